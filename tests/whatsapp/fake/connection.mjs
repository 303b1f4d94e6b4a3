// One client's connection: the handshake, then nodes. What a node means is decided elsewhere.
import { decodeNode, wa } from './baileys.mjs'
import { FrameReader, frame, Handshake } from './noise.mjs'

/** How long a client may take to say who it is. */
const HANDSHAKE_MS_MAX = 30_000
/** Bytes that may wait for a client that does not read; then it is cut off. */
const UNSENT_BYTES_MAX = 64 * 1024 * 1024

export class Connection {
	/** The linked device, once logged in. */
	device = null
	/** What is known of a device that wants to be linked. */
	registration = null
	/** Whether stanzas may be sent: the client has said that it is active. */
	ready = false
	closed = false
	#reader = new FrameReader()
	#handshake = new Handshake()
	#greeted = false
	#transport = null

	/** `receivers`: `begin(connection, staticKey, payload)` and `receive(connection, node)`. */
	constructor(socket, world, receivers) {
		this.socket = socket
		this.world = world
		this.receivers = receivers
		const giveUp = setTimeout(() => this.#transport ?? this.cut(), HANDSHAKE_MS_MAX)
		socket.on('message', bytes => this.#guard(() => this.#feed(bytes)))
		socket.on('error', () => this.cut())
		socket.on('close', () => {
			clearTimeout(giveUp)
			this.#over()
		})
	}

	get silent() {
		return this.device?.person.silent === true
	}

	send(each) {
		const { latencyMs } = this.world.settings
		if (latencyMs > 0) setTimeout(() => this.#write(each), latencyMs)
		else this.#write(each)
	}

	/** Say how it ends, then close; nothing that comes after counts. */
	end(last) {
		this.send(last)
		this.#over()
		const close = () => this.socket.close()
		if (this.world.settings.latencyMs > 0) setTimeout(close, this.world.settings.latencyMs)
		else close()
	}

	/** Drop the TCP connection. */
	cut() {
		this.#over()
		this.socket.terminate()
	}

	#over() {
		if (this.closed) return
		this.closed = true
		this.ready = false
		this.world.connections.delete(this)
		if (this.device?.connection === this) this.device.connection = null
		const { device } = this
		this.world.note('closed', device ? { number: device.person.number, device: device.id } : {})
	}

	#write(each) {
		if (this.silent || this.socket.readyState !== this.socket.OPEN) return
		this.socket.send(frame(this.#transport.seal(wa.encodeBinaryNode(each))))
		if (this.socket.bufferedAmount > UNSENT_BYTES_MAX) this.cut()
	}

	#feed(bytes) {
		for (const body of this.#reader.feed(bytes)) {
			if (this.closed) return
			if (this.#transport) {
				const received = decodeNode(this.#transport.open(body))
				if (!this.silent) this.receivers.receive(this, received)
			} else if (this.#greeted) {
				const { staticKey, payload } = this.#handshake.finish(body)
				this.#transport = this.#handshake.split()
				this.receivers.begin(this, staticKey, payload)
			} else {
				this.#greeted = true
				this.socket.send(frame(this.#handshake.answer(body, this.world.serverIdentity)))
			}
		}
	}

	/** A client that speaks nonsense is cut off; the server goes on. */
	#guard(work) {
		try {
			work()
		} catch (error) {
			process.stderr.write(`a connection is cut: ${error.stack}\n`)
			this.cut()
		}
	}
}
