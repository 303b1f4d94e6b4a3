// A failed attempt to read a message leaves nothing behind; run by test_attempts.py.
import assert from 'node:assert/strict'
import { createRequire } from 'node:module'
import { test } from 'node:test'
import { pathToFileURL } from 'node:url'

const require = createRequire(new URL('../../../daemon/bridge/node/main.mjs', import.meta.url))
const { addTransactionCapability, Curve, DEFAULT_CONNECTION_CONFIG, initAuthCreds } = await import(
	pathToFileURL(require.resolve('baileys'))
)
const { makeSignalRepository } = DEFAULT_CONNECTION_CONFIG
const silent = { level: 'silent', child: () => silent }
for (const level of ['trace', 'debug', 'info', 'warn', 'error']) silent[level] = () => {}
for (const level of ['info', 'warn', 'error']) console[level] = () => {}

const ANNA = '4915550000001@s.whatsapp.net'
const BERT = '4915112345678@s.whatsapp.net'

/** Somebody with a device of his own: its keys, and Baileys' way to use them. */
function party(jid) {
	const values = new Map()
	const store = {
		get: async (type, ids) =>
			Object.fromEntries(ids.map(id => [id, values.get(`${type} ${id}`) ?? null])),
		set: async data => {
			for (const [type, entries] of Object.entries(data)) {
				for (const [id, value] of Object.entries(entries)) values.set(`${type} ${id}`, value)
			}
		}
	}
	const once = { maxCommitRetries: 1, delayBetweenTriesMs: 1 }
	const keys = addTransactionCapability(store, silent, once)
	const creds = { ...initAuthCreds(), me: { id: jid } }
	let preKeys = 0
	return {
		repository: makeSignalRepository({ creds, keys }, silent, async () => []),
		/** What the server hands out to who wants to begin a session. */
		async bundle() {
			const keyId = ++preKeys
			const preKey = Curve.generateKeyPair()
			await store.set({ 'pre-key': { [keyId]: preKey } })
			const { keyId: signedId, keyPair, signature } = creds.signedPreKey
			const prefixed = key => Buffer.concat([Buffer.from([5]), key])
			return {
				registrationId: creds.registrationId,
				identityKey: prefixed(creds.signedIdentityKey.public),
				signedPreKey: { keyId: signedId, publicKey: prefixed(keyPair.public), signature },
				preKey: { keyId, publicKey: prefixed(preKey.public) }
			}
		}
	}
}

/** Anna begins a second session while a message of Bert's is still on its way on the first. */
async function messageOnAnOldSession() {
	const anna = party(ANNA)
	const bert = party(BERT)
	const write = async (from, jid, text) => {
		const data = Buffer.from(text)
		return from.repository.encryptMessage({ jid, data })
	}
	const read = async (by, jid, { type, ciphertext }) =>
		String(await by.repository.decryptMessage({ jid, type, ciphertext }))

	await anna.repository.injectE2ESession({ jid: BERT, session: await bert.bundle() })
	assert.equal(await read(bert, ANNA, await write(anna, BERT, 'one')), 'one')
	assert.equal(await read(anna, BERT, await write(bert, ANNA, 'answer')), 'answer')
	assert.equal(await read(bert, ANNA, await write(anna, BERT, 'two')), 'two')
	const late = [await write(bert, ANNA, 'late 1'), await write(bert, ANNA, 'late 2')]
	await anna.repository.injectE2ESession({ jid: BERT, session: await bert.bundle() })
	for (const [place, message] of late.entries()) {
		assert.equal(message.type, 'msg')
		assert.equal(await read(anna, BERT, message), `late ${place + 1}`)
	}
	const three = await write(anna, BERT, 'three')
	assert.equal(await read(bert, ANNA, three), 'three')
	assert.equal(await read(anna, BERT, await write(bert, ANNA, 'answer 2')), 'answer 2')
	assert.equal(await read(bert, ANNA, await write(anna, BERT, 'four')), 'four')
}

// In this order: what the second imports stays for good.
test('libsignal by itself breaks the new session: once it does not, attempts.mjs may go', async () => {
	await assert.rejects(messageOnAnOldSession(), /Bad MAC/)
})

test('a message on an old session leaves the new one whole', async () => {
	await import('../../../daemon/bridge/node/attempts.mjs')
	await messageOnAnOldSession()
})
