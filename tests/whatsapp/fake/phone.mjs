// A person's phone: a true party of the Signal protocol, played by libsignal. It opens sessions,
// reads and writes; who sends it what, and what becomes of it, is not its business.
import { libsignal, wa } from './baileys.mjs'
// A phone tries a session on a copy; libsignal as it comes does not, and would spoil its sessions.
import '../../../daemon/bridge/node/attempts.mjs'

const SIGNED_PRE_KEY_ID = 1
/** One-time keys handed out and not used yet; the oldest are forgotten beyond this. */
const PRE_KEYS_MAX = 1000

const bare = key => key.subarray(1)
const prefixed = key => wa.generateSignalPubKey(Buffer.from(key))

export class Phone {
	#keys
	#preKeys = new Map()
	#nextPreKey = 1
	#sessions = new Map()
	#last = Promise.resolve()

	/** Made on first use: most people of a large test never decrypt anything. */
	get #own() {
		if (this.#keys === undefined) {
			const identity = libsignal.keyhelper.generateIdentityKeyPair()
			this.#keys = {
				identity,
				registrationId: libsignal.keyhelper.generateRegistrationId(),
				signed: libsignal.keyhelper.generateSignedPreKey(identity, SIGNED_PRE_KEY_ID)
			}
		}
		return this.#keys
	}

	get registrationId() {
		return this.#own.registrationId
	}

	/** The identity key pair, the public half without its type byte. */
	get identity() {
		const { pubKey, privKey } = this.#own.identity
		return { public: bare(pubKey), private: privKey }
	}

	/** What another party needs to open a session; the one-time key in it is handed out once. */
	takeBundle() {
		const { identity, registrationId, signed } = this.#own
		const id = this.#nextPreKey++
		const { keyPair } = libsignal.keyhelper.generatePreKey(id)
		this.#preKeys.set(id, keyPair)
		if (this.#preKeys.size > PRE_KEYS_MAX) this.#preKeys.delete(this.#preKeys.keys().next().value)
		return {
			registrationId,
			identity: bare(identity.pubKey),
			signedPreKey: {
				id: signed.keyId,
				value: bare(signed.keyPair.pubKey),
				signature: signed.signature
			},
			preKey: { id, value: bare(keyPair.pubKey) }
		}
	}

	/** Encrypt for a device; `takeBundle` is asked for its keys when there is no session yet. */
	encrypt(number, device, plaintext, takeBundle) {
		return this.#inTurn(async () => {
			const address = new libsignal.ProtocolAddress(number, device)
			if (!this.#load(address)?.haveOpenSession()) {
				await this.#openSession(address, takeBundle())
			}
			const cipher = new libsignal.SessionCipher(this.#storage, address)
			const { type, body } = await cipher.encrypt(plaintext)
			return { type: type === 3 ? 'pkmsg' : 'msg', body: Buffer.from(body) }
		})
	}

	/** Throws when it cannot be read; the session is then as it was. */
	decrypt(number, device, type, body) {
		return this.#inTurn(() => {
			const address = new libsignal.ProtocolAddress(number, device)
			const cipher = new libsignal.SessionCipher(this.#storage, address)
			return type === 'pkmsg'
				? cipher.decryptPreKeyWhisperMessage(body)
				: cipher.decryptWhisperMessage(body)
		})
	}

	/** Lose the session with a device, as a phone that was restored from a backup. */
	forget(number, device) {
		this.#sessions.delete(new libsignal.ProtocolAddress(number, device).toString())
	}

	#openSession(address, { registrationId, identity, signedPreKey, preKey }) {
		const builder = new libsignal.SessionBuilder(this.#storage, address)
		return builder.initOutgoing({
			registrationId,
			identityKey: prefixed(identity),
			signedPreKey: {
				keyId: signedPreKey.id,
				publicKey: prefixed(signedPreKey.value),
				signature: signedPreKey.signature
			},
			preKey: preKey && { keyId: preKey.id, publicKey: prefixed(preKey.value) }
		})
	}

	/** One operation at a time: libsignal reads, waits and writes back. */
	#inTurn(operation) {
		const result = this.#last.then(operation)
		this.#last = result.catch(() => undefined)
		return result
	}

	#load(address) {
		const saved = this.#sessions.get(address.toString())
		return saved && libsignal.SessionRecord.deserialize(saved)
	}

	#storage = {
		// Kept serialised: a decryption that fails halfway then leaves nothing behind.
		loadSession: async address => this.#load(address),
		storeSession: async (address, record) => {
			this.#sessions.set(address, record.serialize())
		},
		isTrustedIdentity: () => true,
		loadPreKey: async id => this.#preKeys.get(id),
		removePreKey: async id => {
			this.#preKeys.delete(id)
		},
		loadSignedPreKey: async id => (id === SIGNED_PRE_KEY_ID ? this.#own.signed.keyPair : undefined),
		getOurRegistrationId: () => this.registrationId,
		getOurIdentity: () => this.#own.identity
	}
}
