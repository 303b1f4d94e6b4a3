// Linking a device: by a QR code that a phone scans, or by a pairing code that is typed into one.
import { createHmac, createCipheriv, createDecipheriv, randomBytes } from 'node:crypto'
import { libsignal, wa } from './baileys.mjs'
import { RESTART } from './endings.mjs'
import { addressOf, bytesOf, child, node, now, randomId, SERVER } from './nodes.mjs'
import { DEVICES_MAX } from './person.mjs'
import { Refused } from './refused.mjs'

const { aesDecryptGCM, Curve, derivePairingCodeKey, hkdf, proto } = wa
const REFS = 6
const FIRST_REF_S = 60
const LATER_REF_S = 20
/** How long a client may take to sign what the phone has offered. */
const LINK_S_MAX = 20
const ACCOUNT_SIGNATURE = Buffer.from([6, 0])
const DEVICE_SIGNATURE = Buffer.from([6, 1])

/** A new device: offer it codes to show to a phone. */
export function beginRegistration(connection, staticKey, { devicePairingData }) {
	const { eIdent, eRegid, eSkeyId, eSkeyVal, eSkeySig } = devicePairingData
	const { qrTtlMs } = connection.world.settings
	const start = Date.now()
	const refs = Array.from({ length: REFS }, (_, index) => ({
		text: randomBytes(24).toString('base64url'),
		expiresAt: start + (qrTtlMs ?? (FIRST_REF_S + index * LATER_REF_S) * 1000)
	}))
	connection.registration = {
		refs,
		keys: {
			noiseKey: staticKey,
			identity: Buffer.from(eIdent),
			registrationId: Buffer.from(eRegid).readUInt32BE(),
			signedPreKey: {
				id: Buffer.from(eSkeyId).readUIntBE(0, 3),
				value: Buffer.from(eSkeyVal),
				signature: Buffer.from(eSkeySig)
			}
		}
	}
	const offered = refs.map(({ text }) => node('ref', {}, Buffer.from(text)))
	connection.send(
		node('iq', { from: SERVER, type: 'set', id: randomId() }, [node('pair-device', {}, offered)])
	)
}

/** The phone of `person` scans `qr`. Resolves with the linked device. */
export async function scan(world, person, qr) {
	const parts = qr.split('#').at(-1).split(',')
	if (parts.length < 4) throw new Refused('this is no code of WhatsApp: no four parts after the #')
	const [ref, noiseKey, identity, advSecret] = parts
	const connection = [...world.connections].find(each =>
		each.registration?.refs.some(({ text, expiresAt }) => text === ref && Date.now() < expiresAt)
	)
	if (!connection) throw new Refused('this code is not shown by anyone now: it has expired')
	const { keys } = connection.registration
	if (keys.noiseKey.toString('base64') !== noiseKey || keys.identity.toString('base64') !== identity) {
		throw new Refused('this code shows other keys than its client connected with')
	}
	return link(world, connection, person, Buffer.from(advSecret, 'base64'))
}

/** Sign the device in the name of the phone, have it sign in turn, and let it log in. */
async function link(world, connection, person, advSecret) {
	const { registration } = connection
	if (registration.offer) throw new Refused('a phone is linking this client already')
	if (person.devices.size >= DEVICES_MAX) {
		throw new Refused(`${person.number} has ${DEVICES_MAX} linked devices: unlink one first`)
	}
	const deviceId = person.takeDeviceId()
	const { details, identity } = makeDeviceIdentity(person, deviceId, registration.keys.identity)
	const hmac = createHmac('sha256', advSecret).update(identity).digest()
	const sealed = proto.ADVSignedDeviceIdentityHMAC.encode({ details: identity, hmac }).finish()
	const id = randomId()
	registration.offer = { id, person, deviceId, details }
	connection.send(
		node('iq', { from: SERVER, type: 'set', id, t: now() }, [
			node('pair-success', {}, [
				node('device-identity', {}, sealed),
				node('device', {
					jid: `${person.number}:${deviceId}@s.whatsapp.net`,
					lid: `${person.lid}:${deviceId}@lid`
				}),
				node('platform', { name: 'android' })
			])
		])
	)
	await world.waitUntil(() => registration.linked || connection.closed, LINK_S_MAX)
	if (!registration.linked) throw new Refused('the client did not accept the link, or went away')
	return registration.linked
}

/** What the phone says of a device, signed: the words, and the words with the signature. */
function makeDeviceIdentity(person, deviceId, deviceKey) {
	const { identity, registrationId } = person.phone
	const details = proto.ADVDeviceIdentity.encode({
		rawId: registrationId,
		timestamp: Number(now()),
		keyIndex: deviceId
	}).finish()
	const signed = Buffer.concat([ACCOUNT_SIGNATURE, details, deviceKey])
	return {
		details,
		identity: proto.ADVSignedDeviceIdentity.encode({
			details,
			accountSignatureKey: identity.public,
			accountSignature: Curve.sign(identity.private, signed)
		}).finish()
	}
}

/** What a new device answers. Its signature makes it a device of the account. */
export function receiveRegistration(connection, received) {
	const { registration, world } = connection
	const signature = child(received, 'pair-device-sign')
	if (received.attrs.id !== registration.offer?.id || !signature) return
	const { person, deviceId, details } = registration.offer
	const { deviceSignature } = proto.ADVSignedDeviceIdentity.decode(
		bytesOf(signature, 'device-identity')
	)
	const { keys } = registration
	const accountKey = person.phone.identity.public
	const signed = Buffer.concat([DEVICE_SIGNATURE, details, keys.identity, accountKey])
	const key = wa.generateSignalPubKey(keys.identity)
	if (!libsignal.curve.verifySignature(key, signed, Buffer.from(deviceSignature))) {
		throw new Error('the device signed something else')
	}
	registration.linked = person.link(deviceId, keys)
	world.note('paired', { number: person.number, device: registration.linked.id })
	connection.end(RESTART)
}

// --- by pairing code -------------------------------------------------------------------------

/** `<link_code_companion_reg>` of a new device: it shows a code, or ends what a phone began. */
export function receivePairingCode(connection, received) {
	const request = child(received, 'link_code_companion_reg')
	if (request.attrs.stage === 'companion_finish') {
		connection.registration.bundle = bytesOf(request, 'link_code_pairing_wrapped_key_bundle')
		connection.world.note('pairing-code-answered')
		return []
	}
	const ref = randomBytes(16)
	connection.registration.code = {
		ref,
		number: addressOf(request.attrs.jid)?.number,
		wrapped: bytesOf(request, 'link_code_pairing_wrapped_companion_ephemeral_pub')
	}
	connection.world.note('pairing-code-shown')
	return [node('link_code_companion_reg', {}, [node('link_code_pairing_ref', {}, ref)])]
}

/** `code` is typed into the phone of `person`. Resolves with the linked device. */
export async function enterPairingCode(world, person, code) {
	const connection = [...world.connections].find(
		each => each.registration?.code?.number === person.number && !each.registration.offer
	)
	if (!connection) throw new Refused(`no client waits for a code of ${person.number}`)
	const { ref, wrapped } = connection.registration.code
	const companionKey = ctr('decrypt', await codeKey(code, wrapped), wrapped)
	const ephemeral = Curve.generateKeyPair()
	await sendPhonesKey(connection, person, code, ephemeral, ref)
	await world.waitUntil(() => connection.registration.bundle || connection.closed, LINK_S_MAX)
	const { bundle } = connection.registration
	if (!bundle) throw new Refused('the client did not answer, or went away')
	connection.registration.bundle = undefined
	const advSecret = openBundle(connection, person, ephemeral, companionKey, bundle)
	return link(world, connection, person, advSecret)
}

async function sendPhonesKey(connection, person, code, ephemeral, ref) {
	const head = randomBytes(48)
	const sealed = ctr('encrypt', await codeKey(code, head), Buffer.concat([head, ephemeral.public]))
	connection.send(
		node('notification', { from: SERVER, type: 'link_code_companion_reg', id: randomId(), t: now() }, [
			node('link_code_companion_reg', { stage: 'primary_hello' }, [
				node('link_code_pairing_wrapped_primary_ephemeral_pub', {}, Buffer.concat([head, sealed])),
				node('primary_identity_pub', {}, person.phone.identity.public),
				node('link_code_pairing_ref', {}, ref)
			])
		])
	)
}

/** The secret that both sides derive; a code that was mistyped shows here, and only here. */
function openBundle(connection, person, ephemeral, companionKey, bundle) {
	const { identity } = person.phone
	const shared = Curve.sharedKey(ephemeral.private, companionKey)
	const [salt, iv, sealed] = [bundle.subarray(0, 32), bundle.subarray(32, 44), bundle.subarray(44)]
	const info = 'link_code_pairing_key_bundle_encryption_key'
	let opened
	try {
		opened = aesDecryptGCM(sealed, hkdf(shared, 32, { salt, info }), iv, Buffer.alloc(0))
	} catch {
		throw new Refused('wrong code: ask the client for a new one')
	}
	const [companion, primary, random] = [0, 32, 64].map(start => opened.subarray(start, start + 32))
	const { keys } = connection.registration
	if (!companion.equals(keys.identity) || !primary.equals(identity.public)) {
		throw new Refused('the client answered for other keys')
	}
	const secret = Buffer.concat([shared, Curve.sharedKey(identity.private, companion), random])
	return Buffer.from(hkdf(secret, 32, { info: 'adv_secret' }))
}

// A wrapped key is: salt of 32 bytes, IV of 16, the key under AES-CTR with what the code derives.
const codeKey = (code, wrapped) => derivePairingCodeKey(code, wrapped.subarray(0, 32))

function ctr(direction, key, wrapped) {
	const make = direction === 'encrypt' ? createCipheriv : createDecipheriv
	const cipher = make('aes-256-ctr', key, wrapped.subarray(32, 48))
	return Buffer.concat([cipher.update(wrapped.subarray(48)), cipher.final()])
}
