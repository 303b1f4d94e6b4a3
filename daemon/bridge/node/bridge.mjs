// Answers the daemon's calls: which connections there are, and what is asked and told on the line.
//
// Never lives here: what a connection does (connection.mjs).
import { createRequire } from 'node:module'
import './attempts.mjs'
import { AskRefused, CallFailed } from './errors.mjs'
import { check, Invalid } from './checks.mjs'
import { Connection } from './connection.mjs'
import { log, sendLogsTo } from './console.mjs'
import { AccountKeys, KeysUnusable } from './keys.mjs'
import { Line, LineBroken } from './line.mjs'
import { LOG_LEVELS, readOptions } from './options.mjs'
import { describeError } from './redact.mjs'
import { watchSilence } from './silence.mjs'

const LINE_FD = 3
/** Far above what the daemon gives one process; beyond it `open` is refused. */
const CONNECTIONS_MAX = 1_000
/** Answers that nobody gave in this time end their connection: the store is away. */
const ASK_MS = 60_000

/** The fields of each call, beside `v`, `call`, `id` and `deadlineMs`. */
const CALLS = {
	hello: { options: 'object' },
	open: {
		connection: 'count',
		account: 'text',
		keys: 'valuesOrNull',
		doubtful: 'phones',
		distrustSessions: 'flag'
	},
	send: { connection: 'count', messageId: 'text', to: 'phone', text: 'text' },
	onWhatsApp: { connection: 'count', to: 'phone' },
	pairingCode: { connection: 'count', phone: 'phone' },
	logout: { connection: 'count' },
	close: { connection: 'count' },
	ping: {}
}

/** Begin to serve the line, and exit with it. */
export function serve() {
	// TLS is all that says whom we speak to (docs/bridge.md); nobody may turn it off from outside.
	delete process.env.NODE_TLS_REJECT_UNAUTHORIZED
	// A terminal and a supervisor signal the whole process group; we end with the line.
	for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => {})
	const bridge = new Bridge(new Line(LINE_FD))
	process.on('unhandledRejection', error => log('warning', `unhandled: ${describeError(error)}`))
	process.on('uncaughtException', error => bridge.end(error))
	bridge.run()
}

/**
 * Everything that this process does for the daemon.
 *
 * Between calls: `#connections` are those that the daemon may mention; `#asked` are the asks
 * without an answer.
 */
class Bridge {
	#line
	#options = null
	/** @type {Map<number, Connection>} */
	#connections = new Map()
	#asked = new Map()
	#asksMade = 0
	#heard = () => {}

	/** @param {Line} line */
	constructor(line) {
		this.#line = line
	}

	run() {
		sendLogsTo((level, message) => {
			const least = this.#options?.logLevel ?? 'info'
			if (LOG_LEVELS.indexOf(level) >= LOG_LEVELS.indexOf(least))
				this.#line.writeLog(level, message)
		})
		this.#line.read(
			frame => this.#handle(frame),
			error => this.end(error)
		)
	}

	/**
	 * End the process at once: the daemon is gone, or one of us is wrong about what we speak.
	 * @param {Error} [error]
	 */
	end(error) {
		if (!error) process.exit(0)
		// The daemon may still read why. Nothing else happens meanwhile: it kills us at the latest.
		try {
			this.#line.writeLog('error', `the bridge ends: ${describeError(error)}`)
		} finally {
			setImmediate(() => process.exit(1))
		}
	}

	// --- what connections need of the daemon ----------------------------------------------------

	/**
	 * Tell an event.
	 * @param {string} event
	 * @param {object} fields
	 */
	tell(event, fields) {
		this.#line.write({ event, ...fields })
	}

	/**
	 * Ask, and wait for the answer. The frame is written before this returns.
	 * Rejects with `AskRefused` when the daemon answers with an error, or not in time.
	 * @param {string} ask
	 * @param {object} fields
	 * @returns {Promise<object>}
	 */
	ask(ask, fields) {
		const id = ++this.#asksMade
		this.#line.write({ ask, id, ...fields })
		return new Promise((resolve, reject) => {
			const late = () => {
				this.#asked.delete(id)
				reject(new AskRefused(`no answer in ${ASK_MS / 1000} s`))
			}
			this.#asked.set(id, { resolve, reject, timer: setTimeout(late, ASK_MS) })
		})
	}

	/**
	 * A connection is over: the daemon may use its number no more, nor we.
	 * @param {Connection} connection
	 */
	forget(connection) {
		this.#connections.delete(connection.number)
	}

	// --- frames ---------------------------------------------------------------------------------

	#handle(frame) {
		this.#heard()
		if (Object.hasOwn(frame, 'answer')) this.#answered(frame)
		else this.#called(frame).catch(error => this.end(error))
	}

	#answered({ v: _, answer, ok, error, ...rest }) {
		const whole = (ok === undefined) !== (error === undefined) && Object.keys(rest).length === 0
		if (!whole || answer === 0 || answer > this.#asksMade) {
			throw new LineBroken('an answer makes no sense')
		}
		const asked = this.#asked.get(answer)
		// Its connection may have ended, or its time have passed: then nobody waits.
		if (!asked) return
		this.#asked.delete(answer)
		clearTimeout(asked.timer)
		if (ok !== undefined) asked.resolve(ok)
		else asked.reject(new AskRefused(String(error?.kind ?? 'failed')))
	}

	async #called({ v: _, id, call, deadlineMs, ...fields }) {
		// A reply is written in the step that decides it: what it carries must not be overtaken.
		const reply = ok => this.#line.write({ reply: id, ok })
		try {
			if (!Object.hasOwn(CALLS, call)) throw new Invalid('a call is not known')
			check({ deadlineMs }, { deadlineMs: 'milliseconds' }, call)
			check(fields, CALLS[call], call)
			if ((call === 'hello') === (this.#options !== null)) {
				throw new Invalid('hello is the first call, and no other')
			}
			await this[`_${call}`](fields, reply, deadlineMs)
		} catch (error) {
			this.#line.write({ reply: id, error: asError(error) })
		}
	}

	_hello({ options }, reply) {
		this.#options = readOptions(options)
		const { silentMs } = this.#options
		if (silentMs) {
			this.#heard = watchSilence(silentMs, () =>
				this.end(new Error(`the daemon has said nothing for ${silentMs} ms`))
			)
		}
		reply({ node: process.versions.node, baileys: baileysVersion(), pid: process.pid })
	}

	_open({ connection: number, account, keys: values, doubtful, distrustSessions }, reply) {
		if (this.#connections.has(number)) throw new Invalid('open: the connection exists')
		if (this.#connections.size >= CONNECTIONS_MAX) {
			throw new CallFailed('failed', `this process has ${CONNECTIONS_MAX} connections already`)
		}
		const keys = values === null ? AccountKeys.create() : AccountKeys.load(values)
		keys.dropSessionsWith(doubtful)
		if (distrustSessions) keys.dropAllSessions()
		const connection = new Connection(number, account, keys, this.#options, this)
		connection.open()
		this.#connections.set(number, connection)
		reply({})
	}

	_send({ connection, messageId, to, text }, reply, deadlineMs) {
		return this.#connection(connection).send(messageId, to, text, reply, deadlineMs)
	}

	async _onWhatsApp({ connection, to }, reply) {
		reply({ exists: await this.#connection(connection).isOnWhatsApp(to) })
	}

	async _pairingCode({ connection, phone }, reply) {
		reply(await this.#connection(connection).requestPairingCode(phone))
	}

	async _logout({ connection }, reply) {
		await this.#connection(connection).logOut()
		reply({})
	}

	async _close({ connection: number }, reply) {
		// It may have closed by itself a moment ago.
		await this.#connections.get(number)?.close()
		reply({})
	}

	_ping(_, reply) {
		const { user, system } = process.cpuUsage()
		reply({
			rssBytes: process.memoryUsage.rss(),
			cpuS: (user + system) / 1e6,
			connections: this.#connections.size
		})
	}

	/** @param {number} number */
	#connection(number) {
		const connection = this.#connections.get(number)
		if (!connection) throw new CallFailed('closed', 'the connection is over', { code: 428 })
		return connection
	}
}

/** @param {unknown} error */
function asError(error) {
	if (error instanceof CallFailed) return error.fields
	if (error instanceof KeysUnusable) return { kind: 'unusable', message: error.message }
	if (error instanceof Invalid) return { kind: 'invalid', message: error.message }
	if (error instanceof LineBroken) throw error
	return { kind: 'failed', message: describeError(error) }
}

function baileysVersion() {
	const require = createRequire(import.meta.url)
	return require('baileys/package.json').version
}
