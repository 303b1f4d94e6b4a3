// The small words of the protocol: making nodes, reading what is in them, and whose an address is.
import { randomBytes } from 'node:crypto'
import { wa } from './baileys.mjs'

export const SERVER = wa.S_WHATSAPP_NET

export const node = (tag, attrs = {}, content = undefined) => ({ tag, attrs, content })
export const child = (parent, tag) => wa.getBinaryNodeChild(parent, tag)
export const children = (parent, tag) => wa.getBinaryNodeChildren(parent, tag)
export const firstChild = parent => wa.getAllBinaryNodeChildren(parent)[0]
export const bytesOf = (parent, tag) => {
	const content = child(parent, tag)?.content
	return content === undefined ? undefined : Buffer.from(content)
}
export const textOf = each => (each?.content === undefined ? '' : Buffer.from(each.content).toString())
export const now = () => Math.floor(Date.now() / 1000).toString()
export const randomId = () => `3EB0${randomBytes(9).toString('hex').toUpperCase()}`

export function uint(value, length) {
	const bytes = Buffer.alloc(length)
	bytes.writeUIntBE(value, 0, length)
	return bytes
}

// A person's LID is made of the number, so that nobody keeps a table of them.
const LID_LEAD = '2'
const NUMBER_DIGITS_MAX = 15

export const lidOf = number => LID_LEAD + number.padStart(NUMBER_DIGITS_MAX, '0')

/** The phone number and the device that an address means: a phone number's or a LID's. */
export function addressOf(jid) {
	const decoded = wa.jidDecode(jid)
	if (!decoded?.user) return undefined
	const { user, server, device = 0 } = decoded
	if (server === 's.whatsapp.net') return { number: user, device }
	if (server === 'lid' && user.startsWith(LID_LEAD)) {
		return { number: user.slice(LID_LEAD.length).replace(/^0+/, ''), device }
	}
	return undefined
}

/** `<user>` with all that opens a Signal session with it, as the answer to a key query. */
export function bundleNode(jid, { registrationId, identity, signedPreKey, preKey }) {
	const content = [
		node('registration', {}, uint(registrationId, 4)),
		node('type', {}, Buffer.from([5])),
		node('identity', {}, identity),
		node('skey', {}, [
			node('id', {}, uint(signedPreKey.id, 3)),
			node('value', {}, signedPreKey.value),
			node('signature', {}, signedPreKey.signature)
		])
	]
	if (preKey) {
		content.push(
			node('key', {}, [node('id', {}, uint(preKey.id, 3)), node('value', {}, preKey.value)])
		)
	}
	return node('user', { jid }, content)
}
