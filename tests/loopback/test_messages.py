from __future__ import annotations

import time
from pathlib import Path

import pytest
import trio

from daemon.loopback import Behaviour, LoopbackConnector, LoopbackWorld
from daemon.loopback.device import Device, Session
from daemon.loopback.server import Action, Envelope, LoopbackServer, Place
from machine.ports import ConnectionClosed, KeysChanged, SendRefused
from machine.records import KeyName, MessageState
from tests.loopback.steps import (
    ANNA,
    BERT,
    TO,
    applied,
    expect_closed,
    logged_in,
    message_id,
    pair,
    progress,
)


async def test_recipients_see_messages_in_order_and_receipts_come_back(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            for number in range(3):
                await connection.send_text(message_id(number), TO, f"text {number}")
                assert (await progress(connection)).state is MessageState.DELIVERED
    page = await world.list_messages()
    assert [(each.account_id, each.to, each.text) for each in page.arrivals] == [
        (ANNA, TO, f"text {number}") for number in range(3)
    ]
    assert page.arrivals[0].at == pytest.approx(time.time(), abs=30)


async def test_the_same_message_id_twice_is_one_message_and_two_arrivals(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            await connection.send_text(message_id(1), TO, "hello")
            await connection.send_text(message_id(1), TO, "hello")
            await connection.send_text(message_id(1), "491", "another recipient")
    assert [each.to for each in (await world.list_messages()).arrivals] == [TO, "491"]
    raw = (await world.list_messages(raw=True)).arrivals
    assert [each.duplicate for each in raw] == [False, True, False]
    assert all(each.readable for each in raw)


async def test_state_rolled_back_by_k_sends_makes_exactly_k_messages_unreadable(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            keys = applied(keys, (await connection.send_text(message_id(0), TO, "0")).keys)
            for number in (1, 2):
                # These two acks are never stored.
                await connection.send_text(message_id(number), TO, "x")
        async with logged_in(bridge, keys) as connection:
            for number in range(3, 7):
                ack = await connection.send_text(message_id(number), TO, "y")
                keys = applied(keys, ack.keys)
        async with logged_in(bridge, keys) as connection:
            await connection.send_text(message_id(7), TO, "z")
    raw = (await world.list_messages(raw=True)).arrivals
    assert [each.readable for each in raw] == [True, True, True, False, False, True, True, True]
    shown = (await world.list_messages()).arrivals
    assert [each.message_id for each in shown] == [message_id(n) for n in (0, 1, 2, 5, 6, 7)]


async def test_a_message_that_was_unreadable_is_shown_once_it_arrives_readable(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            old = applied(keys, (await connection.send_text(message_id(0), TO, "0")).keys)
            await connection.send_text(message_id(1), TO, "1")
        async with logged_in(bridge, old) as connection:
            await connection.send_text(message_id(2), TO, "2")
            await connection.send_text(message_id(2), TO, "2")
    raw = (await world.list_messages(raw=True)).arrivals
    assert [(each.readable, each.duplicate) for each in raw[2:]] == [(False, False), (True, False)]
    assert (await world.list_messages()).arrivals[-1].message_id == message_id(2)


async def test_doubtful_recipients_begin_a_new_session_and_old_ones_are_deleted(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    other = "491700000000"
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            for to in (TO, other):
                keys = applied(keys, (await connection.send_text(message_id(0), to, "0")).keys)
                await connection.send_text(message_id(1), to, "never recorded")
        async with bridge.open_connection(ANNA, keys, doubtful=[TO]) as connection:
            dropped = await connection.next_event()
            assert isinstance(dropped, KeysChanged)
            assert dict(dropped.change.values) == {KeyName(f"session-{TO}.0"): None}
            await connection.send_text(message_id(1), TO, "again")
            await connection.send_text(message_id(1), other, "again")
    raw = (await world.list_messages(raw=True)).arrivals
    assert [(each.readable, each.duplicate) for each in raw[-2:]] == [(True, True), (False, True)]


async def test_distrusted_sessions_are_all_begun_anew(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    other = "491700000000"
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            for to in (TO, other):
                keys = applied(keys, (await connection.send_text(message_id(0), to, "0")).keys)
                await connection.send_text(message_id(1), to, "never recorded")
        async with bridge.open_connection(ANNA, keys, distrust_sessions=True) as connection:
            dropped = await connection.next_event()
            assert isinstance(dropped, KeysChanged)
            assert set(dropped.change.values) == {f"session-{to}.0" for to in (TO, other)}
            assert not any(dropped.change.values.values())
            for to in (TO, other):
                await connection.send_text(message_id(2), to, "readable")
    raw = (await world.list_messages(raw=True)).arrivals
    assert [each.readable for each in raw[-2:]] == [True, True]


async def test_overtaking_acks_never_store_an_older_position(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        await world.set_behaviour(ANNA, Behaviour(ack_delay_s=0.05))
        acks = []
        async with logged_in(bridge, keys) as connection:

            async def send(number: int) -> None:
                acks.append(await connection.send_text(message_id(number), TO, "x"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, 1)
                await trio.sleep(0.02)
                await world.set_behaviour(ANNA, None)
                nursery.start_soon(send, 2)
        for ack in acks:
            keys = applied(keys, ack.keys)
        async with logged_in(bridge, keys) as connection:
            await connection.send_text(message_id(3), TO, "x")
    assert all(each.readable for each in (await world.list_messages(raw=True)).arrivals)


async def test_a_send_that_was_cancelled_before_it_began_never_happens(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            with trio.CancelScope() as scope:
                scope.cancel()
                await connection.send_text(message_id(1), TO, "no")
            await connection.send_text(message_id(2), TO, "yes")
    assert [each.text for each in (await world.list_messages(raw=True)).arrivals] == ["yes"]


@pytest.mark.parametrize(
    ("to", "text"), [("", "x"), ("9" * 65, "x"), (TO, "x" * 65_537), (TO, "\ud800"), ("\ud800", "")]
)
async def test_a_malformed_message_is_refused_and_the_connection_stays(
    connector: LoopbackConnector, world: LoopbackWorld, to: str, text: str
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            with pytest.raises(SendRefused) as refused:
                await connection.send_text(message_id(1), to, text)
            assert refused.value.code == 479
            await connection.send_text(message_id(2), TO, "x" * 65_536)


async def test_messages_page_by_sequence_and_by_account(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        for account_id in (ANNA, BERT):
            keys = await pair(bridge, world, account_id)
            async with logged_in(bridge, keys, account_id) as connection:
                for number in range(5):
                    await connection.send_text(message_id(number), TO, str(number))
    assert len((await world.list_messages(BERT)).arrivals) == 5
    seen, after, more = [], 0, True
    while more:
        page = await world.list_messages(after=after, limit=3)
        seen += [(each.account_id, each.text) for each in page.arrivals]
        after, more = page.next_seq, page.more
    assert seen == [(who, str(number)) for who in (ANNA, BERT) for number in range(5)]
    end = await world.list_messages(after=after)
    assert (end.arrivals, end.next_seq, end.more) == ((), after, False)
    with pytest.raises(ValueError, match="limit"):
        await world.list_messages(limit=0)


def test_a_large_page_ends_early_and_the_oldest_messages_are_dropped(directory: Path) -> None:
    server = LoopbackServer(directory, time.time, messages_max=150)
    place = Place(ANNA, "bridge", "connection")
    device = Device("device", "proof", "491", adopted=True)

    def send(number: int) -> Action[object]:
        envelope = Envelope(message_id(number), TO, "x" * 60_000, Session("s", number))
        return lambda server: server.deliver(place, "device", envelope)

    server.perform([lambda server: server.log_in(place, device)])
    for first in range(0, 200, 50):
        server.perform([send(number) for number in range(first, first + 50)])
    page = server.list_messages(None, raw=False, after=0, limit=1000)
    assert page.dropped == 50
    assert page.arrivals[0].seq == 51
    assert page.more
    assert 30 <= len(page.arrivals) <= 50
    rest = server.list_messages(None, raw=True, after=page.next_seq, limit=1000)
    assert rest.arrivals[0].seq == page.next_seq + 1
    server.close()


async def test_what_was_acknowledged_is_there_after_the_bridge_is_gone(
    connector: LoopbackConnector, world: LoopbackWorld, directory: Path
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            await connection.send_text(message_id(1), TO, "kept")
    world.close()
    again = LoopbackWorld(directory)
    assert [each.text for each in (await again.list_messages()).arrivals] == ["kept"]
    again.close()


async def test_a_database_that_is_held_by_another_closes_the_connection_with_503(
    connector: LoopbackConnector, world: LoopbackWorld, directory: Path
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            holder = LoopbackServer(directory, time.time)
            holder._database.execute("BEGIN IMMEDIATE")
            with pytest.raises(ConnectionClosed) as closed:
                await connection.send_text(message_id(1), TO, "x")
            holder.close()
            assert closed.value.code == 503
            assert (await expect_closed(connection)).code == 503
        async with logged_in(bridge, keys) as connection:
            await connection.send_text(message_id(1), TO, "x")
