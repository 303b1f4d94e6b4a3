// Bare, unmodified Baileys with its own file store, as most backends use it: what a directory of theirs
// holds, and what our figures are compared to.
//
//   node file_clients.mjs DIR URL    accounts are the directories DIR/NAME; commands are JSON lines on
//                                    stdin, what happened is JSON lines on stdout; it ends with stdin
import { randomBytes } from 'node:crypto'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { wa } from './fake/baileys.mjs'

const { makeWASocket, useMultiFileAuthState } = wa

// libsignal prints session records on the console, and stdout is for our lines.
for (const level of ['log', 'info', 'warn', 'error', 'debug', 'trace']) console[level] = () => {}
const silent = { level: 'silent', child: () => silent }
for (const level of ['trace', 'debug', 'info', 'warn', 'error']) silent[level] = () => {}

/** After a socket has ended Baileys writes its last files. */
const WRITE_MS = 300
const [directory, url] = process.argv.slice(2)
const tell = (event, facts = {}) => process.stdout.write(`${JSON.stringify({ event, ...facts })}\n`)

class Account {
	#acks = new Map()

	constructor(name) {
		this.name = name
	}

	/** Connect until it is open; a QR code that it needs is told, and so is its end. */
	async open() {
		const { state, saveCreds } = await useMultiFileAuthState(join(directory, this.name))
		await new Promise((resolve, reject) => {
			const socket = makeWASocket({
				waWebSocketUrl: url,
				logger: silent,
				auth: state,
				emitOwnEvents: false,
				markOnlineOnConnect: false,
				syncFullHistory: false,
				shouldSyncHistoryMessage: () => false,
				generateHighQualityLinkPreview: false
			})
			this.socket = socket
			let isNew = false
			let isSaved = Promise.resolve()
			socket.ev.on('creds.update', () => (isSaved = saveCreds()))
			socket.ws.on('CB:ack,class:message', ({ attrs }) => this.#acks.get(attrs.id)?.(attrs.error))
			socket.ev.on('messages.upsert', ({ messages }) => this.#heard(messages))
			socket.ev.on('connection.update', ({ connection, qr, isNewLogin, lastDisconnect }) => {
				if (qr) tell('qr', { name: this.name, qr })
				if (isNewLogin) isNew = true
				if (connection === 'open') resolve()
				if (connection !== 'close') return
				// A new device is sent away once, to log in with what it has.
				if (isNew) isSaved.then(() => this.open()).then(resolve, reject)
				else reject(new Error(`${this.name} was closed: ${lastDisconnect?.error?.message}`))
			})
		})
	}

	#heard(messages) {
		for (const { key, message } of messages) {
			const text = message?.conversation || message?.extendedTextMessage?.text
			if (!key.fromMe && text) tell('heard', { name: this.name, text })
		}
	}

	/** Send a text; resolves when the server has acknowledged it. */
	async send(to, text) {
		const messageId = `3EB0${randomBytes(9).toString('hex').toUpperCase()}`
		const acknowledged = new Promise((resolve, reject) =>
			this.#acks.set(messageId, error => (error ? reject(new Error(error)) : resolve()))
		)
		await this.socket.sendMessage(`${to}@s.whatsapp.net`, { text, linkPreview: null }, { messageId })
		await acknowledged
		this.#acks.delete(messageId)
	}
}

const accounts = new Map()
const account = name => accounts.get(name) ?? accounts.set(name, new Account(name)).get(name)

/** Do `work` for each, so many at a time. */
async function inWaves(names, atOnce, work) {
	const waiting = [...names]
	const worker = async () => {
		while (waiting.length > 0) await work(waiting.shift())
	}
	await Promise.all(Array.from({ length: atOnce }, worker))
}

const commands = {
	/** Link a new device for each name, in `atOnce` at a time; ends each connection. */
	async pair({ names, atOnce }) {
		await inWaves(names, atOnce, async name => {
			await account(name).open()
			tell('paired', { name })
			await sleep(WRITE_MS)
			void account(name).socket.end(undefined)
			accounts.delete(name)
		})
		await sleep(WRITE_MS)
		tell('done')
	},
	async open({ names, atOnce }) {
		const began = performance.now()
		const tookS = []
		await inWaves(names, atOnce, async name => {
			await account(name).open()
			tookS.push((performance.now() - began) / 1000)
		})
		tell('done', { tookS })
	},
	async say({ name, to, text }) {
		await account(name).send(to, text)
		tell('done')
	},
	/** End every connection; what Baileys still had to write is written. */
	async close() {
		for (const { socket } of accounts.values()) void socket.end(undefined)
		accounts.clear()
		await sleep(WRITE_MS)
		tell('done')
	},
	/** `callers` that send and wait for the ack, for `seconds`; each through the next of `names`. */
	async send({ names, callers, seconds, to }) {
		const began = performance.now()
		const tookS = []
		const keepSending = async caller => {
			for (let number = 0; performance.now() - began < seconds * 1000; number++) {
				const askedAt = performance.now()
				await account(names[caller % names.length]).send(to, `message ${number}`)
				tookS.push((performance.now() - askedAt) / 1000)
			}
		}
		await Promise.all(Array.from({ length: callers }, (_, caller) => keepSending(caller)))
		tell('done', { tookS, seconds: (performance.now() - began) / 1000 })
	}
}

// Baileys leaves promises of a closed connection behind; what matters is told by its events.
process.on('unhandledRejection', () => undefined)
const lines = createInterface({ input: process.stdin })
lines.on('line', async line => {
	const { command, ...fields } = JSON.parse(line)
	try {
		await commands[command](fields)
	} catch (error) {
		tell('failed', { command, error: error.message })
	}
})
lines.on('close', () => process.exit(0))
tell('ready')
