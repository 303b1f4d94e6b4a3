// Describes what libraries print or throw, without quoting what may be secret.
//
// Kept: the words of a message. Never kept: objects (they hold keys and stanzas), runs of digits
// (phone numbers), anything that looks like encoded bytes, and whatever follows the first line.

const TEXT_CHARS_MAX = 160
const WRITTEN_CHARS_MAX = 60

/**
 * The words of a text: one line, shortened, with digits and encoded bytes taken out.
 * @param {string} text
 * @param {number} [charsMax]
 */
export function words(text, charsMax = TEXT_CHARS_MAX) {
	const line = text.slice(0, 4 * charsMax).split('\n', 1)[0]
	// From the first bracket on it is a dump of something.
	const prose = line.replace(/[[{<].*$/s, '…')
	return prose
		.replace(/[A-Za-z0-9+/=_-]{21,}/g, '…')
		.replace(/\d{4,}/g, '…')
		.slice(0, charsMax)
		.trim()
}

/**
 * What was printed: the words of the first argument, and of which kind the others are.
 * @param {unknown[]} args
 */
export function describePrinted(args) {
	return args.map((arg, place) => (place === 0 ? describe(arg) : kindOf(arg))).join(' ')
}

/** @param {string | Uint8Array} chunk what was written to a stream: its length and first words */
export function describeWritten(chunk) {
	const text = typeof chunk === 'string' ? chunk : Buffer.from(chunk).toString('utf8')
	return `(${text.length} characters) ${words(text, WRITTEN_CHARS_MAX)}`
}

/**
 * An error's name, words and status code.
 * @param {unknown} error
 */
export function describeError(error) {
	if (!(error instanceof Error)) return kindOf(error)
	const code = error.output?.statusCode ?? error.code
	const status = code === undefined ? '' : ` (${words(String(code), 20)})`
	return `${words(error.name, 40)}: ${words(error.message)}${status}`
}

/** @param {unknown} value */
function describe(value) {
	if (typeof value === 'string') return words(value)
	return value instanceof Error ? describeError(value) : kindOf(value)
}

/** @param {unknown} value */
function kindOf(value) {
	if (value instanceof Error) return describeError(value)
	if (typeof value === 'string') return `<text, ${value.length} characters>`
	if (typeof value === 'object' && value !== null)
		return `<${value.constructor?.name ?? 'object'}>`
	return `<${typeof value}>`
}
