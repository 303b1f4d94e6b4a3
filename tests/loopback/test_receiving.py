"""What accounts are sent: kept by the server until they say that it is stored."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx
import pytest
import trio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from daemon.loopback import LoopbackConnector, LoopbackWorld, loopback_router
from daemon.loopback.database import open_database
from daemon.loopback.waiting import WAITING_MAX
from machine.ports import (
    Connected,
    Connection,
    KeysChanged,
    MessageReceived,
)
from machine.refusals import AccountNotPaired, OutboxFull
from tests.loopback.steps import ANNA, BERT, TO, applied, logged_in, message_id, pair

WITHIN_S = 10.0


async def received(connection: Connection, count: int) -> list[MessageReceived]:
    """The next `count` messages, nothing stored yet."""
    found: list[MessageReceived] = []
    with trio.fail_after(WITHIN_S):
        while len(found) < count:
            event = await connection.next_event()
            if isinstance(event, MessageReceived):
                found.append(event)
    return found


async def wait_waiting(world: LoopbackWorld, count: int) -> None:
    with trio.fail_after(WITHIN_S):
        while await world.count_waiting(ANNA) != count:
            await trio.sleep(0.01)


async def test_a_message_is_handed_over_with_its_key_and_kept_until_it_is_stored(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            sent = await world.receive(ANNA, TO, "Hällo 🙂", sender_name="Zoë")
            (event,) = await received(connection, 1)
            message = event.message
            assert (message.account_id, message.message_id) == (ANNA, sent)
            assert (message.chat, message.sender, message.sender_name) == (TO, TO, "Zoë")
            assert message.text == "Hällo 🙂"
            assert event.keys is not None
            assert set(event.keys.values) == {f"session-{TO}.1"}
            assert await world.count_waiting(ANNA) == 1
            event.stored.set()
            await wait_waiting(world, 0)
        async with logged_in(bridge, applied(keys, event.keys)):
            assert await world.count_waiting(ANNA) == 0


async def test_what_was_not_stored_comes_again_at_each_login_after_what_is_newer_too(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        await world.receive(ANNA, TO, "while away", message_id="m1")
        late = trio.Event()
        for _ in range(2):
            async with bridge.open_connection(ANNA, keys) as connection:
                # The login is told before the backlog.
                assert isinstance(await connection.next_event(), Connected)
                (event,) = await received(connection, 1)
                assert event.message.message_id == "m1"
                late = event.stored
        # Stored after its connection has ended: nobody can tell the server any more.
        late.set()
        await world.receive(ANNA, TO, "newer", message_id="m2")
        async with logged_in(bridge, keys) as connection:
            events = await received(connection, 2)
            assert [event.message.message_id for event in events] == ["m1", "m2"]
            for event in events:
                event.stored.set()
            await wait_waiting(world, 0)


async def test_one_message_comes_twice_on_command(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            await world.receive(ANNA, TO, "hello", copies=2)
            one, other = await received(connection, 2)
            assert one.message.message_id == other.message.message_id
            assert one.keys != other.keys
            for event in (one, other):
                event.stored.set()
            await wait_waiting(world, 0)


async def test_reading_and_sending_keep_sessions_of_their_own_and_doubt_drops_both(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            await world.receive(ANNA, TO, "hello")
            (event,) = await received(connection, 1)
            event.stored.set()
            keys = applied(keys, event.keys)
            keys = applied(keys, (await connection.send_text(message_id(1), TO, "hi")).keys)
            await wait_waiting(world, 0)
        async with bridge.open_connection(ANNA, keys, distrust_sessions=True) as connection:
            dropped = await connection.next_event()
            assert isinstance(dropped, KeysChanged)
            assert set(dropped.change.values) == {f"session-{TO}.{device}" for device in (0, 1)}


async def test_nobody_can_write_to_an_account_without_a_phone_or_with_a_full_box(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        with pytest.raises(AccountNotPaired):
            await world.receive(BERT, TO, "hello")
        await pair(bridge, world)
        for _ in range(WAITING_MAX):
            await world.receive(ANNA, TO, "x")
        with pytest.raises(OutboxFull):
            await world.receive(ANNA, TO, "one too many")
        await world.unlink(ANNA)
        with pytest.raises(AccountNotPaired):
            await world.receive(ANNA, TO, "hello")


async def test_a_world_of_the_first_format_is_gone_on_with(
    connector: LoopbackConnector, world: LoopbackWorld, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("old")
    database = open_database(directory)
    database.execute("DROP TABLE waiting")
    database.execute("INSERT INTO eviction (account_id, at) VALUES ('anna', 1)")
    database.execute("PRAGMA user_version = 1")
    database.close()
    old = LoopbackWorld(directory)
    assert await old.count_waiting(ANNA) == 0
    assert len((await old.list_evictions())[1]) == 1
    old.close()


# --- over HTTP


@pytest.fixture
async def client(world: LoopbackWorld) -> AsyncIterator[httpx.AsyncClient]:
    app = FastAPI()
    app.include_router(loopback_router(world))

    async def refuse(_request: Request, _error: Exception) -> Response:
        # FastAPI's own would repeat what was sent, half characters included.
        return Response(status_code=422)

    app.add_exception_handler(RequestValidationError, refuse)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://loopback") as client:
        yield client


async def test_a_message_is_written_over_http(
    connector: LoopbackConnector, world: LoopbackWorld, client: httpx.AsyncClient
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        wanted = {"accountId": "anna", "from": TO, "fromName": "Zoë", "text": "Hello"}
        answer = (await client.post("/api/loopback/receive", json=wanted)).json()
        assert answer == {"success": True, "messageId": answer["messageId"], "waiting": 1}
        assert (await client.get("/api/loopback/waiting/anna")).json() == {"count": 1}
        async with logged_in(bridge, keys) as connection:
            (event,) = await received(connection, 1)
            assert event.message.message_id == answer["messageId"]
            assert event.message.sender_name == "Zoë"
            event.stored.set()
            await wait_waiting(world, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"from": "+49"},
        {"text": ""},
        {"text": "x" * 65_537},
        {"text": "\ud800"},
        {"fromName": "\udfff"},
        {"accountId": "no/such"},
        {"copies": 0},
        {"copies": 11},
        {"messageId": "a b"},
    ],
)
async def test_what_nobody_could_send_is_refused(
    client: httpx.AsyncClient, wrong: dict[str, object]
) -> None:
    wanted = {"accountId": "anna", "from": TO, "text": "Hello", **wrong}
    answer = await client.post(
        "/api/loopback/receive",
        content=json.dumps(wanted),
        headers={"content-type": "application/json"},
    )
    assert answer.status_code == 422
