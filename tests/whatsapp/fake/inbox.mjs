// What a person's phone has got: every arrival in order, and what the person sees of it.

/** Arrivals that are kept, opened or not; what is more is dropped, and counted. */
const ARRIVALS_MAX = 200_000

export class Inbox {
	arrivals = []
	dropped = 0
	/** Copies of what the person's own linked devices sent. The phone does not open them. */
	ownCopies = 0
	#shown = new Map()
	#unreadable = new Map()

	/** Note that a message came; `read` or `fail` says later what became of it. Null: no room. */
	add({ id, from, device, type }) {
		if (this.arrivals.length >= ARRIVALS_MAX) {
			this.dropped++
			return null
		}
		const arrival = { id, from, device, type, at: Date.now() / 1000, text: null, error: null }
		this.arrivals.push(arrival)
		return arrival
	}

	read(arrival, text) {
		arrival.text = text
		const { id, from } = arrival
		const key = `${from} ${id}`
		this.#unreadable.delete(key)
		const shown = this.#shown.get(key)
		if (shown) shown.times++
		else this.#shown.set(key, { id, from, text, at: arrival.at, times: 1 })
	}

	fail(arrival, error) {
		arrival.error = error
		const { id, from } = arrival
		const key = `${from} ${id}`
		if (!this.#shown.has(key)) this.#unreadable.set(key, { id, from, error })
	}

	/** One message an id, as the person sees them. `times` is how often it came and was readable. */
	get shown() {
		return [...this.#shown.values()]
	}

	get shownCount() {
		return this.#shown.size
	}

	/** Messages of which no copy could be read so far. */
	get unreadable() {
		return [...this.#unreadable.values()]
	}
}
