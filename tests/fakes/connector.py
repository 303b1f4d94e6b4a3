"""WhatsApp in memory: one world, many connectors, each account's connection in one place at most.

`FakeWhatsApp` is the server, the phones and the recipients; `FakeConnector` is one instance's way
to it. Each account's behaviour is a `Script`. A message goes on the wire before its ack: whatever
happens to the ack, `raw` has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field

import trio

from machine.ports import (
    Bridge,
    Connected,
    Connection,
    ConnectionClosed,
    ConnectionEvent,
    ConnectorDown,
    KeysChanged,
    MessageProgressed,
    MessageReceived,
    PairingScanned,
    QrShown,
    SendRefused,
    ServerAck,
)
from machine.records import AccountId, InboundMessage, KeyChange, KeyName, MessageId, MessageState

CREDS = KeyName("creds")
SESSION_PREFIX = "session-"
QR_VALID_S = 60.0
QR_NEXT_VALID_S = 20.0
"""Baileys' own times: of the first code, and of each later one."""
WALL_AT_START = 1_700_000_000.0


@dataclass(slots=True)
class Script:
    """How the world treats one account. Lists are used up from the front, one entry a time."""

    open_delay_s: float = 0.0
    """Before `open_connection` yields."""
    login_delay_s: float = 0.0
    """From there to `Connected`."""
    refuse_open: deque[Exception] = field(default_factory=deque)
    """Raised by the next `open_connection`s."""
    refuse_login: deque[ConnectionClosed] = field(default_factory=deque)
    """End the next connections instead of `Connected`."""
    ack_delay_s: float = 0.0
    wire_delay_s: float = 0.0
    """Before the message is on the wire; cancelled in there, it never was."""
    acks_lost: int = 0
    """So many of the next messages are delivered and never acknowledged."""
    refuse_send: deque[SendRefused | ConnectionClosed] = field(default_factory=deque)
    """Raised by the next sends; those messages are not delivered."""
    receipts: tuple[MessageState, ...] = ()
    """What follows each ack, for example `(DELIVERED, READ)`."""
    not_on_whatsapp: set[str] = field(default_factory=set)
    qr_refs: int | None = None
    """How many QR codes a pairing shows one after the other; `None`: one, for ever."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """One arrival at a recipient. `readable` is false when its key had been used before."""

    account_id: AccountId
    to: str
    message_id: MessageId
    text: str
    at: float
    """Trio's clock."""
    duplicate: bool
    readable: bool


@dataclass(slots=True)
class Mail:
    """A message to an account. The server delivers it at each login, until it was stored."""

    message_id: MessageId
    sender: str
    text: str
    sent_at: float
    carrier: FakeConnection | None = None
    """The connection that it was delivered on last, while that is open."""
    stored: trio.Event = field(default_factory=trio.Event)
    """The receipt of that delivery."""


class FakeWhatsApp:
    """The world that every connector of a test shares.

    `opened`, `evictions` and `opened_at_once_max` count; `open` maps each logged-in account to its
    connection; `connections` counts those that exist, logged in or not.
    """

    def __init__(self) -> None:
        self.scripts: dict[AccountId, Script] = {}
        self.open: dict[AccountId, FakeConnection] = {}
        self.connections = 0
        self.opened_at_once_max = 0
        self.opened = 0
        self.evictions: list[AccountId] = []
        self.raw: list[Delivered] = []
        self.unlinked: set[AccountId] = set()
        """Devices that the phone removed: their login ends with 401."""
        self.phones: dict[AccountId, str] = {}
        self.mail: dict[AccountId, list[Mail]] = {}
        """What each account was sent and has not acknowledged."""
        self.mail_delivered: list[MessageId] = []
        """Every delivery to an account, each time."""
        self.bridges = 0
        """Bridges that exist now."""
        self._seen: set[tuple[AccountId, str, MessageId]] = set()
        self._ratchets: dict[tuple[AccountId, str], tuple[int, int]] = {}
        self._pairing: dict[AccountId, FakeConnection] = {}
        self.sessions = 0
        """How many sessions with recipients were ever begun."""

    def connector(self) -> FakeConnector:
        return FakeConnector(self)

    def script(self, account_id: AccountId) -> Script:
        """This account's script, made on first use."""
        return self.scripts.setdefault(account_id, Script())

    def phone(self, account_id: AccountId) -> str:
        return self.phones.setdefault(account_id, f"49{1500000000 + len(self.phones)}")

    def scan(self, account_id: AccountId, phone: str | None = None) -> None:
        """Scan the account's QR code with a phone. Raises `KeyError` when none is shown."""
        connection = self._pairing.pop(account_id)
        if phone is not None:
            self.phones[account_id] = phone
        self.unlinked.discard(account_id)
        connection.scan()

    def cut(self, account_id: AccountId, code: int = 428, *, expire_s: float | None = None) -> None:
        """End the account's connection. Raises `KeyError` when it has none."""
        self.open[account_id].end(ConnectionClosed(code, "cut", expire_s=expire_s))

    def post(
        self,
        account_id: AccountId,
        message_id: str,
        text: str = "hello",
        *,
        sender: str = "4917012345",
        twice: bool = False,
    ) -> None:
        """Send an account a message; it waits while the account is away.

        `twice`: it is delivered a second time at once, as WhatsApp does now and then.
        """
        sent_at = WALL_AT_START + trio.current_time()
        mail = Mail(MessageId(message_id), sender, text, sent_at)
        self.mail.setdefault(account_id, []).append(mail)
        connection = self.open.get(account_id)
        if connection is not None:
            connection.hand_over(mail)
            if twice:
                connection.hand_over(mail)

    def waiting(self, account_id: AccountId) -> list[MessageId]:
        """What the account has not acknowledged yet."""
        self._take_receipts(account_id)
        return [mail.message_id for mail in self.mail.get(account_id, ())]

    def _take_receipts(self, account_id: AccountId) -> None:
        """Forget what was acknowledged over a connection that stands."""
        self.mail[account_id] = [
            mail
            for mail in self.mail.get(account_id, ())
            if mail.carrier is None or not mail.stored.is_set()
        ]

    def inbox(self, to: str | None = None) -> list[Delivered]:
        """What recipients can read: each message once, in order of arrival."""
        return [
            one
            for one in self.raw
            if one.readable and not one.duplicate and (to is None or one.to == to)
        ]

    def unreadable(self) -> list[Delivered]:
        return [one for one in self.raw if not one.readable]

    # -- for the connections

    def log_in(self, connection: FakeConnection) -> None:
        """Make `connection` the account's only one; the other is evicted with 440."""
        other = self.open.get(connection.account_id)
        if other is not None:
            self.evictions.append(connection.account_id)
            other.end(ConnectionClosed(440, "conflict"))
        self.open[connection.account_id] = connection
        self.opened += 1
        self.opened_at_once_max = max(self.opened_at_once_max, len(self.open))

    def hand_over_backlog(self, connection: FakeConnection) -> None:
        for mail in self.mail.get(connection.account_id, ()):
            connection.hand_over(mail)

    def forget(self, connection: FakeConnection) -> None:
        # A receipt that was not sent while the connection stood is not sent any more.
        self._take_receipts(connection.account_id)
        for mail in self.mail[connection.account_id]:
            if mail.carrier is connection:
                mail.carrier = None
        for table in (self.open, self._pairing):
            if table.get(connection.account_id) is connection:
                del table[connection.account_id]

    def show_qr(self, connection: FakeConnection) -> None:
        self._pairing[connection.account_id] = connection

    def new_session(self) -> int:
        self.sessions += 1
        return self.sessions

    def deliver(
        self,
        account_id: AccountId,
        to: str,
        message_id: MessageId,
        text: str,
        ratchet: tuple[int, int],
    ) -> None:
        """Hand a message to its recipient. `ratchet` is (session, position)."""
        known = self._ratchets.get((account_id, to), (0, 0))
        readable = ratchet > known
        self._ratchets[account_id, to] = max(known, ratchet)
        key = (account_id, to, message_id)
        # Only a message that could be read is a message that the recipient has seen.
        duplicate = key in self._seen
        if readable:
            self._seen.add(key)
        at = trio.current_time()
        self.raw.append(Delivered(account_id, to, message_id, text, at, duplicate, readable))


class FakeConnector:
    """A `Connector` of one instance."""

    def __init__(self, world: FakeWhatsApp | None = None) -> None:
        self.world = world if world is not None else FakeWhatsApp()
        self.bridges: list[FakeBridge] = []
        """Those open now."""
        self.refuse_bridge: deque[Exception] = deque()

    def open_bridge(self) -> AbstractAsyncContextManager[Bridge]:
        return self._open_bridge()

    @asynccontextmanager
    async def _open_bridge(self) -> AsyncIterator[Bridge]:
        await trio.lowlevel.checkpoint()
        if self.refuse_bridge:
            raise self.refuse_bridge.popleft()
        bridge = FakeBridge(self.world)
        self.bridges.append(bridge)
        self.world.bridges += 1
        try:
            yield bridge
        finally:
            bridge.kill()
            self.world.bridges -= 1
            self.bridges.remove(bridge)


class FakeBridge:
    """A `Bridge`: dead for good after `kill`."""

    def __init__(self, world: FakeWhatsApp) -> None:
        self.world = world
        self.connections: set[FakeConnection] = set()
        self.dead = False

    def kill(self) -> None:
        """Die as a process does: every connection ends with 428, no other can be opened."""
        self.dead = True
        for connection in list(self.connections):
            connection.end(ConnectionClosed(428, "the bridge is dead"))

    def open_connection(
        self,
        account_id: AccountId,
        keys: Mapping[KeyName, bytes] | None,
        *,
        doubtful: Collection[str] = (),
        distrust_sessions: bool = False,
    ) -> AbstractAsyncContextManager[Connection]:
        return self._open_connection(account_id, keys, doubtful, distrust_sessions)

    @asynccontextmanager
    async def _open_connection(
        self,
        account_id: AccountId,
        keys: Mapping[KeyName, bytes] | None,
        doubtful: Collection[str],
        distrust_sessions: bool,
    ) -> AsyncIterator[Connection]:
        script = self.world.script(account_id)
        await trio.sleep(script.open_delay_s)
        if self.dead:
            raise ConnectorDown("the bridge is dead")
        if script.refuse_open:
            raise script.refuse_open.popleft()
        connection = FakeConnection(
            self.world, account_id, script, keys, doubtful, distrust_sessions
        )
        self.connections.add(connection)
        self.world.connections += 1
        try:
            yield connection
        finally:
            self.world.connections -= 1
            self.connections.discard(connection)
            connection.end(ConnectionClosed(428, "closed by us"))


class FakeConnection:
    """A `Connection`. It logs in, or shows a QR code, while somebody waits in `next_event`.

    It has no task of its own, so that an exception in its block leaves it as it is.
    """

    def __init__(
        self,
        world: FakeWhatsApp,
        account_id: AccountId,
        script: Script,
        keys: Mapping[KeyName, bytes] | None,
        doubtful: Iterable[str],
        distrust_sessions: bool,
    ) -> None:
        self.world = world
        self.account_id = account_id
        self._script = script
        self._begins_at = trio.current_time() + script.login_delay_s
        self._begun = False
        self._qr_count = 0
        self._qr_ends_at = 0.0
        self._paired: trio.Event | None = None
        self._keys = None if keys is None else dict(keys)
        self._events: deque[ConnectionEvent] = deque()
        self._drop_sessions(doubtful, all_of_them=distrust_sessions)
        self._stirred = trio.Event()
        self._ended: ConnectionClosed | None = None
        # A lock but for its owner, which a task of the simulation cannot be.
        self._wire = trio.Semaphore(1)

    def __repr__(self) -> str:
        return f"<FakeConnection {self.account_id}>"

    def _drop_sessions(self, recipients: Iterable[str], *, all_of_them: bool) -> None:
        keys = self._keys or {}
        names = {_session_key(to) for to in recipients}
        dropped = [
            name
            for name in keys
            if name in names or (all_of_them and name.startswith(SESSION_PREFIX))
        ]
        for name in dropped:
            del keys[name]
        if dropped:
            self._events.append(KeysChanged(KeyChange(dict.fromkeys(dropped)), trio.Event()))

    # -- the world's side

    def push(self, event: ConnectionEvent) -> None:
        if self._ended is None:
            self._events.append(event)
            self._stir()

    def end(self, closed: ConnectionClosed) -> None:
        if self._ended is None:
            self._ended = closed
            self.world.forget(self)
            self._stir()

    def _stir(self) -> None:
        self._stirred.set()
        self._stirred = trio.Event()

    def scan(self) -> None:
        """The phone has scanned: hand over the new identity."""
        self.push(PairingScanned())
        values: dict[KeyName, bytes | None] = {CREDS: f"creds of {self.account_id}".encode()}
        values |= {KeyName(f"pre-key-{number}"): b"pre-key" for number in range(1, 4)}
        self._paired = trio.Event()
        self.push(KeysChanged(KeyChange(values), self._paired))

    def hand_over(self, mail: Mail) -> None:
        """Deliver a message, with the key that reading it changes."""
        assert self._keys is not None
        name = KeyName(f"{SESSION_PREFIX}{mail.sender}.read")
        self._keys[name] = str(int(self._keys.get(name, b"0")) + 1).encode()
        mail.carrier, mail.stored = self, trio.Event()
        self.world.mail_delivered.append(mail.message_id)
        message = InboundMessage(
            self.account_id,
            mail.message_id,
            chat=mail.sender,
            sender=mail.sender,
            sender_name="Zoë",
            text=mail.text,
            sent_at=mail.sent_at,
            received_at=WALL_AT_START + trio.current_time(),
        )
        keys = KeyChange({name: self._keys[name]})
        self.push(MessageReceived(message, keys, mail.stored))

    def _begin(self) -> None:
        """Log in, or show a QR code, unless it has ended meanwhile."""
        self._begun = True
        if self._ended is not None:
            return
        if self._keys is None:
            self.world.show_qr(self)
            self._turn_qr()
        elif self._script.refuse_login:
            self.end(self._script.refuse_login.popleft())
        elif self.account_id in self.world.unlinked or CREDS not in self._keys:
            self.end(ConnectionClosed(401, "device removed"))
        else:
            self.world.log_in(self)
            self.push(Connected(self.world.phone(self.account_id)))
            self.world.hand_over_backlog(self)

    def _turn_qr(self) -> None:
        """Show the next QR code, or give up after the last."""
        if self._qr_count == self._script.qr_refs:
            self.end(ConnectionClosed(408, "QR refs used up"))
            return
        valid_s = QR_NEXT_VALID_S if self._qr_count else QR_VALID_S
        self._qr_count += 1
        number = f"#{self._qr_count}" if self._qr_count > 1 else ""
        self._qr_ends_at = trio.current_time() + valid_s
        expires_at = WALL_AT_START + self._qr_ends_at
        self.push(QrShown(f"fake-qr:{self.account_id}{number}", expires_at))

    # -- the machine's side

    def hang_up(self) -> None:
        self.end(ConnectionClosed(428, "closed on this side"))

    async def next_event(self) -> ConnectionEvent:
        await trio.lowlevel.checkpoint()
        while not self._events:
            if self._ended is not None:
                raise self._ended
            if not self._begun:
                with trio.move_on_at(self._begins_at):
                    await self._stirred.wait()
                if trio.current_time() >= self._begins_at:
                    self._begin()
            elif self._paired is not None:
                await _wait_either(self._stirred, self._paired)
                if self._paired.is_set():
                    self.end(ConnectionClosed(515, "restart required"))
            elif self._keys is None and self._script.qr_refs is not None:
                with trio.move_on_at(self._qr_ends_at):
                    await self._stirred.wait()
                if trio.current_time() >= self._qr_ends_at and self._paired is None:
                    self._turn_qr()
            else:
                await self._stirred.wait()
        return self._events.popleft()

    async def _wait_ended(self) -> ConnectionClosed:
        while self._ended is None:
            await self._stirred.wait()
        return self._ended

    async def _sleep(self, seconds: float) -> None:
        """Sleep, or raise `ConnectionClosed` when the connection ends before."""
        with trio.move_on_after(seconds):
            raise await self._wait_ended()
        if self._ended is not None:
            raise self._ended

    async def send_text(self, message_id: MessageId, to: str, text: str) -> ServerAck:
        script = self._script
        async with self._wire:
            await self._sleep(script.wire_delay_s)
            if script.refuse_send:
                raise script.refuse_send.popleft()
            self.world.deliver(self.account_id, to, message_id, text, self._advance(to))
        if script.acks_lost > 0:
            script.acks_lost -= 1
            raise await self._wait_ended()
        await self._sleep(script.ack_delay_s)
        for state in script.receipts:
            self.push(MessageProgressed(message_id, state))
        # As it is now, not as this message left it: acks may overtake each other.
        assert self._keys is not None
        name = _session_key(to)
        return ServerAck(KeyChange({name: self._keys[name]}))

    def _advance(self, to: str) -> tuple[int, int]:
        """Step the ratchet with `to`: where it stands now."""
        assert self._keys is not None, "a connection that is pairing cannot send"
        name = _session_key(to)
        session, position = 0, 0
        if name in self._keys:
            session, position = (int(one) for one in self._keys[name].split(b":"))
        else:
            session = self.world.new_session()
        ratchet = (session, position + 1)
        self._keys[name] = f"{session}:{position + 1}".encode()
        return ratchet

    async def is_on_whatsapp(self, to: str) -> bool:
        await trio.lowlevel.checkpoint()
        if self._ended is not None:
            raise self._ended
        return to not in self._script.not_on_whatsapp

    async def request_pairing_code(self, phone: str) -> tuple[str, float]:
        await trio.lowlevel.checkpoint()
        if self._ended is not None:
            raise self._ended
        self.world.phones[self.account_id] = phone
        return "FAKECODE", WALL_AT_START + trio.current_time() + QR_VALID_S

    async def log_out(self) -> None:
        await trio.lowlevel.checkpoint()
        if self._ended is not None:
            raise self._ended
        self.world.unlinked.add(self.account_id)
        self.end(ConnectionClosed(401, "logged out"))


def _session_key(to: str) -> KeyName:
    return KeyName(f"{SESSION_PREFIX}{to}.0")


async def _wait_either(one: trio.Event, other: trio.Event) -> None:
    async def wait(event: trio.Event) -> None:
        await event.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, one)
        nursery.start_soon(wait, other)
