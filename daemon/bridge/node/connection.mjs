// One account's socket, from `open` to `closed`.
//
// Lives here: when keys are told, and in which order with everything else. What Baileys' events and
// stanzas mean is in inbound.mjs, sends.mjs and closing.mjs.
import { setTimeout as sleep } from 'node:timers/promises'
import { DEFAULT_CONNECTION_CONFIG, makeWASocket } from 'baileys'
import { endSocket, endsInTime, holdInput, holdOutput, readClose } from './closing.mjs'
import { log } from './console.mjs'
import { CallFailed } from './errors.mjs'
import { keepBeforeReceipt, Stanzas } from './inbound.mjs'
import { makeLogger } from './logger.mjs'
import { describeError } from './redact.mjs'
import { isOtherSpelling, readReceipt, Unacknowledged } from './sends.mjs'

/** Changes that nothing else carries are told after this long, several at once. */
const TELL_AFTER_MS = 100
const BODY_MS = 10_000
const SETTLE_MS = 1_000
const SETTLE_TURN_MS = 10
const SERVICE_UNAVAILABLE = 503
const never = new Promise(() => {})

/**
 * @typedef {object} Daemon what a connection needs of the line
 * @property {(event: string, fields: object) => void} tell
 * @property {(ask: string, fields: object) => Promise<any>} ask
 * @property {(connection: Connection) => void} forget
 */

/**
 * Between calls: what `keys` has handed out is on the line, in the order of the changes. Nothing is
 * told after `closed`, nor after `close` has returned.
 */
export class Connection {
	#daemon
	#options
	#keys
	#logger
	#socket = null
	#stanzas = new Stanzas()
	#unacknowledged = new Unacknowledged()
	#storing = new Set()
	/** Settles when the message that was sent last is on the wire, or will not be. */
	#written = Promise.resolve()
	/** What to call for those who wait for Baileys when the connection ends. */
	#waiting = new Set()
	#tellTimer = null
	#qrCount = 0
	#pairingEndsAt = 0
	/** Why it ends, once it does. */
	#ending = null
	#isRefused = false
	#isOver = false
	#isClosing = false
	#closeAsked = promise()
	#closed = promise()

	/**
	 * @param {number} number
	 * @param {string} account
	 * @param {import('./keys.mjs').AccountKeys} keys
	 * @param {import('./options.mjs').Options} options
	 * @param {Daemon} daemon
	 */
	constructor(number, account, keys, options, daemon) {
		this.number = number
		this.account = account
		this.#keys = keys
		this.#options = options
		this.#daemon = daemon
		this.#logger = makeLogger(options.logLevel, account)
		keys.onChange = durableFirst => this.#keysChanged(durableFirst)
	}

	/** Begin to connect. What comes of it is told by events. */
	open() {
		const keep = mail => this.#keep(mail)
		const socket = makeWASocket({
			...this.#options.socket,
			logger: this.#logger,
			auth: { creds: this.#keys.creds, keys: this.#keys.signalStore(this.#logger) },
			getMessage: key => this.#body(key),
			makeSignalRepository: keepBeforeReceipt(
				DEFAULT_CONNECTION_CONFIG.makeSignalRepository,
				this.#stanzas,
				this.#keys,
				keep
			)
		})
		this.#socket = socket
		endsInTime(socket.ws)
		socket.ev.on('connection.update', update => this.#connectionUpdated(update))
		socket.ev.on('creds.update', () => this.#keys.credsChanged().catch(() => {}))
		// Ours must know a stanza before Baileys reads it.
		socket.ws.prependListener('CB:message', node => this.#stanzas.note(node))
		socket.ws.on('CB:ack,class:message', ({ attrs }) => this.#acknowledged(attrs))
		socket.ws.on('CB:receipt', node => this.#receiptCame(node))
		socket.ws.on('CB:iq,type:set,pair-device', node => this.#pairingBegan(node))
		this.#tellKeys().catch(() => {})
	}

	// --- calls ----------------------------------------------------------------------------------

	/**
	 * Send a text, and `reply` with the keys that changed when the server has acknowledged it. The
	 * next goes out beside the ack, and never overtakes this one.
	 * @param {string} messageId
	 * @param {string} to
	 * @param {string} text
	 * @param {(ok: object) => void} reply
	 * @param {number} deadlineMs
	 */
	async send(messageId, to, text, reply, deadlineMs) {
		this.#checkOpen()
		if (this.#unacknowledged.has(messageId)) {
			throw new CallFailed('failed', 'a message of this id is on its way')
		}
		const acknowledged = this.#unacknowledged.expect(messageId)
		const late = setTimeout(() => {
			const error = new CallFailed(
				'failed',
				`the server did not acknowledge it in ${deadlineMs} ms`
			)
			this.#unacknowledged.giveUp(messageId, error)
		}, deadlineMs)
		try {
			const sent = this.#written.then(() => {
				this.#checkOpen()
				return this.#socket.sendMessage(
					`${to}@s.whatsapp.net`,
					{ text, linkPreview: null },
					{ messageId }
				)
			})
			this.#written = sent.catch(() => {})
			sent.catch(error => this.#unacknowledged.giveUp(messageId, this.#asCallFailed(error)))
			await acknowledged
			// Baileys writes the keys after the stanza: the ack may come in between.
			await this.#unlessClosed(sent)
			await this.#keys.whenRead()
			this.#checkOpen()
			reply({ keys: this.#keys.takeChanges() })
		} finally {
			clearTimeout(late)
			if (this.#keys.hasChanges) this.#tellSoon()
		}
	}

	/** @param {string} phone */
	async isOnWhatsApp(phone) {
		this.#checkOpen()
		const found = await this.#unlessClosed(this.#socket.onWhatsApp(`${phone}@s.whatsapp.net`))
		if (!found) throw new CallFailed('failed', 'the server did not say whether the number exists')
		const [known] = found.filter(each => each.exists)
		if (!known || !isOtherSpelling(known.jid, phone)) return Boolean(known)
		log('warning', `${this.account}: a number is on WhatsApp, but spelled otherwise there`)
		return false
	}

	/** @param {string} phone */
	async requestPairingCode(phone) {
		this.#checkOpen()
		if (this.#pairingEndsAt === 0) throw new CallFailed('failed', 'no pairing is under way')
		const code = await this.#unlessClosed(this.#socket.requestPairingCode(phone))
		return { code, expiresAt: this.#pairingEndsAt / 1000 }
	}

	/** Unlink the device; `closed` with 401 follows. */
	async logOut() {
		this.#checkOpen()
		await this.#unlessClosed(this.#socket.logout())
	}

	/** End the socket in good order, and tell the last changes. Tells no `closed`. */
	async close() {
		this.#isClosing = true
		await this.#settle()
		this.#closeAsked.resolve()
		this.#end(428, 'closed by the daemon')
		await this.#closed.promise
	}

	/**
	 * Hear nothing new, and let what is being read be kept and receipted: what the server has no
	 * receipt for it sends again, under keys that are used up by then. For up to `SETTLE_MS`.
	 */
	async #settle() {
		if (this.#ending) return
		holdInput(this.#socket.ws)
		const until = Date.now() + SETTLE_MS
		do {
			const kept = Promise.all([this.#keys.whenRead(), Promise.allSettled(this.#storing)])
			await Promise.race([kept, this.#closed.promise, sleep(until - Date.now())])
			// A message that waits for its turn to be read begins in one of these moments.
			await sleep(SETTLE_TURN_MS)
		} while ((this.#storing.size > 0 || this.#keys.isReading) && Date.now() < until)
	}

	// --- keys -----------------------------------------------------------------------------------

	/** @param {boolean} durableFirst */
	#keysChanged(durableFirst) {
		if (durableFirst) return this.#tellKeys()
		this.#tellSoon()
		return Promise.resolve()
	}

	#tellSoon() {
		if (this.#ending) return
		this.#tellTimer ??= setTimeout(() => {
			this.#tellTimer = null
			// The reply to a send, or the message that is being read, carries them.
			if (this.#unacknowledged.size > 0 || this.#keys.isReading) return
			this.#tellKeys().catch(() => {})
		}, TELL_AFTER_MS)
	}

	/** Tell what changed, and wait until everything told so far is durable. */
	async #tellKeys() {
		if (this.#keys.hasChanges) {
			const values = this.#keys.takeChanges()
			if (Object.keys(values).length > 0) this.#store('keys', { values })
		}
		await Promise.all(this.#storing)
	}

	/**
	 * Ask the daemon to store something. Refused: the connection ends, for what is in memory here is
	 * then ahead of what the next holder will know.
	 */
	#store(ask, fields) {
		const connection = this.number
		const stored = this.#ask(ask, { connection, ...fields }).catch(error => {
			this.#isRefused = true
			this.#end(SERVICE_UNAVAILABLE, `a change was not stored: ${error.message}`)
			throw error
		})
		// Whoever waits for it hears of the error; nobody has to.
		stored.catch(() => {})
		this.#storing.add(stored)
		const done = () => this.#storing.delete(stored)
		stored.then(done, done)
		return stored
	}

	async #ask(ask, fields) {
		if (this.#isOver) throw new CallFailed('closed', 'the connection is over')
		return this.#daemon.ask(ask, fields)
	}

	// --- what Baileys says ----------------------------------------------------------------------

	#connectionUpdated({ connection, qr, isNewLogin, lastDisconnect }) {
		if (qr) this.#qrShown(qr)
		if (isNewLogin) this.#paired()
		if (connection === 'open') this.#tell('connected', { phone: this.#keys.phone })
		if (connection === 'close') this.#socketClosed(lastDisconnect?.error)
	}

	/** @param {import('baileys').BinaryNode} node */
	#pairingBegan(node) {
		const refs = node.content?.[0]?.content?.length ?? 1
		const { qrFirstMs, qrNextMs } = this.#options
		this.#pairingEndsAt = Date.now() + qrFirstMs + qrNextMs * (refs - 1)
	}

	/** @param {string} qr */
	#qrShown(qr) {
		const { qrFirstMs, qrNextMs } = this.#options
		const validMs = this.#qrCount++ === 0 ? qrFirstMs : qrNextMs
		this.#tell('qr', { qr, expiresAt: (Date.now() + validMs) / 1000 })
	}

	/**
	 * A phone has confirmed the new identity. The server hears our answer, which completes the
	 * pairing, when the identity is stored: else there would be a device that nobody has the keys of.
	 */
	#paired() {
		this.#pairingEndsAt = 0
		this.#keys.held = false
		this.#tell('scanned', {})
		holdOutput(this.#socket.ws, this.#tellKeys())
	}

	/**
	 * Takes what reading changed before it first waits.
	 * @param {import('./inbound.mjs').Mail[]} mail what a stanza held, now that it is read
	 */
	async #keep(mail) {
		try {
			for (const message of mail)
				this.#store('received', { message, values: this.#keys.takeChanges() })
			await this.#tellKeys()
		} catch (error) {
			log('info', `${this.account}: a message waits for the next login (${describeError(error)})`)
			// Baileys would take an error for a message that nobody can read.
			await never
		}
	}

	/** @param {Record<string, string>} attrs */
	#acknowledged(attrs) {
		const refused = this.#unacknowledged.acknowledge(attrs)
		if (!refused) return
		const { messageId, code } = refused
		this.#tell('receipt', { messageId, state: 'failed', error: `refused_${code}` })
	}

	/** @param {import('baileys').BinaryNode} node */
	#receiptCame(node) {
		const { me } = this.#keys.creds
		if (!me) return
		for (const progress of readReceipt(node, me)) this.#tell('receipt', progress)
	}

	/** The text of a message that its recipient asks for again. */
	async #body({ id: messageId }) {
		const asked = this.#ask('body', { connection: this.number, messageId })
		asked.catch(() => {})
		let timer
		const late = new Promise(resolve => (timer = setTimeout(resolve, BODY_MS)))
		try {
			const { text } = (await Promise.race([asked, late])) ?? {}
			return typeof text === 'string' ? { extendedTextMessage: { text } } : undefined
		} catch {
			return undefined
		} finally {
			clearTimeout(timer)
		}
	}

	// --- the end --------------------------------------------------------------------------------

	/**
	 * @param {number} code
	 * @param {string} message
	 */
	#end(code, message) {
		this.#ending ??= { code, message }
		endSocket(this.#socket)
	}

	/** @param {Error | undefined} error */
	#socketClosed(error) {
		this.#ending ??= readClose(error)
		const { code, message } = this.#ending
		this.#unacknowledged.failAll(new CallFailed('closed', message, { code }))
		for (const fail of this.#waiting) fail()
		// Baileys writes its last keys in reaction to the same event.
		setImmediate(() => void this.#finish())
	}

	/** Tell the last changes, wait until all are durable, and be over. */
	async #finish() {
		clearTimeout(this.#tellTimer)
		const told = this.#isRefused ? [...this.#storing] : [this.#tellKeys()]
		await Promise.race([Promise.allSettled(told), this.#closeAsked.promise])
		this.#isOver = true
		this.#daemon.forget(this)
		if (!this.#isClosing) {
			this.#daemon.tell('closed', { connection: this.number, ...this.#ending })
		}
		this.#closed.resolve()
	}

	#tell(event, fields) {
		if (this.#ending || this.#isOver) return
		this.#daemon.tell(event, { connection: this.number, ...fields })
	}

	#checkOpen() {
		if (!this.#ending) return
		const { code, message } = this.#ending
		throw new CallFailed('closed', message, { code })
	}

	/** Wait for Baileys; when the connection ends meanwhile, that is the answer. */
	#unlessClosed(answer) {
		return new Promise((resolve, reject) => {
			const fail = error => reject(this.#asCallFailed(error))
			this.#waiting.add(fail)
			const done = () => this.#waiting.delete(fail)
			answer.then(resolve, fail).then(done, done)
		})
	}

	#asCallFailed(error) {
		if (!this.#ending) return new CallFailed('failed', describeError(error))
		const { code, message } = this.#ending
		return new CallFailed('closed', message, { code })
	}
}

/** A promise, and the function that resolves it. */
function promise() {
	let resolve
	const promise = new Promise(settle => (resolve = settle))
	return { promise, resolve }
}
