"""One instance: the states, what happens on entering each, and the only task that moves them.

`run()` is the whole life: boot, stand by, acquire, serve a term, step down or drain. Everyone else
reads `state`, or asks with `request_drain` and `request_step_down`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from machine.desk import Desk
from machine.engine import Engine, Fired
from machine.inbox import InboxPage, make_page, read_cursor
from machine.lease import (
    ACQUIRE_JITTER_S,
    UNCERTAIN,
    HeldLease,
    LeaseTiming,
    Sighting,
    describe_error,
    describe_holder,
    release,
    try_acquire,
    with_heartbeat,
)
from machine.limits import Durability, Limits
from machine.ports import (
    ConnectorDown,
    LeaseMissing,
    Ports,
    StaleWrite,
    StoreUnavailable,
)
from machine.records import (
    AccountCopy,
    AccountId,
    Fence,
    Identity,
    LeaseState,
    LeaseView,
    Listing,
    Transition,
    Version,
)
from machine.refusals import AccountNotFound, NotActive
from machine.restore import RestoreImpossible
from machine.retry import Backoff, TryTimedOut, retry
from machine.states import State, Trigger
from machine.term import EndAsked, Term, open_term
from machine.views import AccountView, Holder, LeaseStatus, RestoreReport

LOOK_BACKOFF = Backoff(first_s=0.25, factor=2.0, cap_s=5.0, jitter=0.5)
LOOK_INTERVAL_MIN_S = 0.01
LOOK_LATE_S = 0.1
"""How long after an expected expiry a standby looks. A ttl is a whole number of renewals, as a
rule, so one is due in that very moment: a look just before it would have to be repeated sooner."""
PAUSED_LOOK_S = 30.0
"""How often a standby looks whether a pause is over, if it hears nothing."""
BOOT_BACKOFF = Backoff(first_s=0.1, factor=2.0, cap_s=1.0, jitter=0.5)
BOOT_TRIES_MAX = 3


@dataclass(frozen=True, slots=True)
class _Ended:
    """How a term came to its end. `released`: the lease is to be given back by us."""

    reason: str
    release: bool
    handoff_to: str | None = None
    stand_back: bool = False


class Instance:
    """One process's part in its group.

    Between calls: `term` is set exactly while requests may be served here; `holder` is whom the
    lease named when it was last seen. `machine_state` is the engine's; read `state`.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        ports: Ports,
        timing: LeaseTiming,
        limits: Limits,
        durability: Durability = Durability.REMOTE,
    ) -> None:
        self.identity = identity
        self.since = ports.clocks.wall()
        self.holder: Holder | None = None
        self.alive = True
        self._ports = ports
        self._timing = timing
        self._limits = limits
        self._durability = durability
        self._transitions: deque[Transition] = deque(maxlen=limits.transitions_kept)
        self._term: Term | None = None
        self._report: RestoreReport | None = None
        self._drain_reason: str | None = None
        self._changed = trio.Event()
        self._fence_moved = trio.Event()
        self._view: LeaseView | None = None
        self._seen_at = 0.0
        self._sighting = Sighting()
        self._epoch_floor = 0
        # The last epoch that was held with this disk.
        self._held_here = 0
        self._fell_until = -math.inf
        self._ttl_max_s = timing.ttl_s
        # The epoch that the documents showed last, and whose it was.
        self._shown: tuple[int, str] | None = None
        self._stand_back_until = -math.inf
        self._told_holder: tuple[str, int] | None = None
        self._fence: Fence | None = None
        self._nursery: trio.Nursery | None = None
        self._unsaved: list[Transition] = []
        self._watching = trio.CancelScope()
        self._warming = trio.CancelScope()
        self._engine = Engine(self, fired=self._record)

    # --- what others read

    @property
    def state(self) -> State:
        """Where this instance stands."""
        return self._engine.state

    @property
    def term(self) -> Term | None:
        """The term that answers requests here, or `None`: then ask the holder."""
        term = self._term
        begun = self.state in (State.ACTIVE, State.DRAINING)
        if not begun or term is None or term.intake_closed or term.over:
            return None
        return term

    @property
    def desk(self) -> Desk | None:
        """Where that term answers requests, or `None`."""
        term = self.term
        return None if term is None else term.desk

    @property
    def epoch(self) -> int:
        """The epoch acted under; 0 when none is."""
        return self._term.epoch if self._term is not None else 0

    @property
    def transitions(self) -> Sequence[Transition]:
        """The last transitions, those of earlier runs included, newest last."""
        return tuple(self._transitions)

    @property
    def restore_report(self) -> RestoreReport | None:
        """What the present or the last restore of this run brought back."""
        return self._term.restore_report if self._term is not None else self._report

    @property
    def lease_status(self) -> LeaseStatus | None:
        """The lease as last seen; `None` before the first look."""
        if self._term is not None:
            held = self._term.held
            return LeaseStatus(
                holder=self.identity.name,
                epoch=held.grant.epoch,
                ttl_s=self._timing.ttl_s,
                remaining_s=max(0.0, held.deadline - trio.current_time()),
                renewals=held.renewals,
                last_renewal_at=held.last_renewal_at,
                paused=held.fence.paused,
            )
        if self._view is None:
            return None
        lease, fence = self._view.lease, self._view.fence
        left_s = lease.ttl_s - self._view.age_s - (trio.current_time() - self._seen_at)
        return LeaseStatus(
            holder=lease.holder if lease.state is LeaseState.HELD else None,
            epoch=max(lease.epoch, fence.epoch),
            ttl_s=lease.ttl_s,
            remaining_s=max(0.0, left_s) if lease.state is LeaseState.HELD else 0.0,
            renewals=0,
            last_renewal_at=None,
            paused=fence.paused,
        )

    async def wait_changed(self) -> None:
        """Wait until state, term or holder differ from what they are now."""
        await self._changed.wait()

    async def list_accounts(self) -> tuple[AccountView, ...]:
        """Every account as the shared store has it: what a PASSIVE instance can say.

        Raises `StoreUnavailable`. The caller sets the deadline.
        """
        listing = await self._ports.accounts.list_accounts()
        views = [
            AccountView(copy.account, in_memory=False, queued=0)
            for copy in listing.copies
            if not copy.removed
        ]
        return tuple(sorted(views, key=lambda view: view.account.account_id))

    async def list_inbox(self, account_id: AccountId, *, cursor: str, count_max: int) -> InboxPage:
        """Messages that the account received, after `cursor`, in the order of their recording.

        Any instance may say it: what counts as received is in the shared store. Raises
        `CursorUnknown`, `AccountNotFound`, `StoreUnavailable`. The caller sets the deadline.
        """
        entries = await self._ports.inbox.list_inbox(
            account_id, after=read_cursor(cursor), count_max=count_max + 1
        )
        if not entries and not cursor and not await self._knows(account_id):
            raise AccountNotFound(f"no account {account_id} in the shared store")
        return make_page(entries, cursor=cursor, count_max=count_max)

    async def _knows(self, account_id: AccountId) -> bool:
        if self._term is not None and account_id in self._term.sessions:
            return True
        copy = await self._ports.accounts.fetch_account(account_id)
        return copy is not None and not copy.removed

    # --- what others ask

    def request_drain(self, reason: str) -> None:
        """Ask this instance to end for good. It does so from any state, in good order."""
        if self._drain_reason is None:
            self._drain_reason = reason
            self._ports.journal.note("drain.asked", reason=reason)
            if self._term is not None:
                self._term.ask_end(EndAsked(reason))
            self._poke()

    def request_step_down(self, reason: str, *, handoff_to: str | None = None) -> None:
        """Ask an ACTIVE instance to hand the lease over. Elsewhere there is nothing to do."""
        if self._term is not None and self._drain_reason is None:
            self._ports.journal.note("step_down.asked", reason=reason)
            self._term.ask_end(EndAsked(reason, handoff_to))

    # --- the life

    async def run(self) -> None:
        """Boot, stand by, and act whenever the lease is ours, until a drain is over.

        Raises bugs, after the lease was given back.
        """
        with self._engine.claim():
            try:
                await self._boot()
                if self._drain_reason is None:
                    await self._engine.fire(Trigger.BOOTED, reason="ready")
                    await self._stand_by_and_serve()
                else:
                    await self._engine.fire(Trigger.DRAIN, reason=self._drain_reason)
                    for transition in self._unsaved:
                        await self._keep_transition(transition)
            finally:
                self.alive = False
                self._poke()

    async def _boot(self) -> None:
        """Read what this host's disk remembers. An unreadable disk does not stop us."""
        local = self._ports.local
        try:
            with trio.fail_after(self._limits.restore_try_s):
                self._epoch_floor = self._held_here = await local.highest_epoch()
                self._transitions.extend(
                    await local.list_transitions(self._limits.transitions_kept)
                )
        except (StoreUnavailable, trio.TooSlowError) as error:
            self._ports.journal.note("disk.failed", what="boot", error=describe_error(error))
        self._ports.journal.note(
            "instance.booted",
            instance=self.identity.name,
            address=self.identity.address,
            epoch=self._epoch_floor,
        )

    async def _stand_by_and_serve(self) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._keep_fence_watched)
            nursery.start_soon(self._keep_warm)
            for transition in self._unsaved:
                nursery.start_soon(self._keep_transition, transition)
            self._unsaved.clear()
            while self._drain_reason is None:
                held = await self._acquire()
                if held is not None:
                    await self._serve(held)
            if self.state is not State.DRAINING:
                await self._engine.fire(Trigger.DRAIN, reason=self._drain_reason)
            await self._linger()
            # Records of transitions still being written to disk get a short last word.
            nursery.cancel_scope.deadline = trio.current_time() + self._limits.store_try_s
            self._cancel_watchers()
        self._nursery = None

    # --- PASSIVE

    async def on_enter_PASSIVE(self, reason: str) -> None:  # noqa: N802 - transitions' own naming
        """Stand by. The restore is skipped, and the log says who holds the lease."""
        del reason
        self._entered()
        self._told_holder = None

    async def _acquire(self) -> HeldLease | None:
        """Stand by until the lease is ours; `None` when a drain is asked for.

        Wakes at the expected expiry and at each change of the fence, not in between.
        """
        failures = 0
        known: LeaseView | None = None
        while self._drain_reason is None:
            # Before the read: a change that comes during it must not be slept through.
            self._fence_moved = moved = trio.Event()
            try:
                view, asked_at = await self._look(known)
            except UNCERTAIN as error:
                failures += 1
                known = None
                await self._tell_unreadable(error, failures, moved)
                continue
            failures = 0
            wait_s = self._wait_s(view, asked_at)
            if wait_s > 0:
                await self._wait_moved(moved, self._next_look(view, asked_at, wait_s))
                known = None if moved.is_set() else view
                continue
            known = None
            if view.lease.incarnation != self.identity.incarnation:
                await trio.sleep(self._ports.rng.uniform(0, ACQUIRE_JITTER_S))
            held = await self._try_acquire(view)
            if held is not None:
                return held
        return None

    async def _look(self, known: LeaseView | None) -> tuple[LeaseView, float]:
        """The documents as they are, and Trio's clock before they were read.

        `known`: as they were at the last look, if nothing was heard since. Then the heartbeat is
        read alone (it is what a standby pays for), and both when it leaves anything to decide.
        """
        if known is not None:
            asked_at = trio.current_time()
            with trio.fail_after(self._timing.attempt_s):
                beat = await self._ports.lease.read_heartbeat()
            view = with_heartbeat(known, beat)
            if view is not None:
                self._note_epoch(view)
                self._view, self._seen_at = view, trio.current_time()
                self._sighting.see(view, self._seen_at)
                if self._wait_s(view, asked_at) > 0:
                    return view, asked_at
        asked_at = trio.current_time()
        with trio.fail_after(self._timing.attempt_s):
            view = await self._ports.lease.read()
        self._see(view, trio.current_time())
        return view, asked_at

    def _wait_s(self, view: LeaseView, asked_at: float) -> float:
        """Seconds from `asked_at`, before `view` was read, until we may take the lease."""
        grace_s = self._limits.handoff_grace_s
        return max(
            self._sighting.free_in(view, self.identity, asked_at, grace_s),
            self._stand_back_until - asked_at,
            self._fell_until - asked_at,
        )

    def _next_look(self, view: LeaseView, asked_at: float, wait_s: float) -> float:
        """When to look again, on Trio's clock, if nothing is heard until then."""
        if view.fence.paused:
            # The listener only accelerates: that the pause is over is found without it too.
            wait_s = min(wait_s, PAUSED_LOOK_S)
        elif view.lease.state is LeaseState.HELD:
            wait_s += LOOK_LATE_S
        # Woken a hair too early, we would look again and again until the moment comes.
        return max(asked_at + wait_s, trio.current_time() + LOOK_INTERVAL_MIN_S)

    async def _try_acquire(self, view: LeaseView) -> HeldLease | None:
        self._note_epoch(view)
        if trio.current_time() < self._fell_until:
            return None  # Meanwhile the accounts were read, and know of a higher epoch.
        floor = self._epoch_floor
        if floor > max(view.lease.epoch, view.fence.epoch):
            self._ports.journal.note(
                "epoch.fell",
                found=floor,
                where="what this host has seen",
                epoch=max(view.lease.epoch, view.fence.epoch),
            )
        try:
            held = await try_acquire(
                self._ports.lease,
                view,
                self.identity,
                self._timing,
                self._ports.clocks,
                self._ports.rng,
                epoch_floor=floor,
                held_here=self._held_here,
            )
        except UNCERTAIN as error:
            self._ports.journal.note(
                "lease.unreadable", error=describe_error(error), retry_s=self._timing.attempt_s
            )
            await trio.sleep(self._timing.attempt_s / 4)
            return None
        if held is None:
            self._ports.journal.note("lease.not_acquired", holder="another instance")
            return None
        self._ports.journal.note(
            "lease.acquired", epoch=held.grant.epoch, previous=describe_holder(view)
        )
        await self._remember_epoch(held.grant.epoch)
        return held

    async def _remember_epoch(self, epoch: int) -> None:
        self._epoch_floor = max(self._epoch_floor, epoch)
        try:
            with trio.fail_after(self._timing.attempt_s):
                await self._ports.local.raise_epoch(epoch)
            self._held_here = epoch
        except (StoreUnavailable, trio.TooSlowError) as error:
            self._ports.journal.note("disk.failed", what="epoch", error=describe_error(error))

    def _see(self, view: LeaseView, read_at: float) -> None:
        """Take note of the documents, and tell whom they name when that is news."""
        self._note_epoch(view)
        self._view, self._seen_at = view, read_at
        self._sighting.see(view, read_at)
        self._note_holder(view.fence)
        lease = view.lease
        told = (lease.holder, view.fence.epoch)
        if lease.state is LeaseState.HELD and told != self._told_holder:
            self._told_holder = told
            self._ports.journal.note("restore.skipped", holder=lease.holder, epoch=view.fence.epoch)

    def _note_epoch(self, view: LeaseView) -> None:
        """Remember the highest epoch; wait a ttl when the documents have forgotten it.

        They are then those of a backup. Whoever acts under the epoch that they have lost may not
        have noticed yet, and the lease that they show as free is not. Whose term that is they do
        not say, so the ttl is the longest that any lease has had.
        """
        epoch, owner = max(view.lease.epoch, view.fence.epoch), view.lease.incarnation
        self._ttl_max_s = max(self._ttl_max_s, view.lease.ttl_s)
        shown, self._shown = self._shown, (epoch, owner)
        # Each time that they fall: whoever came after one backup acts, and is forgotten by the
        # next. An epoch has one owner, so another one at the same is a backup's as well.
        fell = shown is not None and (epoch < shown[0] or (epoch == shown[0] and owner != shown[1]))
        if fell or (epoch < self._epoch_floor and self._fell_until == -math.inf):
            self._fell_until = trio.current_time() + self._ttl_max_s
        elif epoch > self._epoch_floor:
            self._epoch_floor, self._fell_until = epoch, -math.inf

    def _note_holder(self, fence: Fence) -> None:
        holder = None
        if fence.state is LeaseState.HELD and fence.holder:
            holder = Holder(fence.holder, fence.incarnation, fence.address, fence.epoch)
        if holder != self.holder:
            self.holder = holder
            self._poke()

    async def _tell_unreadable(self, error: Exception, failures: int, moved: trio.Event) -> None:
        retry_s = LOOK_BACKOFF.wait_s(failures, self._ports.rng)
        event = "lease.missing" if isinstance(error, LeaseMissing) else "lease.unreadable"
        self._ports.journal.note(event, error=describe_error(error), retry_s=round(retry_s, 2))
        await self._wait_moved(moved, trio.current_time() + retry_s)

    async def _wait_moved(self, moved: trio.Event, until: float) -> None:
        """Wait for the fence to change, for a drain, or until a moment."""
        if self._drain_reason is None:
            with trio.CancelScope(deadline=until):
                await moved.wait()

    async def _keep_fence_watched(self) -> None:
        """Hear of every change of the fence. It only accelerates; the reads decide."""
        with self._watching:
            async with self._ports.lease.watch_fence() as fences:
                async for fence in fences:
                    self._fence = fence
                    self._note_holder(fence)
                    self._fence_moved.set()
                    if self._term is not None:
                        self._heed(fence, self._term)

    def _heed(self, fence: Fence, term: Term) -> None:
        """What the fence says to the holder: a higher epoch, or the operator's wish."""
        if fence.epoch > term.epoch:
            term.lose(f"epoch {fence.epoch} was granted to {fence.holder}")
        elif fence.epoch == term.epoch and (fence.paused or fence.step_down_of == term.epoch):
            term.ask_end(EndAsked(f"asked through the store: {fence.reason}", fence.handoff_to))

    # --- ACTIVE

    async def on_enter_ACTIVE(self, reason: str, term: Term) -> None:  # noqa: N802
        """Restore every account; returns when the first pass is over."""
        del reason
        self._entered()
        await term.restore()

    async def _serve(self, held: HeldLease) -> None:
        """One term, from its first moment to the lease's release."""
        ended: _Ended | None = None
        try:
            ended = await self._run_term(held)
        finally:
            # Stop, then release: nothing of the term runs here any more.
            term, self._term = self._term, None
            if term is not None:
                self._report = term.restore_report
                self._epoch_floor = max(self._epoch_floor, term.epoch_seen)
            self._poke()
            if ended is None or ended.release:
                await self._release(held, ended, settled=term is not None and term.settled)
        if term is not None and term.outranked:
            # Whoever acts under that epoch may not know of ours: he has stopped after a ttl.
            self._stand_back_until = trio.current_time() + self._timing.ttl_s
        if ended.stand_back:
            self._stand_back_until = trio.current_time() + self._limits.stand_back_s
        await self._keep_report()
        if self.state is State.ACTIVE:
            await self._engine.fire(Trigger.STEP_DOWN, reason=ended.reason)

    async def _run_term(self, held: HeldLease) -> _Ended:
        """Open the term, activate, serve, settle; why and how it ended."""
        asked: EndAsked | None = None
        failure: str | None = None
        term: Term | None = None
        try:
            async with open_term(
                held,
                ports=self._ports,
                limits=self._limits,
                timing=self._timing,
                durability=self._durability,
            ) as term:
                self._term = term
                if self._fence is not None:
                    # What was asked for while the bridge was starting.
                    self._heed(self._fence, term)
                if self._drain_reason is not None:
                    term.ask_end(EndAsked(self._drain_reason))
                else:
                    asked = await self._activate_and_wait(term)
                if self._drain_reason is not None:
                    await self._engine.fire(Trigger.DRAIN, reason=self._drain_reason, term=term)
                else:
                    await term.settle()
        except* NotActive:
            # A task of the term looked before an effect and found it over.
            pass
        except* RestoreImpossible as impossible:
            failure = f"restore impossible: {impossible.exceptions[0]}"
        except* ConnectorDown as down:
            failure = f"connector down: {down.exceptions[0]}"
        if term is not None and term.lost_reason is not None:
            return _Ended(term.lost_reason, release=False)
        if failure is not None:
            return _Ended(failure, release=True, stand_back=True)
        if term is None:
            return _Ended("the lease was lost before its term had begun", release=False)
        if self._drain_reason is not None:
            return _Ended(self._drain_reason, release=True)
        assert asked is not None
        return _Ended(asked.reason, release=True, handoff_to=asked.handoff_to, stand_back=True)

    async def _activate_and_wait(self, term: Term) -> EndAsked:
        await self._engine.fire(
            Trigger.ACTIVATE, reason=f"lease acquired (epoch {term.epoch})", term=term
        )
        self._poke()
        return await term.wait_end_asked()

    async def _release(self, held: HeldLease, ended: _Ended | None, *, settled: bool) -> None:
        """Give the lease back; the last word of a term, bounded by itself."""
        reason = ended.reason if ended is not None else "the term ended with an error"
        released = await release(
            held,
            self._ports.lease,
            self._timing,
            self._ports.clocks,
            self._ports.rng,
            self._ports.journal,
            reason=reason,
            handoff_to=ended.handoff_to if ended is not None else None,
            settled=settled,
        )
        if released:
            self._ports.guard.lease_released()
        self._ports.journal.note(
            "lease.released" if released else "lease.not_released",
            epoch=held.grant.epoch,
            reason=reason,
        )

    async def _keep_report(self) -> None:
        report = self._report
        if report is None:
            return
        with suppress(StoreUnavailable, trio.TooSlowError):
            with trio.fail_after(self._limits.store_try_s):
                await self._ports.local.append_report(
                    {
                        "epoch": report.epoch,
                        "startedAt": report.started_at,
                        "finishedAt": report.finished_at,
                        "total": report.total,
                        "restored": report.restored,
                        "failed": len(report.failures),
                        "doubted": report.doubted,
                        "durations": dict(report.durations),
                    }
                )

    # --- DRAINING

    async def on_enter_DRAINING(self, reason: str, term: Term | None = None) -> None:  # noqa: N802
        """Settle the outbox and close the sessions, while the lease is still being renewed."""
        del reason
        self._entered()
        if term is not None:
            await term.settle()

    async def _linger(self) -> None:
        """Stay, and let the API forward, until somebody else holds the lease."""
        with trio.move_on_after(self._limits.linger_s):
            while self.holder is None or self.holder.incarnation == self.identity.incarnation:
                await self.wait_changed()

    # --- the copy on disk

    async def _keep_warm(self) -> None:
        """While PASSIVE, bring the disk copy up to date: once now, then every so often."""
        with self._warming:
            while True:
                if self.state is State.PASSIVE:
                    await self._warm()
                await trio.sleep(self._limits.warm_every_s)

    async def _warm(self) -> None:
        try:
            with trio.fail_after(self._limits.restore_try_s):
                shared = await self._ports.accounts.list_accounts()
                local = await self._ports.local.list_accounts()
        except (StoreUnavailable, trio.TooSlowError) as error:
            self._ports.journal.note("warm.failed", error=describe_error(error))
            return
        # Lease documents of a backup do not say what has been granted; the accounts do.
        seen = max((copy.version.epoch for copy in (*shared.copies, *local.copies)), default=0)
        self._epoch_floor = max(self._epoch_floor, seen)
        stale = _stale(shared, local)
        fetched = 0
        limiter = trio.CapacityLimiter(self._limits.warm_concurrency)

        async def fetch(copy: AccountCopy) -> None:
            nonlocal fetched
            async with limiter:
                fetched += await self._warm_one(copy)

        async with trio.open_nursery() as nursery:
            for copy in stale:
                nursery.start_soon(fetch, copy)
        self._ports.journal.note("warm.finished", fetched=fetched, total=len(shared.copies))

    async def _warm_one(self, copy: AccountCopy) -> bool:
        """Fetch one account to the disk; false when it did not work, or we are not PASSIVE."""
        if self.state is not State.PASSIVE:
            return False
        account_id = copy.account.account_id
        with suppress(StoreUnavailable, StaleWrite, trio.TooSlowError):
            with trio.fail_after(self._limits.store_try_s):
                whole = await self._ports.accounts.fetch_account(account_id)
                if whole is not None and whole.fault is None and not whole.removed:
                    await self._ports.local.save_account(whole)
                    return True
        return False

    # --- telling

    def _record(self, fired: Fired) -> None:
        """The one record of a transition: log, metrics, API, and the local database."""
        transition = Transition(
            source=fired.source,
            dest=fired.dest,
            trigger=fired.trigger,
            reason=fired.reason,
            at=self._ports.clocks.wall() - fired.duration_s,
            duration_s=round(fired.duration_s, 6),
            epoch=self.epoch,
            instance=self.identity.name,
        )
        self._transitions.append(transition)
        self._ports.journal.note(
            "transition.made",
            source=transition.source,
            dest=transition.dest,
            trigger=transition.trigger,
            reason=transition.reason,
            epoch=transition.epoch,
            duration_s=transition.duration_s,
        )
        if self._nursery is not None:
            self._nursery.start_soon(self._keep_transition, transition)
        else:
            self._unsaved.append(transition)
        self._poke()

    async def _keep_transition(self, transition: Transition) -> None:
        async def append() -> None:
            await self._ports.local.append_transition(transition)

        with suppress(StoreUnavailable, TryTimedOut):
            await retry(
                append,
                on=(StoreUnavailable,),
                backoff=BOOT_BACKOFF,
                try_s=self._limits.store_try_s,
                rng=self._ports.rng,
                tries_max=BOOT_TRIES_MAX,
            )

    def _entered(self) -> None:
        """A state was entered: its work begins now, its record follows when that is done."""
        self.since = self._ports.clocks.wall()
        self._poke()

    def _poke(self) -> None:
        """Wake whoever waits for a change, the acquiring task included."""
        self._changed.set()
        self._changed = trio.Event()
        self._fence_moved.set()

    def _cancel_watchers(self) -> None:
        self._watching.cancel()
        self._warming.cancel()


def _stale(shared: Listing, local: Listing) -> list[AccountCopy]:
    """The accounts whose copy on disk is missing, unreadable or older."""
    versions = {c.account.account_id: c.version for c in local.copies if c.fault is None}
    nothing = Version(-1, -1)
    return [
        copy
        for copy in shared.copies
        if copy.fault is None
        and not copy.removed
        and versions.get(copy.account.account_id, nothing) < copy.version
    ]
