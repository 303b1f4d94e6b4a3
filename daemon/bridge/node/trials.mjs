// Undoes what failed tries to read a message leave behind in the sessions with its sender.
//
// libsignal (6.0.0) tries a message on each session, the one used last first. A try moves the
// session's ratchet before it finds that the message belongs to another; when that other one then
// reads it, all are stored. Baileys begins a new session with a contact now and then, and what the
// contact wrote just before still comes in on the old one: it would break the new one, and the next
// message that we send with it.

import { AsyncLocalStorage } from 'node:async_hooks'

/** How far a clock may have been set back since a session was used; then it is left to chance. */
const CLOCK_BACK_MS = 50

/** @typedef {{ _sessions: Record<string, { indexInfo: { used?: number } }> }} SessionRecord */

/**
 * What libsignal wants to store after reading a message, with every session as it was before, but
 * the one that could read it: only that one's time of use has changed.
 * @param {SessionRecord | null | undefined} before
 * @param {SessionRecord} after
 * @returns {SessionRecord}
 */
export function withoutFailedTries(before, after) {
	if (!before?._sessions || !after?._sessions) return after
	const sessions = { ...after._sessions }
	for (const [baseKey, session] of Object.entries(before._sessions)) {
		const tried = sessions[baseKey]
		if (tried && tried.indexInfo.used === session.indexInfo.used) sessions[baseKey] = session
	}
	return { ...after, _sessions: sessions }
}

/**
 * The records that the reading under way has been given. One store for all accounts: on Node 20
 * each one costs every promise of the process.
 * @type {AsyncLocalStorage<Map<string, SessionRecord>>}
 */
const given = new AsyncLocalStorage()

/**
 * Read a message of an established session; `read` uses keys from `watchTries`.
 * @template T
 * @param {() => Promise<T>} read
 */
export function tryingSessions(read) {
	return given.run(new Map(), read)
}

/**
 * A key store for Baileys' Signal repository, which stores nothing of failed tries.
 * @param {any} keys Baileys' own, with its transactions
 */
export function watchTries(keys) {
	return {
		...keys,
		async get(type, ids) {
			const found = await keys.get(type, ids)
			const before = given.getStore()
			if (before && type === 'session') await noteSessions(before, found)
			return found
		},
		set(data) {
			const before = given.getStore()
			if (!before || !data.session) return keys.set(data)
			return keys.set({ ...data, session: mend(before, data.session) })
		}
	}
}

async function noteSessions(before, found) {
	for (const [id, record] of Object.entries(found)) {
		if (!record?._sessions || before.has(id)) continue
		before.set(id, record)
		await untilAfter(record)
	}
}

function mend(before, sessions) {
	const mended = Object.entries(sessions).map(([id, record]) => [
		id,
		record ? withoutFailedTries(before.get(id), record) : record
	])
	return Object.fromEntries(mended)
}

/** Let the millisecond pass in which a session was used last: the next use must tell. */
async function untilAfter({ _sessions: sessions }) {
	const used = Math.max(...Object.values(sessions).map(each => each.indexInfo.used ?? 0))
	while (Date.now() <= used && used - Date.now() < CLOCK_BACK_MS) {
		await new Promise(resolve => setTimeout(resolve, 1))
	}
}
