// Messages and receipts, both ways: from a linked device to a phone or another device, and from a
// phone to the linked devices of an account.
import { wa } from './baileys.mjs'
import { child, children, node, now, randomId, uint } from './nodes.mjs'

const RETRIES_MAX = 5
/** Texts of one person that can be sent again or asked for; the oldest are forgotten. */
const SENT_MAX = 10_000
/** Messages, acks and receipts of one account that can be held; one more is an error. */
const HELD_MAX = 10_000

// --- from a linked device --------------------------------------------------------------------

export function receiveMessage(connection, message) {
	const { device, world } = connection
	const { held, number } = device.person
	world.note('message', { number, id: message.attrs.id })
	if (held === null) accept(connection, device, message)
	else hold(held, { connection, device, message })
}

function hold(held, each) {
	if (held.length >= HELD_MAX) throw new Error(`more than ${HELD_MAX} are held`)
	held.push(each)
}

/** What was held takes its course, in order; `drop`: it is lost, as on a wire that was cut. */
export function releaseHeld(person, { drop }) {
	const held = person.held ?? []
	person.held = null
	if (!drop) for (const { connection, device, message } of held) accept(connection, device, message)
	return held.length
}

function accept(connection, device, message) {
	const { person } = device
	const { mode, error, delayMs, deliver } = person.acks.take()
	const ack = attrs => () => connection.send(acknowledge(message, attrs))
	if (mode === 'error') {
		ack({ error: error.toString() })()
		return
	}
	if (mode === 'good') ack()()
	else if (mode === 'delay') setTimeout(ack(), delayMs)
	else hold(person.heldAcks, ack())
	if (deliver) deliverAll(connection.world, device, message)
}

function acknowledge({ tag, attrs }, { error } = {}) {
	const { id, to, participant } = attrs
	const type = tag === 'receipt' ? attrs.type : undefined
	return node('ack', { class: tag, id, from: to, t: now(), type, participant, error })
}

function deliverAll(world, sender, message) {
	const direct = child(message, 'enc')
	const sealed = children(child(message, 'participants'), 'to').map(to => ({
		jid: to.attrs.jid,
		enc: child(to, 'enc')
	}))
	if (direct) sealed.push({ jid: message.attrs.to, enc: direct })
	for (const { jid, enc } of sealed) {
		const target = world.find(jid)
		if (!target || !enc) continue
		const { person, device } = target
		if (device !== 0) forward(sender, person.devices.get(device), message, enc)
		else if (person === sender.person) person.inbox.ownCopies++
		else arrive(world, person, sender, message.attrs.id, enc)
	}
}

/** To a device of another account, or to another one of the same account. */
function forward(sender, device, { attrs: { id, to, type } }, enc) {
	if (!device) return
	const own = device.person === sender.person
	const attrs = { from: sender.jid, id, t: now(), type, notify: sender.person.number }
	if (own) attrs.recipient = to
	else attrs.sender_lid = sender.person.lidJid
	device.enqueue(node('message', attrs, [enc]))
}

// --- at a phone ------------------------------------------------------------------------------

function arrive(world, person, sender, id, enc) {
	const { number } = sender.person
	const { type } = enc.attrs
	const arrival = person.inbox.add({ id, from: number, device: sender.id, type })
	if (!arrival) return
	world.note('arrived', { number: person.number, from: number, id })
	if (person.isEager(world)) {
		void openArrival(world, person, sender, arrival, enc, () => sendReceipt(person, sender, id))
	} else {
		person.unopened.push(() => openArrival(world, person, sender, arrival, enc, () => undefined))
		sendReceipt(person, sender, id)
	}
}

/** Open what a lazy phone has left unopened, in the order in which it came. */
export async function openAll(person) {
	const unopened = person.unopened.splice(0)
	await Promise.all(unopened.map(open => open()))
}

async function openArrival(world, person, sender, arrival, enc, confirm) {
	const facts = { number: person.number, from: sender.person.number, id: arrival.id }
	let text
	try {
		text = await decrypt(person.phone, sender, enc)
	} catch (error) {
		person.inbox.fail(arrival, error.message)
		world.note('unreadable', facts)
		askAgain(person, sender, arrival.id)
		return
	}
	person.inbox.read(arrival, text)
	person.retries.delete(arrival.id)
	world.note('read', facts)
	confirm()
}

async function decrypt(phone, sender, enc) {
	const padded = await phone.decrypt(sender.person.number, sender.id, enc.attrs.type, enc.content)
	const message = wa.proto.Message.decode(wa.unpadRandomMax16(padded))
	return message.conversation || message.extendedTextMessage?.text || ''
}

/** A phone that cannot read a message asks for it again. */
function askAgain(person, sender, id) {
	const asked = (person.retries.get(id) ?? 0) + 1
	if (asked > RETRIES_MAX) return
	person.retries.set(id, asked)
	const retry = node('retry', { count: asked.toString(), id, t: now(), v: '1' })
	sender.enqueue(
		node('receipt', { from: person.jid, id, t: now(), type: 'retry' }, [
			retry,
			node('registration', {}, uint(person.phone.registrationId, 4))
		])
	)
}

/** Delivery (no type) or `read`, as the account's policy says. */
export function sendReceipt(person, device, id, type = undefined) {
	const account = device.person
	const { mode, delayMs } = account.receipts.take()
	const send = () => device.enqueue(node('receipt', { from: person.jid, id, t: now(), type }))
	if (mode === 'good') send()
	else if (mode === 'delay') setTimeout(send, delayMs)
	else hold(account.heldReceipts, send)
}

// --- from a phone to the devices of an account ---------------------------------------------------

/** `person` writes to `account`. Resolves with the id once every device's stanza is on its way. */
export async function sendText(world, person, account, text, { id = randomId(), twice = false } = {}) {
	if (person.sent.size >= SENT_MAX) person.sent.delete(person.sent.keys().next().value)
	person.sent.set(id, { id, to: account.number, text, receipts: [] })
	for (const device of account.devices.values()) {
		const stanza = await seal(person, device, id, text)
		for (let times = twice ? 2 : 1; times > 0; times--) device.enqueue(stanza)
	}
	world.note('written', { number: person.number, to: account.number, id })
	return id
}

async function seal(person, device, id, text, attrs = {}) {
	const plaintext = wa.encodeWAMessage({ conversation: text })
	const takeBundle = () => device.takeBundle()
	const { number } = device.person
	const { type, body } = await person.phone.encrypt(number, device.id, plaintext, takeBundle)
	const { jid, lidJid } = person
	const envelope = { from: jid, id, t: now(), type: 'text', notify: person.number, sender_lid: lidJid }
	return node('message', envelope, [node('enc', { v: '2', type, ...attrs }, body)])
}

/** A device has got a message, or has read it, or cannot read it. */
export function receiveReceipt(connection, receipt) {
	const { device, world } = connection
	const { id, to, type } = receipt.attrs
	const items = children(child(receipt, 'list'), 'item').map(({ attrs }) => attrs.id)
	const contact = world.find(to)?.person
	for (const each of [id, ...items]) {
		const sent = contact?.sent.get(each)
		sent?.receipts.push({ type: type ?? 'delivered', device: device.id, at: Date.now() / 1000 })
		if (type !== 'retry') device.release('message', each)
		else if (sent) void sendAgain(contact, device, sent, child(receipt, 'retry')?.attrs.count)
	}
	world.note('receipt', { number: device.person.number, id, type: type ?? 'delivered' })
	connection.send(acknowledge(receipt))
}

/** In a new session: the device has said that it cannot use the one there is. */
async function sendAgain(person, device, { id, text }, count = '1') {
	if (Number(count) > RETRIES_MAX) return
	person.phone.forget(device.person.number, device.id)
	device.enqueue(await seal(person, device, id, text, { count }))
}

/** A device is done with a stanza, for better or (with an error) for worse. */
export function receiveAck({ device, world }, { attrs }) {
	device.release(attrs.class, attrs.id)
	if (attrs.error) world.note('nack', { number: device.person.number, id: attrs.id, error: attrs.error })
}
