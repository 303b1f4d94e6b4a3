// Holds back what Baileys would tell the server about a message until the message is kept.
//
// Baileys (7.0.0-rc14) decrypts, sends the receipt, and only then emits the message: a crash in
// between loses it. So the decryption that Baileys calls resolves when the text, and the keys that
// changed by reading it, are durable. Until then there is no receipt, and the server keeps it.
import {
	areJidsSameUser,
	isJidBroadcast,
	isJidGroup,
	isJidStatusBroadcast,
	isLidUser,
	isPnUser,
	jidDecode,
	normalizeMessageContent,
	proto,
	unpadRandomMax16
} from 'baileys'

/** More than WhatsApp allows anyone to send; what is longer is cut, or it would come for ever. */
const TEXT_CHARS_MAX = 100_000

/**
 * A text that somebody else sent to the account.
 * @typedef {{ messageId: string, chat: string, sender: string, senderName?: string, text: string,
 *   sentAt: number }} Mail
 */

/** Knows, for each ciphertext that is being read, the stanza it came in. */
export class Stanzas {
	#byCiphertext = new WeakMap()

	/** @param {import('baileys').BinaryNode} node `<message>`, before Baileys hears of it */
	note(node) {
		if (!Array.isArray(node.content)) return
		for (const child of node.content) {
			if (child.tag === 'enc' && child.content instanceof Uint8Array) {
				this.#byCiphertext.set(child.content, node)
			}
		}
	}

	/** @param {Uint8Array} ciphertext */
	of(ciphertext) {
		return this.#byCiphertext.get(ciphertext)
	}
}

/**
 * Wrap a factory of Baileys' Signal repository so that decrypting waits for `keep`.
 *
 * Reading takes the lock that Baileys sends under: both read and write the same session record, and
 * under locks of their own one would undo the other.
 * @param {Function} makeRepository
 * @param {Stanzas} stanzas
 * @param {(mail: Mail | null) => Promise<void>} keep resolves when the message, if it is one, and all
 *   changed keys are durable; never settles when they cannot be: the connection is then ending
 */
export function keepBeforeReceipt(makeRepository, stanzas, keep) {
	return (auth, ...rest) => {
		const repository = makeRepository(auth, ...rest)
		const kept = (decrypt, ciphertextOf) => async args => {
			const { me } = auth.creds
			const plaintext = await auth.keys.transaction(() => decrypt(args), me.id)
			const stanza = stanzas.of(ciphertextOf(args))
			await keep(stanza ? await readMail(stanza, plaintext, me, repository.lidMapping) : null)
			return plaintext
		}
		return {
			...repository,
			decryptMessage: kept(repository.decryptMessage, args => args.ciphertext),
			decryptGroupMessage: kept(repository.decryptGroupMessage, args => args.msg)
		}
	}
}

/**
 * The mail in a decrypted stanza; `null` for our own messages, statuses, and what is no text.
 * @param {import('baileys').BinaryNode} stanza
 * @param {Uint8Array} plaintext
 * @param {{ id: string, lid?: string }} me
 * @param {{ getPNForLID: (lid: string) => Promise<string | null> }} lidMapping
 * @returns {Promise<Mail | null>}
 */
async function readMail({ attrs }, plaintext, me, lidMapping) {
	const author = attrs.participant ?? attrs.from
	const isOwn = areJidsSameUser(author, me.id) || (me.lid && areJidsSameUser(author, me.lid))
	if (isOwn || attrs.category === 'peer' || isJidStatusBroadcast(attrs.from)) return null
	const text = readText(plaintext)
	if (!text) return null
	const phone = attrs.participant_pn ?? attrs.sender_pn
	const sender = await nameOf(author, phone, lidMapping)
	// A broadcast list is the sender's own affair: to its recipients it is a chat with him.
	const isDirect = !isJidGroup(attrs.from) || isJidBroadcast(attrs.from)
	return {
		messageId: attrs.id,
		chat: isDirect ? sender : attrs.from,
		sender,
		...(attrs.notify ? { senderName: attrs.notify.toWellFormed() } : {}),
		text,
		sentAt: Number(attrs.t) || 0
	}
}

/** @param {Uint8Array} plaintext */
function readText(plaintext) {
	let message
	try {
		message = proto.Message.decode(unpadRandomMax16(plaintext))
	} catch {
		// Baileys finds the same, and asks for the message again.
		return ''
	}
	const content = normalizeMessageContent(message.deviceSentMessage?.message ?? message)
	const text = content?.conversation || content?.extendedTextMessage?.text || ''
	return text.slice(0, TEXT_CHARS_MAX).toWellFormed()
}

/**
 * What the daemon calls a person: the phone number if it is known, else the LID.
 * @param {string} jid
 * @param {string | undefined} phone as the stanza says
 * @param {{ getPNForLID: (lid: string) => Promise<string | null> }} lidMapping
 */
async function nameOf(jid, phone, lidMapping) {
	if (isPnUser(jid)) return jidDecode(jid).user
	if (phone && isPnUser(phone)) return jidDecode(phone).user
	const known = isLidUser(jid) ? await lidMapping.getPNForLID(jid) : null
	if (known) return jidDecode(known).user
	const { user, server } = jidDecode(jid) ?? { user: jid, server: 'unknown' }
	return `${user}@${server}`
}
