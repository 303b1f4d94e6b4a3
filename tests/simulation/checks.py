"""What must be true of a group, told by its effects where they happen, and the trace of a run.

An act is what others can see: a write asked of the store, a login, a message on the wire. It is
judged against the fence as it is in the store at that instant, never against what the instance
believes. Nothing here influences the run, except that the first violation ends it.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable

import trio

from machine.records import AccountId, Fence, Grant, Version
from tests.fakes.shared_store import FakeSharedState
from tests.simulation.process import Process

TAIL_LINES = 60


class Checks:
    """The claims of docs/simulation.md. `violations` has each that was broken, with its time."""

    def __init__(self, *, keep_trace: bool) -> None:
        self.violations: list[str] = []
        self.counts: Counter[str] = Counter()
        self.on_violation: Callable[[], None] = lambda: None
        self.state: FakeSharedState | None = None
        self.trace: deque[str] = deque(maxlen=None if keep_trace else TAIL_LINES)
        self._hash = hashlib.sha256()
        self._written: dict[AccountId, Version] = {}
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
        line = f"{trio.current_time():11.4f} {who:6} {what}"
        self._hash.update(line.encode())
        self.trace.append(line)

    def violated(self, claim: str) -> None:
        if self._closed:
            return
        self.tell("CHECK", claim)
        self.violations.append(f"at {trio.current_time():.4f} s: {claim}")
        self.on_violation()

    # --- who acts

    def may_act(self, process: Process, epoch: int) -> bool:
        """Whether the store's fence names this process and epoch, right now."""
        assert self.state is not None
        assert self.state.fence is not None
        fence = self.state.fence[0]
        return (fence.epoch, fence.incarnation) == (epoch, process.incarnation)

    def asked(self, process: Process, what: str, epoch: int) -> None:
        """An act in the instant that the machine asks for it: right after its own check."""
        self.counts["acts"] += 1
        if not self.may_act(process, epoch):
            self.violated(
                f"{process.name} asks for {what} under epoch {epoch}: {self._fence_line()}"
            )

    def happened(self, process: Process, what: str, epoch: int, pauses: int) -> None:
        """An act in the instant that it reaches the outside. `pauses`: as when it was asked for.

        An act that was past its check when its process was paused is not the machine's fault.
        """
        self.counts[what.split()[0]] += 1
        self.tell(process.name, f"{what} (epoch {epoch})")
        if not self.may_act(process, epoch):
            if process.pauses != pauses:
                self.counts["past check"] += 1
            else:
                self.violated(f"{process.name}: {what} under epoch {epoch}: {self._fence_line()}")

    def connected(self, process: Process, account_id: AccountId, others: list[Process]) -> None:
        """Nobody else may have a connection now, unless it cannot help it: it is not running."""
        for other in others:
            paused = other.gate.closed or other.thawed_at == trio.current_time()
            if other is not process and not paused:
                self.violated(
                    f"{process.name} opens {account_id} while {other.name} has open connections"
                )

    def _fence_line(self) -> str:
        assert self.state is not None
        assert self.state.fence is not None
        fence = self.state.fence[0]
        return f"the fence is at epoch {fence.epoch}, {fence.state} by {fence.incarnation}"

    # --- epochs

    def fence_written(self, old: Fence, new: Fence) -> None:
        self.tell("store", f"fence {new.epoch} {new.state} {new.incarnation} ({new.reason})")
        if new.epoch != old.epoch:
            self.counts["epochs"] += 1
        if new.epoch < old.epoch:
            self.violated(f"the fence's epoch fell from {old.epoch} to {new.epoch}")
        elif new.epoch == old.epoch and new.incarnation != old.incarnation:
            self.violated(f"epoch {new.epoch} was granted to {old.incarnation} and to another")

    def account_written(self, account_id: AccountId, version: Version, grant: Grant) -> None:
        """An account's version never falls, and no epoch writes after a later one."""
        self.counts["writes"] += 1
        self.tell("store", f"{account_id} {version} by {grant.incarnation}")
        before = self._written.get(account_id, Version(0, 0))
        if version < before or grant.epoch < before.epoch:
            self.violated(
                f"{account_id} went from {before} to {version}, written under epoch {grant.epoch}"
            )
        self._written[account_id] = version

    # --- the end of a term

    def term_ended(self, process: Process, connections: int, bridges: int) -> None:
        """Nothing of a term is left in the instant its instance has stopped being ACTIVE."""
        self.counts["terms"] += 1
        modules = ("machine.session", "machine.ledger", "machine.restore", "machine.term")
        left = [
            name
            for name in process.gate.names()
            if name.startswith(modules) or name == "machine.lease.keep_lease"
        ]
        if left or connections or bridges:
            self.violated(
                f"{process.name} left of its term: tasks {left}, {connections} connections, "
                f"{bridges} bridges"
            )
