// The errors that cross the line.

/** The daemon answered an ask with an error, or not in time: the connection must end. */
export class AskRefused extends Error {}

/** A call that fails, and the `error` that its reply carries. */
export class CallFailed extends Error {
	/**
	 * @param {'closed' | 'refused' | 'unusable' | 'failed'} kind
	 * @param {string} message holds nothing secret
	 * @param {{ code?: number, expireS?: number }} [more]
	 */
	constructor(kind, message, more = {}) {
		super(message)
		this.fields = { kind, message, ...more }
	}
}
