// Checks of what the daemon sends. Both sides ship together, so anything unexpected is a bug, and
// is refused at once. Messages name the field and never its value.

/** The frame makes no sense. */
export class Invalid extends Error {}

/** @type {Record<string, (value: unknown) => boolean>} */
const KINDS = {
	text: value => typeof value === 'string',
	phone: value => typeof value === 'string' && /^[0-9]{5,20}$/.test(value),
	flag: value => typeof value === 'boolean',
	count: value => Number.isSafeInteger(value) && value >= 0,
	milliseconds: value => Number.isFinite(value) && value > 0 && value <= 2 ** 31 - 1,
	object: value => typeof value === 'object' && value !== null && !Array.isArray(value),
	phones: value => Array.isArray(value) && value.every(KINDS.phone),
	texts: value => Array.isArray(value) && value.every(KINDS.text),
	values: value => KINDS.object(value) && Object.values(value).every(KINDS.text),
	valuesOrNull: value => value === null || KINDS.values(value)
}

/**
 * Throw `Invalid` unless `fields` has exactly these fields. A kind that ends in `?` may be missing.
 * @param {Record<string, unknown>} fields
 * @param {Record<string, string>} shape
 * @param {string} what
 */
export function check(fields, shape, what) {
	for (const [name, kind] of Object.entries(shape)) {
		const optional = kind.endsWith('?')
		const value = fields[name]
		if (value === undefined && optional) continue
		if (!KINDS[optional ? kind.slice(0, -1) : kind](value)) {
			throw new Invalid(`${what}: ${name} is missing or no ${kind}`)
		}
	}
	const unknown = Object.keys(fields).filter(name => !Object.hasOwn(shape, name))
	if (unknown.length > 0) throw new Invalid(`${what} has ${unknown.length} unknown fields`)
}
