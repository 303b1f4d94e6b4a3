// One account's credentials and Signal keys, in memory, and which of them the daemon has not got.
//
// Values are kept as the text that a file of Baileys' `useMultiFileAuthState` would hold, under
// that file's name, and parsed when they are used. Never lives here: when changes are told.
import { BufferJSON, initAuthCreds, jidDecode, makeCacheableSignalKeyStore, proto } from 'baileys'

const CREDS = 'creds'
/** Baileys goes on with these only when they are durable: somebody else relies on them. */
const DURABLE_FIRST = new Set(['pre-key', 'app-state-sync-key', 'app-state-sync-version'])

/** Told with the next other change: a cache of the server's answers, written at each login. */
const TOLD_LATER = new Set(['device-list'])

/** The keys hold no credentials that can be read. Its message holds nothing of them. */
export class KeysUnusable extends Error {}

/**
 * The name of a key's file, as Baileys makes it.
 * @param {string} type
 * @param {string} id
 */
export function keyName(type, id) {
	return `${type}-${id}`.replace(/\//g, '__').replace(/:/g, '-')
}

/**
 * All keys of one account.
 *
 * Between calls: `#texts` is what is true now, and `#changed` names what differs from what
 * `takeChanges` has handed out. `held` keys (a pairing that no phone has confirmed) hand out
 * nothing. While a message is read, what that changes is in `#read` and not handed out: stored
 * without the message, it would make the server's next copy of it unreadable.
 */
export class AccountKeys {
	#texts
	#changed = new Set()
	#changedForLater = new Set()
	#credsText
	/** @type {Set<string> | null} */
	#read = null
	#whenRead = Promise.resolve()
	#setRead = () => {}
	held = false

	/** Called after each change; what it returns is awaited by Baileys when `durableFirst`. */
	onChange = (/** @type {boolean} */ durableFirst) => Promise.resolve(void durableFirst)

	constructor(creds, texts) {
		this.creds = creds
		this.#texts = texts
		this.#credsText = texts.get(CREDS)
		texts.delete(CREDS)
	}

	/** A new identity, for a pairing. */
	static create() {
		const keys = new AccountKeys(initAuthCreds(), new Map())
		keys.held = true
		keys.#changed.add(CREDS)
		return keys
	}

	/**
	 * The keys of a paired account. Throws `KeysUnusable`; never makes a new identity.
	 * @param {Record<string, string>} values
	 */
	static load(values) {
		const creds = parseCreds(values[CREDS])
		return new AccountKeys(creds, new Map(Object.entries(values)))
	}

	/** The account's own phone number. */
	get phone() {
		return jidDecode(this.creds.me?.id)?.user ?? ''
	}

	get hasChanges() {
		return !this.held && this.#changed.size > 0
	}

	/** Hand out what changed since the last time: name to text, or to `null` for what is gone. */
	takeChanges() {
		const changes = {}
		if (this.held) return changes
		for (const name of this.#changedForLater) this.#changed.add(name)
		this.#changedForLater.clear()
		for (const name of this.#changed) {
			if (this.#read?.has(name)) continue
			this.#changed.delete(name)
			if (name === CREDS) changes[CREDS] = this.#credsText = toText(this.creds)
			else changes[name] = this.#texts.get(name) ?? null
		}
		return changes
	}

	get isReading() {
		return this.#read !== null
	}

	/** A message begins to be read. One at a time: Baileys reads under a lock. */
	beginReading() {
		this.#read = new Set()
		this.#whenRead = new Promise(resolve => (this.#setRead = resolve))
	}

	/** It is read, or cannot be: `takeChanges` hands out what it changed. */
	endReading() {
		const read = this.#read ?? new Set()
		for (const name of read) this.#changed.add(name)
		this.#read = null
		this.#setRead()
		if (read.size > 0) void this.onChange(false)
	}

	/** Resolves when no message is being read: what is taken in the same step has every change. */
	async whenRead() {
		while (this.isReading) await this.#whenRead
	}

	/** Baileys says that it has changed `creds`, which it shares with us. Often it has not. */
	credsChanged() {
		if (toText(this.creds) === this.#credsText) return Promise.resolve()
		this.#changed.add(CREDS)
		return this.onChange(true)
	}

	/**
	 * Drop the Signal sessions with these people, on all of their devices, under their phone numbers
	 * and under their LIDs, and those with this account's own other devices, which get a copy.
	 * @param {string[]} phones
	 */
	dropSessionsWith(phones) {
		if (phones.length === 0) return
		const users = new Set([...phones, this.phone, jidDecode(this.creds.me?.lid)?.user ?? ''])
		for (const phone of [...users]) {
			const lid = this.#value(keyName('lid-mapping', phone))
			if (typeof lid === 'string') users.add(lid)
		}
		// "session-<user>.<device>", or "session-<user>_<domain>.<device>"
		this.#drop(name => {
			const address = /^session-([^._]+)(?:_\d+)?\.\d+$/.exec(name)
			return address !== null && users.has(address[1])
		})
	}

	/** Drop every session, one to one and in groups: they may be older than what is on the wire. */
	dropAllSessions() {
		this.#drop(name => name.startsWith('session-') || name.startsWith('sender-key'))
	}

	/**
	 * What Baileys reads and writes its keys through. Parsed values are kept while they are used.
	 * @param {ReturnType<import('./logger.mjs').makeLogger>} logger
	 */
	signalStore(logger) {
		const store = { get: (type, ids) => this.#get(type, ids), set: data => this.#set(data) }
		return makeCacheableSignalKeyStore(store, logger, new RecentValues())
	}

	#drop(isDropped) {
		for (const name of [...this.#texts.keys()]) {
			if (!isDropped(name)) continue
			this.#texts.delete(name)
			this.#changed.add(name)
		}
	}

	/** Nothing here waits: a reader between two steps of a change would see half of it. */
	async #get(type, ids) {
		const values = {}
		for (const id of ids) {
			const value = this.#value(keyName(type, id))
			values[id] =
				type === 'app-state-sync-key' && value
					? proto.Message.AppStateSyncKeyData.fromObject(value)
					: value
		}
		return values
	}

	async #set(data) {
		let durableFirst = false
		for (const [type, values] of Object.entries(data)) {
			for (const [id, value] of Object.entries(values)) {
				// A pre-key that was used up may go late: the server gives each out once.
				const isUrgent = Boolean(value) && DURABLE_FIRST.has(type)
				durableFirst ||= isUrgent
				const name = keyName(type, id)
				// At each login Baileys writes some that are as they were.
				if (!this.#put(name, value ? toText(value) : undefined)) continue
				if (TOLD_LATER.has(type)) this.#changedForLater.add(name)
				else if (isUrgent) this.#changed.add(name)
				else (this.#read ?? this.#changed).add(name)
			}
		}
		const told = this.onChange(durableFirst)
		if (durableFirst) await told
	}

	/** Whether it was something else before. */
	#put(name, text) {
		if (this.#texts.get(name) === text) return false
		if (text === undefined) this.#texts.delete(name)
		else this.#texts.set(name, text)
		return true
	}

	#value(name) {
		const text = this.#texts.get(name)
		if (text === undefined) return null
		try {
			return fromText(text)
		} catch {
			// As Baileys' own store answers for a broken file. Everything but credentials can be
			// made or asked for again.
			return null
		}
	}
}

const RECENT_VALUES_MAX = 250
const RECENT_VALUES_KEPT_MS = 5 * 60 * 1000

/** @type {Set<WeakRef<RecentValues>>} */
const recent = new Set()

setInterval(() => {
	for (const each of recent) {
		const values = each.deref()
		if (values) values.age()
		else recent.delete(each)
	}
}, RECENT_VALUES_KEPT_MS).unref()

/**
 * Parsed values that were used lately: two generations, of which the older one goes.
 *
 * It exists so that an idle account is in memory once, as text, and one timer serves all accounts
 * (Baileys' default cache has a timer of its own for each).
 */
export class RecentValues {
	#young = new Map()
	#old = new Map()

	constructor() {
		recent.add(new WeakRef(this))
	}

	get size() {
		return this.#young.size + this.#old.size
	}

	get(key) {
		let value = this.#young.get(key)
		if (value === undefined) {
			value = this.#old.get(key)
			if (value !== undefined) this.set(key, value)
		}
		return value
	}

	set(key, value) {
		this.#old.delete(key)
		this.#young.set(key, value)
		if (this.#young.size >= RECENT_VALUES_MAX) this.age()
	}

	age() {
		this.#old = this.#young
		this.#young = new Map()
	}

	flushAll() {
		this.#old = new Map()
		this.#young = new Map()
	}
}

function parseCreds(text) {
	let creds
	try {
		creds = fromText(text)
	} catch {
		throw new KeysUnusable('the credentials are missing or cut short')
	}
	const pairs = [creds?.noiseKey, creds?.signedIdentityKey, creds?.signedPreKey?.keyPair]
	const whole = pairs.every(pair => pair?.private?.length === 32 && pair?.public?.length === 32)
	if (!whole || typeof creds.registrationId !== 'number') {
		throw new KeysUnusable('the credentials lack some of their keys')
	}
	if (!jidDecode(creds.me?.id)?.user || !creds.account) {
		throw new KeysUnusable('the credentials are of no paired account')
	}
	return creds
}

function toText(value) {
	return JSON.stringify(value, BufferJSON.replacer)
}

function fromText(text) {
	return JSON.parse(text, BufferJSON.reviver)
}
