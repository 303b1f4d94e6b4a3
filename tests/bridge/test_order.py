"""Keys reach the ledger in the order in which the bridge wrote them, whatever the schedule."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
import trio

from daemon.bridge.connection import ITEMS_MAX, BridgeConnection
from daemon.bridge.frames import (
    AskFrame,
    Call,
    ClosedEvent,
    KeysAsk,
    OkT,
    ReceiptEvent,
    Reply,
    Send,
    decode,
    read_ok,
)
from machine.ports import ConnectionClosed, KeysChanged, MessageProgressed
from machine.records import AccountId, KeyChange, KeyName, MessageId
from tests.bridge.steps import TO, message_id
from tests.fakes.clocks import FakeClocks
from tests.fakes.journal import RecordingJournal

RATCHET = KeyName(f"session-{TO}.0")


class ScriptedWire:
    """A `Wire` without a process: the test is the process."""

    def __init__(self) -> None:
        self.sends: list[tuple[Send, Callable[[Reply | None], None]]] = []
        self.answers: list[int] = []
        self.refused: list[int] = []
        self.calls: list[Call] = []

    @property
    def alive(self) -> bool:
        return True

    async def call(self, call: Call, kind: type[OkT]) -> OkT:
        self.calls.append(call)
        await trio.lowlevel.checkpoint()
        return kind()

    def post(self, call: Call, replied: Callable[[Reply | None], None], *, within_s: float) -> int:
        assert isinstance(call, Send)
        self.sends.append((call, replied))
        return len(self.sends)

    def read_reply(self, call: Call, reply: Reply | None, kind: type[OkT]) -> OkT:
        assert reply is not None
        return read_ok(reply.ok, kind)  # type: ignore[arg-type]

    def answer(self, ask_id: int, ok: Mapping[str, str | None]) -> None:
        self.answers.append(ask_id)

    def refuse(self, ask: AskFrame, why: str) -> None:
        self.refused.append(ask.id)

    def kill(self, reason: str) -> None:
        raise AssertionError(reason)

    def gone(self) -> ConnectionClosed:
        raise AssertionError

    def reply(self, position: int) -> None:
        """Acknowledge the oldest send with the ratchet at `position`."""
        _, replied = self.sends.pop(0)
        frame = decode(
            b'{"v":1,"reply":1,"ok":{"keys":{"%s":"%d"}}}' % (RATCHET.encode(), position)
        )
        assert isinstance(frame, Reply)
        replied(frame)


def make(wire: ScriptedWire, journal: RecordingJournal | None = None) -> BridgeConnection:
    return BridgeConnection(1, AccountId("anna"), wire, journal or RecordingJournal(), FakeClocks())


def keys_ask(position: int) -> KeysAsk:
    return KeysAsk(id=position, connection=1, values={RATCHET: str(position)})


class Listener:
    """The machine, as far as order goes: two tasks that post keys to one ledger, as it does."""

    def __init__(self, connection: BridgeConnection, seed: int) -> None:
        self.connection = connection
        self.rng = random.Random(seed)
        self.ledger: list[int] = []

    def post(self, change: KeyChange | None) -> None:
        assert change is not None
        value = change.values[RATCHET]
        assert value is not None
        self.ledger.append(int(value))

    async def dawdle(self) -> None:
        for _ in range(self.rng.randrange(4)):
            await trio.lowlevel.checkpoint()

    async def live(self) -> None:
        while True:
            event = await self.connection.next_event()
            if isinstance(event, KeysChanged):
                self.post(event.change)
                event.stored.set()
            await self.dawdle()

    async def deliver(self, count: int, patience: bool) -> None:
        for number in range(count):
            with trio.CancelScope() as scope:
                if not patience:
                    scope.deadline = trio.current_time() + self.rng.random() * 3
                ack = await self.connection.send_text(message_id(number), TO, "x")
                self.post(ack.keys)
            await self.dawdle()


async def write_frames(wire: ScriptedWire, connection: BridgeConnection, seed: int) -> int:
    """Be the process: one ratchet, told in acks and in asks, one after the other."""
    rng = random.Random(-seed)
    position = 0
    idle = 0
    while idle < 40:
        for _ in range(rng.randrange(3)):
            await trio.lowlevel.checkpoint()
        if rng.random() < 0.3:
            await trio.sleep(rng.random())
        for _ in range(rng.randrange(1, 4)):
            if wire.sends and rng.random() < 0.5:
                position += 1
                wire.reply(position)
                idle = 0
            elif position < 60 and rng.random() < 0.5:
                position += 1
                connection.receive(keys_ask(position))
        idle += 1
    return position


@pytest.mark.parametrize("patience", [True, False], ids=["waiting", "giving up"])
@pytest.mark.parametrize("seeds", range(4))
async def test_keys_are_posted_in_the_order_they_were_written(
    seeds: int, patience: bool, autojump_clock: trio.testing.MockClock
) -> None:
    for seed in range(seeds * 75, seeds * 75 + 75):
        wire = ScriptedWire()
        connection = make(wire)
        listener = Listener(connection, seed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.live)
            nursery.start_soon(listener.deliver, 12, patience)
            position = await write_frames(wire, connection, seed)
            await trio.sleep(10)
            nursery.cancel_scope.cancel()
        # In order, and none missing: those of senders that gave up came as events.
        assert listener.ledger == list(range(1, position + 1)), f"seed {seed}"


async def test_an_ack_waits_until_what_was_written_before_it_is_read() -> None:
    wire = ScriptedWire()
    connection = make(wire)
    seen: list[str] = []

    async def send() -> None:
        await connection.send_text(message_id(1), TO, "x")
        seen.append("acked")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        connection.receive(keys_ask(1))
        wire.reply(2)
        connection.receive(keys_ask(3))
        await trio.testing.wait_all_tasks_blocked()
        assert seen == []
        assert isinstance(await connection.next_event(), KeysChanged)
        assert seen == []
        after = await connection.next_event()
        assert seen == ["acked"]
        assert isinstance(after, KeysChanged)
        assert after.change.values == {RATCHET: b"3"}


async def test_a_reader_cancelled_while_it_hands_over_an_ack_loses_nothing() -> None:
    wire = ScriptedWire()
    connection = make(wire)
    acked = trio.Event()

    async def send() -> None:
        ack = await connection.send_text(message_id(1), TO, "x")
        assert ack.keys == KeyChange({RATCHET: b"1"})
        acked.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        wire.reply(1)
        connection.receive(keys_ask(2))
        with trio.CancelScope() as scope:
            scope.cancel()
            await connection.next_event()
        assert scope.cancelled_caught
        event = await connection.next_event()
        assert acked.is_set()
    assert isinstance(event, KeysChanged)
    assert event.change.values == {RATCHET: b"2"}


async def test_keys_of_a_send_whose_caller_has_left_come_as_an_event() -> None:
    wire = ScriptedWire()
    connection = make(wire)
    with trio.move_on_after(0.01):
        await connection.send_text(message_id(1), TO, "x")
    wire.reply(1)
    event = await connection.next_event()
    assert isinstance(event, KeysChanged)
    assert event.change.values == {RATCHET: b"1"}


async def test_what_was_written_before_the_end_is_read_before_the_end() -> None:
    wire = ScriptedWire()
    connection = make(wire)
    refused: list[int] = []

    async def send(number: int) -> None:
        try:
            await connection.send_text(message_id(number), TO, "x")
        except ConnectionClosed as closed:
            refused.append(closed.code)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send, 1)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(send, 2)
        await trio.testing.wait_all_tasks_blocked()
        wire.reply(1)
        connection.receive(keys_ask(2))
        connection.receive(ClosedEvent(connection=1, code=428, message="gone"))
        await trio.testing.wait_all_tasks_blocked()
        # The one without a reply will never have one; the other's is still to be read.
        assert refused == [428]
        assert isinstance(await connection.next_event(), KeysChanged)
    assert refused == [428]
    with pytest.raises(ConnectionClosed, match="gone"):
        await connection.next_event()
    with pytest.raises(ConnectionClosed, match="gone"):
        await connection.send_text(message_id(3), TO, "x")
    assert wire.sends == wire.sends[:1]


async def test_an_ask_is_answered_when_what_it_brought_is_stored() -> None:
    wire = ScriptedWire()
    connection = make(wire)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.keep_answering)
        connection.receive(keys_ask(1))
        connection.receive(keys_ask(2))
        first, second = await connection.next_event(), await connection.next_event()
        assert isinstance(first, KeysChanged)
        assert isinstance(second, KeysChanged)
        await trio.testing.wait_all_tasks_blocked()
        assert wire.answers == []
        first.stored.set()
        await trio.testing.wait_all_tasks_blocked()
        assert wire.answers == [1]
        second.stored.set()
        await trio.testing.wait_all_tasks_blocked()
        assert wire.answers == [1, 2]
        await connection.close(1.0)
        connection.receive(keys_ask(3))
        assert wire.refused == [3]


async def test_a_connection_that_nobody_reads_is_closed_at_the_limit() -> None:
    wire, journal = ScriptedWire(), RecordingJournal()
    connection = make(wire, journal)
    for _ in range(ITEMS_MAX + 5):
        connection.receive(ReceiptEvent(connection=1, message_id="A", state="read"))
    assert journal.names() == ["bridge.flooded"]
    for _ in range(ITEMS_MAX):
        assert isinstance(await connection.next_event(), MessageProgressed)
    with pytest.raises(ConnectionClosed, match="503"):
        await connection.next_event()


async def test_an_ack_that_finds_the_queue_full_ends_its_sender_too() -> None:
    wire = ScriptedWire()
    connection = make(wire)
    closed: list[ConnectionClosed] = []

    async def send() -> None:
        try:
            await connection.send_text(MessageId("A"), TO, "x")
        except ConnectionClosed as error:
            closed.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(ITEMS_MAX):
            connection.receive(ReceiptEvent(connection=1, message_id="A", state="read"))
        wire.reply(1)
    assert [error.code for error in closed] == [503]
