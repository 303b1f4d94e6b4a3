// A linked device: what WhatsApp keeps of it. Its keys, its connection if it has one, and what is
// on the way to it. The account itself is the person whose phone linked it.
import { node, now, randomId, SERVER } from './nodes.mjs'

/** Stanzas that wait for a device; what is more is dropped, and counted. */
const QUEUE_MAX = 100_000
/** At so few one-time keys the device is asked for more. */
const PRE_KEYS_LOW = 3

export class Device {
	connection = null
	/** Somebody else who has logged in as this device: the control API's foreign client. */
	foreigner = null
	logins = 0
	conflicts = 0
	preKeys = []
	dropped = 0
	#queue = []
	#askedForPreKeys = false

	constructor(person, id, { noiseKey, identity, registrationId, signedPreKey }) {
		Object.assign(this, { person, id, noiseKey, identity, registrationId, signedPreKey })
	}

	get jid() {
		return `${this.person.number}:${this.id}@s.whatsapp.net`
	}

	get lidJid() {
		return `${this.person.lid}:${this.id}@lid`
	}

	get waiting() {
		return this.#queue.length
	}

	/** Send, now or at the next login; kept, and sent again at each login, until acknowledged. */
	enqueue(stanza) {
		if (this.#queue.length >= QUEUE_MAX) {
			this.dropped++
			return
		}
		this.#queue.push(stanza)
		if (this.connection?.ready) this.connection.send(stanza)
	}

	/** Forget the oldest stanza of this kind and id: the device has it. */
	release(tag, id) {
		const index = this.#queue.findIndex(each => each.tag === tag && each.attrs.id === id)
		if (index < 0) return false
		this.#queue.splice(index, 1)
		return true
	}

	/** Send all that waited, as the backlog of a login; from then on stanzas go out at once. */
	sendBacklog() {
		const backlog = this.#queue.slice()
		const count = backlog.length.toString()
		this.connection.send(node('ib', {}, [node('offline_preview', { count })]))
		backlog.forEach(({ tag, attrs, content }, index) => {
			this.connection.send(node(tag, { ...attrs, offline: index.toString() }, content))
		})
		this.connection.send(node('ib', {}, [node('offline', { count })]))
		this.connection.ready = true
		this.connection.world.note('ready', { number: this.person.number, device: this.id })
	}

	addPreKeys(preKeys) {
		this.preKeys.push(...preKeys)
		this.#askedForPreKeys = false
	}

	/** What another party needs to open a session; a one-time key is handed out once. */
	takeBundle() {
		const { registrationId, identity, signedPreKey } = this
		const preKey = this.preKeys.shift()
		if (this.preKeys.length < PRE_KEYS_LOW && !this.#askedForPreKeys) {
			this.#askedForPreKeys = true
			const value = this.preKeys.length.toString()
			this.enqueue(
				node('notification', { from: SERVER, type: 'encrypt', id: randomId(), t: now() }, [
					node('count', { value })
				])
			)
		}
		return { registrationId, identity, signedPreKey, preKey }
	}
}
