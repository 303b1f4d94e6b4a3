// What clients ask (`iq`) and what they are answered. What nobody has thought of gets an empty
// result: a client waits a minute for an answer.
import {
	addressOf,
	bundleNode,
	bytesOf,
	child,
	children,
	firstChild,
	node,
	SERVER,
	textOf
} from './nodes.mjs'
import { receivePairingCode } from './registration.mjs'

/** A client with fewer one-time keys on the server than this uploads 5 (0: 812). */
const PRE_KEYS_FEW = 5
const PRE_KEYS_PLENTY = 100

export function answer(connection, received) {
	const { type, xmlns, id } = received.attrs
	if (type !== 'get' && type !== 'set') return
	const ask = ASKED[`${type} ${xmlns} ${firstChild(received)?.tag ?? ''}`]
	// A client that is not logged in may ask for one thing: to be linked by a code.
	const allowed = ask && (connection.device !== null || ask === receivePairingCode)
	const content = allowed ? ask(connection, received) : []
	connection.send(node('iq', { from: SERVER, type: 'result', id }, content))
	if (allowed && ask === activate && !connection.ready) connection.device.sendBacklog()
}

const ASKED = {
	'get encrypt count': countPreKeys,
	'set encrypt registration': addPreKeys,
	'set encrypt rotate': rotate,
	'get encrypt digest': () => [node('digest')],
	'get encrypt key': takeBundles,
	'set passive active': activate,
	'get usync usync': lookUp,
	'get abt props': () => [node('props', { hash: 'fake' })],
	'get blocklist ': () => [node('list')],
	'get privacy privacy': () => [
		node('privacy', {}, [node('category', { name: 'readreceipts', value: 'all' })])
	],
	'set w:sync:app:state sync': syncAppState,
	'set md link_code_companion_reg': receivePairingCode,
	'set md remove-companion-device': removeDevice
}

/** The client is ready: its backlog follows the answer. */
function activate() {
	return []
}

function countPreKeys({ device, world }) {
	const { preKeyCount } = device.person
	if (preKeyCount !== null) return [node('count', { value: preKeyCount.toString() })]
	const real = device.preKeys.length
	// The real 0 makes a client upload 812 keys: most tests have no use for the wait.
	const few = real > 0 ? PRE_KEYS_PLENTY : PRE_KEYS_FEW
	return [node('count', { value: (world.settings.preKeys === 'real' ? real : few).toString() })]
}

function addPreKeys({ device, world }, received) {
	const preKeys = children(child(received, 'list'), 'key').map(readKey)
	device.addPreKeys(preKeys)
	device.signedPreKey = readSignedKey(child(received, 'skey'))
	world.note('pre-keys', { number: device.person.number, count: preKeys.length })
	return []
}

function rotate({ device }, received) {
	device.signedPreKey = readSignedKey(child(child(received, 'rotate'), 'skey'))
	return []
}

const readKey = each => ({ id: bytesOf(each, 'id').readUIntBE(0, 3), value: bytesOf(each, 'value') })
const readSignedKey = each => ({ ...readKey(each), signature: bytesOf(each, 'signature') })

function takeBundles({ world }, received) {
	const users = children(child(received, 'key'), 'user').map(({ attrs: { jid } }) => {
		const found = world.find(jid)
		const party = found && (found.device === 0 ? found.person.phone : found.person.devices.get(found.device))
		const unknown = () => node('user', { jid }, [node('error', { code: '404', text: 'not-found' })])
		return party ? bundleNode(jid, party.takeBundle()) : unknown()
	})
	return [node('list', {}, users)]
}

function lookUp({ world }, received) {
	const usync = child(received, 'usync')
	const protocols = new Set(child(usync, 'query').content.map(({ tag }) => tag))
	const users = children(child(usync, 'list'), 'user').map(each => {
		const { jid } = each.attrs
		if (jid) return describe(world, world.person(addressOf(jid)?.number), jid, protocols)
		// Asked for by a number as somebody typed it: the answer has it as WhatsApp spells it.
		const typed = world.person(textOf(child(each, 'contact')).replace(/^\+/, ''))
		const person = typed.spelledAs ? world.person(typed.spelledAs) : typed
		return describe(world, person, person.jid, protocols)
	})
	return [node('usync', {}, [node('list', {}, users)])]
}

function describe(world, person, jid, protocols) {
	const content = []
	if (protocols.has('contact')) content.push(node('contact', { type: person.exists ? 'in' : 'out' }))
	if (protocols.has('devices') && person.exists) {
		const linked = [...person.devices.keys()].map(id =>
			node('device', { id: id.toString(), 'key-index': id.toString() })
		)
		const list = node('device-list', {}, [node('device', { id: '0' }), ...linked])
		content.push(node('devices', {}, [list]))
	}
	if (protocols.has('lid') && person.exists && world.settings.lids) {
		content.push(node('lid', { val: person.lidJid }))
	}
	return node('user', { jid }, content)
}

function syncAppState(_, received) {
	const collections = children(child(received, 'sync'), 'collection').map(({ attrs: { name } }) =>
		node('collection', { name, version: '1' })
	)
	return [node('sync', {}, collections)]
}

/** The client logs itself out. */
function removeDevice({ device, world }) {
	device.person.devices.delete(device.id)
	world.note('logged-out', { number: device.person.number, device: device.id })
	return []
}
