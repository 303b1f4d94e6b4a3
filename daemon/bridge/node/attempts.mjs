// A failed attempt to read a message leaves the session as it was.
//
// libsignal 6.0.0 tries each session that it has with a sender, and steps a session's ratchet before
// it knows that the message belongs to it. When the next one fits, all of them are stored, those that
// were stepped for nothing included: after two first messages have crossed, half of what follows is
// unreadable. WhatsApp's own clients try on a copy, and so does this.
import { createRequire } from 'node:module'

const require = createRequire(createRequire(import.meta.url).resolve('baileys'))
const { SessionCipher } = require('libsignal')

const attempt = SessionCipher.prototype.doDecryptWhisperMessage

SessionCipher.prototype.doDecryptWhisperMessage = async function (message, session) {
	if (!session) return attempt.call(this, message, session)
	const copy = session.constructor.deserialize(session.serialize())
	const plaintext = await attempt.call(this, message, copy)
	// Reading the first answer makes an end of it, and assigning takes nothing away.
	delete session.pendingPreKey
	Object.assign(session, copy)
	return plaintext
}
