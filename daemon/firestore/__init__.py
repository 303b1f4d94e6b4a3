"""The shared store on Firestore: lease, accounts and outbox behind the machine's ports.

Everything that knows a Firestore word (`update_time`, collection, mask, Listen) lives here.
Never lives here: a retry, a decision about who may act, and anything that opens a packed part.
"""
