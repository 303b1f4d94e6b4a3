// The parts of the Node side that need no socket; run by test_units.py.
import assert from 'node:assert/strict'
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { test } from 'node:test'
import { isDeepStrictEqual } from 'node:util'
import { createRequire } from 'node:module'
import { tmpdir } from 'node:os'
import { basename, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import {
	FRAME_BYTES_MAX,
	FrameReader,
	LineBroken,
	parseFrame
} from '../../../daemon/bridge/node/line.mjs'
import { describePrinted, describeWritten, words } from '../../../daemon/bridge/node/redact.mjs'
import {
	AccountKeys,
	KeysUnusable,
	keyName,
	RecentValues
} from '../../../daemon/bridge/node/keys.mjs'
import {
	isOtherSpelling,
	readReceipt,
	Unacknowledged
} from '../../../daemon/bridge/node/sends.mjs'
import { keepBeforeReceipt, readMail, Stanzas } from '../../../daemon/bridge/node/inbound.mjs'
import { readClose } from '../../../daemon/bridge/node/closing.mjs'

const require = createRequire(new URL('../../../daemon/bridge/node/main.mjs', import.meta.url))
const {
	addTransactionCapability,
	Curve,
	encodeWAMessage,
	initAuthCreds,
	proto,
	useMultiFileAuthState
} = await import(pathToFileURL(require.resolve('baileys')))

const bytes = text => Buffer.from(text)
const ME = { id: '4915100000001:7@s.whatsapp.net', lid: '2000001:7@lid' }
const ME_CREDS = { ...ME, name: 'Shop' }
const ANNA = '491700000001@s.whatsapp.net'
const GROUP = '120363021033254949@g.us'

test('frames that make no sense break the line without being quoted', () => {
	const senseless = [
		'secret',
		'[]',
		'null',
		'{"v": 2, "call": "ping", "id": 1}',
		'{"call": "ping", "id": 1}',
		'{"v": 1, "event": "connected"}',
		'{"v": 1, "call": "ping", "answer": 1, "id": 1}',
		'{"v": 1, "call": "ping"}',
		'{"v": 1, "call": "ping", "id": 1.5}',
		'{"v": 1, "answer": "secret", "ok": {}}'
	]
	for (const text of senseless) {
		assert.throws(
			() => parseFrame(bytes(text)),
			error => error instanceof LineBroken && !error.message.includes('secret'),
			text
		)
	}
	assert.throws(() => parseFrame(Buffer.from([0x22, 0xff, 0x22])), LineBroken)
})

test('frames are put together however they arrive', () => {
	const frames = [1, 2, 3].map(id => ({ v: 1, call: 'ping', id, text: 'ü'.repeat(id) }))
	const stream = bytes(frames.map(frame => `${JSON.stringify(frame)}\n`).join(''))
	for (let size = 1; size <= stream.length; size++) {
		const reader = new FrameReader()
		const read = []
		for (let at = 0; at < stream.length; at += size) {
			read.push(...reader.feed(stream.subarray(at, at + size)))
		}
		assert.ok(isDeepStrictEqual(read, frames), `in pieces of ${size} bytes`)
	}
})

test('a frame longer than the limit breaks the line before it has ended', () => {
	const reader = new FrameReader()
	assert.deepEqual([...reader.feed(Buffer.alloc(FRAME_BYTES_MAX, 'x'))], [])
	assert.throws(() => [...reader.feed(bytes('x'))], LineBroken)
})

test('what is printed is described, never quoted', () => {
	const session = { privKey: Buffer.alloc(32, 7), text: 'see you at noon' }
	const key = Buffer.alloc(32, 7).toString('base64')
	const described = [
		describePrinted(['Closing session:', session, 'see you at noon', key]),
		describePrinted([session]),
		describePrinted([new Error(`for 4915112345678@s.whatsapp.net: ${key}`)]),
		words(`Invalid LID-PN mapping: 4915112345678, ${key}`),
		words('{"text": "see you at noon"}'),
		words('first\nsee you at noon'),
		describeWritten(bytes(`${key}\nsee you at noon`))
	].join('\n')
	for (const secret of ['see you', '4915112345678', key, key.slice(0, 25), 'privKey']) {
		assert.ok(!described.includes(secret), `${secret} in ${described}`)
	}
	assert.match(
		described,
		/^Closing session: <Object> <text, 15 characters> <text, 44 characters>/
	)
})

test('names of keys are those of the files of Baileys', () => {
	assert.equal(keyName('session', '4915112345678.0'), 'session-4915112345678.0')
	assert.equal(keyName('app-state-sync-key', 'AAAA/+b='), 'app-state-sync-key-AAAA__+b=')
	assert.equal(keyName('sender-key', '1@g.us::2:3'), 'sender-key-1@g.us--2-3')
})

test('values that are not used go, and there are never more than twice the limit', () => {
	const recent = new RecentValues()
	for (let id = 0; id < 5000; id++) recent.set(`k${id}`, id)
	assert.ok(recent.size <= 500)
	assert.equal(recent.get('k4999'), 4999)
	recent.age()
	assert.equal(recent.get('k4999'), 4999)
	recent.age()
	assert.equal(recent.get('k4999'), 4999)
	recent.age()
	recent.age()
	assert.equal(recent.get('k4999'), undefined)
	recent.set('gone', null)
	assert.equal(recent.get('gone'), null)
})

test('an ack ends one wait; a refusal that nobody waits for is told', async () => {
	const waiting = new Unacknowledged()
	const good = waiting.expect('A')
	const bad = waiting.expect('B')
	assert.equal(waiting.acknowledge({ id: 'A' }), null)
	await good
	assert.equal(waiting.acknowledge({ id: 'B', error: '463' }), null)
	await assert.rejects(bad, error => error.fields.kind === 'refused' && error.fields.code === 463)
	assert.deepEqual(waiting.acknowledge({ id: 'A', error: '479' }), { messageId: 'A', code: 479 })
	assert.equal(waiting.acknowledge({ id: 'A' }), null)
	const lost = waiting.expect('C')
	waiting.failAll(new Error('closed'))
	await assert.rejects(lost, /closed/)
	assert.equal(waiting.size, 0)
})

test('receipts say how far messages have come, and only those of recipients do', () => {
	const read = (attrs, content) => readReceipt({ tag: 'receipt', attrs, content }, ME)
	const from = '4915112345678@s.whatsapp.net'
	assert.deepEqual(read({ id: 'A', from }), [{ messageId: 'A', state: 'delivered' }])
	assert.deepEqual(read({ id: 'A', from, type: 'played' }), [{ messageId: 'A', state: 'read' }])
	const item = id => ({ tag: 'item', attrs: { id } })
	assert.deepEqual(
		read({ id: 'A', from, type: 'read' }, [{ tag: 'list', attrs: {}, content: [item('B')] }]),
		[
			{ messageId: 'A', state: 'read' },
			{ messageId: 'B', state: 'read' }
		]
	)
	assert.deepEqual(read({ id: 'A', from, type: 'retry' }), [])
	assert.deepEqual(read({ id: 'A', from: '4915100000001@s.whatsapp.net' }), [])
	assert.deepEqual(read({ id: 'A', from: '2000001:3@lid', type: 'read' }), [])
})

test('a close is read by its code and attributes, not by its text', () => {
	const boom = (statusCode, data) =>
		Object.assign(new Error('Stream Errored (conflict)'), { output: { statusCode }, data })
	assert.equal(readClose(boom(440, { attrs: { type: 'replaced' } })).code, 440)
	assert.equal(readClose(boom(440, { attrs: { type: 'device_removed' } })).code, 401)
	assert.equal(readClose(boom(402, { reason: '402', expire: '3600' })).expireS, 3600)
	assert.equal(readClose(new Error('anything')).code, 500)
	assert.equal(readClose(undefined).code, 428)
})

const knownLids = {
	getPNForLID: async lid => (lid.startsWith('3000001') ? '491700000001:0@s.whatsapp.net' : null)
}
const mailOf = (attrs, message) =>
	readMail(
		{ attrs: { id: 'A', t: '1700000000', ...attrs } },
		encodeWAMessage(message),
		ME,
		knownLids
	)
const text = { conversation: 'hello' }
const annasMail = {
	messageId: 'A',
	chat: '491700000001',
	sender: '491700000001',
	text: 'hello',
	sentAt: 1_700_000_000
}

test('texts of others are mail, in whatever they are wrapped', async () => {
	for (const message of [
		text,
		{ extendedTextMessage: { text: 'hello' } },
		{ ephemeralMessage: { message: text } },
		{ ephemeralMessage: { message: { extendedTextMessage: { text: 'hello' } } } },
		{ deviceSentMessage: { message: text } }
	]) {
		assert.deepEqual(await mailOf({ from: ANNA }, message), [annasMail])
	}
	const [named] = await mailOf({ from: ANNA, notify: 'Anna ☕' }, text)
	assert.equal(named.senderName, 'Anna ☕')
})

test('people are named by their phone number where it is known', async () => {
	for (const attrs of [
		{ from: '3000001:4@lid' },
		{ from: '3000009@lid', sender_pn: ANNA },
		{ from: '491700000001:3@s.whatsapp.net' },
		{ from: '15@broadcast', participant: ANNA }
	]) {
		assert.deepEqual(await mailOf(attrs, text), [annasMail])
	}
	const [unknown] = await mailOf({ from: '3000009@lid' }, text)
	assert.deepEqual([unknown.chat, unknown.sender], ['3000009@lid', '3000009@lid'])
	const [group] = await mailOf(
		{ from: GROUP, participant: '3000009@lid', participant_pn: ANNA },
		text
	)
	assert.deepEqual([group.chat, group.sender], [GROUP, '491700000001'])
})

test('our own messages, statuses and what is no text are no mail', async () => {
	for (const [attrs, message] of [
		[{ from: ME.id, recipient: ANNA }, { deviceSentMessage: { message: text } }],
		[{ from: '2000001@lid' }, text],
		[{ from: GROUP, participant: ME.id }, text],
		[{ from: 'status@broadcast', participant: ANNA }, text],
		[{ from: ANNA }, { imageMessage: { caption: 'hello' } }],
		[{ from: ANNA }, { reactionMessage: { text: '👍' } }],
		[{ from: ANNA }, { protocolMessage: { type: proto.Message.ProtocolMessage.Type.REVOKE } }],
		[{ from: ANNA }, { conversation: '' }]
	]) {
		assert.deepEqual(await mailOf(attrs, message), [], JSON.stringify(message))
	}
	assert.deepEqual(await readMail({ attrs: { from: ANNA } }, bytes('junk'), ME, knownLids), [])
})

test('what our own phone read for us is mail, and nobody else can say so', async () => {
	const webMessageInfoBytes = proto.WebMessageInfo.encode({
		key: { remoteJid: ANNA, id: 'A' },
		message: text,
		messageTimestamp: 1_700_000_000
	}).finish()
	const message = {
		protocolMessage: {
			peerDataOperationRequestResponseMessage: {
				peerDataOperationResult: [
					{ placeholderMessageResendResponse: { webMessageInfoBytes } },
					{ placeholderMessageResendResponse: {} }
				]
			}
		}
	}
	assert.deepEqual(await mailOf({ id: 'B', from: ME.id, category: 'peer' }, message), [annasMail])
	assert.deepEqual(await mailOf({ id: 'B', from: '491700000002@s.whatsapp.net' }, message), [])
})

test('a text longer than anyone may send is cut, and never in the middle of a character', async () => {
	const [mail] = await mailOf({ from: ANNA }, { conversation: `x${'😀'.repeat(60_000)}` })
	assert.equal(mail.text.length, 100_000)
	assert.ok(mail.text.isWellFormed())
})

const silent = { level: 'silent', trace() {}, debug() {}, info() {}, warn() {}, error() {} }

function newKeys() {
	const keys = AccountKeys.create()
	keys.held = false
	keys.takeChanges()
	return { keys, store: keys.signalStore(silent) }
}

test('what reading a message changes is handed out with it, and not before', async () => {
	const { keys, store } = newKeys()
	await store.set({ 'pre-key': { 5: 'old' } })
	keys.takeChanges()
	await store.set({ session: { 'anna.0': 'sent to' } })
	keys.beginReading()
	await store.set({ session: { 'anna.0': 'read from' }, 'pre-key': { 5: null } })
	await store.set({ 'pre-key': { 9: 'new' } })
	assert.deepEqual(keys.takeChanges(), { 'pre-key-9': '"new"' })
	const order = []
	const other = keys.whenRead().then(() => order.push('other'))
	keys.endReading()
	order.push('reader')
	assert.deepEqual(keys.takeChanges(), { 'session-anna.0': '"read from"', 'pre-key-5': null })
	await other
	assert.deepEqual(order, ['reader', 'other'])
	assert.deepEqual(keys.takeChanges(), {})
})

test('a change is told once, at its last value, and credentials that are the same are not told', async () => {
	const { keys, store } = newKeys()
	await store.set({ session: { 'anna.0': 1 }, 'lid-mapping': { 491: 'a' } })
	await store.set({ session: { 'anna.0': 2 }, 'lid-mapping': { 491: null, 492: null } })
	await keys.credsChanged()
	assert.deepEqual(keys.takeChanges(), { 'session-anna.0': '2', 'lid-mapping-491': null })
	await store.set({ session: { 'anna.0': 2 }, 'lid-mapping': { 491: null } })
	assert.deepEqual(keys.takeChanges(), {})
	await store.set({ 'device-list': { 491: ['0'] } })
	assert.ok(!keys.hasChanges)
	keys.creds.nextPreKeyId = 7
	await keys.credsChanged()
	assert.deepEqual(Object.keys(keys.takeChanges()), ['creds', 'device-list-491'])
})

test('only what the server relies on makes Baileys wait', async () => {
	const { keys, store } = newKeys()
	const urgent = []
	keys.onChange = durableFirst => {
		urgent.push(durableFirst)
		return durableFirst ? new Promise(() => {}) : Promise.resolve()
	}
	await store.set({ session: { a: 1 } })
	await store.set({ 'pre-key': { 1: null } })
	const waits = store.set({ 'pre-key': { 2: 1 } })
	assert.equal(
		await Promise.race([waits, new Promise(go => setTimeout(go, 20, 'waits'))]),
		'waits'
	)
	assert.deepEqual(urgent, [false, false, true])
})

test('a number that WhatsApp spells otherwise is told from one that it spells the same', () => {
	assert.ok(isOtherSpelling('553196348800@s.whatsapp.net', '5531996348800'))
	assert.ok(!isOtherSpelling('5531996348800@s.whatsapp.net', '5531996348800'))
	assert.ok(!isOtherSpelling('2000001@lid', '5531996348800'))
})

const SAMPLES = {
	'pre-key': { 17: Curve.generateKeyPair() },
	session: {
		'2000001_1.0': { _sessions: { 'a/b+c=': { indexInfo: { used: 1 } } }, version: 'v1' }
	},
	'sender-key': { '1@g.us::2000001_1::0': Buffer.from('[{"senderKeyId": 1}]') },
	'sender-key-memory': { '1@g.us': { '2000001:3@lid': true } },
	'identity-key': { '2000001_1.0': Curve.generateKeyPair().public },
	'lid-mapping': { 491700000001: '2000001', '2000001_reverse': '491700000001' },
	'device-list': { 491700000001: ['0', '3'] },
	tctoken: { '2000001@lid': { token: Buffer.from('token'), timestamp: '1700000000' } },
	'app-state-sync-key': {
		'AAAA/+b=': proto.Message.AppStateSyncKeyData.fromObject({
			keyData: Buffer.alloc(32, 1),
			fingerprint: { rawId: 1, currentIndex: 0, deviceIndexes: [0, 1] },
			timestamp: 1_700_000_000
		})
	},
	'app-state-sync-version': {
		regular: { version: 3, hash: Buffer.alloc(128), indexValueMap: {} }
	}
}

test('what Baileys wrote into files is read as Baileys reads it, and written as it writes', async () => {
	const folder = mkdtempSync(join(tmpdir(), 'keys-'))
	try {
		const { state, saveCreds } = await useMultiFileAuthState(folder)
		Object.assign(state.creds, { me: ME_CREDS, account: { details: Buffer.from('x') } })
		await saveCreds()
		await state.keys.set(SAMPLES)
		const file = name => readFileSync(join(folder, `${name}.json`), 'utf8')
		const names = readdirSync(folder).map(each => basename(each, '.json'))
		const values = Object.fromEntries(names.map(name => [name, file(name)]))

		const loaded = AccountKeys.load(values)
		assert.ok(isDeepStrictEqual(loaded.creds, (await useMultiFileAuthState(folder)).state.creds))
		const store = loaded.signalStore(silent)
		for (const [type, each] of Object.entries(SAMPLES)) {
			const theirs = await state.keys.get(type, Object.keys(each))
			assert.ok(isDeepStrictEqual(await store.get(type, Object.keys(each)), theirs), type)
		}
		await store.set(SAMPLES)
		assert.deepEqual(loaded.takeChanges(), {})
		for (const [type, each] of Object.entries(SAMPLES)) {
			await store.set({ [type]: Object.fromEntries(Object.keys(each).map(id => [id, null])) })
		}
		await store.set(SAMPLES)
		const changes = loaded.takeChanges()
		assert.deepEqual(Object.keys(changes).sort(), names.filter(name => name !== 'creds').sort())
		for (const [name, text] of Object.entries(changes)) assert.equal(text, file(name), name)
	} finally {
		rmSync(folder, { recursive: true })
	}
})

test('credentials of no paired account are unusable, and nothing of them is said', () => {
	const creds = initAuthCreds()
	const text = JSON.stringify(creds, (_, value) => value)
	for (const values of [{}, { creds: '{' }, { creds: '[]' }, { creds: text }]) {
		assert.throws(
			() => AccountKeys.load(values),
			error => error instanceof KeysUnusable && !error.message.includes(creds.advSecretKey)
		)
	}
})

test('doubt drops the sessions with a number and its LID, and with our own devices, no others', () => {
	const kept = [
		'session-491700000002.0',
		'session-3000002_1.0',
		'pre-key-1',
		'lid-mapping-491700000001'
	]
	const dropped = ['session-491700000001.0', 'session-491700000001.3', 'session-3000001_1.0']
	const own = ['session-4915100000001.0', 'session-2000001_1.0']
	const values = Object.fromEntries([...kept, ...dropped, ...own].map(name => [name, '{}']))
	values['lid-mapping-491700000001'] = '"3000001"'
	const changesOf = phones => {
		const keys = new AccountKeys({ me: ME_CREDS }, new Map(Object.entries(values)))
		keys.dropSessionsWith(phones)
		return Object.entries(keys.takeChanges()).map(([name, text]) => `${name}: ${text}`)
	}
	assert.deepEqual(changesOf([]), [])
	assert.deepEqual(
		changesOf(['491700000001']).sort(),
		[...dropped, ...own].map(name => `${name}: null`).sort()
	)
})

test('a message is read under the lock that sends take, and handed on when it is kept', async () => {
	const { keys, store } = newKeys()
	const auth = {
		creds: { me: ME_CREDS },
		keys: addTransactionCapability(store, silent, { maxCommitRetries: 1, delayBetweenTriesMs: 1 })
	}
	const order = []
	const tick = () => new Promise(go => setTimeout(go, 20))
	const repository = {
		lidMapping: knownLids,
		async decryptMessage() {
			order.push('read')
			await auth.keys.set({ session: { 'anna.0': 'read' } })
			return encodeWAMessage(text)
		},
		decryptGroupMessage: () => Promise.reject(new Error('no sender key'))
	}
	const stanzas = new Stanzas()
	const ciphertext = bytes('sealed')
	const attrs = { id: 'A', from: ANNA, t: '1700000000' }
	stanzas.note({
		tag: 'message',
		attrs,
		content: [{ tag: 'enc', attrs: {}, content: ciphertext }]
	})
	const keep = async mail => {
		order.push(['kept', mail, keys.takeChanges()])
		await tick()
		order.push('stored')
	}
	const reader = keepBeforeReceipt(() => repository, stanzas, keys, keep)(auth)

	const sending = auth.keys.transaction(async () => {
		order.push('send')
		await tick()
		order.push('sent')
	}, ME.id)
	await reader
		.decryptMessage({ jid: ANNA, type: 'msg', ciphertext })
		.then(() => order.push('receipt'))
	await sending
	const change = { 'session-anna.0': '"read"' }
	assert.deepEqual(order, [
		'send',
		'sent',
		'read',
		['kept', [annasMail], change],
		'stored',
		'receipt'
	])

	await assert.rejects(
		reader.decryptGroupMessage({ group: GROUP, msg: ciphertext }),
		/no sender key/
	)
	assert.ok(!keys.isReading)
	assert.equal(order.length, 6)
})
