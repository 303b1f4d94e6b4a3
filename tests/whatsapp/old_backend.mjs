// A backend as people have one today: the real Baileys, and one `useMultiFileAuthState` directory an
// account. `node old_backend.mjs URL DIRECTORY`; each line on stdin is JSON and says what to do, each
// line on stdout what happened. It ends when its stdin does.
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import { setTimeout as sleep } from 'node:timers/promises'
import { wa } from './fake/baileys.mjs'

const { DisconnectReason, makeCacheableSignalKeyStore, makeWASocket, useMultiFileAuthState } = wa
const [url, directory] = process.argv.slice(2)
/** For what is still being written when it is told to end. */
const WRITTEN_MS = 500

// libsignal prints session records on the console, and stdout is for our lines.
for (const level of ['log', 'info', 'warn', 'error', 'debug', 'trace']) console[level] = () => {}
const silent = { level: 'silent', child: () => silent }
for (const level of ['trace', 'debug', 'info', 'warn', 'error']) silent[level] = () => {}

const sockets = new Map()
let isEnding = false
const tell = facts => process.stdout.write(`${JSON.stringify(facts)}\n`)

async function open(name) {
	const { state, saveCreds } = await useMultiFileAuthState(join(directory, name))
	const sock = makeWASocket({
		waWebSocketUrl: url,
		logger: silent,
		auth: { creds: state.creds, keys: makeCacheableSignalKeyStore(state.keys, silent) },
		syncFullHistory: false,
		shouldSyncHistoryMessage: () => false
	})
	sockets.set(name, sock)
	sock.ev.on('creds.update', saveCreds)
	sock.ev.on('connection.update', ({ connection, qr, lastDisconnect }) => {
		if (qr) tell({ name, event: 'qr', qr })
		if (connection === 'open') tell({ name, event: 'open' })
		if (connection !== 'close' || isEnding) return
		const code = lastDisconnect?.error?.output?.statusCode
		if (code === DisconnectReason.restartRequired) void open(name)
		else tell({ name, event: 'closed', code })
	})
	sock.ev.on('messages.upsert', ({ messages }) => {
		for (const { key, message } of messages) {
			const text = message?.conversation || message?.extendedTextMessage?.text
			if (!key.fromMe && text) tell({ name, event: 'message', text })
		}
	})
}

const send = (name, to, text) => sockets.get(name).sendMessage(`${to}@s.whatsapp.net`, { text })

process.on('unhandledRejection', () => undefined)
for await (const line of createInterface({ input: process.stdin })) {
	const { name, to, text } = JSON.parse(line)
	if (to) void send(name, to, text)
	else void open(name)
}
isEnding = true
for (const sock of sockets.values()) void sock.end(undefined)
await sleep(WRITTEN_MS)
process.exit(0)
