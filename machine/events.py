"""Every event the machine tells, with its level and its sentence. Spelled the same everywhere.

An event's name is a noun and a past tense. The sentence is for the log; fields are filled in by
name and are never secrets or message bodies. docs/events.md is generated from this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from machine.ports import Level


@dataclass(frozen=True, slots=True)
class EventKind:
    """How an event is told."""

    level: Level
    text: str


def _debug(text: str) -> EventKind:
    return EventKind(Level.DEBUG, text)


def _info(text: str) -> EventKind:
    return EventKind(Level.INFO, text)


def _warning(text: str) -> EventKind:
    return EventKind(Level.WARNING, text)


def _error(text: str) -> EventKind:
    return EventKind(Level.ERROR, text)


EVENTS: dict[str, EventKind] = {
    # --- the machine
    "instance.booted": _info("{instance} is up at {address}; highest epoch on this disk: {epoch}"),
    "transition.made": _info("{source} -> {dest} ({trigger}): {reason}"),
    "drain.asked": _info("drain asked: {reason}"),
    "step_down.asked": _info("step-down asked: {reason}"),
    "warm.finished": _info(
        "PASSIVE: disk copy brought up to date: {fetched} of {total} accounts fetched"
    ),
    "warm.failed": _warning("PASSIVE: disk copy could not be brought up to date: {error}"),
    "disk.failed": _warning(
        "this host's disk copy could not be written ({what}): {error}; "
        "the shared store has everything; check free space and permissions"
    ),
    "disk.unreadable": _warning(
        "account {account_id}: this disk's copy {version} could not be read ({error}); "
        "its bytes are kept, the shared store's copy is used"
    ),
    # --- the lease
    "lease.acquired": _info("lease acquired: epoch {epoch}, was held by {previous}"),
    "lease.not_acquired": _info("lease not acquired: {holder} was faster"),
    "lease.unreadable": _warning(
        "lease could not be read: {error}; asking again in {retry_s} s; "
        "check that the store is reachable"
    ),
    "lease.missing": _error(
        "the lease documents do not exist: {error}; this is never taken for a free lease; "
        "run `watchkeeper init` once for this group, or restore the store's backup"
    ),
    "lease.renewed": _debug("lease renewed (epoch {epoch}, renewal {renewals})"),
    "lease.renewal_failed": _warning(
        "lease renewal {failures} failed ({cause}; epoch {epoch}); the term ends by itself in "
        "{remaining_s} s unless one succeeds"
    ),
    "lease.lost": _warning("lease lost (epoch {epoch}): {reason}"),
    "lease.released": _info("lease released (epoch {epoch}): {reason}"),
    "lease.release_unanswered": _warning("releasing the lease got no answer: {error}"),
    "lease.not_released": _warning(
        "lease not released (epoch {epoch}): the store did not answer; others wait for its ttl"
    ),
    "epoch.fell": _error(
        "the lease documents are older than what this group has seen (epoch {found} in {where}, "
        "{epoch} in the lease): they were restored from a backup; acting on under a higher epoch"
    ),
    # --- the restore
    "restore.skipped": _info(
        "PASSIVE: account restore skipped, lease held by {holder} (epoch {epoch})"
    ),
    "restore.started": _info(
        "ACTIVE under epoch {epoch}: restoring accounts from the shared store and from disk"
    ),
    "restore.source_read": _info("{source}: {found} accounts found ({duration_s} s)"),
    "restore.source_retried": _warning("reading {source} failed (try {tries}): {error}"),
    "restore.source_failed": _error("{source} could not be read: {error}; {advice}"),
    "restore.found": _info(
        "found {total} accounts: {shared} in the shared store, {disk} on disk; "
        "{to_open} to open, {listed} only listed, {quarantined} quarantined"
    ),
    "account.doubted": _warning(
        "account {account_id}: its Signal sessions may be old ({cause}); they are dropped at its "
        "next opening, and begun anew with each contact"
    ),
    "account.found": _info("account {account_id} ({name}): {status}, taken from {source}"),
    "account.imported": _info("account {account_id} imported from a Baileys directory"),
    "import.failed": _error("{directory} was not imported: {cause}; {advice}"),
    "import.noted": _warning("import of {account_id}: {cause}; {advice}"),
    "session.restored": _info("account {account_id} restored in {duration_s} s: {status}"),
    "session.failed": _warning("account {account_id} not restored: {cause}; {advice}"),
    "restore.finished": _info(
        "restore finished in {duration_s} s: {restored} restored, {pairing} waiting for a phone, "
        "{listed} listed, {failed} failed, of {total}"
    ),
    "restore.interrupted": _warning("restore interrupted after {duration_s} s: {reason}"),
    # --- sessions
    "session.connected": _info("account {account_id} connected"),
    "session.closed": _info(
        "account {account_id} closed with {code} ({meaning}); next try in {retry_s} s"
    ),
    "session.stopped": _error("account {account_id} is {status}: {cause}; {advice}"),
    "session.held_back": _warning("account {account_id} is not opened: {cause}; {advice}"),
    "session.banned": _error(
        "account {account_id} is banned for {seconds} s and waits until that is over; {advice}"
    ),
    "pairing.expired": _info("account {account_id} is {status}: {cause}; {advice}"),
    "client.refused": _error(
        "WhatsApp refuses this client's version ({cause}): no account is opened any more in this "
        "term, those that are open go on; the accounts' state is fine; upgrade Watchkeeper, or "
        "try one account with reconnect"
    ),
    "account.restricted": _error(
        "account {account_id} is restricted by WhatsApp: message {message_id} was refused and is "
        "not sent again; look at the phone, and send less, to people who expect it"
    ),
    "account.not_archived": _warning(
        "account {account_id}: its state could not be archived ({error}); it stays with the account"
    ),
    "session.quarantined": _error("account {account_id} quarantined: {cause}; {advice}"),
    "session.doubled": _error(
        "account {account_id} was opened by another client (440): if that is another instance of "
        "ours, two of them act; epoch {epoch}"
    ),
    "account.created": _info("account {account_id} created"),
    "account.removed": _info("account {account_id} removed (purge: {purge})"),
    "account.refused_seal": _info("account {account_id} had changed since it was read; read again"),
    "account.pushed": _info(
        "account {account_id}: this disk's copy {version} was newer than the shared store's"
    ),
    "account.rekeyed": _info("account {account_id} re-encrypted with the active key"),
    # --- sends
    "message.accepted": _debug("message {message_id} of {account_id} accepted"),
    "message.acked": _debug("message {message_id} of {account_id} acknowledged by the server"),
    "message.retried": _info("message {message_id} of {account_id} goes out again: {cause}"),
    "message.received": _debug("message {message_id} for {account_id} received and stored"),
    "message.look_dropped": _warning(
        "account {account_id}: too many receipts of messages that are not in memory any more; the "
        "one of {message_id} is not followed"
    ),
    "message.failed": _warning("message {message_id} of {account_id} failed: {cause}"),
    "outbox.loaded": _info("outbox: {count} messages wait to be sent"),
    "outbox.purged": _debug("outbox: {count} settled messages over their retention deleted"),
    "inbox.purged": _debug("inbox: {count} received messages over their retention deleted"),
    # --- the store
    "commit.retried": _warning("account {account_id}: commit not confirmed ({error}); again"),
    "commit.refused": _warning("account {account_id}: commit refused: {reason}"),
    "drain.settled": _info("settled in {duration_s} s: {in_flight} sends were in flight"),
    "drain.unflushed": _warning(
        "{accounts} accounts have changes that the shared store did not confirm; with durability "
        "local this disk may be the only one that has them: start an instance on it first"
    ),
    "drain.unsettled": _warning(
        "{in_flight} sends were still in flight after {duration_s} s; the next holder sends them "
        "again under the same message ids"
    ),
}
