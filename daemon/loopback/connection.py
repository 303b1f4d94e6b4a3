"""One connection to the loopback WhatsApp: a pairing, or a login with what is sent through it.

Lives here: what a device does, and what it remembers while it is connected.
Never lives here: how it reaches the server (`connector`), what the server decides (`server`).
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import trio

from daemon.loopback.device import (
    CredsUnreadable,
    Device,
    NewDevice,
    Session,
    dump_session,
    load_session,
    make_keys,
    new_device,
    read_device,
    reading_key,
    session_key,
)
from daemon.loopback.server import Action, Envelope, Fate, LoopbackServer, Place
from daemon.loopback.waiting import Letter
from machine.ports import (
    Connected,
    ConnectionClosed,
    ConnectionEvent,
    KeysChanged,
    MessageProgressed,
    MessageReceived,
    PairingScanned,
    QrShown,
    ServerAck,
)
from machine.records import InboundMessage, KeyChange, KeyName, MessageId, MessageState
from machine.refusals import NotAwaitingScan

EVENTS_MAX = 10_000
"""Unread events of one connection. Receipts beyond it are dropped."""

CODE_LETTERS = "123456789ABCDEFGHJKLMNPQRSTVWXYZ"
CODE_LENGTH = 8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoopbackTiming:
    """How fast time passes in the loopback world. The QR's times are Baileys' own."""

    qr_first_s: float = 60.0
    qr_next_s: float = 20.0
    qr_refs: int = 6
    code_s: float = 180.0
    watch_every_s: float = 1.0
    """An eviction, a cut or a scan is heard of at once; at the latest after this long, when the
    process that did it was killed before it could ring."""

    def __post_init__(self) -> None:
        if min(self.qr_first_s, self.qr_next_s, self.code_s, self.watch_every_s) <= 0:
            raise ValueError("all times of the loopback world must be positive")
        if self.qr_refs < 1:
            raise ValueError("qr_refs must be at least 1")

    @property
    def pairing_s(self) -> float:
        """From the first QR code to the end of the last."""
        return self.qr_first_s + self.qr_next_s * (self.qr_refs - 1)


class Wire(Protocol):
    """What a connection needs of its bridge."""

    wall: Callable[[], float]
    timing: LoopbackTiming
    nursery: trio.Nursery

    async def perform(self, action: Action[T]) -> T:
        """Have the server run `action`. Raises what it raises, and `ConnectionClosed`."""
        ...


@dataclass(frozen=True, slots=True)
class _Ending:
    """Why a connection is closed. Each who asks gets an error of its own."""

    code: int
    detail: str
    expire_s: float | None

    def error(self) -> ConnectionClosed:
        return ConnectionClosed(self.code, self.detail, expire_s=self.expire_s)


@dataclass(slots=True)
class _Pairing:
    """A pairing under way: which QR code is shown, until when (Trio's clock)."""

    device: NewDevice
    due: float
    shown: int = 0


class LoopbackConnection:
    """One login, or one pairing, of one account. `device_id` is empty until it is known.

    Sessions in memory are ahead of the stored ones until an ack's `keys` are stored, as with the
    real ones: that is what makes a lost state visible.
    """

    def __init__(self, bridge: Wire, place: Place) -> None:
        self.device_id = ""
        self._bridge = bridge
        self._place = place
        self._sessions: dict[KeyName, bytes] = {}
        self._positions: dict[str, Session] = {}
        self._events: deque[ConnectionEvent] = deque()
        self._news = trio.Event()
        self._ending: _Ending | None = None
        self._scopes: set[trio.CancelScope] = set()
        self._pairing: _Pairing | None = None
        self._stored: trio.Event | None = None
        self._logged_in = False
        self._early: list[Letter] = []
        self._unacknowledged: deque[tuple[int, trio.Event]] = deque()
        self._acknowledging = False

    # --- opening and ending ------------------------------------------------------------------

    async def begin_pairing(self) -> None:
        """Show the first QR code. Raises `ConnectionClosed`."""
        device, place = new_device(), self._place
        self.device_id = device.device_id
        until = self._bridge.wall() + self._bridge.timing.pairing_s
        with self._while_open():
            await self._bridge.perform(
                lambda server: server.begin_pairing(place, device.device_id, device.proof, until)
            )
        self._pairing = _Pairing(device, trio.current_time())
        self._turn_qr(self._pairing)

    async def log_in(
        self, keys: Mapping[KeyName, bytes], doubtful: Collection[str], distrust_sessions: bool
    ) -> None:
        """Log in with `keys`. Raises `ConnectionClosed`."""
        device = self._read_device(keys)
        self.device_id = device.device_id
        place = self._place
        with self._while_open():
            delay_s = await self._bridge.perform(
                lambda server: server.login_delay_s(place.account_id)
            )
            if delay_s > 0:
                await trio.sleep(delay_s)
            phone = await self._bridge.perform(lambda server: server.log_in(place, device))
        self._sessions = {
            name: value for name, value in keys.items() if name.startswith("session-")
        }
        self._drop_sessions(doubtful, all_of_them=distrust_sessions)
        self._tell(Connected(phone))
        self._logged_in = True
        for letter in self._early:
            self.be_written_to(letter)

    def _read_device(self, keys: Mapping[KeyName, bytes]) -> Device:
        try:
            return read_device(keys)
        except CredsUnreadable as error:
            raise ConnectionClosed(401, str(error)) from error

    def _drop_sessions(self, doubtful: Collection[str], *, all_of_them: bool) -> None:
        """Begin anew with these recipients, and say so first: the old sessions must not return."""
        dropped = {
            name: None
            for name in self._sessions
            if all_of_them or any(name.startswith(f"session-{to}.") for to in doubtful)
        }
        for name in dropped:
            del self._sessions[name]
        if dropped:
            self._tell(KeysChanged(KeyChange(dropped), trio.Event()))

    def end(self, code: int, detail: str, *, expire_s: float | None = None) -> None:
        """Close, if still open: whoever waits for this connection is told so."""
        if self._ending is None:
            self._ending = _Ending(code, detail, expire_s)
            self._news.set()
            for scope in self._scopes:
                scope.cancel()

    @contextmanager
    def _while_open(self) -> Iterator[None]:
        """Raise `ConnectionClosed` instead of the block's end once the connection is closed."""
        if self._ending is not None:
            raise self._ending.error()
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                yield
            except ConnectionClosed as closed:
                # The server said so before the watcher could.
                self.end(closed.code, closed.detail, expire_s=closed.expire_s)
                raise
            finally:
                self._scopes.discard(scope)
        if scope.cancelled_caught and self._ending is not None:
            raise self._ending.error()

    # --- events ------------------------------------------------------------------------------

    def _tell(self, event: ConnectionEvent) -> None:
        if len(self._events) < EVENTS_MAX:
            self._events.append(event)
            self._news.set()

    def hang_up(self) -> None:
        """See `machine.ports.Connection`. Nothing is on its way here that was not told."""
        self.end(428, "closed on this side")

    async def next_event(self) -> ConnectionEvent:
        """See `machine.ports.Connection`. For one task at a time."""
        await trio.lowlevel.checkpoint()
        while not self._events:
            if self._ending is not None:
                raise self._ending.error()
            if self._stored is not None:
                with self._while_open():
                    await self._stored.wait()
                self.end(515, "restart required: the pairing is complete")
            else:
                await self._wait_for_news()
        return self._events.popleft()

    async def _wait_for_news(self) -> None:
        """Return when there is something to look at, having turned the QR code when it was due."""
        due = self._pairing.due if self._pairing else float("inf")
        with trio.move_on_at(due) as scope:
            await self._news.wait()
            self._news = trio.Event()
        if scope.cancelled_caught and self._pairing is not None:
            self._turn_qr(self._pairing)

    # --- pairing -----------------------------------------------------------------------------

    def _turn_qr(self, pairing: _Pairing) -> None:
        """Show the next QR code, or give up after the last."""
        timing = self._bridge.timing
        if pairing.shown == timing.qr_refs:
            self.end(408, "QR refs used up: nobody scanned")
            return
        length_s = timing.qr_next_s if pairing.shown else timing.qr_first_s
        pairing.shown += 1
        pairing.due += length_s
        reference = f"loopback,{secrets.token_urlsafe(24)},{self._place.account_id}"
        self._tell(QrShown(reference, self._bridge.wall() + length_s))

    def be_scanned(self, phone: str) -> None:
        """Complete the pairing: hand out the keys; once they are stored, ask for a restart."""
        if self._pairing is None or self._ending is not None:
            return
        keys = make_keys(self._pairing.device, phone)
        self._pairing = None
        self._stored = trio.Event()
        self._tell(PairingScanned())
        self._tell(KeysChanged(KeyChange(dict(keys)), self._stored))

    async def request_pairing_code(self, phone: str) -> tuple[str, float]:
        """See `machine.ports.Connection`. Raises `NotAwaitingScan` unless pairing."""
        code = "".join(secrets.choice(CODE_LETTERS) for _ in range(CODE_LENGTH))
        until = self._bridge.wall() + self._bridge.timing.code_s
        place = self._place
        with self._while_open():
            if self._pairing is None:
                raise NotAwaitingScan(f"account {place.account_id} is not being paired")
            await self._bridge.perform(lambda server: server.offer_code(place, phone, code, until))
        return code, until

    async def log_out(self) -> None:
        """See `machine.ports.Connection`. The connection ends with 401, as the real one does."""
        place, device_id = self._place, self.device_id
        with self._while_open():
            await self._bridge.perform(lambda server: server.log_out(place, device_id))
        self.end(401, "logged out")

    # --- receiving ---------------------------------------------------------------------------

    def be_written_to(self, letter: Letter) -> None:
        """Hand on a message. The server hears that it arrived when it is stored, and not before."""
        if self._ending is not None:
            return
        if not self._logged_in:
            self._early.append(letter)
            return
        name = reading_key(letter.sender)
        position = load_session(self._sessions.get(name)).advanced()
        self._sessions[name] = dump_session(position)
        stored = trio.Event()
        message = InboundMessage(
            self._place.account_id,
            MessageId(letter.message_id),
            chat=letter.sender,
            sender=letter.sender,
            sender_name=letter.sender_name,
            text=letter.text,
            sent_at=letter.sent_at,
            received_at=self._bridge.wall(),
        )
        if len(self._events) >= EVENTS_MAX:
            return  # The server keeps it for the next login.
        self._tell(MessageReceived(message, KeyChange({name: self._sessions[name]}), stored))
        self._unacknowledged.append((letter.seq, stored))
        if not self._acknowledging:
            self._acknowledging = True
            self._bridge.nursery.start_soon(self._acknowledge)

    async def _acknowledge(self) -> None:
        """Tell the server what is stored, in order, until nothing waits or the connection ends."""
        place, device_id = self._place, self.device_id
        with suppress(ConnectionClosed), self._while_open():
            while self._unacknowledged:
                await self._unacknowledged[0][1].wait()
                numbers: list[int] = []
                while self._unacknowledged and self._unacknowledged[0][1].is_set():
                    numbers.append(self._unacknowledged.popleft()[0])
                await self._bridge.perform(partial(_acknowledge, place, device_id, numbers))
        self._acknowledging = False

    # --- sending -----------------------------------------------------------------------------

    async def is_on_whatsapp(self, to: str) -> bool:
        """See `machine.ports.Connection`."""
        place, device_id = self._place, self.device_id
        with self._while_open():
            return await self._bridge.perform(
                lambda server: server.is_on_whatsapp(place, device_id, to)
            )
        raise AssertionError("the block above returns or raises")

    async def send_text(self, message_id: MessageId, to: str, text: str) -> ServerAck:
        """See `machine.ports.Connection`. At most one delivery for each call.

        Receipts follow as events. An ack lost by command: `ConnectionClosed` (408) after a while.
        """
        place, device_id = self._place, self.device_id
        with self._while_open():
            envelope = Envelope(message_id, to, text, self._encrypt(to))
            fate = await self._bridge.perform(
                lambda server: server.deliver(place, device_id, envelope)
            )
            await self._wait_for_ack(fate)
        if fate.readable:
            self._promise_receipts(message_id, fate)
        # The newest position, not this message's: acks may overtake each other.
        return ServerAck(KeyChange({session_key(to): dump_session(self._positions[to])}))

    def _encrypt(self, to: str) -> Session:
        """The session to use for one message; it is used up by that, whatever comes of it."""
        session = self._positions.get(to) or load_session(self._sessions.get(session_key(to)))
        self._positions[to] = session.advanced()
        return session

    async def _wait_for_ack(self, fate: Fate) -> None:
        told = fate.behaviour
        if told.ack_delay_s > 0:
            await trio.sleep(told.ack_delay_s)
        if fate.lost:
            await trio.sleep(told.ack_lost_close_s)
            raise ConnectionClosed(408, "no answer from the server")

    def _promise_receipts(self, message_id: MessageId, fate: Fate) -> None:
        told = fate.behaviour
        states = {
            "none": (),
            "delivered": (MessageState.DELIVERED,),
            "read": (MessageState.DELIVERED, MessageState.READ),
        }[told.receipts]
        if told.receipt_delay_s > 0 and states:
            self._bridge.nursery.start_soon(
                self._tell_receipts, message_id, states, told.receipt_delay_s
            )
            return
        for state in states:
            self._tell(MessageProgressed(message_id, state))

    async def _tell_receipts(
        self, message_id: MessageId, states: tuple[MessageState, ...], delay_s: float
    ) -> None:
        for state in states:
            await trio.sleep(delay_s)
            if self._ending is not None:
                return  # The real server would keep it for the next login; this one forgets it.
            self._tell(MessageProgressed(message_id, state))


def _acknowledge(
    place: Place, device_id: str, numbers: Sequence[int], server: LoopbackServer
) -> None:
    server.acknowledge(place, device_id, numbers)
