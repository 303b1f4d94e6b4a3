"""Four plausible mistakes, to show that the simulation would notice them.

Each replaces a function of the machine, or the store, for the time of one run in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import trio

import machine.lease
from machine.lease import (
    UNCERTAIN,
    HeldLease,
    LeaseTiming,
    release,
    renew_write,
)
from machine.ports import Clocks, LeaseStore
from machine.records import AccountCommit, Stamp
from machine.term import Term
from tests.simulation.group import TIMING
from tests.simulation.world import SimulatedState


@dataclass(frozen=True)
class Mutant:
    """A mistake: how it is made, and which store it is made with."""

    what: str
    made: Callable[[], AbstractContextManager[None]] = nullcontext
    state: type[SimulatedState] = SimulatedState


# --- the deadline counts from the reply -----------------------------------------------------------


class LateHeldLease(HeldLease):
    """Allows itself the time that the answers took, on top."""

    def __post_init__(self) -> None:
        self.extend(self.asked_at, self.asked_at, TIMING)

    def extend(self, asked_at: float, boot_asked_at: float, timing: LeaseTiming) -> None:
        answered_at = trio.current_time()
        super().extend(answered_at, boot_asked_at + answered_at - asked_at, timing)
        self.asked_at = asked_at


@contextmanager
def deadline_after_the_reply() -> Iterator[None]:
    right = machine.lease.HeldLease
    machine.lease.HeldLease = LateHeldLease  # type: ignore[misc]
    try:
        yield
    finally:
        machine.lease.HeldLease = right  # type: ignore[misc]


# --- an answer that is not known counts as a success ----------------------------------------------


async def renew_blindly(
    held: HeldLease, store: LeaseStore, timing: LeaseTiming, clocks: Clocks, rng: object
) -> bool:
    """Take every answer for a yes."""
    asked_at, boot_asked_at = trio.current_time(), clocks.boottime()
    write = renew_write(held, nonce=f"{asked_at}")
    try:
        with trio.fail_after(timing.attempt_s):
            stamps = await store.write(write)
        assert stamps.lease_stamp is not None
        assert write.lease is not None
        held.lease, held.lease_stamp = write.lease, stamps.lease_stamp
    except UNCERTAIN:
        pass
    held.extend(asked_at, boot_asked_at, timing)
    held.renewals += 1
    return True


@contextmanager
def ambiguous_is_success() -> Iterator[None]:
    right = machine.lease.renew_once
    machine.lease.renew_once = renew_blindly
    try:
        yield
    finally:
        machine.lease.renew_once = right


# --- release before drain -------------------------------------------------------------------------


@contextmanager
def release_before_drain() -> Iterator[None]:
    right = Term.settle

    async def settle(self: Term) -> None:
        ports = self._ports
        await release(
            self.held, ports.lease, TIMING, ports.clocks, ports.rng, ports.journal, reason="early"
        )
        await right(self)

    Term.settle = settle  # type: ignore[method-assign]
    try:
        yield
    finally:
        Term.settle = right  # type: ignore[method-assign]


# --- no fence -------------------------------------------------------------------------------------


class UnfencedState(SimulatedState):
    """Writes whatever it is given, whoever gives it."""

    def commit(self, commit: AccountCommit) -> Stamp:
        stored = self.accounts.get(commit.account.account_id)
        stamp = commit.stamp if stored is None else stored.stamp
        return super().commit(replace(commit, stamp=stamp))


MUTANTS = {
    "late-deadline": Mutant("the deadline counts from the reply", deadline_after_the_reply),
    "ambiguous-success": Mutant("no answer counts as a success", ambiguous_is_success),
    "release-first": Mutant("the lease is released before the drain", release_before_drain),
    "no-fence": Mutant("the store takes any epoch and any stamp", state=UnfencedState),
}
