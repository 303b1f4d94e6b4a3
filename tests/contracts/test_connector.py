"""What every connector promises the machine: the fake, loopback, and the real Baileys."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from machine.ports import (
    Bridge,
    Connected,
    Connection,
    ConnectionClosed,
    ConnectionEvent,
    KeysChanged,
    MessageProgressed,
    MessageReceived,
    PairingScanned,
    QrShown,
)
from machine.records import KeyChange, KeyName, MessageId, MessageState
from tests.contracts.connector_worlds import (
    ANNA,
    PHONE,
    STRANGER,
    WRITER,
    ConnectorWorld,
    open_connector_world,
)

TO = "4915112345678"
WITHIN_S = 60.0
BAILEYS = pytest.param("baileys", marks=[pytest.mark.node, pytest.mark.long])

E = TypeVar("E")


@pytest.fixture(params=["fake", "loopback", BAILEYS])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ConnectorWorld]:
    async with open_connector_world(str(request.param), tmp_path / "world") as world:
        yield world


class Listener:
    """The machine's part: reads every event, stores what changed, remembers how it closed."""

    def __init__(self, connection: Connection, keys: dict[KeyName, bytes]) -> None:
        self.connection = connection
        self.keys = keys
        self.events: list[ConnectionEvent] = []
        self.closed: ConnectionClosed | None = None
        self.storing = True
        self._news = trio.Event()

    def store(self, change: KeyChange | None) -> None:
        for name, value in (change.values if change else {}).items():
            if value is None:
                self.keys.pop(name, None)
            else:
                self.keys[name] = value

    async def listen(self) -> None:
        while self.closed is None:
            try:
                self._take(await self.connection.next_event())
            except ConnectionClosed as closed:
                self.closed = closed
            self._news.set()
            self._news = trio.Event()

    def _take(self, event: ConnectionEvent) -> None:
        self.events.append(event)
        if isinstance(event, KeysChanged):
            self.store(event.change)
        if isinstance(event, MessageReceived):
            self.store(event.keys)
        if self.storing and isinstance(event, KeysChanged | MessageReceived):
            event.stored.set()

    def store_what_came(self) -> None:
        """Say that everything is durable, and say it at once from now on."""
        self.storing = True
        for event in self.events:
            if isinstance(event, KeysChanged | MessageReceived):
                event.stored.set()

    async def wait(self, kind: type[E]) -> E:
        """The first event of this kind."""
        while True:
            for event in self.events:
                if isinstance(event, kind):
                    return event
            assert self.closed is None, self.closed
            await self._news.wait()

    async def wait_closed(self) -> int:
        while self.closed is None:
            await self._news.wait()
        return self.closed.code

    async def send(self, number: int, text: str) -> None:
        ack = await self.connection.send_text(MessageId(f"3EB0{number:012X}"), TO, text)
        self.store(ack.keys)


@asynccontextmanager
async def listening(
    bridge: Bridge, keys: dict[KeyName, bytes] | None, **how: object
) -> AsyncIterator[Listener]:
    """A connection that is listened to; `keys` are kept up to date."""
    async with (
        bridge.open_connection(ANNA, keys and dict(keys), **how) as connection,  # type: ignore[arg-type]
        trio.open_nursery() as nursery,
    ):
        listener = Listener(connection, {} if keys is None else keys)
        nursery.start_soon(listener.listen)
        yield listener
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connected(
    bridge: Bridge, keys: dict[KeyName, bytes], **how: object
) -> AsyncIterator[Listener]:
    async with listening(bridge, keys, **how) as listener:
        await listener.wait(Connected)
        yield listener


async def pair(bridge: Bridge, world: ConnectorWorld) -> dict[KeyName, bytes]:
    """Pair Anna; her keys."""
    async with listening(bridge, None) as listener:
        await world.scan((await listener.wait(QrShown)).qr)
        assert await listener.wait_closed() == 515
        return listener.keys


async def test_a_pairing_ends_with_a_restart_once_its_keys_are_stored(
    world: ConnectorWorld,
) -> None:
    with trio.fail_after(WITHIN_S):
        async with (
            world.connector.open_bridge() as bridge,
            listening(bridge, None) as listener,
            trio.open_nursery() as nursery,
        ):
            listener.storing = False
            # The phone waits for the client's answer, and the client may wait for the store.
            nursery.start_soon(world.scan, (await listener.wait(QrShown)).qr)
            await listener.wait(KeysChanged)
            await trio.sleep(0.1)
            assert listener.closed is None, "not before the keys are stored"
            assert "creds" in listener.keys
            listener.store_what_came()
            assert await listener.wait_closed() == 515
            kinds = [type(event) for event in listener.events]
            # The machine keeps nothing of an identity that no phone has confirmed.
            assert kinds.index(QrShown) < kinds.index(PairingScanned) < kinds.index(KeysChanged)
            assert Connected not in kinds


async def test_a_paired_account_logs_in_sends_and_hears_of_the_delivery(
    world: ConnectorWorld,
) -> None:
    with trio.fail_after(WITHIN_S):
        async with world.connector.open_bridge() as bridge:
            keys = await pair(bridge, world)
            async with connected(bridge, keys) as listener:
                assert (await listener.wait(Connected)).phone == PHONE
                await listener.send(1, "Grüße 🌍")
                progress = await listener.wait(MessageProgressed)
                assert progress.message_id == "3EB0000000000001"
                assert progress.state is MessageState.DELIVERED
        assert await world.shown(TO) == [("3EB0000000000001", "Grüße 🌍")]


async def test_with_the_keys_as_told_the_next_connection_is_readable(
    world: ConnectorWorld,
) -> None:
    with trio.fail_after(WITHIN_S):
        async with world.connector.open_bridge() as bridge:
            keys = await pair(bridge, world)
            for number in range(3):
                async with connected(bridge, keys) as listener:
                    await listener.send(2 * number, f"text {2 * number}")
                    await listener.send(2 * number + 1, f"text {2 * number + 1}")
        shown = await world.shown(TO)
        assert [text for _, text in shown] == [f"text {number}" for number in range(6)]
        assert await world.unreadable(TO) == 0
        assert await world.evictions() == 0, "each connection was over before the next began"


async def test_sends_that_wait_together_go_out_in_order_and_lose_no_key(
    world: ConnectorWorld,
) -> None:
    with trio.fail_after(WITHIN_S):
        async with world.connector.open_bridge() as bridge:
            keys = await pair(bridge, world)
            for first in (0, 5):
                async with connected(bridge, keys) as listener, trio.open_nursery() as nursery:
                    for number in range(first, first + 5):
                        nursery.start_soon(listener.send, number, f"text {number}")
                        # A task begins before the one that is started after this.
                        await trio.lowlevel.checkpoint()
        shown = await world.shown(TO)
        assert [text for _, text in shown] == [f"text {number}" for number in range(10)]
        assert await world.unreadable(TO) == 0


async def test_a_second_login_evicts_the_first_with_440(world: ConnectorWorld) -> None:
    with trio.fail_after(WITHIN_S):
        async with world.connector.open_bridge() as bridge:
            keys = await pair(bridge, world)
            async with (
                connected(bridge, keys) as first,
                world.another.open_bridge() as other,
                connected(other, dict(keys)),
            ):
                assert await first.wait_closed() == 440
        assert await world.evictions() == 1


async def test_after_a_bridge_s_block_another_instance_logs_in_without_an_eviction(
    world: ConnectorWorld,
) -> None:
    with trio.fail_after(WITHIN_S):
        async with world.connector.open_bridge() as bridge:
            keys = await pair(bridge, world)
            with trio.CancelScope() as term:
                async with connected(bridge, keys):
                    term.cancel()
        async with world.another.open_bridge() as other, connected(other, keys) as listener:
            await listener.send(1, "from the other")
        assert await world.evictions() == 0


async def test_an_unlinked_device_is_closed_with_401(world: ConnectorWorld) -> None:
    with trio.fail_after(WITHIN_S):
        async with world.connector.open_bridge() as bridge:
            keys = await pair(bridge, world)
            async with connected(bridge, keys):
                pass
            await world.unlink()
            code = None
            try:
                async with listening(bridge, keys) as listener:
                    code = await listener.wait_closed()
            except ConnectionClosed as closed:
                code = closed.code
            assert code == 401


async def test_a_connection_that_is_closed_says_so_to_everyone_and_again(
    world: ConnectorWorld,
) -> None:
    with trio.fail_after(WITHIN_S):
        async with world.connector.open_bridge() as bridge:
            keys = await pair(bridge, world)
            async with connected(bridge, keys) as listener:
                await world.cut(503)
                assert await listener.wait_closed() == 503
                for _ in range(2):
                    with pytest.raises(ConnectionClosed, match="503"):
                        await listener.connection.next_event()
                with pytest.raises(ConnectionClosed, match="503"):
                    await listener.connection.send_text(MessageId("3EB01"), TO, "x")
                with pytest.raises(ConnectionClosed, match="503"):
                    await listener.connection.is_on_whatsapp(TO)


@pytest.mark.parametrize("how", [{"doubtful": [TO]}, {"distrust_sessions": True}], ids=str)
async def test_sessions_in_doubt_are_told_as_gone_before_the_login(
    world: ConnectorWorld, how: dict[str, object]
) -> None:
    with trio.fail_after(WITHIN_S):
        async with world.connector.open_bridge() as bridge:
            keys = await pair(bridge, world)
            async with connected(bridge, keys) as listener:
                await listener.send(1, "one")
            sessions = {name for name in keys if name.startswith("session-")}
            assert sessions
            async with connected(bridge, keys, **how) as listener:
                kinds = [type(event) for event in listener.events]
                assert kinds.index(KeysChanged) < kinds.index(Connected)
                dropped = await listener.wait(KeysChanged)
                gone = {name for name, value in dropped.change.values.items() if value is None}
                assert gone & sessions
                await listener.send(2, "two")
        assert [text for _, text in await world.shown(TO)] == ["one", "two"]
        assert await world.unreadable(TO) == 0


async def test_a_message_comes_again_until_it_was_stored_and_then_not_any_more(
    world: ConnectorWorld,
) -> None:
    with trio.fail_after(WITHIN_S):
        async with world.connector.open_bridge() as bridge:
            keys = await pair(bridge, world)
            async with connected(bridge, keys) as listener:
                await listener.send(1, "one")
            before = dict(keys)
            async with connected(bridge, dict(keys)) as listener:
                listener.storing = False
                await world.write("Hällo 🙂")
                lost = await listener.wait(MessageReceived)
            # Neither the message nor its keys were stored: an instance has crashed.
            async with connected(bridge, before) as listener:
                again = await listener.wait(MessageReceived)
                assert again.message.message_id == lost.message.message_id
                assert again.message.text == lost.message.text == "Hällo 🙂"
                assert again.message.account_id == ANNA
                assert again.message.sender == again.message.chat == WRITER
                assert again.keys is not None
                await listener.send(2, "two")
            async with connected(bridge, before) as listener:
                await world.write("after it")
                only = await listener.wait(MessageReceived)
                assert only.message.text == "after it"


async def test_a_number_without_whatsapp_is_told_from_one_with(world: ConnectorWorld) -> None:
    with trio.fail_after(WITHIN_S):
        async with world.connector.open_bridge() as bridge:
            keys = await pair(bridge, world)
            async with connected(bridge, keys) as listener:
                assert await listener.connection.is_on_whatsapp(TO)
                assert not await listener.connection.is_on_whatsapp(STRANGER)


async def test_the_block_s_own_error_comes_out_as_it_is(world: ConnectorWorld) -> None:
    async def fail() -> None:
        async with world.connector.open_bridge() as bridge, bridge.open_connection(ANNA, None):
            raise KeyError("mine")

    with trio.fail_after(WITHIN_S), pytest.raises(KeyError, match="mine"):
        await fail()
