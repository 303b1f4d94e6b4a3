// How a connection ends, by the status code that Baileys makes of it.
import { node, SERVER } from './nodes.mjs'

const failure = code => ({ expireS }) =>
	node('failure', { reason: code.toString(), ...(expireS ? { expire: expireS.toString() } : {}) })
const streamError = code => () => node('stream:error', { code: code.toString() })

export const REPLACED = node('stream:error', {}, [node('conflict', { type: 'replaced' })])
export const REMOVED = node('stream:error', { code: '401' }, [
	node('conflict', { type: 'device_removed' })
])
export const RESTART = streamError(515)()

const ENDINGS = {
	401: failure(401),
	402: failure(402),
	403: failure(403),
	405: failure(405),
	406: failure(406),
	411: () => node('ib', { from: SERVER }, [node('downgrade_webclient')]),
	428: () => node('xmlstreamend'),
	440: () => REPLACED,
	500: streamError(500),
	501: streamError(501),
	503: streamError(503),
	515: () => RESTART
}

export const CODES = Object.keys(ENDINGS).map(Number)

/** The last node before the close; `expireS` counts for 402 only. */
export const ending = (code, { expireS, deviceRemoved = false } = {}) =>
	deviceRemoved ? REMOVED : ENDINGS[code]({ expireS: code === 402 ? expireS : undefined })
