// How a socket ends, and what its end means.
import { describeError } from './redact.mjs'

/** A peer that has not answered our close in this time is not waited for. */
const CLOSE_MS = 1_000
const REPLACED = 440
const REMOVED = 401
const UNKNOWN = 500

/**
 * Why Baileys closed: by code or by the stanza's attributes, never by text (440 and a removed
 * device's 401 carry the same).
 * @param {any} error `lastDisconnect.error`
 * @returns {{ code: number, message: string, expireS?: number }}
 */
export function readClose(error) {
	if (!error) return { code: 428, message: 'closed without a reason' }
	let code = Number(error.output?.statusCode) || UNKNOWN
	const attrs = error.data?.attrs ?? error.data ?? {}
	if (code === REPLACED && attrs.type === 'device_removed') code = REMOVED
	const expireS = Number(attrs.expire)
	const message = describeError(error)
	return expireS > 0 ? { code, message, expireS } : { code, message }
}

/**
 * Bound how long a close of this socket may take: `ws` waits 30 s for the other side.
 * @param {any} ws Baileys' WebSocketClient
 */
export function endsInTime(ws) {
	const close = ws.close.bind(ws)
	ws.close = () => {
		const { socket } = ws
		setTimeout(() => socket?.terminate(), CLOSE_MS).unref()
		return close()
	}
}

/** @param {any} socket Baileys' */
export function endSocket(socket) {
	const wire = socket.ws.socket
	// Baileys stops to listen before it first waits: what was held back is heard by nobody.
	void socket.end(undefined)
	if (wire?.isPaused) wire.resume()
}

/**
 * Read nothing more from this socket; what was read already goes on.
 * @param {any} ws Baileys' WebSocketClient
 */
export function holdInput({ socket }) {
	socket?.pause()
}

/**
 * Keep back everything that is written to this socket from now on until `ready`; when that fails,
 * it is never written.
 * @param {any} ws Baileys' WebSocketClient
 * @param {Promise<void>} ready
 */
export function holdOutput({ socket }, ready) {
	const send = socket.send.bind(socket)
	ready.catch(() => {})
	// It stays in place: taken away, a later frame could overtake one that is still waiting.
	socket.send = (data, callback) => {
		ready.then(() => send(data, callback), callback)
	}
}
