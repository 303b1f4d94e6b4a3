"""What callers ask of a term: accounts, messages, pairing, imports.

Every request is a visit: it ends with the term, wherever it is, and its caller then hears
`NotActive`. What waits for the shared store asks it a few times and then says so (`StoreAway`).

Never lives here: how long the term lasts (`machine.term`), what a session does with what it was
given (`machine.session`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Protocol, TypeVar, TypeVarTuple

import trio

from machine.lease import HeldLease, describe_error
from machine.ledger import AccountUnreadable, AccountVanished, Ledger
from machine.legacy import first_version, new_account
from machine.limits import Limits
from machine.outbox import require_same
from machine.ports import (
    AccountExists,
    ConnectionClosed,
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
    Grant,
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
    TermEnded,
)
from machine.restore import fault_of
from machine.retry import TryTimedOut
from machine.session import Session
from machine.views import AccountView, PairingCode, QrCode

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

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


class HandingOver(NotActive):
    """Refused before anything was begun: the term settles."""


class DeskTerm(Protocol):
    """What a desk needs of its term."""

    held: HeldLease
    grant: Grant
    sessions: dict[AccountId, Session]
    settling: bool
    intake_closed: bool

    @property
    def certain(self) -> bool:
        """Whether an account that is not in memory does not exist."""
        ...

    def check(self) -> None: ...
    def lose(self, reason: str, *, epoch_seen: int = 0) -> None: ...
    def make_ledger(self, copy: AccountCopy) -> Ledger: ...
    def make_session(self, account: Account, ledger: Ledger | None) -> Session: ...
    def start_session(self, session: Session) -> None: ...
    async def wait_known(self) -> None:
        """Wait until the restore has every account in memory."""
        ...

    async def ask_store(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Ask the store a few times. Raises `StoreUnavailable`, `TryTimedOut`."""
        ...

    async def import_directory(self, directory: str) -> dict[str, object]: ...


class Desk:
    """Where the requests of a term are answered.

    Every public coroutine raises `NotActive` the moment the term is over; `TermEnded` when it was
    under way by then. Between calls:
    `_visitors` has the scope of each request that is being answered, and of no other.
    """

    def __init__(self, term: DeskTerm, *, ports: Ports, limits: Limits) -> None:
        self._term = term
        self._ports = ports
        self._limits = limits
        self._visitors: set[trio.CancelScope] = set()
        self._left = trio.Event()
        self._accepted: OrderedDict[MessageId, AccountId] = OrderedDict()
        self._creating: set[AccountId] = set()

    # --- its bounds

    @property
    def epoch(self) -> int:
        """The epoch that what is accepted here is accepted under."""
        return self._term.grant.epoch

    @property
    def outbox_depth(self) -> int:
        """Pending messages of all accounts."""
        return sum(session.outbox.depth for session in self._term.sessions.values())

    @property
    def outbox_oldest_at(self) -> float | None:
        """When the message that has waited longest was accepted (wall clock)."""
        oldest = (session.outbox.oldest_at for session in self._term.sessions.values())
        return min((at for at in oldest if at is not None), default=None)

    def extend(self, deadline: float) -> None:
        """Move the end of every request that is being answered."""
        for visitor in self._visitors:
            visitor.deadline = deadline

    async def aclose(self) -> None:
        """End the requests that are being answered, and wait until they have left."""
        for visitor in tuple(self._visitors):
            visitor.cancel()
        with trio.CancelScope(shield=True):
            # Bounded: a visitor that is cancelled has nothing to wait for any more.
            while self._visitors:
                self._left = trio.Event()
                await self._left.wait()

    async def _visit(self, ask: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
        """Answer a caller's request inside the term: it ends with the term, wherever it is.

        Raises `TermEnded` then: a write that was on its way may be applied all the same.
        """
        self._term.check()
        with trio.CancelScope(deadline=self._term.held.deadline) as visitor:
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
            except AccountUnreadable as error:
                raise AccountQuarantined(str(error)) from error
            except AccountVanished as error:
                raise AccountNotFound(str(error)) from error
            except HandingOver:
                raise
            except NotActive as over:
                # Seen by a check before one of several effects: the ones before it are done.
                raise _term_ended() from over
            finally:
                self._visitors.discard(visitor)
                self._left.set()
        raise _term_ended()

    # --- accounts

    async def list_accounts(self) -> tuple[AccountView, ...]:
        """Every account, in the order of their ids."""
        return await self._visit(self._list_accounts)

    async def _list_accounts(self) -> tuple[AccountView, ...]:
        await self._term.wait_known()
        return tuple(
            self._term.sessions[account_id].view() for account_id in sorted(self._term.sessions)
        )

    async def account(self, account_id: AccountId) -> AccountView:
        """One account. Raises `AccountNotFound`."""
        return (await self._visit(self._session, account_id)).view()

    async def _session(self, account_id: AccountId) -> Session:
        """The account's session; waits until the restore knows every account."""
        if account_id not in self._term.sessions:
            await self._term.wait_known()
        session = self._term.sessions.get(account_id)
        if session is None and not self._term.certain:
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

    async def add_account(self, account_id: AccountId, name: str) -> AccountView:
        """Create an account and begin its pairing. Raises `AccountAlreadyExists`, `StoreAway`."""
        return await self._visit(self._add_account, account_id, name)

    async def _add_account(self, account_id: AccountId, name: str) -> AccountView:
        await self._term.wait_known()
        self._refuse_intake()
        if account_id in self._term.sessions or account_id in self._creating:
            raise AccountAlreadyExists(f"account {account_id} exists; see its status, or repair it")
        self._creating.add(account_id)
        try:
            session = await self._create_account(account_id, name)
        finally:
            self._creating.discard(account_id)
        return await self._begin_pairing(session)

    async def _create_account(self, account_id: AccountId, name: str) -> Session:
        account = new_account(account_id, name, self._ports.clocks.wall())
        version = await self._term.ask_store(
            lambda: first_version(self._ports.accounts, account_id, self.epoch)
        )
        try:
            stamp = await self._term.ask_store(
                lambda: self._ports.accounts.create_account(self._term.grant, account, version, {})
            )
        except AccountExists:
            # Perhaps by an earlier try of ours that got no answer.
            found = await self._term.ask_store(
                lambda: self._ports.accounts.fetch_account(account_id)
            )
            ours = found is not None and found.account == account and found.version == version
            if found is None or not ours or found.stamp is None:
                raise AccountAlreadyExists(f"account {account_id} exists") from None
            stamp = found.stamp
        except StaleWrite as stale:
            self._term.lose(f"creating an account was refused: {stale}")
            raise NotActive("this instance was fenced out", retry_after_s=1) from stale
        copy = AccountCopy(account, version, {}, complete=True, stamp=stamp)
        session = self._term.make_session(account, self._term.make_ledger(copy))
        session.load_outbox(())
        self._ports.journal.note("account.created", account_id=account_id)
        return session

    async def _begin_pairing(self, session: Session) -> AccountView:
        """Start a pairing, and answer when there is something to scan, or soon anyway."""
        session.ask_open()
        self._term.start_session(session)
        with trio.move_on_after(self._limits.qr_wait_s):
            await session.wait_qr()
        return session.view()

    async def qr(self, account_id: AccountId) -> QrCode:
        """The QR code to scan now. Raises `AccountNotFound`, `NotAwaitingScan`."""
        session = await self._visit(self._session, account_id)
        if session.qr is None or session.qr.expires_at <= self._ports.clocks.wall():
            pairing = session.status in (AccountStatus.AWAITING_SCAN, AccountStatus.QR_READY)
            raise NotAwaitingScan(
                f"account {account_id} is {session.status}: there is no QR code to scan now",
                retry_after_s=1 if pairing else None,
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
        session.ask_open()
        if not session.running:
            session.show(AccountStatus.CONNECTING)
            self._term.start_session(session)
        return session.view()

    async def _read_again(self, account_id: AccountId, *, keys: bool) -> Session:
        """A quarantined account, read anew from the shared store. `keys`: they must be readable.

        Raises `AccountQuarantined`.
        """
        copy = await self._term.ask_store(lambda: self._ports.accounts.fetch_account(account_id))
        fault = "it is not in the shared store" if copy is None else copy.fault
        if copy is not None and keys:
            fault = fault_of(copy, self._ports.codec)
        if copy is None or fault is not None:
            raise AccountQuarantined(f"account {account_id} still cannot be read: {fault}")
        fresh = self._term.make_session(copy.account, self._term.make_ledger(copy))
        assert fresh.ledger is not None
        await fresh.ledger.ensure_sealed()
        pending = await self._term.ask_store(self._ports.outbox.list_pending)
        fresh.load_outbox(m for m in pending if m.account_id == account_id)
        return fresh

    async def log_out(self, account_id: AccountId) -> AccountView:
        """Unlink the device at WhatsApp, as far as it can be reached, and keep the account listed.

        Its state is archived. Raises `AccountNotFound`, `AccountQuarantined`, `StoreAway`.
        """
        return await self._visit(self._log_out, account_id)

    async def _log_out(self, account_id: AccountId) -> AccountView:
        session, ledger = await self._stoppable(account_id, keys=True)
        if session.connection is not None:
            self._term.check()
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
            status=AccountStatus.AWAITING_SCAN,
            last_error=None,
            since=self._ports.clocks.wall(),
            # Both were of the old identity.
            banned_until=None,
            sessions_doubtful=False,
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
        await self._term.ask_store(
            lambda: self._ports.accounts.archive_parts(ledger.copy(), reason)
        )

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
            await self._term.ask_store(
                lambda: self._ports.accounts.remove_account(
                    self._term.grant, account_id, stamp, purge=purge
                )
            )
        except StaleWrite:
            # Perhaps done by an earlier try of ours that got no answer.
            left = await self._term.ask_store(
                lambda: self._ports.accounts.fetch_account(account_id)
            )
            if left is not None and not left.removed:
                raise StoreAway(
                    f"account {account_id} changed meanwhile; ask again", retry_after_s=1
                ) from None
        del self._term.sessions[account_id]
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
        await self._term.wait_known()
        self._refuse_intake()
        return await self._term.import_directory(directory)

    # --- messages

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
        if self._term.intake_closed:
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
            session.outbox.accept(message)

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
        if self._term.settling:
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
        if account_id is not None and account_id in self._term.sessions:
            settled = await self._term.sessions[account_id].outbox.wait_settled(message_id)
            if settled is not None:
                return settled
        message = await self._message(message_id)
        session = self._term.sessions.get(message.account_id)
        if message.state in PENDING_STATES and session is not None:
            return await session.outbox.wait_settled(message_id) or message
        return message

    async def message(self, message_id: MessageId) -> Message:
        """One message, from memory or from the store. Raises `MessageNotFound`."""
        return await self._visit(self._message, message_id)

    async def _message(self, message_id: MessageId) -> Message:
        account_id = self._accepted.get(message_id)
        if account_id is not None and account_id in self._term.sessions:
            known = self._term.sessions[account_id].outbox.find(message_id)
            if known is not None:
                return known
        stored = await self._term.ask_store(lambda: self._ports.outbox.fetch_message(message_id))
        if stored is None:
            raise MessageNotFound(f"no message {message_id}, or its retention is over")
        session = self._term.sessions.get(stored.account_id)
        return (session and session.outbox.find(message_id)) or stored


def _handing_over() -> HandingOver:
    return HandingOver("this instance is handing the lease over; ask again", retry_after_s=1)


def _term_ended() -> TermEnded:
    return TermEnded(
        "the lease went to another instance meanwhile, and what was asked may have happened; ask "
        "again with the same Idempotency-Key",
        retry_after_s=1,
    )


def _sending(message: Message) -> Message:
    return replace(
        message,
        state=MessageState.SENDING,
        state_at={**message.state_at, MessageState.SENDING: message.created_at},
    )
