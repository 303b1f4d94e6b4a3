"""What must be true of a group, told by its effects where they happen, and the trace of a run.

An act is what others can see: a write asked of the store, a login, a message on the wire. It is
judged against what the store has granted up to that instant, never against what the instance
believes. Nothing here influences the run, except that the first violation ends it.

The numbers are the claims of docs/simulation.md.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from machine.records import AccountId, Fence, Grant, Lease, LeaseState, MessageId, Version
from machine.term import BOOTTIME_LOOK_S
from tests.simulation.clock import WorldClock
from tests.simulation.process import Process

TAIL_LINES = 60
ATTEMPTS_KEPT = 100
"""Attempts to hold the lease that may still be applied late, of all hosts."""
HAIR_S = 1e-6
"""What rounding may do to a moment that is computed in two ways."""


@dataclass(slots=True)
class Granted:
    """The newest grant that the store has made, and until when its holder may act at most."""

    epoch: int
    incarnation: str
    until: float = -1.0
    released: bool = False


class Checks:
    """The claims of docs/simulation.md. `violations` has each that was broken, with its time."""

    def __init__(self, clock: WorldClock, *, keep_trace: bool) -> None:
        self.clock = clock
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.on_violation: Callable[[], None] = lambda: None
        self.on_rollback: Callable[[AccountId], None] = lambda _account_id: None
        self.processes: dict[str, Process] = {}
        self.received: set[MessageId] = set()
        """Messages to accounts that the shared store has had."""
        self.trace: deque[str] = deque(maxlen=None if keep_trace else TAIL_LINES)
        self._hash = hashlib.sha256()
        self._granted = Granted(0, "")
        self._rival: Granted | None = None
        """Granted at or below it, under an epoch that nobody has acted under yet: see `_holds`."""
        self._asked: dict[str, tuple[Process, float]] = {}
        self._acted = (0, "")
        self._forgotten = False
        self._written: dict[AccountId, tuple[Version, Grant]] = {}
        self._put_back: set[AccountId] = set()
        self._closed = False

    def close(self) -> None:
        """Judge nothing any more: the run is over, and the rest is tidying up."""
        self._closed = True

    @property
    def trace_hash(self) -> str:
        return self._hash.hexdigest()

    def tell(self, who: str, what: str) -> None:
        """Add a line to the trace."""
        if self._closed:
            return
        line = f"{self.clock.now:11.4f} {who:6} {what}"
        self._hash.update(line.encode())
        self.trace.append(line)

    def violated(self, claim: int, what: str) -> None:
        if self._closed:
            return
        self.tell("CHECK", f"({claim}) {what}")
        self.violations.append(f"({claim}) at {self.clock.now:.4f} s: {what}")
        self.on_violation()

    # --- who acts: claims 1, 4, 5

    def _holds(self, incarnation: str, epoch: int) -> Granted | None:
        """The grant of this epoch to this process, as far as anyone can tell the newest one.

        Lease documents of a backup may forget a grant, and an epoch be granted again. Where nobody
        has acted under it, nothing tells the two apart, and it is whose who acts first.
        """
        rival = self._rival
        granted = self._granted
        grants = (granted,) if rival is None or rival.epoch <= self._acted[0] else (rival, granted)
        return next(
            (one for one in grants if (one.epoch, one.incarnation) == (epoch, incarnation)), None
        )

    def wrong(self, process: Process, epoch: int) -> tuple[int, str] | None:
        """Which claim an act of this process under this epoch would break now, and how."""
        granted = self._holds(process.incarnation, epoch)
        if granted is None:
            newest = self._granted
            return 1, f"epoch {newest.epoch} was granted to {newest.incarnation}"
        if granted.released:
            return 5, "the lease was released before"
        if self.clock.now > granted.until + HAIR_S:
            return 4, f"its deadline was {self.clock.now - granted.until:.4f} s ago"
        acted_epoch, acted_by = self._acted
        if epoch < acted_epoch or (epoch == acted_epoch and acted_by != process.incarnation):
            return 3, f"{acted_by} has acted under epoch {acted_epoch} already"
        return None

    def asked(self, process: Process, what: str, epoch: int) -> None:
        """An act in the instant that the machine asks for it: right after its own check."""
        self.counts["acts"] += 1
        wrong = self.wrong(process, epoch)
        if wrong is not None:
            self.violated(wrong[0], f"{process.name} asks for {what}, epoch {epoch}: {wrong[1]}")

    def happened(self, process: Process, what: str, epoch: int, pauses: int) -> None:
        """An act in the instant that it reaches the outside. `pauses`: as when it was asked for.

        An act that was past its check when its process was paused is not the machine's fault, nor
        one that was asked for in time right after a suspend: what would have cancelled it looks
        at that clock only so often, and the margin is there for what is on its way.
        """
        self.counts[what.split()[0]] += 1
        self.tell(process.name, f"{what} (epoch {epoch})")
        wrong = self.wrong(process, epoch)
        thawed = self.clock.now - process.thawed_at <= BOOTTIME_LOOK_S
        past_check = process.pauses != pauses or (thawed and wrong is not None and wrong[0] == 4)
        if wrong is not None and past_check:
            self.counts["past check"] += 1
        elif wrong is not None:
            self.violated(wrong[0], f"{process.name}: {what}, epoch {epoch}: {wrong[1]}")
        else:
            self._has_acted(process.incarnation, epoch)

    def connected(self, process: Process, account_id: AccountId, others: list[Process]) -> None:
        """Nobody else may have a connection now, unless it cannot help it: it is not running."""
        for other in others:
            paused = other.gate.closed or self.clock.now - other.thawed_at <= BOOTTIME_LOOK_S
            if other is not process and not paused:
                self.violated(
                    1, f"{process.name} opens {account_id} while {other.name} has connections"
                )

    def still_open(self, process: Process, connections: int) -> None:
        """Looked at soon after a suspend: what is past its deadline has closed its connections."""
        mine = self._granted.incarnation == process.incarnation
        over_since = self._granted.until if mine else -1.0
        running = not (process.dead or process.gate.closed)
        if running and connections and self.clock.now > over_since + 2 * BOOTTIME_LOOK_S:
            self.violated(4, f"{process.name} has {connections} connections past its deadline")

    # --- the lease: claims 3 and 5

    def lease_asked(self, process: Process, lease: Lease) -> None:
        """An attempt to hold the lease, in the instant it is made: a term counts from here."""
        self._asked[lease.nonce] = (process, self.clock.now)
        while len(self._asked) > ATTEMPTS_KEPT:
            del self._asked[next(iter(self._asked))]

    def lease_written(self, lease: Lease) -> None:
        """The store has applied a write of the lease."""
        process, asked_at = self._asked.get(lease.nonce, (None, 0.0))
        if lease.state is not LeaseState.HELD or process is None:
            return
        granted = self._holds(lease.incarnation, lease.epoch)
        if granted is None:
            newest = self._granted
            granted = Granted(lease.epoch, lease.incarnation)
            still = not newest.released and self.clock.now <= newest.until
            if lease.epoch <= self._acted[0]:
                # Lease documents of a backup: whoever gets this must find out, and may not act.
                self.counts["granted below"] += 1
                return
            if still and lease.epoch <= newest.epoch:
                self.counts["granted again"] += 1
                self._rival = granted
            else:
                self._granted, self._rival, self._forgotten = granted, None, False
        term_s = process.timing.term_s / process.gate.clock.rate
        granted.until = max(granted.until, asked_at + term_s)

    def _has_acted(self, incarnation: str, epoch: int) -> None:
        rival = self._holds(incarnation, epoch)
        if rival is not None and rival is self._rival:
            self._granted, self._rival = rival, None
        if not self._forgotten:
            self._acted = (epoch, incarnation)

    def fence_written(self, old: Fence, new: Fence) -> None:
        """The store has applied a write of the fence (after that of the lease)."""
        self.tell("store", f"fence {new.epoch} {new.state} {new.incarnation} ({new.reason})")
        if new.epoch != old.epoch:
            self.counts["epochs"] += 1
            if old.paused:
                self.violated(1, f"epoch {new.epoch} was acquired while the group is paused")
        if new.epoch < old.epoch:
            self.violated(3, f"the fence's epoch fell from {old.epoch} to {new.epoch}")
        elif new.epoch == old.epoch and new.incarnation != old.incarnation:
            self.violated(3, f"epoch {new.epoch} was granted to {old.incarnation} and to another")
        granted = self._holds(new.incarnation, new.epoch)
        if granted is not None and new.state is not LeaseState.HELD:
            granted.released = True

    # --- the accounts: claims 2 and 7

    def account_written(self, account_id: AccountId, version: Version, grant: Grant) -> None:
        """An account's version never falls, and no epoch writes after a later one."""
        self.counts["writes"] += 1
        self.tell("store", f"{account_id} {version} by {grant.incarnation}")
        if self._holds(grant.incarnation, grant.epoch) is not None:
            self._has_acted(grant.incarnation, grant.epoch)
        elif grant.epoch < self._granted.epoch:
            self.counts["late, before the seal"] += 1
        before, by = self._written.get(account_id, (Version(0, 0), grant))
        self._written[account_id] = (version, grant)
        if account_id in self._put_back:
            self._put_back.discard(account_id)
            if version.revision < before.revision:
                self._fell(account_id, before, by, version, grant)
        elif version < before or grant.epoch < before.epoch:
            self.violated(
                2, f"{account_id} went from {before} to {version}, written under {grant.epoch}"
            )
        elif version.revision < before.revision:
            self.violated(7, f"{account_id} fell from {before} to {version}: an older copy won")

    def _fell(
        self, account_id: AccountId, before: Version, by: Grant, version: Version, grant: Grant
    ) -> None:
        """The newest revision is gone. Somebody's backup may do that, unless the writer had it."""
        copy = self.processes[grant.incarnation].disk.copies.get(account_id)
        had_it = copy is not None and copy.version.revision >= before.revision
        if had_it or (by.epoch, by.incarnation) == (grant.epoch, grant.incarnation):
            self.violated(
                7, f"{account_id} fell from {before} to {version}, though the newest copy was here"
            )
        else:
            self.counts["rolled back by a backup"] += 1
            self.on_rollback(account_id)

    def account_put_back(self, account_id: AccountId) -> None:
        """Somebody has put an account's document of an older backup into the store."""
        self._put_back.add(account_id)

    def database_put_back(self) -> None:
        """The same for all documents, with every process stopped: nobody holds what was granted."""
        self._granted, self._rival = Granted(0, ""), None
        self._acted, self._forgotten = (0, ""), True

    def receipt(self, account_id: AccountId, message_id: MessageId) -> None:
        """WhatsApp's server forgets a message to an account: it has a receipt."""
        self.counts["received"] += 1
        if message_id not in self.received:
            self.violated(6, f"{message_id} to {account_id} was acknowledged and is not stored")

    # --- what is left: claim 10

    def term_ended(self, process: Process, connections: int, bridges: int) -> None:
        """Nothing of a term is left in the instant its instance has stopped being ACTIVE."""
        self.counts["terms"] += 1
        left = [name for name in process.gate.names() if _OF_A_TERM.match(name)]
        if left or connections or bridges:
            self.violated(
                10,
                f"{process.name} left of its term: tasks {left}, {connections} connections, "
                f"{bridges} bridges",
            )


_OF_A_TERM = re.compile(r"machine\.(session|ledger|restore|term|desk)\b|machine\.lease\.keep_lease")
