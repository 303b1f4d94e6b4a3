// Takes the console and the standard streams away from everything that is loaded later.
//
// What libraries print becomes a log record of the daemon, described instead of quoted. Until the
// line to the daemon exists, a few records are kept.
import { describePrinted, describeWritten } from './redact.mjs'

const EARLY_RECORDS_MAX = 100

/** @typedef {'debug' | 'info' | 'warning' | 'error'} Level */

/** @type {[Level, string][]} */
const early = []

/** @type {(level: Level, message: string) => void} */
let sink = (level, message) => {
	if (early.length < EARLY_RECORDS_MAX) early.push([level, message])
}

/**
 * Tell the daemon. The message must hold nothing secret: callers describe, they do not quote.
 * @param {Level} level
 * @param {string} message
 */
export function log(level, message) {
	sink(level, message)
}

/**
 * Say where log records go from now on, and hand over those that came earlier.
 * @param {(level: Level, message: string) => void} newSink
 */
export function sendLogsTo(newSink) {
	sink = newSink
	for (const [level, message] of early.splice(0)) sink(level, message)
}

/** @type {Record<string, Level>} */
const LEVELS = { error: 'warning', warn: 'warning', assert: 'warning', trace: 'debug' }

for (const [name, method] of Object.entries(console)) {
	if (typeof method !== 'function' || name === 'Console') continue
	const level = LEVELS[name] ?? 'debug'
	console[name] = (...args) => {
		if (args.length > 0) log(level, `console.${name}: ${describePrinted(args)}`)
	}
}

for (const name of ['stdout', 'stderr']) {
	process[name].write = (chunk, encoding, callback) => {
		log('debug', `${name}: ${describeWritten(chunk)}`)
		const written = typeof encoding === 'function' ? encoding : callback
		if (written) process.nextTick(written)
		return true
	}
}
