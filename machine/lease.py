"""Who may act, and until when: acquiring the lease, keeping it, giving it back.

The protocol is LEASE.md's: one conditional commit for each step, its preconditions fixed before it
is sent, and the holder's deadline counted from before the question. Every step is first built as a
value by a pure function (`acquire_write`, `renew_write`, …) and then tried; after any answer but
"done" the documents are read again and compared (`judge`).

Never lives here: what the holder does with the lease (`machine.term`).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import trio

from machine.doubt import LastTerm
from machine.ports import (
    Clocks,
    Journal,
    LeaseMissing,
    LeaseRefused,
    LeaseStore,
    StoreMisconfigured,
    StoreUnavailable,
)
from machine.records import (
    FENCE_HISTORY_MAX,
    Fence,
    FenceChange,
    Grant,
    Heartbeat,
    Identity,
    Lease,
    LeaseState,
    LeaseView,
    LeaseWrite,
    Stamp,
)

WRITE_INTERVAL_MIN_S = 1.0
"""Firestore sustains one write a second and document (its documented limit)."""

ACQUIRE_JITTER_S = 0.05

UNCERTAIN = (
    StoreUnavailable,
    StoreMisconfigured,
    LeaseRefused,
    LeaseMissing,
    trio.TooSlowError,
)
"""Answers after which nobody knows what was applied: read again, and compare."""


@dataclass(frozen=True, slots=True)
class LeaseTiming:
    """The times of the lease, in seconds. Contradictory ones cannot be built.

    `ttl_s` is what the record promises others; `term_s` is what the holder allows itself, counted
    from before each renewal was sent.
    """

    ttl_s: float = 15.0
    renew_s: float = 5.0
    attempt_s: float = 2.0
    margin_s: float = 1.5
    drift: float = 500e-6

    def __post_init__(self) -> None:
        """Refuse numbers that could let two act, or lose the lease at the first hiccup."""
        needed = self.renew_s + 2 * self.attempt_s + self.margin_s
        if self.ttl_s < needed:
            raise ValueError(
                f"the lease times contradict each other: ttl {self.ttl_s:g} s must be at least "
                f"renew {self.renew_s:g} + 2 x attempt {self.attempt_s:g} + margin "
                f"{self.margin_s:g} = {needed:g} s. Raise LEASE_TTL_S or lower the others."
            )
        if self.renew_s < WRITE_INTERVAL_MIN_S:
            raise ValueError(
                f"renew {self.renew_s:g} s is too often: a lease document takes one write a "
                f"second at most. Raise LEASE_RENEW_S to {WRITE_INTERVAL_MIN_S:g} or more."
            )
        if self.attempt_s < 0.1 or self.margin_s < 0.1:
            raise ValueError(
                f"attempt {self.attempt_s:g} s and margin {self.margin_s:g} s must each be at "
                "least 0.1 s."
            )
        if not 0 <= self.drift < 0.01:
            raise ValueError(f"drift {self.drift:g} must be a rate between 0 and 0.01")
        # Whoever does not end by itself is killed, and dead, before anyone else may begin.
        assert self.term_s < self.term_s + self.kill_grace_s < self.ttl_s

    @property
    def term_s(self) -> float:
        """How long a renewal lets its holder act, from the moment it was asked for."""
        return self.ttl_s * (1 - 2 * self.drift) - self.margin_s

    @property
    def kill_grace_s(self) -> float:
        """How long after its deadline a term may take to end before it is killed from outside.

        Half the margin: the other half is for the kill itself, before the ttl is over.
        """
        return self.margin_s / 2


@dataclass(slots=True)
class HeldLease:
    """The lease as its holder knows it. Changed by `acquire`, `keep_lease` and `release` only.

    `deadline` is on Trio's clock, `boot_deadline` on CLOCK_BOOTTIME: whichever passes first.
    """

    grant: Grant
    lease: Lease
    lease_stamp: Stamp
    fence: Fence
    fence_stamp: Stamp
    deadline: float
    boot_deadline: float
    asked_at: float
    last: LastTerm = field(default_factory=LastTerm)
    renewals: int = 0
    last_renewal_at: float | None = None
    failure: str = ""
    """Why the last try to renew was not answered "done": see `cause_of`."""

    def extend(self, asked_at: float, boot_asked_at: float, timing: LeaseTiming) -> None:
        """Move both deadlines on from the moment a successful attempt was *asked*."""
        self.asked_at = asked_at
        self.deadline = asked_at + timing.term_s
        self.boot_deadline = boot_asked_at + timing.term_s


class Verdict(Enum):
    """What a read says of an attempt whose answer was not "done"."""

    APPLIED = "applied"
    NOT_APPLIED = "mine, and still as before the attempt"
    LOST = "another's"


def judge(view: LeaseView, attempt: Lease) -> Verdict:
    """Compare what is stored with what an attempt wanted to store."""
    lease = view.lease
    if view.fence.epoch > attempt.epoch:
        return Verdict.LOST
    mine = (lease.holder, lease.incarnation, lease.epoch) == (
        attempt.holder,
        attempt.incarnation,
        attempt.epoch,
    )
    if not mine:
        return Verdict.LOST
    if lease.nonce == attempt.nonce:
        return Verdict.APPLIED
    return Verdict.NOT_APPLIED if lease.state is LeaseState.HELD else Verdict.LOST


def fence_changed(
    fence: Fence, *, at: float, by: str, reason: str, state: LeaseState, epoch: int
) -> tuple[FenceChange, ...]:
    """The fence's history with one more line, the oldest ones dropped at the limit."""
    line = FenceChange(at=at, epoch=epoch, state=state, changed_by=by, reason=reason)
    return (*fence.history, line)[-FENCE_HISTORY_MAX:]


def acquire_write(
    view: LeaseView, me: Identity, *, nonce: str, ttl_s: float, at: float, epoch_floor: int
) -> LeaseWrite:
    """Take the lease under an epoch above every one seen: in `view`, and on this host's disk."""
    epoch = max(view.lease.epoch, view.fence.epoch, epoch_floor) + 1
    reason = f"acquired by {me.name}"
    return LeaseWrite(
        lease=Lease(me.name, me.incarnation, epoch, nonce, ttl_s, LeaseState.HELD),
        fence=Fence(
            epoch=epoch,
            holder=me.name,
            incarnation=me.incarnation,
            address=me.address,
            state=LeaseState.HELD,
            reason=reason,
            changed_by=me.name,
            history=fence_changed(
                view.fence, at=at, by=me.name, reason=reason, state=LeaseState.HELD, epoch=epoch
            ),
        ),
        lease_stamp=view.lease_stamp,
        fence_stamp=view.fence_stamp,
    )


def renew_write(held: HeldLease, *, nonce: str) -> LeaseWrite:
    """Write the heartbeat again, if nobody has touched it since."""
    return LeaseWrite(lease=replace(held.lease, nonce=nonce), lease_stamp=held.lease_stamp)


def release_write(
    held: HeldLease,
    *,
    nonce: str,
    at: float,
    reason: str,
    handoff_to: str | None,
    settled: bool,
) -> LeaseWrite:
    """Give the lease back, if it is still as we know it. Only after the term is over."""
    state = LeaseState.HANDOFF if handoff_to else LeaseState.RELEASED
    return LeaseWrite(
        lease=replace(held.lease, nonce=nonce, state=LeaseState.RELEASED),
        fence=replace(
            held.fence,
            state=state,
            handoff_to=handoff_to,
            settled=settled,
            step_down_of=None,
            reason=reason,
            changed_by=held.lease.holder,
            history=fence_changed(
                held.fence,
                at=at,
                by=held.lease.holder,
                reason=reason,
                state=state,
                epoch=held.lease.epoch,
            ),
        ),
        lease_stamp=held.lease_stamp,
        fence_stamp=held.fence_stamp,
    )


@dataclass(slots=True)
class Sighting:
    """What a candidate remembers of the lease: since when, on its own clock, it has not changed.

    `handoff_seen_at` is when it first saw the present handoff to somebody else.
    """

    stamp: Stamp | None = None
    since: float = 0.0
    handoff_stamp: Stamp | None = None
    handoff_seen_at: float = 0.0

    def see(self, view: LeaseView, read_at: float) -> None:
        """Take note of `view`; `read_at` is Trio's clock *after* the read.

        A renewal may be written while the read is under way: counted from before the read, the
        lease could seem unchanged for a ttl while its holder still acts.
        """
        if view.lease_stamp != self.stamp:
            self.stamp, self.since = view.lease_stamp, read_at
        if view.fence.state is not LeaseState.HANDOFF:
            self.handoff_stamp = None
        elif view.fence_stamp != self.handoff_stamp:
            self.handoff_stamp, self.handoff_seen_at = view.fence_stamp, read_at

    def free_in(self, view: LeaseView, me: Identity, now: float, handoff_grace_s: float) -> float:
        """Seconds until `view`'s lease may be taken if nothing changes; 0 when it may be now.

        `now` is Trio's clock *before* `view` was read. Infinite while the operator has paused the
        group.
        """
        if view.fence.paused:
            return math.inf
        lease = view.lease
        # Our own incarnation's lease is free for us: whoever asks for it has no term running.
        own = lease.incarnation == me.incarnation
        if lease.state is not LeaseState.RELEASED and not own:
            by_store = lease.ttl_s - view.age_s
            by_own_clock = self.since + lease.ttl_s - now
            return max(0.0, min(by_store, by_own_clock))
        if view.fence.state is LeaseState.HANDOFF and view.fence.handoff_to != me.name:
            return max(0.0, self.handoff_seen_at + handoff_grace_s - now)
        return 0.0


def with_heartbeat(view: LeaseView, beat: Heartbeat) -> LeaseView | None:
    """`view` as of a newer heartbeat of the same holder; `None` when both must be read.

    While the same incarnation holds the lease under the fence's epoch, what else the fence says is
    for that holder to heed.
    """
    was, lease = view.lease, beat.lease
    same = (lease.holder, lease.incarnation, lease.epoch, lease.state) == (
        was.holder,
        was.incarnation,
        view.fence.epoch,
        LeaseState.HELD,
    )
    if not same:
        return None
    return replace(view, lease=lease, lease_stamp=beat.lease_stamp, age_s=beat.age_s)


def make_nonce(rng: random.Random) -> str:
    """A fresh mark for one attempt: how an attempt without an answer is recognised."""
    return f"{rng.getrandbits(64):016x}"


async def try_acquire(
    store: LeaseStore,
    view: LeaseView,
    me: Identity,
    timing: LeaseTiming,
    clocks: Clocks,
    rng: random.Random,
    *,
    epoch_floor: int = 0,
    held_here: int = 0,
) -> HeldLease | None:
    """Try once to take the lease as `view` shows it; `None` when another was faster.

    `held_here` is the last epoch that was held with this host's disk.

    Takes at most two `attempt_s`. An attempt without an answer is looked up; if even that has no
    answer it may have been applied: we then count as not holding it, and find our own incarnation
    in the documents at the next look.
    """
    asked_at, boot_asked_at = trio.current_time(), clocks.boottime()
    write = acquire_write(
        view,
        me,
        nonce=make_nonce(rng),
        ttl_s=timing.ttl_s,
        at=clocks.wall(),
        epoch_floor=epoch_floor,
    )
    lease, fence = write.lease, write.fence
    assert lease is not None
    assert fence is not None
    try:
        with trio.fail_after(timing.attempt_s):
            stamps = await store.write(write)
        lease_stamp, fence_stamp = stamps.lease_stamp, stamps.fence_stamp
    except UNCERTAIN:
        with trio.fail_after(timing.attempt_s):
            seen = await store.read()
        if judge(seen, lease) is not Verdict.APPLIED:
            return None
        lease_stamp, fence_stamp = seen.lease_stamp, seen.fence_stamp
    assert lease_stamp is not None
    assert fence_stamp is not None
    return HeldLease(
        grant=Grant(lease.epoch, me.name, me.incarnation, fence_stamp),
        lease=lease,
        lease_stamp=lease_stamp,
        fence=fence,
        fence_stamp=fence_stamp,
        deadline=asked_at + timing.term_s,
        boot_deadline=boot_asked_at + timing.term_s,
        asked_at=asked_at,
        last=last_term(view, held_here=held_here, epoch_floor=epoch_floor),
    )


def last_term(view: LeaseView, *, held_here: int, epoch_floor: int = 0) -> LastTerm:
    """How the term ended that `view` shows the end of. Documents from a backup do not say."""
    epoch = max(view.lease.epoch, view.fence.epoch)
    first = epoch == 0
    return LastTerm(
        settled=(view.fence.settled or first) and epoch >= epoch_floor, here=held_here == epoch
    )


async def ask_lease(held: HeldLease, store: LeaseStore, timing: LeaseTiming) -> None:
    """Look whether `held` is still ours. No answer says nothing. Raises `LeaseLost`."""
    try:
        with trio.fail_after(timing.attempt_s):
            view = await store.read()
    except UNCERTAIN:
        return
    if judge(view, held.lease) is Verdict.LOST:
        raise LeaseLost(describe_holder(view))


class LeaseLost(Exception):
    """Another holds the lease, or a higher epoch exists. Stop acting now."""


async def renew_once(
    held: HeldLease, store: LeaseStore, timing: LeaseTiming, clocks: Clocks, rng: random.Random
) -> bool:
    """Ask once for a renewal; true when it is known to be applied, and `held` is then extended.

    False: not known, or not applied; ask again. Raises `LeaseLost`.
    """
    asked_at, boot_asked_at = trio.current_time(), clocks.boottime()
    write = renew_write(held, nonce=make_nonce(rng))
    attempt = write.lease
    assert attempt is not None
    try:
        with trio.fail_after(timing.attempt_s):
            stamps = await store.write(write)
        assert stamps.lease_stamp is not None
        lease_stamp = stamps.lease_stamp
    except UNCERTAIN as error:
        held.failure = cause_of(error)
        try:
            with trio.fail_after(timing.attempt_s):
                view = await store.read()
        except UNCERTAIN as unread:
            held.failure = cause_of(unread)
            return False
        verdict = judge(view, attempt)
        if verdict is Verdict.LOST:
            raise LeaseLost(describe_holder(view)) from None
        held.fence, held.fence_stamp = view.fence, view.fence_stamp
        lease_stamp = view.lease_stamp
        if verdict is Verdict.NOT_APPLIED:
            held.lease, held.lease_stamp = view.lease, lease_stamp
            return False
    held.lease, held.lease_stamp = attempt, lease_stamp
    held.extend(asked_at, boot_asked_at, timing)
    held.renewals += 1
    held.last_renewal_at = clocks.wall()
    return True


def describe_holder(view: LeaseView) -> str:
    """For people: whom the documents name."""
    lease = view.lease
    return f"{lease.holder or 'nobody'} ({lease.state}, epoch {max(lease.epoch, view.fence.epoch)})"


async def release(
    held: HeldLease,
    store: LeaseStore,
    timing: LeaseTiming,
    clocks: Clocks,
    rng: random.Random,
    journal: Journal,
    *,
    reason: str,
    handoff_to: str | None = None,
    settled: bool = False,
) -> bool:
    """Give the lease back; true when it is known to be released (or not ours any more).

    `settled`: the shared store has everything that counted in the term.

    Bounded by four `attempt_s` and shielded for that long: it is a short last word. When it stays
    unanswered, the others wait for the ttl.
    """
    with trio.move_on_after(4 * timing.attempt_s, shield=True):
        while True:
            write = release_write(
                held,
                nonce=make_nonce(rng),
                at=clocks.wall(),
                reason=reason,
                handoff_to=handoff_to,
                settled=settled,
            )
            attempt = write.lease
            assert attempt is not None
            try:
                with trio.fail_after(timing.attempt_s):
                    await store.write(write)
                return True
            except UNCERTAIN as error:
                journal.note("lease.release_unanswered", error=describe_error(error))
            try:
                with trio.fail_after(timing.attempt_s):
                    view = await store.read()
            except UNCERTAIN:
                await trio.sleep(timing.attempt_s / 4)
                continue
            if judge(view, attempt) is not Verdict.NOT_APPLIED:
                return True
            news = view.fence_stamp != held.fence_stamp or view.lease_stamp != held.lease_stamp
            held.lease, held.lease_stamp = view.lease, view.lease_stamp
            held.fence, held.fence_stamp = view.fence, view.fence_stamp
            if not news:
                # Nothing has changed, so the store itself said no: do not ask in a tight loop.
                await trio.sleep(timing.attempt_s / 4)
    return False


def cause_of(error: BaseException) -> str:
    """One word of a short list, for a metric: the store's own code, or what else went wrong."""
    match error:
        case StoreUnavailable():
            return error.code
        case LeaseRefused():
            return "refused"
        case LeaseMissing():
            return "missing"
    return "timeout"


def describe_error(error: BaseException) -> str:
    """One line for a log: the kind of error and its own sentence."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class Tenure(Protocol):
    """What `keep_lease` moves: the term, seen from the lease."""

    def extend(self, held: HeldLease) -> None:
        """Take over the new deadline."""
        ...

    def lose(self, reason: str) -> None:
        """End at once: another acts."""
        ...


async def keep_lease(
    held: HeldLease,
    store: LeaseStore,
    timing: LeaseTiming,
    clocks: Clocks,
    rng: random.Random,
    journal: Journal,
    term: Tenure,
) -> None:
    """Renew the lease, moving `term`'s deadline at each success.

    The deadline counts from the moment we asked, not from the answer: a slow store may shorten
    our term and can never lengthen it.

    Refused: ends `term` at once and returns; a higher epoch exists, or another holder.
    Unreachable: keeps asking; `term` ends by itself at its deadline.
    Cancelled: releases nothing; that comes after the term.
    """
    failures = 0
    while True:
        if failures == 0:
            await trio.sleep_until(held.asked_at + timing.renew_s)
        else:
            # The failed try took up to two attempts already; a short pause keeps a store that
            # refuses at once from being asked in a tight loop.
            await trio.sleep(min(WRITE_INTERVAL_MIN_S, timing.attempt_s / 2))
        try:
            renewed = await renew_once(held, store, timing, clocks, rng)
        except LeaseLost as lost:
            term.lose(f"the lease is held by {lost}")
            return
        if renewed:
            failures = 0
            term.extend(held)
            journal.note("lease.renewed", epoch=held.grant.epoch, renewals=held.renewals)
        else:
            failures += 1
            journal.note(
                "lease.renewal_failed",
                epoch=held.grant.epoch,
                failures=failures,
                cause=held.failure,
                remaining_s=round(held.deadline - trio.current_time(), 3),
            )
