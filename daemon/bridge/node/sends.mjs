// What becomes of messages that were sent: acks by the server, receipts by recipients.
import { isPnUser, jidDecode } from 'baileys'
import { CallFailed } from './errors.mjs'
import { isOwn } from './inbound.mjs'

const REFUSALS = {
	463: 'the account is restricted: it may not begin chats with this recipient now',
	479: 'the server could not read the message'
}

/**
 * Messages that wait for the server's ack.
 *
 * Baileys resolves a send when the stanza is on the socket, and tells nobody of a good ack.
 */
export class Unacknowledged {
	/** @type {Map<string, { resolve: () => void, reject: (error: Error) => void }>} */
	#waiting = new Map()

	get size() {
		return this.#waiting.size
	}

	/** @param {string} messageId */
	has(messageId) {
		return this.#waiting.has(messageId)
	}

	/**
	 * A promise for this message's ack. Rejects with `CallFailed`: `refused`; or what `failAll` and
	 * `giveUp` are called with.
	 * @param {string} messageId
	 * @returns {Promise<void>}
	 */
	expect(messageId) {
		return new Promise((resolve, reject) => this.#waiting.set(messageId, { resolve, reject }))
	}

	/**
	 * An ack has arrived; what it refused that nobody waits for is returned.
	 * @param {Record<string, string>} attrs of `<ack class="message">`
	 * @returns {{ messageId: string, code: number } | null}
	 */
	acknowledge({ id: messageId, error }) {
		const waiting = this.#waiting.get(messageId)
		this.#waiting.delete(messageId)
		if (error === undefined) {
			waiting?.resolve()
			return null
		}
		const code = Number(error) || 500
		if (!waiting) return { messageId, code }
		const message = REFUSALS[code] ?? 'the server refused the message'
		waiting.reject(new CallFailed('refused', message, { code }))
		return null
	}

	/**
	 * @param {string} messageId
	 * @param {Error} error
	 */
	giveUp(messageId, error) {
		const waiting = this.#waiting.get(messageId)
		this.#waiting.delete(messageId)
		waiting?.reject(error)
	}

	/** @param {Error} error */
	failAll(error) {
		for (const messageId of [...this.#waiting.keys()]) this.giveUp(messageId, error)
	}
}

/** What recipients' receipts mean. Others (retry, sender, server-error, …) are not progress. */
const STATES = { '': 'delivered', inactive: 'delivered', read: 'read', played: 'read' }

/**
 * How far a receipt says that our messages have come; nothing for one of our own other devices.
 * @param {import('baileys').BinaryNode} node `<receipt>`
 * @param {{ id: string, lid?: string }} me
 * @returns {{ messageId: string, state: string }[]}
 */
export function readReceipt({ attrs, content }, me) {
	const state = STATES[attrs.type ?? '']
	const from = attrs.participant ?? attrs.from
	if (!state || isOwn(from, me) || attrs.recipient) return []
	const items =
		Array.isArray(content) && Array.isArray(content[0]?.content) ? content[0].content : []
	const ids = [attrs.id, ...items.filter(each => each.tag === 'item').map(each => each.attrs.id)]
	return ids.filter(Boolean).map(messageId => ({ messageId, state }))
}

/**
 * Whether WhatsApp knows a number under other digits (in Brazil and Mexico numbers have grown, and
 * older accounts have not): what is sent to the digits that were given is acknowledged and lost.
 * @param {string} jid whom WhatsApp names for the number
 * @param {string} phone
 */
export function isOtherSpelling(jid, phone) {
	return Boolean(isPnUser(jid)) && jidDecode(jid)?.user !== phone
}
