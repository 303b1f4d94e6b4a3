// Everything there is: the people, the connections, the settings, and the log of what happened.
import { Person } from './person.mjs'
import { addressOf } from './nodes.mjs'
import { makeServerIdentity } from './noise.mjs'

const PEOPLE_MAX = 100_000
const LOG_MAX = 20_000

const SETTINGS = {
	/** Whether phones open what they get at once, or only when the inbox is asked for. */
	decrypt: 'eager',
	/** 'few': a new device uploads 5 one-time keys, and more when they run out. 'real': 812. */
	preKeys: 'few',
	/** Whether numbers have LIDs. Without, a known session is used again however old it is. */
	lids: true,
	/** How long each QR code may be scanned; null: 60 s the first one, each later one 20 s more. */
	qrTtlMs: null,
	/** Before each frame to a client. */
	latencyMs: 0,
	/** 'none', or new connections are refused: 'reset' by TCP, '503' by HTTP. */
	outage: 'none'
}

export class World {
	serverIdentity = makeServerIdentity()
	connections = new Set()
	#people = new Map()
	#log = []
	#counts = {}
	#happened = 0
	#waiting = new Set()
	settings = { ...SETTINGS }

	/** The person with this number; whoever is asked for exists from then on. */
	person(number) {
		const known = this.#people.get(number)
		if (known) return known
		if (this.#people.size >= PEOPLE_MAX) throw new Error(`more than ${PEOPLE_MAX} people`)
		const person = new Person(number)
		this.#people.set(number, person)
		return person
	}

	/** The person and the device id that an address means, or undefined. */
	find(jid) {
		const address = addressOf(jid)
		return address && { person: this.person(address.number), device: address.device }
	}

	get accounts() {
		return [...this.#people.values()].filter(person => person.devices.size > 0)
	}

	/** Write down that something happened, count it, and wake who waits for it. Never a text. */
	note(event, facts = {}) {
		this.#happened++
		this.#counts[event] = (this.#counts[event] ?? 0) + 1
		this.#log.push({ at: Date.now() / 1000, event, ...facts })
		if (this.#log.length > LOG_MAX) this.#log.splice(0, LOG_MAX / 2)
		for (const wake of this.#waiting) wake()
	}

	get counts() {
		return { ...this.#counts }
	}

	get log() {
		return this.#log
	}

	/** Wait until `holds()` gives something true, at most so long; what it gave last. */
	async waitUntil(holds, seconds) {
		const giveUpAt = Date.now() + seconds * 1000
		for (;;) {
			const before = this.#happened
			const found = await holds()
			const left = giveUpAt - Date.now()
			if (found || left <= 0) return found
			// What happened while it was looked at may have been what is waited for.
			if (this.#happened === before) await this.#nextEvent(left)
		}
	}

	#nextEvent(withinMs) {
		return new Promise(resolve => {
			const wake = () => {
				clearTimeout(timer)
				this.#waiting.delete(wake)
				resolve()
			}
			const timer = setTimeout(wake, withinMs)
			this.#waiting.add(wake)
		})
	}

	/** As at the start: nobody, nothing. Connections are cut. */
	reset() {
		for (const connection of this.connections) connection.cut()
		this.#people.clear()
		this.#log = []
		this.#counts = {}
		this.settings = { ...SETTINGS }
	}
}
