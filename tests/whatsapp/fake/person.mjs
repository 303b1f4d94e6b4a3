// Somebody with a phone number: a contact who writes and reads, and, with a device linked, an
// account. What the server shall do to the person's messages and logins is kept here too.
import { Device } from './device.mjs'
import { Inbox } from './inbox.mjs'
import { lidOf } from './nodes.mjs'
import { Phone } from './phone.mjs'

export const DEVICES_MAX = 4

/** What is done with acks, or with receipts: `times` of it, then good again. */
export class Policy {
	mode = 'good'

	constructor({ mode = 'good', error, delayMs, deliver = true, times = Infinity } = {}) {
		Object.assign(this, { mode, error, delayMs, deliver, times })
	}

	/** What to do this time. */
	take() {
		if (this.mode === 'good') return this
		const { mode, error, delayMs, deliver } = this
		if (--this.times <= 0) this.mode = 'good'
		return { mode, error, delayMs, deliver }
	}
}

export class Person {
	/** Whether WhatsApp knows the number. */
	exists = true
	/** The number under which WhatsApp knows whoever asks for this one; null: this one. */
	spelledAs = null
	/** 'eager', or 'lazy': only when the inbox is asked for. `null`: as the world's setting says. */
	decrypt = null
	phone = new Phone()
	inbox = new Inbox()
	/** What the person's phone sent: id → {text, to, receipts}. */
	sent = new Map()
	devices = new Map()
	acks = new Policy()
	receipts = new Policy()
	/** How logins end instead of succeeding: {code, expireS, times}, or null. */
	refusal = null
	/** Nothing is answered, and what comes is lost, as on a dead network. */
	silent = false
	/** Answer to a device's question how many one-time keys are left; null: the truth. */
	preKeyCount = null
	/** What the linked devices sent while the wire is held; null: it is not. */
	held = null
	heldAcks = []
	heldReceipts = []
	/** What a lazy phone has not opened yet. */
	unopened = []
	/** How often the phone has asked for a message again, by id. */
	retries = new Map()
	#nextDevice = 1

	constructor(number) {
		this.number = number
		this.lid = lidOf(number)
	}

	get jid() {
		return `${this.number}@s.whatsapp.net`
	}

	get lidJid() {
		return `${this.lid}@lid`
	}

	/** Whether the phone opens what comes at once. */
	isEager(world) {
		return (this.decrypt ?? world.settings.decrypt) === 'eager'
	}

	/** The id for a device that is being linked; none is given twice. */
	takeDeviceId() {
		return this.#nextDevice++
	}

	link(id, keys) {
		const device = new Device(this, id, keys)
		this.devices.set(id, device)
		return device
	}
}
