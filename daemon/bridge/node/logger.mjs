// What Baileys logs through. It is given whole stanzas and keys, so objects are never passed on.
import { log } from './console.mjs'
import { LOG_LEVELS } from './options.mjs'
import { describeError, words } from './redact.mjs'

/** Baileys' levels, and ours: much of what it calls an error is the weather. */
const LEVELS = { debug: 'debug', info: 'debug', warn: 'info', error: 'warning', fatal: 'error' }

/**
 * A logger in the shape that Baileys asks for. `trace` is never on: it prints stanzas.
 * @param {string} logLevel the least of `LOG_LEVELS` that is passed on
 * @param {string} account
 */
export function makeLogger(logLevel, account) {
	const least = LOG_LEVELS.indexOf(logLevel)
	const logger = { level: 'silent', child: () => logger, trace() {} }
	for (const [name, level] of Object.entries(LEVELS)) {
		logger[name] =
			LOG_LEVELS.indexOf(level) < least
				? () => {}
				: (fields, message) => log(level, `${account}: ${describeRecord(fields, message)}`)
	}
	return logger
}

function describeRecord(fields, message) {
	if (typeof fields === 'string') return words(fields)
	const error = fields?.err ?? fields?.error
	const text = typeof message === 'string' ? words(message) : ''
	return error instanceof Error ? `${text} (${describeError(error)})` : text
}
