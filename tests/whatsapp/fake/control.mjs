// The control API: what the tests say to the phones, the network and the server. JSON over HTTP.
import { createServer } from 'node:http'
import { CODES, ending, REMOVED } from './endings.mjs'
import { loginAsForeigner } from './login.mjs'
import { openAll, releaseHeld, sendReceipt, sendText } from './messages.mjs'
import { Policy } from './person.mjs'
import { Refused } from './refused.mjs'
import { enterPairingCode, scan } from './registration.mjs'

const BODY_BYTES_MAX = 1024 * 1024
const WAIT_S_MAX = 60
const TEXTS_MAX = 10_000

// --- what a body may hold --------------------------------------------------------------------

const isA = type => value => typeof value === type
const oneOf = (...values) => value => values.includes(value)
const count = value => Number.isInteger(value) && value >= 0
const digits = value => typeof value === 'string' && /^[1-9]\d{4,14}$/.test(value)
const strings = value => Array.isArray(value) && value.length <= TEXTS_MAX && value.every(isA('string'))
const orNull = check => value => value === null || check(value)
const policy = {
	mode: oneOf('good', 'error', 'delay', 'withhold'),
	error: count,
	delayMs: count,
	deliver: isA('boolean'),
	times: count
}

/** Fields by name; one that ends in `!` must be there. Anything else is refused by name. */
function check(body, fields) {
	for (const [name, value] of Object.entries(body)) {
		const valid = fields[name] ?? fields[`${name}!`]
		if (!valid) throw new Refused(`unknown field ${name}; known: ${Object.keys(fields).join(', ')}`)
		if (!valid(value)) throw new Refused(`${name} cannot be ${JSON.stringify(value)}`)
	}
	for (const name of Object.keys(fields)) {
		if (name.endsWith('!') && !(name.slice(0, -1) in body)) throw new Refused(`${name} is missing`)
	}
}

// --- the routes ------------------------------------------------------------------------------

/** `METHOD /path/:number` → [fields of the body, what is done]. */
const ROUTES = {
	'GET /state': [{}, describe],
	'GET /log': [{}, world => ({ log: world.log })],
	'POST /wait': [
		{ 'event!': isA('string'), count, seconds: count },
		(world, { event, count: least = 1, seconds = WAIT_S_MAX }) =>
			world.waitUntil(() => (world.counts[event] ?? 0) >= least, Math.min(seconds, WAIT_S_MAX))
	],
	'POST /settings': [
		{
			decrypt: oneOf('eager', 'lazy'),
			preKeys: oneOf('few', 'real'),
			lids: isA('boolean'),
			qrTtlMs: orNull(count),
			latencyMs: count,
			outage: oneOf('none', 'reset', '503')
		},
		(world, settings) => {
			Object.assign(world.settings, settings)
			return world.settings
		}
	],
	'POST /reset': [{}, world => world.reset()],
	'POST /people/:number/scan': [
		{ 'qr!': isA('string') },
		async (world, { qr }, person) => describeDevice(await scan(world, person, qr))
	],
	'POST /people/:number/enter-code': [
		{ 'code!': isA('string') },
		async (world, { code }, person) => describeDevice(await enterPairingCode(world, person, code))
	],
	'GET /people/:number': [{}, (_, __, person) => describePerson(person)],
	'POST /people/:number': [
		{
			exists: isA('boolean'),
			spelledAs: orNull(digits),
			decrypt: orNull(oneOf('eager', 'lazy')),
			preKeyCount: orNull(count)
		},
		(_, facts, person) => describePerson(Object.assign(person, facts))
	],
	'POST /people/:number/close': [
		{ 'code!': oneOf(...CODES), expireS: count, deviceRemoved: isA('boolean') },
		(_, { code, ...how }, person) => eachConnection(person, each => each.end(ending(code, how)))
	],
	'POST /people/:number/cut': [{}, (_, __, person) => eachConnection(person, each => each.cut())],
	'POST /people/:number/silence': [
		{ 'on!': isA('boolean') },
		(_, { on }, person) => void (person.silent = on)
	],
	'POST /people/:number/refuse': [
		{ 'code!': orNull(oneOf(...CODES)), expireS: count, times: count },
		(_, { code, expireS, times = Infinity }, person) =>
			void (person.refusal = code === null ? null : { code, expireS, times })
	],
	'POST /people/:number/unlink': [{ device: count }, unlink],
	'POST /people/:number/foreign-login': [
		{ device: count, fights: count, everyMs: count },
		(world, { device: id, fights = 0, everyMs = 1000 }, person) =>
			loginAsForeigner(world, deviceOf(person, id), { fights, everyMs })
	],
	'POST /people/:number/acks': [policy, (_, how, person) => void (person.acks = new Policy(how))],
	'POST /people/:number/receipts': [
		policy,
		(_, how, person) => void (person.receipts = new Policy(how))
	],
	'POST /people/:number/hold': [{}, (_, __, person) => void (person.held ??= [])],
	'POST /people/:number/release': [{ drop: isA('boolean') }, release],
	'POST /people/:number/send': [
		{ 'to!': digits, 'texts!': strings, ids: strings, twice: isA('boolean') },
		send
	],
	'GET /people/:number/inbox': [{}, inbox],
	'POST /people/:number/wait-inbox': [
		{ 'count!': count, seconds: count },
		(world, { count: least, seconds = WAIT_S_MAX }, person) =>
			world.waitUntil(
				() => openAll(person).then(() => person.inbox.shownCount >= least),
				Math.min(seconds, WAIT_S_MAX)
			)
	],
	'GET /people/:number/sent': [{}, (_, __, person) => ({ sent: [...person.sent.values()] })],
	'POST /people/:number/read': [{ 'from!': digits, ids: strings }, read],
	'POST /people/:number/forget': [
		{ 'session!': digits, device: count },
		(world, { session, device: id }, person) => {
			const device = deviceOf(world.person(session), id)
			person.phone.forget(session, device.id)
		}
	]
}

function eachConnection(person, act) {
	const connections = [...person.devices.values()].map(each => each.connection).filter(Boolean)
	connections.forEach(act)
	return { connections: connections.length }
}

/** The device with this id; without one, the one that was linked last. */
function deviceOf(person, id = Math.max(0, ...person.devices.keys())) {
	const device = person.devices.get(id)
	if (!device) throw new Refused(`${person.number} has no linked device ${id || 'at all'}`)
	return device
}

function unlink(world, { device: id }, person) {
	const device = deviceOf(person, id)
	person.devices.delete(device.id)
	device.connection?.end(REMOVED)
	world.note('unlinked', { number: person.number, device: device.id })
}

/** What was held goes on: messages on the wire, withheld acks, withheld receipts. */
function release(_, { drop = false }, person) {
	const messages = releaseHeld(person, { drop })
	const [acks, receipts] = [person.heldAcks.splice(0), person.heldReceipts.splice(0)]
	if (!drop) for (const each of [...acks, ...receipts]) each()
	return { messages, acks: acks.length, receipts: receipts.length }
}

async function send(world, { to, texts, ids = [], twice }, person) {
	const account = world.person(to)
	if (account.devices.size === 0) throw new Refused(`${to} has no linked device to send to`)
	const sent = []
	for (const [index, text] of texts.entries()) {
		sent.push(await sendText(world, person, account, text, { id: ids[index], twice }))
	}
	return { ids: sent }
}

async function inbox(_, __, person) {
	await openAll(person)
	const { arrivals, dropped, ownCopies, shown, unreadable } = person.inbox
	return { shown, unreadable, arrivals, dropped, ownCopies }
}

/** The person reads what came from `from`: the blue ticks. */
function read(world, { from, ids }, person) {
	const device = deviceOf(world.person(from))
	const seen = person.inbox.shown.filter(each => each.from === from)
	const chosen = ids ?? seen.map(({ id }) => id)
	for (const id of chosen) sendReceipt(person, device, id, 'read')
	return { ids: chosen }
}

// --- what is told ----------------------------------------------------------------------------

const describeDevice = device => ({
	device: device.id,
	jid: device.jid,
	connected: device.connection !== null,
	ready: device.connection?.ready ?? false,
	foreign: device.foreigner !== null,
	logins: device.logins,
	conflicts: device.conflicts,
	preKeys: device.preKeys.length,
	waiting: device.waiting,
	dropped: device.dropped
})

const describePerson = person => ({
	number: person.number,
	lid: person.lid,
	exists: person.exists,
	devices: [...person.devices.values()].map(describeDevice),
	received: person.inbox.arrivals.length + person.inbox.dropped,
	held: person.held?.length ?? 0,
	heldAcks: person.heldAcks.length,
	heldReceipts: person.heldReceipts.length
})

function describe(world) {
	const { user, system } = process.cpuUsage()
	return {
		cpuS: (user + system) / 1e6,
		rssBytes: process.memoryUsage.rss(),
		connections: world.connections.size,
		counts: world.counts,
		settings: world.settings,
		accounts: world.accounts.map(describePerson)
	}
}

// --- HTTP ------------------------------------------------------------------------------------

async function readBody(request) {
	const chunks = []
	let size = 0
	for await (const chunk of request) {
		size += chunk.length
		if (size > BODY_BYTES_MAX) throw new Refused(`a body has at most ${BODY_BYTES_MAX} bytes`)
		chunks.push(chunk)
	}
	if (size === 0) return {}
	try {
		const body = JSON.parse(Buffer.concat(chunks).toString())
		if (typeof body === 'object' && body !== null && !Array.isArray(body)) return body
	} catch {
		// Told below, as any other body that is no object.
	}
	throw new Refused('the body is no JSON object')
}

async function respond(world, request) {
	const { pathname } = new URL(request.url, 'http://fake')
	const [, people, number, ...rest] = pathname.split('/')
	const named = people === 'people' && number !== undefined
	const path = named ? ['/people/:number', ...rest].join('/') : pathname
	const route = ROUTES[`${request.method} ${path}`]
	if (!route) throw new Refused(`no ${request.method} ${pathname}: see the README beside the fake`)
	if (named && !digits(number)) throw new Refused(`${number} is no phone number: 5 to 15 digits`)
	const [fields, act] = route
	const body = await readBody(request)
	check(body, fields)
	return (await act(world, body, named ? world.person(number) : undefined)) ?? {}
}

export function makeControlServer(world) {
	return createServer(async (request, response) => {
		const reply = (status, body) => {
			response.writeHead(status, { 'content-type': 'application/json' })
			response.end(JSON.stringify(body))
		}
		try {
			reply(200, await respond(world, request))
		} catch (error) {
			if (error instanceof Refused) reply(400, { error: error.message })
			else reply(500, { error: error.stack })
		}
	})
}
