// Makes directories as a backend on the real Baileys leaves them behind, and compares what was
// imported from one with what Baileys reads from it.
//
//   node generate.mjs make DIR COUNT       DIR/account-0 … as useMultiFileAuthState writes them,
//                                          and DIR.ids.json: the ids that Baileys would ask for
//   node generate.mjs compare DIR IDS KEYS exits with 1 and says where KEYS (a JSON object, key
//                                          name to the text of its value) differs from DIR
import { randomBytes } from 'node:crypto'
import { readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { isDeepStrictEqual } from 'node:util'
import { wa } from '../whatsapp/fake/baileys.mjs'

const {
	addTransactionCapability,
	BufferJSON,
	Curve,
	DEFAULT_CONNECTION_CONFIG,
	generateSignalPubKey,
	proto,
	signedKeyPair,
	useMultiFileAuthState
} = wa

const PRE_KEYS = 30
const CONTACTS = 6

// libsignal prints private keys on the console (and Baileys' own logger is not needed either).
console.info = () => {}
const silent = { level: 'silent', child: () => silent }
for (const level of ['trace', 'debug', 'info', 'warn', 'error']) silent[level] = () => {}

async function makeAccount(folder, index) {
	const { state, saveCreds } = await useMultiFileAuthState(folder)
	const { creds } = state
	const asked = {}
	// Notes every id that Baileys itself writes under, in Baileys' own spelling.
	const set = async data => {
		for (const type in data) {
			asked[type] = [...new Set([...(asked[type] ?? []), ...Object.keys(data[type])])]
		}
		await state.keys.set(data)
	}
	const keys = addTransactionCapability({ get: state.keys.get, set }, silent, {
		maxCommitRetries: 1,
		delayBetweenTriesMs: 1
	})

	const phone = `4915550${String(index).padStart(5, '0')}`
	const lid = `2000000000${index}`
	creds.me = { id: `${phone}:7@s.whatsapp.net`, lid: `${lid}:7@lid`, name: `Shop ${index} ☕` }
	creds.account = {
		details: randomBytes(24),
		accountSignatureKey: randomBytes(32),
		accountSignature: randomBytes(64),
		deviceSignature: randomBytes(64)
	}
	creds.signalIdentities = [
		{ identifier: { name: creds.me.id, deviceId: 0 }, identifierKey: randomBytes(33) }
	]
	creds.platform = 'android'
	creds.routingInfo = randomBytes(9)
	creds.myAppStateKeyId = 'AAAAAB/p'
	// Every second account was paired with a code: only then does Baileys set this.
	creds.registered = index % 2 === 1
	creds.nextPreKeyId = PRE_KEYS + 1
	creds.firstUnuploadedPreKeyId = PRE_KEYS + 1

	const preKeys = {}
	for (let id = 1; id <= PRE_KEYS; id++) preKeys[id] = Curve.generateKeyPair()
	await keys.transaction(() => keys.set({ 'pre-key': preKeys }), 'pre-keys')

	const repository = DEFAULT_CONNECTION_CONFIG.makeSignalRepository({ creds, keys }, silent)
	const group = '120363021033254949@g.us'
	const memory = {}
	for (let contact = 0; contact < CONTACTS; contact++) {
		const number = `49170${index}00${contact}`
		const theirs = `3000${index}00${contact}`
		const identity = Curve.generateKeyPair()
		const signed = signedKeyPair(identity, 1)
		await repository.lidMapping.storeLIDPNMappings([
			{ lid: `${theirs}@lid`, pn: `${number}@s.whatsapp.net` }
		])
		for (const jid of [`${theirs}@lid`, `${theirs}:3@lid`]) {
			await repository.injectE2ESession({
				jid,
				session: {
					registrationId: 4000 + contact,
					identityKey: generateSignalPubKey(identity.public),
					signedPreKey: {
						keyId: 1,
						publicKey: generateSignalPubKey(signed.keyPair.public),
						signature: signed.signature
					},
					preKey: { keyId: 9, publicKey: generateSignalPubKey(Curve.generateKeyPair().public) }
				}
			})
			await repository.encryptMessage({ jid, data: randomBytes(40) })
			memory[jid] = true
		}
		await keys.transaction(
			() =>
				keys.set({
					'identity-key': { [`${theirs}_1.0`]: generateSignalPubKey(identity.public) },
					'device-list': { [number]: ['0', '3'] },
					tctoken: { [`${theirs}@lid`]: { token: randomBytes(16), timestamp: '1763800000' } }
				}),
			'contact'
		)
	}
	await repository.encryptGroupMessage({ group, meId: creds.me.id, data: randomBytes(20) })
	await keys.transaction(
		() =>
			keys.set({
				'sender-key-memory': { [group]: memory },
				tctoken: { __index: { token: Buffer.from(JSON.stringify(['30000000@lid'])) } },
				'app-state-sync-key': {
					'AAAAAB/p': proto.Message.AppStateSyncKeyData.fromObject({
						keyData: randomBytes(32),
						fingerprint: { rawId: 1, currentIndex: 0, deviceIndexes: [0, 1] },
						timestamp: 1763800000
					})
				},
				'app-state-sync-version': {
					regular_high: {
						version: 3,
						hash: randomBytes(128),
						indexValueMap: { [randomBytes(32).toString('base64')]: { valueMac: randomBytes(32) } }
					}
				}
			}),
		'rest'
	)
	await saveCreds()
	return asked
}

// The lookup that a connector does over imported keys: Baileys' own rewriting of the id.
function importedStore(imported) {
	const text = name => imported[name.replace(/\//g, '__').replace(/:/g, '-')]
	return (type, id) => {
		const found = text(`${type}-${id}`)
		const value = found === undefined ? null : JSON.parse(found, BufferJSON.reviver)
		return type === 'app-state-sync-key' && value
			? proto.Message.AppStateSyncKeyData.fromObject(value)
			: value
	}
}

async function compare(folder, ids, imported) {
	const { state } = await useMultiFileAuthState(folder)
	const lookUp = importedStore(imported)
	const differs = []
	let compared = 0
	for (const [type, each] of Object.entries(ids)) {
		const theirs = await state.keys.get(type, each)
		for (const id of each) {
			compared++
			if (theirs[id] === null || !isDeepStrictEqual(theirs[id], lookUp(type, id))) {
				differs.push(`${type} ${id}`)
			}
		}
	}
	if (!isDeepStrictEqual(state.creds, JSON.parse(imported.creds, BufferJSON.reviver))) {
		differs.push('creds')
	}
	console.log(JSON.stringify({ compared, differs }))
	return differs.length === 0
}

const [, , verb, folder, ...rest] = process.argv
if (verb === 'make') {
	const ids = {}
	for (let index = 0; index < Number(rest[0]); index++) {
		ids[`account-${index}`] = await makeAccount(join(folder, `account-${index}`), index)
	}
	writeFileSync(`${folder}.ids.json`, JSON.stringify(ids))
} else if (verb === 'compare') {
	const [ids, keys] = rest.map(path => JSON.parse(readFileSync(path, 'utf8')))
	process.exitCode = (await compare(folder, ids, keys)) ? 0 : 1
} else {
	process.exitCode = 2
}
// The caches of the repository keep timers alive.
process.exit()
