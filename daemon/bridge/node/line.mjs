// The line to the daemon: frames on file descriptor 3, one JSON object a line.
//
// Lives here: what a frame is, what of it is refused, and how much may wait to be written. Never
// lives here: what a frame means.
import { Socket } from 'node:net'

export const VERSION = 1
export const FRAME_BYTES_MAX = 16 * 1024 * 1024
/** A daemon that does not read for this long a queue is lost; its accounts open elsewhere. */
const UNREAD_BYTES_MAX = 4 * FRAME_BYTES_MAX
/** Beyond this, log records are dropped (and counted) instead of written. */
const UNREAD_BYTES_CALM = 1024 * 1024

const NEWLINE = 0x0a
const WORDS = ['call', 'answer']

/** Something that ends the line: the other side must be wrong about what we speak. */
export class LineBroken extends Error {}

/** A frame that would be longer than the line allows. Nothing of it was written. */
export class FrameTooLong extends Error {}

/**
 * Splits what arrives into frames.
 *
 * Between calls: holds the beginning of one frame, at most `FRAME_BYTES_MAX` bytes of it.
 */
export class FrameReader {
	#chunks = []
	#bytes = 0

	#keep(part) {
		this.#bytes += part.length
		if (this.#bytes > FRAME_BYTES_MAX) {
			throw new LineBroken(`a frame is longer than ${FRAME_BYTES_MAX} bytes`)
		}
		this.#chunks.push(part)
	}

	/**
	 * Yields each frame that `chunk` completes. Throws `LineBroken`.
	 * @param {Buffer} chunk
	 */
	*feed(chunk) {
		let rest = chunk
		for (let end = rest.indexOf(NEWLINE); end >= 0; end = rest.indexOf(NEWLINE)) {
			this.#keep(rest.subarray(0, end))
			const frame = Buffer.concat(this.#chunks, this.#bytes)
			this.#chunks = []
			this.#bytes = 0
			rest = rest.subarray(end + 1)
			yield parseFrame(frame)
		}
		if (rest.length > 0) this.#keep(rest)
	}
}

const utf8 = new TextDecoder('utf-8', { fatal: true })

/**
 * One frame of the daemon's: a call or an answer. Its other fields are checked by who knows them.
 * The error's message holds nothing of the frame.
 * @param {Buffer} bytes
 */
export function parseFrame(bytes) {
	let frame
	try {
		frame = JSON.parse(utf8.decode(bytes))
	} catch {
		throw new LineBroken(`a frame of ${bytes.length} bytes is no JSON`)
	}
	if (typeof frame !== 'object' || frame === null || Array.isArray(frame)) {
		throw new LineBroken('a frame is no object')
	}
	if (frame.v !== VERSION) throw new LineBroken(`a frame is not of version ${VERSION}`)
	const words = WORDS.filter(word => Object.hasOwn(frame, word))
	if (words.length !== 1) throw new LineBroken('a frame is neither a call nor an answer')
	const id = words[0] === 'call' ? frame.id : frame.answer
	if (!Number.isSafeInteger(id) || id < 0) throw new LineBroken(`a ${words[0]} has no id`)
	return frame
}

/**
 * The writing end.
 *
 * Between calls: frames leave in the order in which they were given.
 */
export class Line {
	#socket
	#droppedLogs = 0
	#onEnd = (/** @type {Error | undefined} */ error) => void error

	/** @param {number} fd one end of a connected pair of UNIX sockets */
	constructor(fd) {
		this.#socket = new Socket({ fd, readable: true, writable: true })
	}

	/**
	 * Read frames until the line ends; then, when `onFrame` throws, or when the daemon does not read
	 * what is written, call `onEnd`, which must end the process.
	 * @param {(frame: object) => void} onFrame
	 * @param {(error?: Error) => void} onEnd
	 */
	read(onFrame, onEnd) {
		const reader = new FrameReader()
		this.#onEnd = onEnd
		this.#socket.on('data', chunk => {
			try {
				for (const frame of reader.feed(chunk)) onFrame(frame)
			} catch (error) {
				onEnd(error)
			}
		})
		this.#socket.on('end', () => onEnd())
		this.#socket.on('close', () => onEnd())
		this.#socket.on('error', () => onEnd())
	}

	/**
	 * Write a frame. Throws `FrameTooLong`.
	 * @param {object} fields
	 */
	write(fields) {
		const frame = Buffer.from(`${JSON.stringify({ v: VERSION, ...fields })}\n`)
		if (frame.length - 1 > FRAME_BYTES_MAX) {
			throw new FrameTooLong(`a frame of ${frame.length} bytes is longer than the line allows`)
		}
		if (this.#socket.writableLength + frame.length > UNREAD_BYTES_MAX) {
			this.#onEnd(new LineBroken('the daemon does not read'))
			return
		}
		this.#socket.write(frame)
	}

	/**
	 * Write a log record, or count it when the daemon is behind with reading.
	 * @param {string} level
	 * @param {string} message
	 */
	writeLog(level, message) {
		if (this.#socket.writableLength > UNREAD_BYTES_CALM) {
			this.#droppedLogs++
			return
		}
		if (this.#droppedLogs > 0) {
			const dropped = this.#droppedLogs
			this.#droppedLogs = 0
			this.write({
				event: 'log',
				level: 'warning',
				message: `${dropped} log records were dropped`
			})
		}
		this.write({ event: 'log', level, message })
	}
}
