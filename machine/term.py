"""A term: everything that exists only while ACTIVE under one epoch.

One `async with`, one cancel scope whose deadline is the lease's. When the block is over nothing of
the term runs any more: renewals, the bridge, sessions, deliveries, commits, and the callers' own
requests that were being answered by it.

Never lives here: who gets the lease (`machine.lease`), what the states mean (`machine.instance`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TypeVar, TypeVarTuple

import trio

from machine.lease import HeldLease, LeaseTiming, describe_error, keep_lease
from machine.ledger import AccountVanished, Ledger
from machine.legacy import first_version, new_account
from machine.limits import Durability, Limits
from machine.outbox import require_same
from machine.places import Places
from machine.ports import (
    AccountExists,
    Bridge,
    ConnectionClosed,
    ConnectorDown,
    MessageExists,
    Ports,
    StaleWrite,
    StoreUnavailable,
)
from machine.records import (
    PENDING_STATES,
    Account,
    AccountCopy,
    AccountId,
    AccountStatus,
    Message,
    MessageId,
    MessageState,
)
from machine.refusals import (
    AccountAlreadyExists,
    AccountBanned,
    AccountNotFound,
    AccountNotPaired,
    AccountQuarantined,
    MessageNotFound,
    NotActive,
    NotAwaitingScan,
    StoreAway,
)
from machine.restore import Restore
from machine.retry import Backoff, TryTimedOut, retry
from machine.session import Session, jitter_s
from machine.views import AccountView, PairingCode, QrCode, RestoreReport

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

ASK_BACKOFF = Backoff(first_s=0.05, factor=2.0, cap_s=0.5, jitter=0.5)
ASK_TRIES_MAX = 3
REMEMBERED_MAX = 100_000
"""Messages whose account a term remembers; for older ones the store is asked."""

_REFUSED = {
    AccountStatus.BANNED: AccountBanned,
    AccountStatus.QUARANTINED: AccountQuarantined,
    AccountStatus.LOGGED_OUT: AccountNotPaired,
    AccountStatus.STOPPED: AccountNotPaired,
    AccountStatus.QR_READY: AccountNotPaired,
    AccountStatus.AWAITING_SCAN: AccountNotPaired,
}
"""Statuses in which a message is refused. In all others it is accepted and waits."""


@dataclass(frozen=True, slots=True)
class EndAsked:
    """Why a term is to end in good order, and to whom the lease is to go."""

    reason: str
    handoff_to: str | None = None


class Term:
    """What its holder may do, while it may.

    Between calls: `over` tells whether anything may still be done; `sessions` has every account
    that is in memory. Every public coroutine raises `NotActive` the moment the term is over.
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
        self.intake_closed = False
        self.opening = Places(limits.open_concurrency)
        self.reading = Places(limits.read_concurrency)
        self.lease_ttl_s = timing.ttl_s
        self.scope = trio.CancelScope(deadline=held.deadline)
        self.lost_reason: str | None = None
        self.epoch_seen = held.grant.epoch
        self.end_asked: EndAsked | None = None
        self._end_asked = trio.Event()
        self._ports = ports
        self._limits = limits
        self._durability = durability
        self._restore = Restore(self, ports=ports, limits=limits)
        self._restoring = trio.CancelScope()
        self._known = trio.Event()
        self._visitors: set[trio.CancelScope] = set()
        self._left = trio.Event()
        self._nursery: trio.Nursery | None = None
        self._bridge: Bridge | None = None
        self._accepted: OrderedDict[MessageId, AccountId] = OrderedDict()
        self._creating: set[AccountId] = set()

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
        for visitor in self._visitors:
            visitor.deadline = held.deadline

    def lose(self, reason: str, *, epoch_seen: int = 0) -> None:
        """End the term at once: another acts, or may.

        `epoch_seen` is the higher epoch that says so, if one does: the next term starts above it.
        """
        self.epoch_seen = max(self.epoch_seen, epoch_seen)
        if self.lost_reason is None and not self.scope.cancel_called:
            self.lost_reason = reason
            self._ports.journal.note("lease.lost", epoch=self.epoch, reason=reason)
        self.scope.cancel()

    def ask_end(self, asked: EndAsked) -> None:
        """Ask the term to end in good order; a restore that still runs is cut short."""
        if self.end_asked is None:
            self.end_asked = asked
            self._end_asked.set()
            self._restoring.cancel()

    def connector_down(self, reason: str) -> None:
        """The connector is dead beyond repair: let another instance try."""
        self.ask_end(EndAsked(f"connector down: {reason}"))

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

    async def join_visitors(self) -> None:
        """End the requests that are being answered, and wait until they have left."""
        self.scope.cancel()
        for visitor in tuple(self._visitors):
            visitor.cancel()
        with trio.CancelScope(shield=True):
            # Bounded: a visitor that is cancelled has nothing to wait for any more.
            while self._visitors:
                self._left = trio.Event()
                await self._left.wait()

    async def _visit(self, ask: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Answer a caller's request inside the term: it ends with the term, wherever it is."""
        self.check()
        with trio.CancelScope(deadline=self.scope.deadline) as visitor:
            self._visitors.add(visitor)
            try:
                return await ask(*args)
            except StoreUnavailable as error:
                raise StoreAway(
                    f"the store did not answer ({error}); ask again", retry_after_s=1
                ) from error
            except TryTimedOut as error:
                raise StoreAway(
                    "the store did not answer in time; ask again", retry_after_s=1
                ) from error
            except AccountVanished as error:
                raise AccountNotFound(str(error)) from error
            finally:
                self._visitors.discard(visitor)
                self._left.set()
        raise NotActive("the lease went to another instance meanwhile; ask again", retry_after_s=1)

    async def _try(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Ask the store a few times, each under its own deadline and only while we may."""

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
            durability=self._durability,
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
        in_flight = [session for session in self.sessions.values() if session.sending]
        with trio.move_on_after(self._limits.settle_s):
            async with trio.open_nursery() as nursery:
                for session in in_flight:
                    nursery.start_soon(session.wait_sent)
        unsettled = sum(session.sending for session in self.sessions.values())
        async with trio.open_nursery() as nursery:
            for session in self.sessions.values():
                nursery.start_soon(session.stop)
        self.intake_closed = True
        ledgers = [s.ledger for s in self.sessions.values() if s.ledger is not None]
        with trio.move_on_after(self._limits.settle_s):
            async with trio.open_nursery() as nursery:
                for ledger in ledgers:
                    nursery.start_soon(_flush, ledger)
        unflushed = sum(not ledger.flushed for ledger in ledgers)
        if unflushed:
            self._ports.journal.note("drain.unflushed", accounts=unflushed)
        self._ports.journal.note(
            "drain.unsettled" if unsettled else "drain.settled",
            duration_s=round(trio.current_time() - began, 3),
            in_flight=unsettled or len(in_flight),
        )

    # --- what callers ask

    @property
    def outbox_depth(self) -> int:
        """Pending messages of all accounts."""
        return sum(session.outbox.depth for session in self.sessions.values())

    async def list_accounts(self) -> tuple[AccountView, ...]:
        """Every account, in the order of their ids."""
        return await self._visit(self._list_accounts)

    async def _list_accounts(self) -> tuple[AccountView, ...]:
        await self._known.wait()
        return tuple(self.sessions[account_id].view() for account_id in sorted(self.sessions))

    async def account(self, account_id: AccountId) -> AccountView:
        """One account. Raises `AccountNotFound`."""
        return (await self._visit(self._session, account_id)).view()

    async def _session(self, account_id: AccountId) -> Session:
        """The account's session; waits until the restore knows every account."""
        if account_id not in self.sessions:
            await self._known.wait()
        session = self.sessions.get(account_id)
        if session is None and not self._restore.certain:
            raise StoreAway(
                f"account {account_id} is not on this disk, and the shared store could not be read "
                "yet; ask again",
                retry_after_s=2,
            )
        if session is None:
            raise AccountNotFound(
                f"no account {account_id} in the shared store or on disk; see the list of accounts"
            )
        return session

    async def accept(
        self,
        *,
        message_id: MessageId,
        account_id: AccountId,
        to: str,
        text: str,
        idempotency_key: str | None,
    ) -> Message:
        """Accept a message: on return it is durable, and it will be sent.

        The same `message_id` with the same content is accepted once, and answered with the first.
        Raises `AccountNotFound`, `AccountNotPaired`, `AccountQuarantined`, `AccountBanned`,
        `OutboxFull`, `IdempotencyKeyReused`, `StoreAway` (ask again), `NotActive`.
        """
        now = self._ports.clocks.wall()
        message = Message(
            message_id=message_id,
            account_id=account_id,
            to=to,
            text=text,
            state=MessageState.QUEUED,
            epoch=self.epoch,
            created_at=now,
            updated_at=now,
            idempotency_key=idempotency_key,
            state_at={MessageState.QUEUED: now},
        )
        return await self._visit(self._accept, message)

    async def _accept(self, message: Message) -> Message:
        session = await self._session(message.account_id)
        if self.intake_closed:
            raise _handing_over()
        refusal = _REFUSED.get(session.status)
        if session.ledger is None:
            refusal = AccountQuarantined
        if refusal is not None:
            raise refusal(
                f"account {message.account_id} is {session.status}: "
                f"{session.account.last_error or 'pair it first, by scanning its QR code'}"
            )
        known = session.outbox.find_same(message.message_id, to=message.to, text=message.text)
        if known is not None:
            return known
        return await self._write_accepted(session, message)

    async def _write_accepted(self, session: Session, message: Message) -> Message:
        assert session.ledger is not None
        if session.can_send_now:
            # One write instead of two: its delivery starts in the instant it is durable.
            message = _sending(message)
        session.outbox.reserve()

        def applied() -> None:
            session.outbox.unreserve()
            session.outbox.put(message)

        try:
            await session.ledger.write(
                new_message=message,
                applied=applied,
                failed=lambda error: session.outbox.unreserve(),
            )
        except MessageExists as exists:
            require_same(
                exists.message,
                account_id=message.account_id,
                to=message.to,
                text=message.text,
            )
            return exists.message
        self._remember(message)
        self._ports.journal.note(
            "message.accepted", account_id=message.account_id, message_id=message.message_id
        )
        return message

    def _refuse_intake(self) -> None:
        if self.settling:
            raise _handing_over()

    def _remember(self, message: Message) -> None:
        self._accepted[message.message_id] = message.account_id
        while len(self._accepted) > REMEMBERED_MAX:
            self._accepted.popitem(last=False)

    async def wait_progress(self, message_id: MessageId) -> Message:
        """Wait until a message is not pending any more. Raises `MessageNotFound`."""
        return await self._visit(self._wait_progress, message_id)

    async def _wait_progress(self, message_id: MessageId) -> Message:
        account_id = self._accepted.get(message_id)
        if account_id is not None and account_id in self.sessions:
            settled = await self.sessions[account_id].outbox.wait_settled(message_id)
            if settled is not None:
                return settled
        message = await self._message(message_id)
        session = self.sessions.get(message.account_id)
        if message.state in PENDING_STATES and session is not None:
            return await session.outbox.wait_settled(message_id) or message
        return message

    async def message(self, message_id: MessageId) -> Message:
        """One message, from memory or from the store. Raises `MessageNotFound`."""
        return await self._visit(self._message, message_id)

    async def _message(self, message_id: MessageId) -> Message:
        account_id = self._accepted.get(message_id)
        if account_id is not None and account_id in self.sessions:
            known = self.sessions[account_id].outbox.find(message_id)
            if known is not None:
                return known
        stored = await self._try(lambda: self._ports.outbox.fetch_message(message_id))
        if stored is None:
            raise MessageNotFound(f"no message {message_id}, or its retention is over")
        session = self.sessions.get(stored.account_id)
        return (session and session.outbox.find(message_id)) or stored

    async def add_account(self, account_id: AccountId, name: str) -> AccountView:
        """Create an account and begin its pairing. Raises `AccountAlreadyExists`, `StoreAway`."""
        return await self._visit(self._add_account, account_id, name)

    async def _add_account(self, account_id: AccountId, name: str) -> AccountView:
        await self._known.wait()
        self._refuse_intake()
        if account_id in self.sessions or account_id in self._creating:
            raise AccountAlreadyExists(f"account {account_id} exists; see its status, or repair it")
        self._creating.add(account_id)
        try:
            session = await self._create_account(account_id, name)
        finally:
            self._creating.discard(account_id)
        return await self._begin_pairing(session)

    async def _create_account(self, account_id: AccountId, name: str) -> Session:
        account = new_account(account_id, name, self._ports.clocks.wall())
        version = await self._try(
            lambda: first_version(self._ports.accounts, account_id, self.epoch)
        )
        try:
            stamp = await self._try(
                lambda: self._ports.accounts.create_account(self.grant, account, version, {})
            )
        except AccountExists:
            # Perhaps by an earlier try of ours that got no answer.
            found = await self._try(lambda: self._ports.accounts.fetch_account(account_id))
            ours = found is not None and found.account == account and found.version == version
            if found is None or not ours or found.stamp is None:
                raise AccountAlreadyExists(f"account {account_id} exists") from None
            stamp = found.stamp
        except StaleWrite as stale:
            self.lose(f"creating an account was refused: {stale}")
            raise NotActive("this instance was fenced out", retry_after_s=1) from stale
        copy = AccountCopy(account, version, {}, complete=True, stamp=stamp)
        session = self.make_session(account, self.make_ledger(copy))
        session.outbox_loaded.set()
        self._ports.journal.note("account.created", account_id=account_id)
        return session

    async def _begin_pairing(self, session: Session) -> AccountView:
        """Start a pairing, and answer when there is something to scan, or soon anyway."""
        self.start_session(session)
        with trio.move_on_after(self._limits.qr_wait_s):
            await session.wait_qr()
        return session.view()

    async def qr(self, account_id: AccountId) -> QrCode:
        """The QR code to scan now. Raises `AccountNotFound`, `NotAwaitingScan`."""
        session = await self._visit(self._session, account_id)
        if session.qr is None:
            raise NotAwaitingScan(
                f"account {account_id} is {session.status}: there is no QR code to scan now",
                retry_after_s=1 if session.status is AccountStatus.AWAITING_SCAN else None,
            )
        return session.qr

    async def pairing_code(self, account_id: AccountId, phone: str) -> PairingCode:
        """A code to type on the phone instead. Raises `AccountNotFound`, `NotAwaitingScan`."""
        return await self._visit(self._pairing_code, account_id, phone)

    async def _pairing_code(self, account_id: AccountId, phone: str) -> PairingCode:
        session = await self._session(account_id)
        try:
            with trio.fail_after(self._limits.ack_s):
                code = await session.pairing_code(phone)
        except (ConnectionClosed, trio.TooSlowError):
            code = None
        if code is None:
            raise NotAwaitingScan(
                f"account {account_id} is {session.status}: it is not pairing now"
            )
        return code

    async def reconnect(self, account_id: AccountId) -> AccountView:
        """Try to open an account now: cut its back-off short, or take it out of quarantine.

        Raises `AccountNotFound`, `AccountNotPaired`, `AccountQuarantined` (still unreadable).
        """
        return await self._visit(self._reconnect, account_id)

    async def _reconnect(self, account_id: AccountId) -> AccountView:
        session = await self._session(account_id)
        if session.ledger is None:
            session = await self._read_again(account_id, keys=True)
        assert session.ledger is not None
        if session.status is AccountStatus.LOGGED_OUT or not (
            session.ledger.parts or session.running
        ):
            raise AccountNotPaired(
                f"account {account_id} is {session.status}: pair it again with repair"
            )
        if session.running:
            session.wake()
        else:
            session.show(AccountStatus.CONNECTING)
            self.start_session(session)
        return session.view()

    async def _read_again(self, account_id: AccountId, *, keys: bool) -> Session:
        """A quarantined account, read anew from the shared store. `keys`: they must be readable.

        Raises `AccountQuarantined`.
        """
        copy = await self._try(lambda: self._ports.accounts.fetch_account(account_id))
        fault = "it is not in the shared store" if copy is None else copy.fault
        if copy is not None and fault is None and keys and copy.parts:
            fault = self._ports.codec.check(account_id, copy.parts)
        if copy is None or fault is not None:
            raise AccountQuarantined(f"account {account_id} still cannot be read: {fault}")
        fresh = self.make_session(copy.account, self.make_ledger(copy))
        assert fresh.ledger is not None
        await fresh.ledger.ensure_sealed()
        pending = await self._try(self._ports.outbox.list_pending)
        fresh.outbox.load(m for m in pending if m.account_id == account_id)
        fresh.outbox_loaded.set()
        return fresh

    async def log_out(self, account_id: AccountId) -> AccountView:
        """Unlink the device at WhatsApp, as far as it can be reached, and keep the account listed.

        Its state is archived. Raises `AccountNotFound`, `AccountQuarantined`, `StoreAway`.
        """
        return await self._visit(self._log_out, account_id)

    async def _log_out(self, account_id: AccountId) -> AccountView:
        session, ledger = await self._stoppable(account_id, keys=True)
        if session.connection is not None:
            self.check()
            with suppress(ConnectionClosed), trio.move_on_after(self._limits.ack_s):
                await session.connection.log_out()
        await session.stop()
        await self._archive(ledger, "logged out")
        await ledger.write(
            fields={"status": AccountStatus.LOGGED_OUT, "last_error": "logged out on request"}
        )
        return session.view()

    async def repair(self, account_id: AccountId) -> AccountView:
        """Pair again under the same account id; the old state is archived.

        Raises `AccountNotFound`, `AccountQuarantined`, `StoreAway`.
        """
        return await self._visit(self._repair, account_id)

    async def _repair(self, account_id: AccountId) -> AccountView:
        session, ledger = await self._stoppable(account_id)
        await session.stop()
        await self._archive(ledger, "paired again")
        await ledger.clear_keys(
            status=AccountStatus.AWAITING_SCAN, last_error=None, since=self._ports.clocks.wall()
        )
        return await self._begin_pairing(session)

    async def _stoppable(
        self, account_id: AccountId, *, keys: bool = False
    ) -> tuple[Session, Ledger]:
        """A session to stop for good. `keys`: refused where they cannot be read.

        Otherwise they are archived as they are, which is what `repair` and removal need.
        """
        session = await self._session(account_id)
        self._refuse_intake()
        if session.ledger is None:
            session = await self._read_again(account_id, keys=keys)
        assert session.ledger is not None
        await session.ledger.ensure_sealed()
        return session, session.ledger

    async def _archive(self, ledger: Ledger, reason: str) -> None:
        await ledger.ensure_complete()
        await self._try(lambda: self._ports.accounts.archive_parts(ledger.copy(), reason))

    async def remove_account(self, account_id: AccountId, *, purge: bool) -> None:
        """Take an account off the list; its state is archived, or destroyed with `purge`.

        Raises `AccountNotFound`, `AccountQuarantined`, `StoreAway`.
        """
        await self._visit(self._remove_account, account_id, purge)

    async def _remove_account(self, account_id: AccountId, purge: bool) -> None:
        session, ledger = await self._stoppable(account_id)
        await session.stop()
        await session.give_up_pending("the account was removed")
        await ledger.flush()
        assert ledger.stamp is not None
        stamp = ledger.stamp
        try:
            await self._try(
                lambda: self._ports.accounts.remove_account(
                    self.grant, account_id, stamp, purge=purge
                )
            )
        except StaleWrite:
            # Perhaps done by an earlier try of ours that got no answer.
            left = await self._try(lambda: self._ports.accounts.fetch_account(account_id))
            if left is not None and not left.removed:
                raise StoreAway(
                    f"account {account_id} changed meanwhile; ask again", retry_after_s=1
                ) from None
        del self.sessions[account_id]
        with trio.move_on_after(self._limits.store_try_s):
            try:
                await self._ports.local.remove_account(account_id, purge=purge)
            except StoreUnavailable as error:
                self._ports.journal.note(
                    "disk.failed", what=f"account {account_id}", error=describe_error(error)
                )
        self._ports.journal.note("account.removed", account_id=account_id, purge=purge)

    async def import_accounts(self, directory: str) -> Mapping[str, object]:
        """Import a directory of Baileys sessions; what was imported, and what was not and why."""
        return await self._visit(self._import_accounts, directory)

    async def _import_accounts(self, directory: str) -> Mapping[str, object]:
        await self._known.wait()
        self._refuse_intake()
        return await self._restore.import_directory(directory)

    # --- housekeeping

    async def _keep_purged(self) -> None:
        """Delete settled messages that are over their retention, a bounded number at a time."""
        while True:
            await trio.sleep(self._limits.purge_every_s)
            before = self._ports.clocks.wall() - self._limits.message_retention_s
            try:
                gone = await self._try(
                    lambda before=before: self._ports.outbox.purge_messages(  # type: ignore[misc]
                        self.grant, before=before, count_max=self._limits.purge_count_max
                    )
                )
                self._ports.journal.note("outbox.purged", count=gone)
            except StaleWrite as stale:
                self.lose(f"deleting old messages was refused: {stale}")
            except (StoreUnavailable, TryTimedOut):
                # The next round finds them too.
                pass


async def _flush(ledger: Ledger) -> None:
    # What one account's ledger cannot write was told when it was tried; the drain goes on.
    with suppress(AccountVanished, StoreAway):
        await ledger.flush()


def _handing_over() -> NotActive:
    return NotActive("this instance is handing the lease over; ask again", retry_after_s=1)


def _sending(message: Message) -> Message:
    return replace(
        message,
        state=MessageState.SENDING,
        state_at={**message.state_at, MessageState.SENDING: message.created_at},
    )


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
        await term.join_visitors()
        if term.scope.cancelled_caught and term.lost_reason is None:
            term.lost_reason = "its deadline has passed"
            ports.journal.note("lease.lost", epoch=term.epoch, reason=term.lost_reason)
    if not begun:
        raise NotActive("the lease was lost before its term had begun", retry_after_s=1)
