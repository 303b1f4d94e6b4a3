// What `hello` sets for every connection of this process, and what Baileys is told to do.
import { check, Invalid } from './checks.mjs'

const WHATSAPP_URL = 'wss://web.whatsapp.com/ws/chat'
export const LOG_LEVELS = ['debug', 'info', 'warning', 'error']
const QR_FIRST_MS = 60_000
const QR_NEXT_MS = 20_000
const QUERY_MS = 30_000

const SHAPE = {
	url: 'text?',
	urlInsecure: 'flag?',
	browser: 'texts',
	logLevel: 'text',
	qrTimeoutMs: 'milliseconds?',
	connectTimeoutMs: 'milliseconds?',
	keepAliveMs: 'milliseconds?',
	silentMs: 'milliseconds?'
}

/**
 * @typedef {object} Options
 * @property {string} url
 * @property {[string, string, string]} browser what the phone shows: system, browser, version
 * @property {string} logLevel
 * @property {number} qrFirstMs how long the first QR code is valid
 * @property {number} qrNextMs how long each later one is
 * @property {number} [silentMs] how long the daemon may say nothing before this process ends
 * @property {object} socket what Baileys is given for every account
 */

/**
 * Check `hello`'s options. Throws `Invalid`.
 * @param {Record<string, any>} given
 * @returns {Options}
 */
export function readOptions(given) {
	check(given, SHAPE, 'options')
	if (given.browser.length !== 3) throw new Invalid('options: browser is not three texts')
	if (!LOG_LEVELS.includes(given.logLevel)) throw new Invalid('options: logLevel is not known')
	const url = given.url ?? WHATSAPP_URL
	if (url !== WHATSAPP_URL) checkUrl(url, given.urlInsecure === true)
	return {
		url,
		browser: given.browser,
		logLevel: given.logLevel,
		qrFirstMs: given.qrTimeoutMs ?? QR_FIRST_MS,
		qrNextMs: given.qrTimeoutMs ?? QR_NEXT_MS,
		silentMs: given.silentMs,
		socket: socketOptions(url, given)
	}
}

/**
 * Baileys checks no certificate of WhatsApp's own, so TLS to its address is all that says whom we
 * speak to. Another address is for tests.
 * @param {string} url
 * @param {boolean} insecure
 */
function checkUrl(url, insecure) {
	let parsed
	try {
		parsed = new URL(url)
	} catch {
		throw new Invalid('options: url is no address')
	}
	if (!['ws:', 'wss:'].includes(parsed.protocol)) {
		throw new Invalid('options: url is not of a WebSocket (ws: or wss:)')
	}
	if (!insecure && !isLoopback(parsed.hostname)) {
		throw new Invalid('options: url is not on this host; urlInsecure allows it, for tests only')
	}
}

/** @param {string} host */
function isLoopback(host) {
	return host === 'localhost' || host === '[::1]' || /^127(\.\d{1,3}){3}$/.test(host)
}

function socketOptions(url, given) {
	const times = {}
	if (given.qrTimeoutMs) times.qrTimeout = given.qrTimeoutMs
	if (given.connectTimeoutMs) times.connectTimeoutMs = given.connectTimeoutMs
	if (given.keepAliveMs) times.keepAliveIntervalMs = given.keepAliveMs
	return {
		...times,
		waWebSocketUrl: url,
		browser: given.browser,
		defaultQueryTimeoutMs: QUERY_MS,
		// Our store takes every change or ends the connection: there is nothing to try again.
		transactionOpts: { maxCommitRetries: 1, delayBetweenTriesMs: 1 },
		markOnlineOnConnect: false,
		emitOwnEvents: false,
		// Past messages are the phone's business; here they would only fill the memory.
		syncFullHistory: false,
		shouldSyncHistoryMessage: () => false,
		generateHighQualityLinkPreview: false
	}
}
