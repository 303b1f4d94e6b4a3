// Bare, unmodified Baileys clients for the fake's own tests. It prints a port; whoever connects there
// writes JSON lines (what to do) and gets JSON lines (what happened). An account is a name; its
// credentials live as long as the line, also between its logins. Nothing here is clever: it shows
// what Baileys does by itself.
import { createServer } from 'node:net'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { wa } from './fake/baileys.mjs'

const { BufferJSON, Curve, initAuthCreds, makeCacheableSignalKeyStore, makeWASocket } = wa

// libsignal prints session records on the console, and stdout is for our lines.
for (const level of ['log', 'info', 'warn', 'error', 'debug', 'trace']) console[level] = () => {}
const silent = { level: 'silent', child: () => silent }
for (const level of ['trace', 'debug', 'info', 'warn', 'error']) silent[level] = () => {}

const frozen = value => JSON.stringify(value, BufferJSON.replacer)
const thawed = text => JSON.parse(text, BufferJSON.reviver)

/** Values as text, as in a database, and a moment later, as over a pipe. */
function makeKeys(values) {
	return {
		async get(type, ids) {
			await sleep(1)
			const found = ids.map(id => [id, values.get(`${type}-${id}`)])
			return Object.fromEntries(found.map(([id, text]) => [id, text ? thawed(text) : null]))
		},
		async set(data) {
			await sleep(1)
			for (const [type, each] of Object.entries(data)) {
				for (const [id, value] of Object.entries(each)) {
					if (value) values.set(`${type}-${id}`, frozen(value))
					else values.delete(`${type}-${id}`)
				}
			}
		}
	}
}

function open(state, { url, cached = true, qrTimeout, keepAliveMs = 30_000 }, tell) {
	const keys = makeKeys(state.values)
	const sock = makeWASocket({
		waWebSocketUrl: url,
		logger: silent,
		auth: { creds: state.creds, keys: cached ? makeCacheableSignalKeyStore(keys, silent) : keys },
		qrTimeout,
		keepAliveIntervalMs: keepAliveMs,
		// Else receipts that come within 100 ms are merged into the echo of one's own message.
		emitOwnEvents: false,
		markOnlineOnConnect: false,
		syncFullHistory: false,
		shouldSyncHistoryMessage: () => false,
		getMessage: async ({ id }) => state.bodies.get(id)
	})
	state.sock = sock
	sock.ev.on('creds.update', update => Object.assign(state.creds, update))
	sock.ev.on('connection.update', ({ connection, qr, isNewLogin, lastDisconnect }) => {
		if (qr) tell('qr', { qr })
		if (isNewLogin) tell('paired')
		if (connection === 'open') tell('open', { me: state.creds.me })
		if (connection === 'close') {
			const { output, data } = lastDisconnect.error ?? {}
			tell('closed', { code: output?.statusCode ?? 0, attrs: data?.attrs ?? data ?? null })
		}
	})
	sock.ev.on('messages.upsert', ({ type, messages }) => {
		for (const each of messages) tell('message', { type, ...describe(each) })
	})
	sock.ev.on('messages.update', updates => {
		for (const { key, update } of updates) tell('update', { id: key.id, status: update.status })
	})
	sock.ws.on('CB:ack,class:message', ({ attrs }) => tell('ack', attrs))
}

const describe = ({ key, message, messageStubType, messageStubParameters }) => ({
	id: key.id,
	chat: key.remoteJid,
	fromMe: key.fromMe,
	text: message?.conversation || message?.extendedTextMessage?.text || null,
	stub: messageStubType ?? null,
	why: messageStubParameters?.[0] ?? null
})

const commands = {
	open,
	async send({ sock, bodies }, { to, text, id }, tell) {
		bodies.set(id, { extendedTextMessage: { text } })
		await sock.sendMessage(`${to}@s.whatsapp.net`, { text }, { messageId: id })
		tell('sent', { id })
	},
	async code({ sock }, { phone }, tell) {
		tell('code', { code: await sock.requestPairingCode(phone) })
	},
	async known({ sock }, { phone }, tell) {
		const [found] = await sock.onWhatsApp(phone)
		tell('known', { exists: found?.exists ?? false })
	},
	close: ({ sock }) => sock.end(undefined),
	logout: ({ sock }) => sock.logout(),
	/** A second client with the same credentials: what a split brain is. */
	copy({ creds, values }, _, __, other) {
		Object.assign(other, { creds: thawed(frozen(creds)), values: new Map(values) })
	},
	/** As one who knows all but the key that the device connects with. */
	rekey({ creds }) {
		creds.noiseKey = Curve.generateKeyPair()
	},
	/** Back to what was copied: an older state of the keys. */
	becomes(state, _, __, { creds, values }) {
		Object.assign(state, { creds: thawed(frozen(creds)), values: new Map(values) })
	}
}

function serve(line) {
	const accounts = new Map()
	const account = name => {
		if (!accounts.has(name)) {
			accounts.set(name, { creds: initAuthCreds(), values: new Map(), bodies: new Map() })
		}
		return accounts.get(name)
	}
	const write = facts => line.writable && line.write(`${JSON.stringify(facts)}\n`)
	const lines = createInterface({ input: line })
	lines.on('line', async text => {
		const { command, name, as, ...fields } = JSON.parse(text)
		const tell = (event, facts = {}) => write({ name, event, ...facts })
		try {
			await commands[command](account(name), fields, tell, as && account(as))
		} catch (error) {
			tell('failed', { command, error: error.message })
		}
	})
	// Both tell of it: the test has gone while there was something to say.
	lines.on('error', () => line.destroy())
	line.on('error', () => line.destroy())
	line.on('close', () => {
		for (const { sock } of accounts.values()) void sock?.end(undefined)
	})
}

// Baileys leaves promises of a closed connection behind; what matters is told by its events.
process.on('unhandledRejection', () => undefined)
process.stdin.resume().on('end', () => process.exit(0))
const server = createServer(serve)
server.listen(0, '127.0.0.1', () => {
	process.stdout.write(`${JSON.stringify({ port: server.address().port })}\n`)
})
