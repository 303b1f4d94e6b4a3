// Noise_XX_25519_AESGCM_SHA256 as WhatsApp speaks it, the server's side, and its three-byte frames.
import { createCipheriv, createDecipheriv } from 'node:crypto'
import { wa } from './baileys.mjs'

const { Curve, hkdf, proto, sha256 } = wa
const NAME = Buffer.from('Noise_XX_25519_AESGCM_SHA256\0\0\0\0')
const HEADER = Buffer.from([0x57, 0x41, 6, 3])
const ROUTING = Buffer.from([0x45, 0x44, 0, 1])
const TAG_BYTES = 16
const NOTHING = Buffer.alloc(0)

export const FRAME_BYTES_MAX = 4 * 1024 * 1024

function nonce(counter) {
	const iv = Buffer.alloc(12)
	iv.writeUInt32BE(counter, 8)
	return iv
}

function seal(key, counter, plaintext, data) {
	const cipher = createCipheriv('aes-256-gcm', key, nonce(counter))
	cipher.setAAD(data)
	return Buffer.concat([cipher.update(plaintext), cipher.final(), cipher.getAuthTag()])
}

function open(key, counter, sealed, data) {
	const decipher = createDecipheriv('aes-256-gcm', key, nonce(counter))
	decipher.setAAD(data)
	decipher.setAuthTag(sealed.subarray(sealed.length - TAG_BYTES))
	const body = sealed.subarray(0, sealed.length - TAG_BYTES)
	return Buffer.concat([decipher.update(body), decipher.final()])
}

/** The server's static key with its two certificates, made anew at each start. */
export function makeServerIdentity() {
	const [root, intermediate, leaf] = [1, 2, 3].map(() => Curve.generateKeyPair())
	const certificate = (serial, issuerSerial, key, signer) => {
		const details = proto.CertChain.NoiseCertificate.Details.encode({
			serial,
			issuerSerial,
			key
		}).finish()
		return { details, signature: Curve.sign(signer, details) }
	}
	const chain = proto.CertChain.encode({
		intermediate: certificate(1, 0, intermediate.public, root.private),
		leaf: certificate(2, 1, leaf.public, intermediate.private)
	}).finish()
	return { rootKey: root.public, keyPair: leaf, chain }
}

/** One handshake: `answer` the client's hello, `finish` with what it says next, then `split`. */
export class Handshake {
	#hash = NAME
	#salt = NAME
	#key = NAME
	#counter = 0
	#ephemeral = Curve.generateKeyPair()

	constructor() {
		this.#mixHash(HEADER)
	}

	answer(hello, identity) {
		const theirs = Buffer.from(proto.HandshakeMessage.decode(hello).clientHello.ephemeral)
		this.#mixHash(theirs)
		this.#mixHash(this.#ephemeral.public)
		this.#mixKey(Curve.sharedKey(this.#ephemeral.private, theirs))
		const sealedStatic = this.#seal(identity.keyPair.public)
		this.#mixKey(Curve.sharedKey(identity.keyPair.private, theirs))
		const payload = this.#seal(identity.chain)
		return proto.HandshakeMessage.encode({
			serverHello: { ephemeral: this.#ephemeral.public, static: sealedStatic, payload }
		}).finish()
	}

	/** The client's static key and its ClientPayload. Throws when it does not decrypt. */
	finish(message) {
		const { clientFinish } = proto.HandshakeMessage.decode(message)
		const staticKey = this.#open(Buffer.from(clientFinish.static))
		this.#mixKey(Curve.sharedKey(this.#ephemeral.private, staticKey))
		const payload = proto.ClientPayload.decode(this.#open(Buffer.from(clientFinish.payload)))
		return { staticKey, payload }
	}

	split() {
		const keys = hkdf(NOTHING, 64, { salt: this.#salt, info: '' })
		return new Transport(Buffer.from(keys.subarray(0, 32)), Buffer.from(keys.subarray(32)))
	}

	#mixHash(data) {
		this.#hash = sha256(Buffer.concat([this.#hash, data]))
	}

	#mixKey(secret) {
		const keys = hkdf(secret, 64, { salt: this.#salt, info: '' })
		this.#salt = Buffer.from(keys.subarray(0, 32))
		this.#key = Buffer.from(keys.subarray(32))
		this.#counter = 0
	}

	#seal(plaintext) {
		const sealed = seal(this.#key, this.#counter++, plaintext, this.#hash)
		this.#mixHash(sealed)
		return sealed
	}

	#open(sealed) {
		const plaintext = open(this.#key, this.#counter++, sealed, this.#hash)
		this.#mixHash(sealed)
		return plaintext
	}
}

/** What follows the handshake: a key and a counter for each direction. */
class Transport {
	#received = 0
	#sent = 0

	constructor(clientKey, serverKey) {
		this.clientKey = clientKey
		this.serverKey = serverKey
	}

	seal(plaintext) {
		return seal(this.serverKey, this.#sent++, plaintext, NOTHING)
	}

	open(sealed) {
		return open(this.clientKey, this.#received++, sealed, NOTHING)
	}
}

export function frame(body) {
	const head = Buffer.alloc(3)
	head.writeUIntBE(body.length, 0, 3)
	return Buffer.concat([head, body])
}

/** Cuts what a client sends into frames, its greeting taken off. Throws on anything else. */
export class FrameReader {
	#bytes = NOTHING
	#greeted = false

	/** The bodies of the frames that are complete by now. */
	feed(bytes) {
		this.#bytes = this.#bytes.length === 0 ? bytes : Buffer.concat([this.#bytes, bytes])
		if (!this.#greeted && !this.#readGreeting()) return []
		const bodies = []
		for (let size = this.#nextSize(); size !== undefined; size = this.#nextSize()) {
			bodies.push(this.#bytes.subarray(3, 3 + size))
			this.#bytes = this.#bytes.subarray(3 + size)
		}
		return bodies
	}

	#readGreeting() {
		let start = 0
		if (this.#bytes.subarray(0, 4).equals(ROUTING)) {
			if (this.#bytes.length < 7) return false
			start = 7 + this.#bytes.readUIntBE(4, 3)
		}
		if (this.#bytes.length < start + HEADER.length) return false
		if (!this.#bytes.subarray(start, start + HEADER.length).equals(HEADER)) {
			throw new Error('this is no WhatsApp client: its greeting is not WA 6 3')
		}
		this.#bytes = this.#bytes.subarray(start + HEADER.length)
		this.#greeted = true
		return true
	}

	#nextSize() {
		if (this.#bytes.length < 3) return undefined
		const size = this.#bytes.readUIntBE(0, 3)
		if (size > FRAME_BYTES_MAX) throw new Error(`a frame of ${size} bytes`)
		return this.#bytes.length < 3 + size ? undefined : size
	}
}
