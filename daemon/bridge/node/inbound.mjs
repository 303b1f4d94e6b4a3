// Holds back what Baileys would tell the server about a message until the message is kept.
//
// Baileys (7.0.0-rc14) decrypts, sends the receipt, and only then emits the message: a crash in
// between loses it. So the decryption that Baileys calls resolves when the text, and the keys that
// changed by reading it, are durable. Until then there is no receipt, and the server keeps it.
import {
	areJidsSameUser,
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

/** @typedef {{ id: string, lid?: string }} Me */
/** @typedef {{ getPNForLID: (lid: string) => Promise<string | null> }} LidMapping */

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
 * @param {import('./keys.mjs').AccountKeys} keys
 * @param {(mail: Mail[]) => Promise<void>} keep resolves when the messages, if there are any, and
 *   all changed keys are durable; never settles when they cannot be: the connection is then ending
 */
export function keepBeforeReceipt(makeRepository, stanzas, keys, keep) {
	return (auth, ...rest) => {
		const repository = makeRepository(auth, ...rest)
		const kept = (decrypt, ciphertextOf) => async args => {
			const { me } = auth.creds
			let mail = []
			const read = async () => {
				keys.beginReading()
				const plaintext = await decrypt(args)
				const stanza = stanzas.of(ciphertextOf(args))
				if (stanza) mail = await readMail(stanza, plaintext, me, repository.lidMapping)
				return plaintext
			}
			let plaintext
			try {
				plaintext = await auth.keys.transaction(read, me.id)
			} finally {
				keys.endReading()
			}
			// In the same step: what reading changed goes with the message, or not at all.
			await keep(mail)
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
 * The mail in a decrypted stanza: none in our own messages, in statuses, and in what is no text.
 * @param {import('baileys').BinaryNode} stanza
 * @param {Uint8Array} plaintext
 * @param {Me} me
 * @param {LidMapping} lidMapping
 * @returns {Promise<Mail[]>}
 */
export async function readMail({ attrs }, plaintext, me, lidMapping) {
	let found
	try {
		const message = proto.Message.decode(unpadRandomMax16(plaintext))
		const isOurs = isOwn(attrs.participant ?? attrs.from, me)
		found = isOurs ? readResent(message) : [{ attrs, message }]
	} catch {
		// Nobody can read it: Baileys finds the same.
		return []
	}
	const mail = await Promise.all(found.map(each => asMail(each, me, lidMapping)))
	return mail.filter(each => each !== null)
}

/**
 * Messages that we could not read, and that our own phone has read for us.
 * @param {proto.IMessage} message of our own phone's
 */
function readResent(message) {
	const response = message.protocolMessage?.peerDataOperationRequestResponseMessage
	const resent = []
	for (const { placeholderMessageResendResponse } of response?.peerDataOperationResult ?? []) {
		const bytes = placeholderMessageResendResponse?.webMessageInfoBytes
		if (!bytes?.length) continue
		const { key, message, messageTimestamp, pushName } = proto.WebMessageInfo.decode(bytes)
		if (!key?.id || !key.remoteJid || key.fromMe || !message) continue
		const attrs = { id: key.id, from: key.remoteJid, t: String(messageTimestamp ?? 0) }
		if (key.participant) attrs.participant = key.participant
		if (pushName) attrs.notify = pushName
		resent.push({ attrs, message })
	}
	return resent
}

/**
 * @param {{ attrs: Record<string, string>, message: proto.IMessage }} found
 * @param {Me} me
 * @param {LidMapping} lidMapping
 * @returns {Promise<Mail | null>}
 */
async function asMail({ attrs, message }, me, lidMapping) {
	const author = attrs.participant ?? attrs.from
	const content = normalizeMessageContent(message.deviceSentMessage?.message ?? message)
	const text = content?.conversation || content?.extendedTextMessage?.text
	if (!text || isOwn(author, me) || isJidStatusBroadcast(attrs.from)) return null
	const phone = attrs.participant_pn ?? attrs.sender_pn
	const sender = await nameOf(author, phone, lidMapping)
	return {
		messageId: attrs.id,
		// A broadcast list is the sender's own affair: to its recipients it is a chat with him.
		chat: isJidGroup(attrs.from) ? attrs.from : sender,
		sender,
		...(attrs.notify ? { senderName: attrs.notify.toWellFormed() } : {}),
		text: text.slice(0, TEXT_CHARS_MAX).toWellFormed(),
		sentAt: Number(attrs.t) || 0
	}
}

/**
 * What the daemon calls a person: the phone number if it is known, else the LID.
 * @param {string} jid
 * @param {string | undefined} phone as the stanza says
 * @param {LidMapping} lidMapping
 */
async function nameOf(jid, phone, lidMapping) {
	if (isPnUser(jid)) return jidDecode(jid).user
	if (phone && isPnUser(phone)) return jidDecode(phone).user
	const known = isLidUser(jid) ? await lidMapping.getPNForLID(jid) : null
	if (known) return jidDecode(known).user
	const { user, server } = jidDecode(jid) ?? { user: jid, server: 'unknown' }
	return `${user}@${server}`
}

/**
 * @param {string} jid
 * @param {Me} me
 */
export function isOwn(jid, me) {
	return areJidsSameUser(jid, me.id) || Boolean(me.lid && areJidsSameUser(jid, me.lid))
}
