"""Decide who acts and what becomes of every account.

Lives here: the states, the lease, the term, the restore, sessions and the outbox.
Never lives here: a network, a file, a database, a logger. Those are behind `machine.ports`.
"""
