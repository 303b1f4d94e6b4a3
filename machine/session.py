"""One account: opening it, hearing from it, sending through it, and what a close means.

A session exists in memory from the moment its account is known, open or not. It decides nothing
about other accounts, and nothing about the lease: it asks its term before each effect.

Never lives here: how bytes are stored (`machine.ledger`), who acts (`machine.lease`).
"""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from enum import Enum
from typing import Protocol, TypeVar

import trio

from machine.arrivals import Arrivals
from machine.closes import (
    BACK_OFF,
    BAN_S_MAX,
    CLIENT_REFUSED,
    NO_RESPONSE,
    PAIRING_OVER,
    REACTIONS,
    VERIFY_S,
    Reaction,
    Step,
)
from machine.lease import describe_error
from machine.ledger import AccountVanished, Ledger, TermGuard
from machine.limits import Limits
from machine.outbox import AccountOutbox, moved
from machine.places import Places, last_used_at
from machine.ports import (
    AuthTooLarge,
    AuthUnreadable,
    BodyAsked,
    Bridge,
    Connected,
    Connection,
    ConnectionClosed,
    ConnectorDown,
    KeysChanged,
    MessageProgressed,
    MessageReceived,
    PairingScanned,
    Ports,
    QrShown,
    SendRefused,
    ServerAck,
    StoreUnavailable,
)
from machine.records import (
    RESTORED_STATUSES,
    Account,
    AccountId,
    AccountStatus,
    Message,
    MessageId,
    MessageState,
)
from machine.refusals import StoreAway
from machine.retry import Backoff, TryTimedOut
from machine.views import AccountView, PairingCode, QrCode

DOUBLED, LOGGED_OUT, BANNED = 440, 401, 402

FIRST_PASS_TRIES = 3
"""After this many tries without a connection the restore reports the account as failed."""


AHEAD_MAX = 16
"""Messages of one account that are ahead of the store: marked as `sending` before their turn comes,
or acknowledged and not recorded yet. A crash has the sessions with their recipients dropped."""

ON_WIRE_MAX = 4
"""Messages of one account that the server has not acknowledged yet: the next goes out beside its
answer, else an account would send no faster than the answers take from there to here."""

PASSING_STATUSES = frozenset(
    {AccountStatus.RESTORING, AccountStatus.CONNECTING, AccountStatus.BACKING_OFF}
)
"""Shown in memory only. Stored, they would be what a standby lists of an account that has been
connected for days."""

T = TypeVar("T")

_Shown = tuple[AccountStatus, str | None, float]


class Outcome(Enum):
    """How the first pass ended for an account."""

    CONNECTED = "connected"
    PAIRING = "waits for a phone"
    FAILED = "failed"


class SessionTerm(TermGuard, Protocol):
    """What a session needs of its term."""

    settling: bool
    """On its way out: nothing is opened or sent any more; messages may still be accepted."""
    opening: Places
    lease_ttl_s: float
    client_refused: str | None
    """Why no account is opened any more in this term, if WhatsApp refuses this client's version."""

    def refuse_client(self, cause: str) -> None:
        """WhatsApp refuses this client's version, whichever account it is."""
        ...

    async def ask_lease(self) -> None:
        """Look whether the lease is still ours; the term ends when it is not."""
        ...

    async def ask_store(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Ask the store a few times. Raises `StoreUnavailable`, `TryTimedOut`."""
        ...

    def connector_down(self, reason: str) -> None:
        """The connector is dead beyond repair: the term must end."""
        ...


class Session:
    """One account's live connection, or the place where one will be.

    Between calls: `ledger` is `None` only for an account that cannot be read at all; `connection`
    is set exactly while the account can send; `first_pass` is set once there is an `outcome`.
    """

    def __init__(
        self,
        account: Account,
        ledger: Ledger | None,
        *,
        term: SessionTerm,
        ports: Ports,
        limits: Limits,
    ) -> None:
        self._account = account
        self.ledger = ledger
        self.outbox = AccountOutbox(
            account.account_id,
            pending_max=limits.outbox_per_account_max,
            settled_kept=limits.outbox_settled_kept,
        )
        self.arrivals = (
            None
            if ledger is None
            else Arrivals(ledger, self.outbox, term=term, ports=ports, limits=limits)
        )
        self._outbox_known = trio.Event()
        self._outbox_unread = False
        self.connection: Connection | None = None
        self.outcome: Outcome | None = None
        self.first_pass = trio.Event()
        self.cause = ""
        self.advice = ""
        self.sending = 0
        """How many messages are between the wire and their record."""
        self.qr: QrCode | None = None
        self._term = term
        self._ports = ports
        self._limits = limits
        self._backoff = Backoff(
            first_s=limits.reconnect_first_s, factor=2, cap_s=limits.reconnect_cap_s, jitter=0.5
        )
        self._running: trio.CancelScope | None = None
        self._stopping = False
        # The connection whose events are being heard, connected or not.
        self._heard: Connection | None = None
        self._woken = trio.Event()
        self._ended = trio.Event()
        self._ended.set()
        self._sent = trio.Event()
        self._qr_shown = trio.Event()
        self._doubled_at: float | None = None
        self._verified = False
        # When a 401 was last likely to be a mistake: the account was opened, or restarted.
        self._fresh_at = -math.inf
        self._asked = False
        # Shown instead of what is stored: what passes, and what later terms do not inherit.
        self._shown: _Shown | None = None
        self._known: OrderedDict[str, None] = OrderedDict()

    # --- what it shows

    @property
    def account_id(self) -> AccountId:
        """Whose session this is."""
        return self.account.account_id

    @property
    def account(self) -> Account:
        """The account's plain fields as they are now."""
        if self.ledger is None:
            return self._account
        if self._shown is None:
            return self.ledger.account
        status, error, since = self._shown
        return replace(self.ledger.account, status=status, last_error=error, since=since)

    @property
    def status(self) -> AccountStatus:
        """The account's status as it is now."""
        return self.account.status

    def view(self) -> AccountView:
        """What callers see."""
        return AccountView(self.account, in_memory=True, queued=self.outbox.depth)

    def show(self, status: AccountStatus, error: str | None = None) -> None:
        """Change the status in memory; the store gets it with the next commit if it lasts."""
        if self.ledger is None or (self.status, self.account.last_error) == (status, error):
            return
        since = self._ports.clocks.wall()
        if status in PASSING_STATUSES:
            self._shown = (status, error, since)
            return
        self._shown = None
        stored = self.ledger.account
        if (stored.status, stored.last_error) != (status, error):
            self.ledger.note(status=status, last_error=error, since=since)

    def show_here(self, status: AccountStatus, error: str) -> None:
        """Show a stop that later terms do not inherit: it is not stored."""
        self._shown = (status, error, self._ports.clocks.wall())

    # --- its outbox

    def load_outbox(self, pending: Iterable[Message]) -> None:
        """Take over what earlier terms left pending. The account may be opened from now on."""
        self.outbox.load(pending)
        self._outbox_unread = False
        self._outbox_known.set()

    def open_without_outbox(self) -> None:
        """Let the account be opened though nobody can say what earlier terms left pending."""
        self._outbox_unread = True
        self._outbox_known.set()

    # --- its task

    @property
    def running(self) -> bool:
        """Whether the session's task runs: it is open, opening, or waiting to open."""
        return self._running is not None

    def start(self, bridge: Bridge, *, delay_s: float = 0.0) -> None:
        """Keep the account open from now on, in the term's nursery. Nothing if it does already."""
        if self._running is None and self.ledger is not None:
            self._running = trio.CancelScope()
            self._ended = trio.Event()
            self._qr_shown = trio.Event()
            self._term.spawn(lambda: self._run(bridge, delay_s))

    async def stop(self) -> None:
        """Close the connection and wait until nothing of the session runs.

        In good order for up to `hang_up_s`: keys that changed and are on their way are taken in.
        Lost, they would leave the next holder with a ratchet that has moved on without it.
        """
        self._stopping = True
        if self._heard is not None:
            self._heard.hang_up()
            with trio.move_on_after(self._limits.hang_up_s):
                await self._ended.wait()
        if self._running is not None:
            self._running.cancel()
        await self._ended.wait()
        self._stopping = False
        self._shown = None

    async def wait_sent(self) -> None:
        """Wait until no message is between the wire and its record."""
        while self.sending:
            self._sent = trio.Event()
            await self._sent.wait()

    async def wait_qr(self) -> None:
        """Wait until a QR code of the pairing that was just begun can be scanned."""
        await self._qr_shown.wait()

    def ask_open(self) -> None:
        """An operator wants it open: try once now, whatever was decided to wait for."""
        self._asked = self.connection is None
        self._woken.set()

    async def _run(self, bridge: Bridge, delay_s: float) -> None:
        assert self._running is not None
        try:
            with self._running:
                await trio.sleep(delay_s)
                await self._keep_open(bridge)
        finally:
            self._running = None
            self.connection = None
            self.qr = None
            self._ended.set()

    async def _keep_open(self, bridge: Bridge) -> None:
        """Open the account again and again until its close code says to stop."""
        tries = 0
        self._fresh_at = trio.current_time()
        await self._wait_ban()
        while True:
            was_connected, closed = await self._open_once(bridge)
            if self._stopping:
                return
            tries = 1 if was_connected else tries + 1
            if closed.code == DOUBLED:
                await self._term.ask_lease()
            wait_s = self._react(closed, tries, was_connected=was_connected)
            if wait_s is None:
                if closed.code == LOGGED_OUT:
                    await self._archive("logged out by WhatsApp")
                return
            await self._wait(wait_s)

    async def _wait(self, seconds: float) -> None:
        self._woken = trio.Event()
        if not self._asked:
            with trio.move_on_after(seconds):
                await self._woken.wait()

    async def _wait_ban(self) -> None:
        """Wait until a ban that an earlier term met is over."""
        until = self.account.banned_until
        left_s = 0.0 if until is None else until - self._ports.clocks.wall()
        if left_s > 0:
            cause = self.account.last_error or REACTIONS[BANNED].meaning
            self.show(AccountStatus.BACKING_OFF, cause)
            self._settle_outcome(Outcome.FAILED, cause, REACTIONS[BANNED].advice)
            await self._wait(min(left_s, BAN_S_MAX))

    async def _archive(self, reason: str) -> None:
        """Keep a copy of the account's state aside, whatever becomes of it."""
        assert self.ledger is not None
        ledger = self.ledger
        try:
            await ledger.ensure_complete()
            await self._term.ask_store(
                lambda: self._ports.accounts.archive_parts(ledger.copy(), reason)
            )
        except (StoreUnavailable, TryTimedOut, StoreAway, AccountVanished) as error:
            self._ports.journal.note(
                "account.not_archived", account_id=self.account_id, error=describe_error(error)
            )

    async def _open_once(self, bridge: Bridge) -> tuple[bool, ConnectionClosed]:
        """One connection from opening to its end; whether it was connected, and how it closed."""
        assert self.ledger is not None
        assert self.arrivals is not None
        slot = _Slot(self._term.opening)
        self._connected_once = False
        try:
            # These wait for the store as long as the term lasts, each try under its own deadline.
            await self.ledger.ensure_sealed()
            await self.ledger.ensure_complete()
            await self._outbox_known.wait()
            # An ack of the connection before may still be on its way to the store. Opened without
            # its keys, the account would doubt that recipient's session, and begin one anew.
            await self.ledger.wait_written()
            keys = self.ledger.keys() if self.ledger.parts else None
            if keys is not None:
                await self._rotate()
            await slot.take(last_used_at(self.account))
            asked, self._asked = self._asked, False
            if self._term.client_refused is not None and not asked:
                return False, ConnectionClosed(CLIENT_REFUSED, self._term.client_refused)
            with trio.move_on_after(self._limits.open_try_s) as opening:
                self.show(
                    AccountStatus.CONNECTING if keys is not None else AccountStatus.AWAITING_SCAN
                )
                # The last look before the effect: an account is only opened under the lease.
                self._term.check()
                self.arrivals.begin(pairing=keys is None)
                async with bridge.open_connection(
                    self.account_id,
                    keys,
                    doubtful=self.outbox.doubtful_recipients(),
                    distrust_sessions=keys is not None and self._distrusted,
                ) as connection:
                    self._heard = connection
                    closed = await self._live(connection, opening, slot)
                    return self._connected_once, closed
        except ConnectionClosed as refused:
            return self._connected_once, refused
        except ConnectorDown as down:
            self._term.connector_down(str(down))
            return False, ConnectionClosed(503, str(down))
        except (AuthUnreadable, AuthTooLarge, AccountVanished) as broken:
            return self._connected_once, _Unusable(str(broken))
        except StoreAway as away:
            return self._connected_once, ConnectionClosed(503, str(away))
        finally:
            slot.give_back()
            self._heard = None
            self.connection = None
            self.qr = None
        return False, ConnectionClosed(
            NO_RESPONSE, f"not connected within {self._limits.open_try_s:g} s"
        )

    async def _live(
        self, connection: Connection, opening: trio.CancelScope, slot: _Slot
    ) -> ConnectionClosed:
        """Hear events and deliver messages until the connection closes."""
        assert self.arrivals is not None
        ended: list[ConnectionClosed] = []
        async with trio.open_nursery() as nursery:

            def broke(closed: ConnectionClosed) -> None:
                ended.append(closed)
                nursery.cancel_scope.cancel()

            def failed(error: Exception) -> None:
                broke(ConnectionClosed(503, f"a change was not stored: {error}"))

            async def hang_up(closed: ConnectionClosed) -> None:
                # A send has failed; what came before that is heard first: keys may have changed.
                ended.append(closed)
                connection.hang_up()
                await trio.sleep(self._limits.hang_up_s)
                nursery.cancel_scope.cancel()

            while True:
                try:
                    event = await connection.next_event()
                except ConnectionClosed as closed:
                    broke(closed)
                    break
                match event:
                    case Connected(phone):
                        opening.deadline = float("inf")
                        slot.give_back()
                        self._connected(phone, failed)
                        self.connection = connection
                        if self.account.sessions_doubtful:
                            nursery.start_soon(self._trust_again, failed)
                        nursery.start_soon(self._deliver, connection, hang_up, broke)
                    case QrShown(qr, expires_at):
                        opening.deadline = float("inf")
                        slot.give_back()
                        self.connection = connection
                        self.qr = QrCode(qr, expires_at)
                        self.show(AccountStatus.QR_READY)
                        self._qr_shown.set()
                        self._settle_outcome(Outcome.PAIRING)
                    case PairingScanned():
                        self.qr = None
                        self.arrivals.confirm()
                        self.show(AccountStatus.CONNECTING)
                    case KeysChanged():
                        self.arrivals.change_keys(event, failed)
                    case MessageProgressed():
                        self.arrivals.progress(event)
                    case MessageReceived():
                        await self.arrivals.receive(event, failed)
                    case BodyAsked():
                        self.arrivals.give_body(event)
        return ended[0]

    @property
    def _distrusted(self) -> bool:
        return self._outbox_unread or self.account.sessions_doubtful

    async def _trust_again(self, failed: Callable[[Exception], None]) -> None:
        """End the doubt once it is stored that the sessions are gone.

        They were told as dropped before the login. Could that not be stored, the connection is
        ending, and this with it.
        """
        assert self.ledger is not None
        try:
            await self.ledger.wait_written()
        except (AccountVanished, StoreAway) as error:
            failed(error)
        await trio.lowlevel.checkpoint()
        self.ledger.post(fields={"sessions_doubtful": False}, failed=failed)

    def _connected(self, phone: str, failed: Callable[[Exception], None]) -> None:
        assert self.ledger is not None
        now = self._ports.clocks.wall()
        stored = self.ledger.account
        news = stored.phone != phone or stored.status is not AccountStatus.CONNECTED
        news = news or stored.banned_until is not None
        self._connected_once = True
        self._verified = False
        self.show(AccountStatus.CONNECTED)
        self.ledger.note(last_connected_at=now)
        if news:
            # Told to the store at once: other instances list the account by it, and the next
            # term opens it by it.
            self.ledger.post(fields={"phone": phone, "banned_until": None}, failed=failed)
        self._ports.journal.note("session.connected", account_id=self.account_id, phone=phone)
        self._settle_outcome(Outcome.CONNECTED)

    async def _rotate(self) -> None:
        """Write the keys again when they are still under an older encryption key."""
        assert self.ledger is not None
        if await self.ledger.rotate():
            self._ports.journal.note("account.rekeyed", account_id=self.account_id)

    def _settle_outcome(self, outcome: Outcome, cause: str = "", advice: str = "") -> None:
        self.cause, self.advice = cause, advice
        if self.outcome is None or outcome is not Outcome.FAILED:
            self.outcome = outcome
        self.first_pass.set()

    # --- closes

    def _react(self, closed: ConnectionClosed, tries: int, *, was_connected: bool) -> float | None:
        """Seconds until the next try, or `None` to stop; `REACTIONS` decides."""
        assert self.ledger is not None
        if isinstance(closed, _Unusable):
            self.quarantine(closed.detail, "its bytes are kept; see the operating docs")
            return None
        reaction = REACTIONS.get(closed.code, BACK_OFF)
        if closed.code == NO_RESPONSE and not self.ledger.parts and self._qr_shown.is_set():
            reaction = PAIRING_OVER
        wait_s = self._wait_of(reaction, closed, tries, was_connected=was_connected)
        cause = f"{reaction.meaning} ({closed})"
        if reaction.step is Step.STOP_ALL:
            self._term.refuse_client(closed.detail)
        if wait_s is None:
            self._settle_outcome(Outcome.FAILED, cause, reaction.advice)
            if reaction.lasting:
                self.show(reaction.status, cause)
                self.ledger.post(fields={"status": reaction.status, "last_error": cause})
            else:
                self.show_here(reaction.status, cause)
            self._ports.journal.note(
                reaction.event,
                account_id=self.account_id,
                status=reaction.status,
                cause=cause,
                advice=reaction.advice,
            )
            return None
        if reaction.step is Step.WAIT_BAN:
            self._ban(wait_s, cause, reaction.advice)
        elif reaction.step is not Step.REOPEN:
            if tries >= FIRST_PASS_TRIES:
                self._settle_outcome(Outcome.FAILED, cause, "it is tried again by itself")
            self.show(AccountStatus.BACKING_OFF, cause)
        self._ports.journal.note(
            "session.closed",
            account_id=self.account_id,
            code=closed.code,
            meaning=reaction.meaning,
            retry_s=round(wait_s, 2),
        )
        return wait_s

    def _wait_of(
        self, reaction: Reaction, closed: ConnectionClosed, tries: int, *, was_connected: bool
    ) -> float | None:
        match reaction.step:
            case Step.REOPEN:
                self._fresh_at = trio.current_time()
                return 0.0 if tries <= 3 else self._backoff.wait_s(tries, self._ports.rng)
            case Step.BACK_OFF:
                return self._backoff.wait_s(tries, self._ports.rng)
            case Step.WAIT_BAN:
                wait_s = max(closed.expire_s or 0.0, self._limits.reconnect_cap_s)
                return min(wait_s, BAN_S_MAX)
            case Step.WAIT_TTL:
                return self._wait_after_doubling()
            case Step.VERIFY:
                fresh = trio.current_time() - self._fresh_at <= VERIFY_S
                if self._verified or (was_connected and not fresh):
                    return None
                self._verified = True
                return self._limits.reconnect_first_s
            case Step.STOP | Step.STOP_ALL:
                return None

    def _ban(self, wait_s: float, cause: str, advice: str) -> None:
        """A temporary ban: stored, so that the next holder does not open the account either."""
        assert self.ledger is not None
        until = self._ports.clocks.wall() + wait_s
        self._settle_outcome(Outcome.FAILED, cause, advice)
        self.show(AccountStatus.BACKING_OFF, cause)
        self.ledger.post(
            fields={
                "status": AccountStatus.BACKING_OFF,
                "last_error": cause,
                "banned_until": until,
            }
        )
        self._ports.journal.note(
            "session.banned", account_id=self.account_id, seconds=round(wait_s), advice=advice
        )

    def _wait_after_doubling(self) -> float | None:
        """440: one more try after a lease ttl; a second 440 in that window is a stop."""
        self._ports.journal.note(
            "session.doubled", account_id=self.account_id, epoch=self._term.grant.epoch
        )
        now = trio.current_time()
        window_s = 2 * self._term.lease_ttl_s
        again = self._doubled_at is not None and now - self._doubled_at < window_s
        self._doubled_at = now
        return None if again else self._term.lease_ttl_s

    def quarantine(self, cause: str, advice: str) -> None:
        """Keep the account listed and its bytes untouched, and do not open it in this term."""
        self.show_here(AccountStatus.QUARANTINED, cause)
        self._settle_outcome(Outcome.FAILED, cause, advice)
        self._ports.journal.note(
            "session.quarantined", account_id=self.account_id, cause=cause, advice=advice
        )

    # --- messages

    @property
    def can_send_now(self) -> bool:
        """A message accepted now goes out at once: its first stored state may be `sending`."""
        return (
            self.status is AccountStatus.CONNECTED
            and self.outbox.depth < AHEAD_MAX
            and self._outbox_known.is_set()
            and not self._term.settling
        )

    async def _deliver(
        self,
        connection: Connection,
        hang_up: Callable[[ConnectionClosed], Awaitable[None]],
        broke: Callable[[ConnectionClosed], None],
    ) -> None:
        """Send pending messages in order. The one delivery task of this account.

        A message's turn comes when the one before is with the connection, acknowledged or not. What
        ends the connection ends it in good order, but where nothing can be stored any more; those
        that are on the wire then end with it.
        """
        ended: list[ConnectionClosed] = []
        places = trio.Semaphore(ON_WIRE_MAX)
        in_flight: set[MessageId] = set()

        async def deliver(message: Message, gone: trio.Event) -> None:
            try:
                await self._deliver_one(connection, message, gone, broke)
            except ConnectionClosed as closed:
                ended.append(closed)
            except trio.TooSlowError:
                late = "the server did not answer a message in time"
                ended.append(ConnectionClosed(NO_RESPONSE, late))
            except (StoreAway, AuthUnreadable, AuthTooLarge, AccountVanished) as error:
                broke(_closed_by(error))
            finally:
                in_flight.discard(message.message_id)
                self.sending -= 1
                self._sent.set()
                places.release()
                gone.set()
                if ended:
                    taking.cancel()

        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as taking:
                while True:
                    await places.acquire()
                    message = await self.outbox.next_pending(besides=in_flight)
                    if self._term.settling:
                        await trio.sleep_forever()
                    in_flight.add(message.message_id)
                    self.sending += 1
                    gone = trio.Event()
                    nursery.start_soon(deliver, message, gone)
                    await gone.wait()
            await hang_up(ended[0])

    async def _deliver_one(
        self,
        connection: Connection,
        message: Message,
        gone: trio.Event,
        broke: Callable[[ConnectionClosed], None],
    ) -> None:
        """Send one message, and have its ack recorded. Sets `gone` when the next may follow."""
        assert self.ledger is not None
        if message.attempts >= self._limits.send_attempts_max:
            await self._fail(message, f"gave up after {message.attempts} attempts")
            return
        if not await self._is_on_whatsapp(connection, message.to):
            await self._fail(message, "not_on_whatsapp")
            return
        if message.attempts > 0:
            self._ports.journal.note(
                "message.retried",
                account_id=self.account_id,
                message_id=message.message_id,
                cause=f"attempt {message.attempts + 1}",
            )
        message = self._moved(message, MessageState.SENDING, attempts=message.attempts + 1)
        if not _marked(self.outbox, message):
            await self._mark(message)
        # The last look before the effect; nothing is awaited between it and the send.
        self._term.check()
        self.outbox.try_now(message)
        # Whoever waits for this runs when the connection has it: calls are sent in their order.
        gone.set()
        try:
            with trio.fail_after(self._limits.ack_s):
                ack = await connection.send_text(message.message_id, message.to, message.text)
        except SendRefused as refused:
            await self._fail(message, f"refused_{refused.code}: {refused.detail}")
            return
        self._record(self._moved(message, MessageState.SERVER_ACK), ack, broke)

    async def _mark(self, message: Message) -> None:
        """Store that a message may be on the wire from now on, and those after it with it.

        Commits are in order: when this one is durable, so are the acks of all that went before.
        """
        assert self.ledger is not None
        after = self.outbox.queued_after(message.message_id, AHEAD_MAX - 1)
        ahead = tuple(self._moved(each, MessageState.SENDING) for each in after)

        def applied() -> None:
            for each in ahead:
                self.outbox.accept(each)

        await self.ledger.write(messages=(message, *ahead), applied=applied)

    def _record(
        self, acked: Message, ack: ServerAck, broke: Callable[[ConnectionClosed], None]
    ) -> None:
        """Have an ack stored in one commit with the keys that its message changed.

        The next message need not wait for it: stored as `sending`, both are sent again after a
        crash, in new sessions. Whoever waits for this one is told when it is durable.
        """
        assert self.ledger is not None
        ledger, message_id = self.ledger, acked.message_id
        # A receipt may have overtaken the ack, and waits for its keys.
        acked = self.outbox.latest(acked)

        # Both run also when the connection has ended meanwhile: the outbox stays true.
        def applied() -> None:
            late = self.outbox.note_recorded(message_id)
            self.outbox.put(acked)
            latest = self.outbox.latest(acked)
            if latest is not acked:
                late += (latest,)
            if late:
                ledger.post(messages=late)
            self._ports.journal.note(
                "message.acked",
                account_id=self.account_id,
                message_id=message_id,
                duration_s=max(0.0, acked.updated_at - acked.created_at),
            )

        def failed(error: Exception) -> None:
            self.outbox.note_unrecorded(message_id)
            broke(_closed_by(error))

        self.outbox.note_acked(message_id)
        ledger.post(
            keys=ack.keys,
            messages=(acked,),
            applied=applied,
            failed=failed,
        )

    async def _is_on_whatsapp(self, connection: Connection, to: str) -> bool:
        if to not in self._known:
            with trio.fail_after(self._limits.ack_s):
                if not await connection.is_on_whatsapp(to):
                    return False
            self._known[to] = None
            while len(self._known) > self._limits.recipients_known_max:
                self._known.popitem(last=False)
        return True

    def _moved(
        self,
        message: Message,
        state: MessageState,
        *,
        error: str | None = None,
        attempts: int | None = None,
    ) -> Message:
        return moved(
            message,
            state,
            at=self._ports.clocks.wall(),
            epoch=self._term.grant.epoch,
            error=error,
            attempts=attempts,
        )

    async def hand_over(self) -> None:
        """Leave everything with the shared store, for the next holder. The session must be stopped.

        What was stored as `sending`, ahead of its send, and came to none, is `queued` again: it
        leaves no doubt about its recipient's session, which would be dropped for nothing.
        Raises `AccountVanished`, `StoreAway`.
        """
        assert self.ledger is not None
        await self.ledger.flush()
        untried = tuple(self._moved(each, MessageState.QUEUED) for each in self.outbox.untried)
        if untried:
            self.ledger.post(messages=untried)
            await self.ledger.flush()

    async def give_up_pending(self, cause: str) -> None:
        """Fail every message that still waits. The session must be stopped."""
        assert self.ledger is not None
        await self.ledger.wait_written()
        while not self.outbox.idle:
            await self._fail(await self.outbox.next_pending(), cause)

    async def _fail(self, message: Message, cause: str) -> None:
        assert self.ledger is not None
        assert self.arrivals is not None
        failed = self._moved(message, MessageState.FAILED, error=cause)
        await self.ledger.write(messages=(failed,), applied=lambda: self.outbox.put(failed))
        self.arrivals.tell_failed(message.message_id, cause)

    async def pairing_code(self, phone: str) -> PairingCode | None:
        """A code to type on the phone; `None` when the account is not pairing now."""
        if self.connection is None or self.qr is None:
            return None
        code, expires_at = await self.connection.request_pairing_code(phone)
        return PairingCode(code, expires_at)


def _marked(outbox: AccountOutbox, message: Message) -> bool:
    """Whether the store has this message as `sending` already."""
    known = outbox.find(message.message_id)
    return known is not None and known.state is MessageState.SENDING


def _closed_by(error: Exception) -> ConnectionClosed:
    """What it means for the connection that a change of its account was not stored."""
    if isinstance(error, AuthUnreadable | AuthTooLarge | AccountVanished):
        return _Unusable(str(error))
    return ConnectionClosed(503, f"a change was not stored: {error}")


class _Unusable(ConnectionClosed):
    """The account's own state is what keeps it from opening, not the connection."""

    def __init__(self, cause: str) -> None:
        super().__init__(0, cause)


class _Slot:
    """One of the `Places`, given back once."""

    def __init__(self, openings: Places) -> None:
        self._openings = openings
        self._taken = False

    async def take(self, used_at: float) -> None:
        await self._openings.take(used_at)
        self._taken = True

    def give_back(self) -> None:
        if self._taken:
            self._taken = False
            self._openings.give_back()


def is_opened(account: Account) -> bool:
    """Whether an account in this status is opened when an instance becomes ACTIVE."""
    return account.status in RESTORED_STATUSES


def jitter_s(rng: random.Random, limits: Limits) -> float:
    """A small pause before an account is opened, so that accounts do not come in one instant."""
    return rng.uniform(0, limits.open_jitter_s)
