// The fake WhatsApp server: `node main.mjs [--port N] [--control-port N]`. When it is ready it prints
// one line of JSON on stdout with its two ports. It ends when its stdin does, or by a signal.

// libsignal prints session records, keys included: before anything loads it, nobody prints.
for (const level of ['log', 'info', 'warn', 'error', 'debug', 'trace']) console[level] = () => {}

const { createServer } = await import('node:http')
const { parseArgs } = await import('node:util')
const { WebSocketServer } = await import('./baileys.mjs')
const { Connection } = await import('./connection.mjs')
const { makeControlServer } = await import('./control.mjs')
const { login } = await import('./login.mjs')
const { receiveAck, receiveMessage, receiveReceipt } = await import('./messages.mjs')
const { FRAME_BYTES_MAX } = await import('./noise.mjs')
const { answer } = await import('./queries.mjs')
const { beginRegistration, receiveRegistration } = await import('./registration.mjs')
const { World } = await import('./world.mjs')

const HOST = '127.0.0.1'
const CONNECTIONS_MAX = 5000

const receivers = {
	begin(connection, staticKey, payload) {
		if (payload.devicePairingData) beginRegistration(connection, staticKey, payload)
		else login(connection, staticKey, payload)
	},
	receive(connection, received) {
		const { tag, attrs } = received
		if (tag === 'iq' && attrs.type === 'result' && connection.registration) {
			receiveRegistration(connection, received)
		} else if (tag === 'iq') answer(connection, received)
		else if (!connection.device) return
		else if (tag === 'message') receiveMessage(connection, received)
		else if (tag === 'receipt') receiveReceipt(connection, received)
		else if (tag === 'ack') receiveAck(connection, received)
		// Presence, telemetry and the like need no answer.
	}
}

function serveClients(world) {
	const http = createServer((_, response) => response.writeHead(426).end())
	const sockets = new WebSocketServer({
		server: http,
		perMessageDeflate: false,
		maxPayload: FRAME_BYTES_MAX,
		verifyClient: (_, decide) => {
			const full = world.connections.size >= CONNECTIONS_MAX
			decide(world.settings.outage !== '503' && !full, 503)
		}
	})
	http.on('connection', socket => {
		if (world.settings.outage === 'reset') socket.resetAndDestroy()
	})
	sockets.on('connection', socket => {
		world.connections.add(new Connection(socket, world, receivers))
		world.note('connected')
	})
	return http
}

const listen = (server, port) =>
	new Promise((resolve, reject) => {
		server.on('error', reject)
		server.listen(port, HOST, () => resolve(server.address().port))
	})

// One stanza that goes wrong does not end the others' tests; its own will miss it.
process.on('unhandledRejection', error => process.stderr.write(`${error?.stack ?? error}\n`))
const { values } = parseArgs({
	options: {
		port: { type: 'string', default: '0' },
		'control-port': { type: 'string', default: '0' }
	}
})
const world = new World()
const port = await listen(serveClients(world), Number(values.port))
const controlPort = await listen(makeControlServer(world), Number(values['control-port']))
const url = `ws://${HOST}:${port}/ws/chat`
const control = `http://${HOST}:${controlPort}`
process.stdout.write(`${JSON.stringify({ url, control })}\n`)
// Whoever started it holds the other end: when he dies, however he dies, it ends too.
process.stdin.resume().on('end', () => process.exit(0))
