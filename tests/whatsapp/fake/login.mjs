// A paired device logs in, and takes the place of whoever is logged in as the same device.
import { ending, REPLACED } from './endings.mjs'
import { node, now } from './nodes.mjs'

export function login(connection, staticKey, payload) {
	const { world } = connection
	const number = payload.username.toString()
	const person = world.person(number)
	const device = person.devices.get(payload.device)
	if (!device?.noiseKey.equals(staticKey)) {
		world.note('login-refused', { number, code: 401 })
		connection.end(ending(401))
		return
	}
	const refusal = takeRefusal(person)
	if (refusal) {
		world.note('login-refused', { number, device: device.id, code: refusal.code })
		connection.end(ending(refusal.code, refusal))
		return
	}
	evict(world, device, 'client')
	connection.device = device
	device.connection = connection
	device.logins++
	world.note('login', { number, device: device.id })
	connection.send(node('success', { t: now(), lid: device.lidJid }))
	// Which front server to come back to; from then on the client's greeting is longer.
	const route = node('routing_info', {}, Buffer.from(`fake${number.slice(-4)}`))
	connection.send(node('ib', {}, [node('edge_routing', {}, [route])]))
}

function takeRefusal(person) {
	const { refusal } = person
	if (refusal && --refusal.times <= 0) person.refusal = null
	return refusal
}

/** One device, one connection: the older one is told that it was replaced. */
function evict(world, device, by) {
	const { connection, foreigner } = device
	if (!connection && !foreigner) return
	device.conflicts++
	device.foreigner = null
	world.note('conflict', { number: device.person.number, device: device.id, by })
	connection?.end(REPLACED)
	if (foreigner?.fights > 0) {
		const again = { ...foreigner, fights: foreigner.fights - 1 }
		setTimeout(() => loginAsForeigner(world, device, again), foreigner.everyMs)
	}
}

/** Somebody else logs in as this device; `fights` more times after being replaced himself. */
export function loginAsForeigner(world, device, { fights, everyMs }) {
	if (device.person.devices.get(device.id) !== device) return
	evict(world, device, 'foreigner')
	device.foreigner = { fights, everyMs }
}
