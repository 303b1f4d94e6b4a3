"""One account's connection in a bridge process, and the order in which its keys are told.

Lives here: what a connection's frames mean to the machine.
Never lives here: the process that they come from (`process`), and which one that is (`connector`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import trio

from daemon.bridge.frames import (
    AskFrame,
    BodyAsk,
    Call,
    Changes,
    Close,
    ClosedEvent,
    ConnectedEvent,
    ConnectionEventFrame,
    Done,
    FrameTooLong,
    KeysAsk,
    Logout,
    OkT,
    OnWhatsApp,
    OnWhatsAppDone,
    Open,
    PairingCode,
    PairingCodeDone,
    QrEvent,
    ReceiptEvent,
    ReceivedAsk,
    Reply,
    ScannedEvent,
    Send,
    SendDone,
)
from daemon.bridge.process import CallFailed, KeysUnusable, seconds_left
from machine.ports import (
    AuthUnreadable,
    BodyAsked,
    Clocks,
    Connected,
    ConnectionClosed,
    ConnectionEvent,
    Journal,
    KeysChanged,
    MessageProgressed,
    MessageReceived,
    PairingScanned,
    QrShown,
    ServerAck,
)
from machine.records import (
    AccountId,
    InboundMessage,
    KeyChange,
    KeyName,
    MessageId,
    MessageState,
)

ITEMS_MAX = 10_000
"""Unread events of one connection; then it is closed (503), and the account opened again."""
STREAM_ERROR = 500
SERVER_AWAY = 503
CLOSE_S = 5.0
"""How long the process is given to end a connection in good order."""


class Wire(Protocol):
    """What a connection needs of its process."""

    @property
    def alive(self) -> bool:
        """See `daemon.bridge.process.BridgeProcess.alive`."""
        ...

    async def call(self, call: Call, kind: type[OkT]) -> OkT:
        """See `daemon.bridge.process.BridgeProcess.call`."""
        ...

    def post(self, call: Call, replied: Callable[[Reply | None], None], *, within_s: float) -> int:
        """See `daemon.bridge.process.BridgeProcess.post`."""
        ...

    def read_reply(self, call: Call, reply: Reply | None, kind: type[OkT]) -> OkT:
        """See `daemon.bridge.process.BridgeProcess.read_reply`."""
        ...

    def answer(self, ask_id: int, ok: Mapping[str, str | None]) -> None:
        """See `daemon.bridge.process.BridgeProcess.answer`."""
        ...

    def refuse(self, ask: AskFrame, why: str) -> None:
        """See `daemon.bridge.process.BridgeProcess.refuse`."""
        ...

    def kill(self, reason: str) -> None:
        """See `daemon.bridge.process.BridgeProcess.kill`."""
        ...

    def gone(self) -> ConnectionClosed:
        """See `daemon.bridge.process.BridgeProcess.gone`."""
        ...


@dataclass(slots=True, eq=False)
class _Sending:
    """A send whose caller waits, from its call to the moment the caller has gone on.

    `handed` is set when `next_event` has come to its reply; `left` when the caller runs again: with
    the reply (`took`), or without it, because it was cancelled.
    """

    call: Send
    reply: Reply | None = None
    handed: trio.Event = field(default_factory=trio.Event)
    left: trio.Event = field(default_factory=trio.Event)
    took: bool = False


_Item: TypeAlias = ConnectionEvent | _Sending


class BridgeConnection:
    """One opening of one account. Its frames are read in one order: the one they were written in.

    That is what keeps an older key from overwriting a newer one. A send's reply carries keys, and
    so do events, and two tasks of the machine take them; so a reply is an item of the one queue
    too, and `next_event`, when it comes to one, hands it to its sender and goes on only when that
    sender has run to its own next await. By then the machine has posted the keys.

    Between calls: `_items` holds what was not read yet; `_ending` is set once nothing follows.
    """

    def __init__(
        self, number: int, account_id: AccountId, wire: Wire, journal: Journal, clocks: Clocks
    ) -> None:
        self.number = number
        self.account_id = account_id
        self._wire = wire
        self._journal = journal
        self._clocks = clocks
        self._items: deque[_Item] = deque()
        self._news = trio.Event()
        self._ending: ConnectionClosed | None = None
        self._over_there = False
        self._hung_up: trio.Event | None = None
        self._sendings: set[_Sending] = set()
        self._calls: set[trio.CancelScope] = set()
        self._to_answer: deque[tuple[AskFrame, trio.Event]] = deque()
        self._asked = trio.Event()
        self._answering = trio.CancelScope()

    def __repr__(self) -> str:
        return f"<BridgeConnection {self.number} of {self.account_id}>"

    # --- opening and closing

    async def open(
        self,
        keys: Mapping[KeyName, bytes] | None,
        doubtful: Collection[str],
        *,
        distrust_sessions: bool,
    ) -> None:
        """Have the process open it. Raises `ConnectionClosed`, `AuthUnreadable`."""
        call = Open(
            connection=self.number,
            account=self.account_id,
            keys=None if keys is None else _texts(self.account_id, keys),
            doubtful=tuple(doubtful),
            distrust_sessions=distrust_sessions,
        )
        try:
            await self._wire.call(call, Done)
        except KeysUnusable as unusable:
            raise AuthUnreadable(
                f"account {self.account_id}: Baileys cannot use its keys ({unusable}); its state "
                "is kept; pair it again with repair, or restore it from a backup"
            ) from unusable
        except FrameTooLong as too_long:
            raise ConnectionClosed(SERVER_AWAY, f"its keys are too large: {too_long}") from too_long
        except CallFailed as failed:
            raise ConnectionClosed(STREAM_ERROR, str(failed)) from failed

    def hang_up(self) -> None:
        """See `machine.ports.Connection`. The process tells its last changes before it replies."""
        if self._ending is not None or self._hung_up is not None or not self._wire.alive:
            return
        hung_up = self._hung_up = trio.Event()

        def replied(reply: Reply | None) -> None:
            # `None`: the process is gone, and says why itself.
            self._over_there = reply is not None
            hung_up.set()
            if reply is not None:
                self.end(ConnectionClosed(428, "closed on this side"))

        self._wire.post(Close(connection=self.number), replied, within_s=CLOSE_S)

    async def close(self, close_s: float) -> None:
        """Close it for good: a last word to the process of up to `close_s`, even when cancelled.

        A process that does not say that it is closed is killed. Nothing is said of what is dead.
        """
        self.end(ConnectionClosed(428, "closed on this side"))
        self._answering.cancel()
        if self._over_there or not self._wire.alive:
            return
        with trio.move_on_after(close_s, shield=True) as closing:
            if self._hung_up is not None:
                await self._hung_up.wait()
                return
            try:
                await self._wire.call(Close(connection=self.number), Done)
            except (ConnectionClosed, CallFailed):
                return  # It was closed there in the meantime, or the process is gone.
        if closing.cancelled_caught:
            self._journal.note(
                "bridge.close_unanswered", account_id=self.account_id, waited_s=close_s
            )
            self._wire.kill(f"it did not close account {self.account_id} within {close_s:g} s")

    def end(self, closed: ConnectionClosed) -> None:
        """Take note that nothing follows: who waits is told so, once all earlier is read."""
        if self._ending is not None:
            return
        self._ending = closed
        self._news.set()
        for sending in self._sendings:
            if sending.reply is None:
                sending.handed.set()
        for scope in self._calls:
            scope.cancel()

    def _closed(self) -> ConnectionClosed:
        """Make each who asks an error of his own."""
        ending = self._ending
        assert ending is not None
        return ConnectionClosed(ending.code, ending.detail, expire_s=ending.expire_s)

    # --- what comes in

    def receive(self, frame: ConnectionEventFrame | AskFrame) -> None:
        """Take a frame off the line, in the order of the line."""
        if self._ending is not None:
            if isinstance(frame, AskFrame):
                self._wire.refuse(frame, "this connection is closed")
            self._over_there = self._over_there or isinstance(frame, ClosedEvent)
            return
        match frame:
            case ConnectedEvent():
                self._put(Connected(frame.phone))
            case QrEvent():
                self._put(QrShown(frame.qr, frame.expires_at))
            case ScannedEvent():
                self._put(PairingScanned())
            case ReceiptEvent():
                self._put(
                    MessageProgressed(
                        MessageId(frame.message_id), MessageState(frame.state), frame.error
                    )
                )
            case ClosedEvent():
                self._over_there = True
                self.end(ConnectionClosed(frame.code, frame.message, expire_s=frame.expire_s))
            case KeysAsk():
                self._put(KeysChanged(_change(frame.values), self._stored(frame)))
            case ReceivedAsk():
                keys = _change(frame.values) if frame.values else None
                self._put(MessageReceived(self._inbound(frame), keys, self._stored(frame)))
            case BodyAsk():
                self._put(BodyAsked(MessageId(frame.message_id), self._body_answer(frame)))

    def _put(self, item: _Item) -> bool:
        """Put an item last in the queue; false, and the connection's end, when it is full."""
        if len(self._items) >= ITEMS_MAX:
            self._journal.note("bridge.flooded", account_id=self.account_id, count=len(self._items))
            self.end(ConnectionClosed(SERVER_AWAY, f"{ITEMS_MAX} events were not read"))
            return False
        self._items.append(item)
        self._news.set()
        return True

    def _inbound(self, frame: ReceivedAsk) -> InboundMessage:
        message = frame.message
        return InboundMessage(
            account_id=self.account_id,
            message_id=MessageId(message.message_id),
            chat=message.chat,
            sender=message.sender,
            sender_name=message.sender_name,
            text=message.text,
            sent_at=message.sent_at,
            received_at=self._clocks.wall(),
        )

    # --- answers

    def _stored(self, ask: AskFrame) -> trio.Event:
        """An event that, once set, has `ask` answered."""
        stored = trio.Event()
        self._to_answer.append((ask, stored))
        self._asked.set()
        return stored

    async def keep_answering(self) -> None:
        """Answer asks as what they brought becomes durable, until the connection is closed.

        One after the other: the machine stores in order, so none waits for another in vain.
        """
        with self._answering:
            while True:
                await self._asked.wait()
                self._asked = trio.Event()
                while self._to_answer:
                    ask, stored = self._to_answer[0]
                    await stored.wait()
                    self._to_answer.popleft()
                    self._wire.answer(ask.id, {})

    def _body_answer(self, ask: BodyAsk) -> Callable[[str | None], None]:
        def answer(text: str | None) -> None:
            if self._ending is None:
                self._wire.answer(ask.id, {"text": text})

        return answer

    # --- what the machine asks

    async def next_event(self) -> ConnectionEvent:
        """See `machine.ports.Connection`. For one task at a time.

        Cancelled: nothing is lost; the next call goes on where this one was.
        """
        await trio.lowlevel.checkpoint()
        while True:
            while not self._items:
                if self._ending is not None:
                    raise self._closed()
                self._news = trio.Event()
                await self._news.wait()
            item = self._items[0]
            if not isinstance(item, _Sending):
                self._items.popleft()
                return item
            # The sender's answer is this item. It leaves the queue when the sender has gone on.
            item.handed.set()
            await item.left.wait()
            self._items.popleft()
            if not item.took and (orphaned := self._orphaned(item)) is not None:
                return orphaned

    def _orphaned(self, sending: _Sending) -> KeysChanged | None:
        """The keys of a send whose caller has left: they changed all the same."""
        try:
            done = self._wire.read_reply(sending.call, sending.reply, SendDone)
        except Exception:  # noqa: BLE001  # whoever would act on the failure has left
            return None
        return KeysChanged(_change(done.keys), trio.Event()) if done.keys else None

    async def send_text(self, message_id: MessageId, to: str, text: str) -> ServerAck:
        """See `machine.ports.Connection`."""
        if self._ending is not None:
            raise self._closed()
        await trio.lowlevel.checkpoint_if_cancelled()
        sending = _Sending(Send(connection=self.number, message_id=message_id, to=to, text=text))

        def replied(reply: Reply | None) -> None:
            # Without a reply the process is gone, and `end` follows. In a full queue there is no
            # place for it either.
            if reply is not None and self._ending is None and self._put(sending):
                sending.reply = reply

        self._wire.post(sending.call, replied, within_s=seconds_left())
        self._sendings.add(sending)
        try:
            await sending.handed.wait()
            sending.took = True
        finally:
            self._sendings.discard(sending)
            sending.left.set()
        # Nothing is awaited from here on: see the class.
        if sending.reply is None:
            raise self._closed()
        try:
            done = self._wire.read_reply(sending.call, sending.reply, SendDone)
        except CallFailed as failed:
            raise ConnectionClosed(STREAM_ERROR, f"a send failed: {failed}") from failed
        return ServerAck(_change(done.keys) if done.keys else None)

    async def is_on_whatsapp(self, to: str) -> bool:
        """See `machine.ports.Connection`."""
        call = OnWhatsApp(connection=self.number, to=to)
        try:
            return (await self._call(call, OnWhatsAppDone)).exists
        except CallFailed:
            # A connection that ends each time would keep every later message back for ever.
            return True

    async def request_pairing_code(self, phone: str) -> tuple[str, float]:
        """See `machine.ports.Connection`."""
        call = PairingCode(connection=self.number, phone=phone)
        done = await self._call_or_close(call, PairingCodeDone)
        return done.code, done.expires_at

    async def log_out(self) -> None:
        """See `machine.ports.Connection`."""
        await self._call_or_close(Logout(connection=self.number), Done)

    async def _call_or_close(self, call: Call, kind: type[OkT]) -> OkT:
        """As `_call`; what could not be done is `ConnectionClosed`, too."""
        try:
            return await self._call(call, kind)
        except CallFailed as failed:
            raise ConnectionClosed(STREAM_ERROR, str(failed)) from failed

    async def _call(self, call: Call, kind: type[OkT]) -> OkT:
        """Ask the process while the connection is open. Raises `ConnectionClosed`, `CallFailed`."""
        if self._ending is not None:
            raise self._closed()
        with trio.CancelScope() as scope:
            self._calls.add(scope)
            try:
                return await self._wire.call(call, kind)
            finally:
                self._calls.discard(scope)
        raise self._closed()


def _texts(account_id: AccountId, keys: Mapping[KeyName, bytes]) -> dict[str, str]:
    """Keys as the process takes them. Raises `AuthUnreadable`."""
    try:
        return {name: value.decode() for name, value in keys.items()}
    except UnicodeDecodeError:
        raise AuthUnreadable(
            f"account {account_id}: one of its keys is no text, so no Baileys wrote it"
        ) from None


def _change(values: Changes) -> KeyChange:
    return KeyChange(
        {KeyName(name): None if value is None else value.encode() for name, value in values.items()}
    )
