// Ends the process when the daemon says nothing for too long: hung or stopped, it can neither keep
// its lease nor end us, and our connections would stay open into another instance's term.

/**
 * Call `onSilence` when what this returns has not been called for `silentMs`.
 * @param {number} silentMs
 * @param {() => void} onSilence
 * @returns {() => void} to be called at each sign of life
 */
export function watchSilence(silentMs, onSilence) {
	let heardAt = performance.now()
	const isSilent = () => performance.now() - heardAt > silentMs
	const look = setInterval(() => {
		// If it was we who hung, what has arrived meanwhile is read before this.
		if (isSilent()) setImmediate(() => isSilent() && onSilence())
	}, silentMs / 4)
	look.unref()
	return () => {
		heardAt = performance.now()
	}
}
