"""A term: everything that exists only while ACTIVE under one epoch.

One `async with`, one cancel scope whose deadline is the lease's. When the block is over nothing of
the term runs any more: renewals, the bridge, sessions, deliveries, commits, and the callers' own
requests that were being answered by it.

Never lives here: who gets the lease (`machine.lease`), what the states mean (`machine.instance`),
how requests are answered (`machine.desk`).
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Protocol, TypeVar

import trio

from machine.desk import Desk
from machine.lease import HeldLease, LeaseLost, LeaseTiming, ask_lease, keep_lease
from machine.ledger import AccountVanished, Ledger
from machine.limits import Durability, Limits
from machine.places import Places
from machine.ports import (
    AuthTooLarge,
    Bridge,
    ConnectorDown,
    Ports,
    StaleWrite,
    StoreUnavailable,
)
from machine.records import (
    Account,
    AccountCopy,
    AccountId,
    Grant,
)
from machine.refusals import (
    NotActive,
    StoreAway,
)
from machine.restore import Restore
from machine.retry import Backoff, TryTimedOut, retry
from machine.session import Session, jitter_s
from machine.views import RestoreReport

T = TypeVar("T")

ASK_BACKOFF = Backoff(first_s=0.05, factor=2.0, cap_s=0.5, jitter=0.5)
ASK_TRIES_MAX = 3

BOOTTIME_LOOK_S = 0.5
"""How often a term looks at the clock that goes on in a suspend; Trio cannot wait for it."""


PURGE_PAUSE_S = 1.0
"""Between two bounded deletions: callers come first."""


class _Purge(Protocol):
    async def __call__(self, grant: Grant, *, before: float, count_max: int) -> int: ...


@dataclass(frozen=True, slots=True)
class EndAsked:
    """Why a term is to end in good order, and to whom the lease is to go."""

    reason: str
    handoff_to: str | None = None


class Term:
    """What its holder may do, while it may.

    Between calls: `over` tells whether anything may still be done; `sessions` has every account
    that is in memory; `desk` answers requests, and ends them with the term.
    """

    def __init__(
        self,
        held: HeldLease,
        *,
        ports: Ports,
        limits: Limits,
        timing: LeaseTiming,
        durability: Durability,
    ) -> None:
        self.held = held
        self.grant = held.grant
        self.sessions: dict[AccountId, Session] = {}
        self.settling = False
        self.settled = False
        self.durability = durability
        self.last = held.last
        self.intake_closed = False
        self.opening = Places(limits.open_concurrency)
        self.reading = Places(limits.read_concurrency)
        self.lease_ttl_s = timing.ttl_s
        self._kill_grace_s = timing.kill_grace_s
        self.client_refused: str | None = None
        self.scope = trio.CancelScope(deadline=held.deadline)
        self.lost_reason: str | None = None
        self.epoch_seen = held.grant.epoch
        self.outranked = False
        self.end_asked: EndAsked | None = None
        self._end_asked = trio.Event()
        self._ports = ports
        self._limits = limits
        self._timing = timing
        self._restore = Restore(self, ports=ports, limits=limits)
        self._restoring = trio.CancelScope()
        self._known = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._bridge: Bridge | None = None
        self.desk = Desk(self, ports=ports, limits=limits)

    # --- its bounds

    @property
    def epoch(self) -> int:
        """The epoch this term acts under."""
        return self.grant.epoch

    @property
    def over(self) -> bool:
        """Whether the term has ended, on either clock."""
        return (
            self.scope.cancel_called
            or trio.current_time() >= self.held.deadline
            or self._ports.clocks.boottime() >= self.held.boot_deadline
        )

    def check(self) -> None:
        """Raise `NotActive` when the term is over. Called right before every effect.

        CLOCK_BOOTTIME goes on in a suspend, Trio's clock does not: the first to pass ends it.
        """
        if self.over:
            self.lose("its deadline has passed")
            raise NotActive("this instance does not hold the lease any more", retry_after_s=1)

    def extend(self, held: HeldLease) -> None:
        """Take over a later deadline, for the term and for every request it is answering."""
        self.scope.deadline = held.deadline
        self.desk.extend(held.deadline)
        self.tell_guard()

    def tell_guard(self) -> None:
        """Tell the guard until when this term may run, a little grace included."""
        self._ports.guard.deadline_moved(self.grant, self.held.boot_deadline + self._kill_grace_s)

    def lose(self, reason: str, *, epoch_seen: int = 0) -> None:
        """End the term at once: another acts, or may.

        `epoch_seen` is the higher epoch that says so, if one does: the next term starts above it.
        """
        self.epoch_seen = max(self.epoch_seen, epoch_seen)
        self.outranked = self.outranked or epoch_seen >= self.epoch
        if self.lost_reason is None and not self.scope.cancel_called:
            self.lost_reason = reason
            self._ports.journal.note("lease.lost", epoch=self.epoch, reason=reason)
        self.scope.cancel()

    async def keep_boottime_watched(self) -> None:
        """End the term soon after its deadline has passed on CLOCK_BOOTTIME.

        After a suspend the scope's own deadline is late by as long: until then connections would
        stay open that another holder opens too.
        """
        while not self.over:
            left_s = self.held.boot_deadline - self._ports.clocks.boottime()
            await trio.sleep(min(BOOTTIME_LOOK_S, max(0.0, left_s)))
        self.lose("its deadline has passed")

    def ask_end(self, asked: EndAsked) -> None:
        """Ask the term to end in good order; a restore that still runs is cut short."""
        if self.end_asked is None:
            self.end_asked = asked
            self._end_asked.set()
            self._restoring.cancel()

    def connector_down(self, reason: str) -> None:
        """The connector is dead beyond repair: let another instance try."""
        self.ask_end(EndAsked(f"connector down: {reason}"))

    def refuse_client(self, cause: str) -> None:
        """WhatsApp refuses this client's version: no account is opened any more in this term.

        One alert for all of them. Those that are open go on: they were accepted, and closing them
        would only lose what still works.
        """
        if self.client_refused is None:
            self.client_refused = cause or "client version refused"
            self._ports.journal.note("client.refused", cause=self.client_refused)

    async def ask_lease(self) -> None:
        """Look whether the lease is still ours; the term ends when it is not."""
        try:
            await ask_lease(self.held, self._ports.lease, self._timing)
        except LeaseLost as lost:
            self.lose(f"the lease is held by {lost}")

    async def wait_end_asked(self) -> EndAsked:
        """Wait until somebody asks for the term's end in good order."""
        await self._end_asked.wait()
        assert self.end_asked is not None
        return self.end_asked

    def spawn(self, work: Callable[[], Awaitable[object]]) -> None:
        """Run `work` in the term's nursery; it is cancelled and joined with the term."""
        assert self._nursery is not None
        self._nursery.start_soon(work)

    def begin(self, nursery: trio.Nursery, bridge: Bridge) -> None:
        """Take the term's nursery and bridge. `open_term` calls it, once."""
        self._nursery, self._bridge = nursery, bridge
        self.spawn(self._keep_purged)

    async def ask_store(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Ask the store a few times, each under its own deadline and only while we may.

        Raises `StoreUnavailable`, `TryTimedOut`; `NotActive` when the term is over.
        """

        async def once() -> T:
            self.check()
            return await attempt()

        return await retry(
            once,
            on=(StoreUnavailable,),
            backoff=ASK_BACKOFF,
            try_s=self._limits.store_try_s,
            rng=self._ports.rng,
            tries_max=ASK_TRIES_MAX,
        )

    # --- the restore

    @property
    def restore_report(self) -> RestoreReport:
        """What the restore has brought back so far."""
        return self._restore.report

    async def restore(self) -> None:
        """Restore every account; returns after the first pass, or when the term is to end.

        Raises `RestoreImpossible`.
        """
        with self._restoring:
            await self._restore.run()
        if self._restoring.cancelled_caught:
            assert self.end_asked is not None
            self._ports.journal.note(
                "restore.interrupted",
                duration_s=round(self._ports.clocks.wall() - self.restore_report.started_at, 3),
                reason=self.end_asked.reason,
            )

    def make_ledger(self, copy: AccountCopy, *, push: bool = False, saved: bool = False) -> Ledger:
        """The writer of one account in this term."""
        return Ledger(
            copy,
            term=self,
            ports=self._ports,
            limits=self._limits,
            durability=self.durability,
            push=push,
            saved=saved,
        )

    def make_session(self, account: Account, ledger: Ledger | None) -> Session:
        """Put an account in memory; from here on it is known, and accepts messages."""
        session = Session(account, ledger, term=self, ports=self._ports, limits=self._limits)
        self.sessions[account.account_id] = session
        return session

    def start_session(self, session: Session) -> None:
        """Open an account, unless the term is on its way out."""
        if self._bridge is not None and not self.settling:
            session.start(self._bridge, delay_s=jitter_s(self._ports.rng, self._limits))

    def known(self) -> None:
        """Every account is in memory now: who is not, does not exist."""
        self._known.set()

    async def wait_known(self) -> None:
        """Wait until every account is in memory."""
        await self._known.wait()

    @property
    def certain(self) -> bool:
        """Whether an account that is not in memory does not exist."""
        return self._restore.certain

    async def import_directory(self, directory: str) -> dict[str, object]:
        """Import a directory on request, and open what was imported."""
        return await self._restore.import_directory(directory)

    # --- the end in good order

    async def settle(self) -> None:
        """Let what is in flight finish, close every session, stop intake, make all durable.

        Messages are still accepted while sessions close (0.5 s for 1,000 of them): they wait in
        the outbox for the next holder, and their callers wait for nobody. Bounded by `settle_s`
        and by the lease. What is not settled then stays in the outbox as `sending`, and the next
        holder sends it again under the same id.
        """
        began = trio.current_time()
        self.settling = True
        in_flight = sum(session.sending for session in self.sessions.values())
        with trio.move_on_after(self._limits.settle_s):
            async with trio.open_nursery() as nursery:
                for session in self.sessions.values():
                    if session.sending:
                        nursery.start_soon(session.wait_sent)
        unsettled = sum(session.sending for session in self.sessions.values())
        async with trio.open_nursery() as nursery:
            for session in self.sessions.values():
                nursery.start_soon(session.stop)
        self.intake_closed = True
        ledgers = [s.ledger for s in self.sessions.values() if s.ledger is not None]
        with trio.move_on_after(self._limits.settle_s):
            async with trio.open_nursery() as nursery:
                for session in self.sessions.values():
                    if session.ledger is not None:
                        nursery.start_soon(_hand_over, session)
        unflushed = sum(not ledger.flushed for ledger in ledgers)
        # An account that was not sealed may carry a doubt that the store has not heard of.
        self.settled = self.certain and all(ledger.flushed and ledger.sealed for ledger in ledgers)
        if unflushed:
            self._ports.journal.note("drain.unflushed", accounts=unflushed)
        self._ports.journal.note(
            "drain.unsettled" if unsettled else "drain.settled",
            duration_s=round(trio.current_time() - began, 3),
            in_flight=unsettled or in_flight,
        )

    # --- housekeeping

    async def _keep_purged(self) -> None:
        """Delete messages that are over their retention: settled ones, and received ones."""
        while True:
            await trio.sleep(self._limits.purge_every_s)
            before = self._ports.clocks.wall() - self._limits.message_retention_s
            for box, purge in (
                ("outbox", self._ports.outbox.purge_messages),
                ("inbox", self._ports.inbox.purge_inbox),
            ):
                try:
                    gone = await self._purge(purge, before)
                    self._ports.journal.note(f"{box}.purged", count=gone)
                except StaleWrite as stale:
                    self.lose(f"deleting old messages was refused: {stale}")
                except (StoreUnavailable, TryTimedOut):
                    # The next round finds them too.
                    pass

    async def _purge(self, purge: _Purge, before: float) -> int:
        """Delete what is older, a bounded number at a time, until nothing is; how many went.

        With one bounded look a round a busy group would keep more than it deletes.
        """
        total, count_max = 0, self._limits.purge_count_max
        while True:
            gone = await self.ask_store(
                lambda: purge(self.grant, before=before, count_max=count_max)
            )
            total += gone
            if gone < count_max:
                return total
            await trio.sleep(PURGE_PAUSE_S)


async def _hand_over(session: Session) -> None:
    # What one account's ledger cannot write was told when it was tried; the drain goes on.
    with suppress(AccountVanished, AuthTooLarge, StoreAway):
        await session.hand_over()


@asynccontextmanager
async def open_term(
    held: HeldLease,
    *,
    ports: Ports,
    limits: Limits,
    timing: LeaseTiming,
    durability: Durability,
) -> AsyncIterator[Term]:
    """Open a term: renewals first, then the bridge, then room for sessions.

    The block ends early, without an error, when the term is lost: see `Term.lost_reason`. After
    it nothing of the term runs. Raises `ConnectorDown` when no bridge could be made, `NotActive`
    when the term was lost before there was one.
    """
    term = Term(held, ports=ports, limits=limits, timing=timing, durability=durability)
    begun = False
    # A suspend may have eaten all of it. Told of a deadline that has passed, the guard would kill a
    # process that ends its term by itself.
    term.check()
    term.tell_guard()
    try:
        with term.scope:
            async with trio.open_nursery() as renewing:
                renewing.start_soon(
                    keep_lease,
                    held,
                    ports.lease,
                    timing,
                    ports.clocks,
                    ports.rng,
                    ports.journal,
                    term,
                )
                renewing.start_soon(term.keep_boottime_watched)
                with trio.move_on_after(limits.open_try_s) as starting:
                    async with (
                        ports.connector.open_bridge() as bridge,
                        trio.open_nursery() as nursery,
                    ):
                        starting.deadline = math.inf
                        term.begin(nursery, bridge)
                        begun = True
                        yield term
                        nursery.cancel_scope.cancel()
                if starting.cancelled_caught:
                    # The lease would be renewed for ever, and nobody would serve.
                    raise ConnectorDown(f"it did not start within {limits.open_try_s:g} s")
                renewing.cancel_scope.cancel()
    finally:
        term.scope.cancel()
        await term.desk.aclose()
        ports.guard.term_over()
        if term.scope.cancelled_caught and term.lost_reason is None:
            term.lost_reason = "its deadline has passed"
            ports.journal.note("lease.lost", epoch=term.epoch, reason=term.lost_reason)
    if not begun:
        raise NotActive("the lease was lost before its term had begun", retry_after_s=1)
