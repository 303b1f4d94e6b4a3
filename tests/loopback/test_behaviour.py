from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trio

from daemon.loopback import Behaviour, LoopbackConnector, LoopbackWorld
from daemon.loopback.behaviour import dump_behaviour, load_behaviour
from machine.ports import ConnectionClosed, SendRefused
from machine.records import MessageState
from tests.loopback.steps import (
    ANNA,
    BERT,
    TO,
    expect_closed,
    logged_in,
    message_id,
    pair,
    progress,
)


async def test_an_ack_comes_late_by_command_and_the_recipient_has_the_message_before(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        await world.set_behaviour(None, Behaviour(ack_delay_s=0.2))
        async with logged_in(bridge, keys) as connection, trio.open_nursery() as nursery:
            began_at = trio.current_time()
            nursery.start_soon(connection.send_text, message_id(1), TO, "x")
            await trio.sleep(0.1)
            assert len((await world.list_messages()).arrivals) == 1
            await progress(connection)
            assert trio.current_time() - began_at >= 0.2


async def test_a_lost_ack_delivers_the_message_and_ends_the_connection_with_408(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        lost = Behaviour(ack_lost=True, ack_lost_close_s=0.05, ack_times=1)
        await world.set_behaviour(ANNA, lost)
        async with logged_in(bridge, keys) as connection:
            with pytest.raises(ConnectionClosed) as closed:
                await connection.send_text(message_id(1), TO, "x")
            assert closed.value.code == 408
            assert (await expect_closed(connection)).code == 408
        assert await world.behaviour(ANNA) == replace(lost, ack_lost=False, ack_times=None)
        async with logged_in(bridge, keys, doubtful=[TO]) as connection:
            await connection.send_text(message_id(1), TO, "x")
    raw = (await world.list_messages(raw=True)).arrivals
    assert [(each.readable, each.duplicate) for each in raw] == [(True, False), (True, True)]


async def test_a_caller_may_leave_a_lost_ack_before_and_the_connection_stays(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        await world.set_behaviour(None, Behaviour(ack_lost=True, ack_times=1))
        async with logged_in(bridge, keys) as connection:
            with trio.move_on_after(0.1) as scope:
                await connection.send_text(message_id(1), TO, "x")
            assert scope.cancelled_caught
            await connection.send_text(message_id(1), TO, "x")
    assert len((await world.list_messages(raw=True)).arrivals) == 2


@pytest.mark.parametrize("code", [463, 479])
async def test_an_ack_is_refused_by_command_and_nobody_gets_the_message(
    connector: LoopbackConnector, world: LoopbackWorld, code: int
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        await world.set_behaviour(None, Behaviour(ack_refused=code, ack_times=2))
        async with logged_in(bridge, keys) as connection:
            for number in (1, 2):
                with pytest.raises(SendRefused) as refused:
                    await connection.send_text(message_id(number), TO, "x")
                assert refused.value.code == code
            await connection.send_text(message_id(3), TO, "x")
    raw = (await world.list_messages(raw=True)).arrivals
    assert [each.message_id for each in raw] == [message_id(3)]


async def test_a_login_is_slow_or_refused_by_command(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        for code, expire_s in [(402, 60.0), (403, None), (405, None), (440, None), (503, None)]:
            await world.set_behaviour(
                ANNA, Behaviour(login_refused=code, login_expire_s=expire_s, login_times=1)
            )
            with pytest.raises(ConnectionClosed) as closed:
                async with bridge.open_connection(ANNA, keys):
                    pytest.fail("logged in")
            assert (closed.value.code, closed.value.expire_s) == (code, expire_s)
            async with logged_in(bridge, keys):
                pass
        await world.set_behaviour(ANNA, Behaviour(login_delay_s=0.1))
        began_at = trio.current_time()
        async with logged_in(bridge, keys):
            assert trio.current_time() - began_at >= 0.1
        assert (await world.list_evictions())[0] == 0


async def test_numbers_that_are_not_on_whatsapp(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        await world.set_behaviour(None, Behaviour(not_on_whatsapp=frozenset({"4900"})))
        async with logged_in(bridge, keys) as connection:
            assert await connection.is_on_whatsapp(TO)
            assert not await connection.is_on_whatsapp("4900")
            with pytest.raises(SendRefused) as refused:
                await connection.send_text(message_id(1), "4900", "x")
            assert refused.value.code == 404


async def test_receipts_by_command(connector: LoopbackConnector, world: LoopbackWorld) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            await world.set_behaviour(None, Behaviour(receipts="none"))
            await connection.send_text(message_id(1), TO, "x")
            for delay_s in (0.0, 0.02):
                told = Behaviour(receipts="read", receipt_delay_s=delay_s)
                await world.set_behaviour(None, told)
                await connection.send_text(message_id(2), TO, "x")
                for state in (MessageState.DELIVERED, MessageState.READ):
                    event = await progress(connection)
                    assert (event.message_id, event.state) == (message_id(2), state)


async def test_an_accounts_own_behaviour_goes_before_everyones(
    world: LoopbackWorld, directory: Path
) -> None:
    slow, slower = Behaviour(ack_delay_s=1), Behaviour(ack_delay_s=2)
    await world.set_behaviour(None, slow)
    assert await world.set_behaviour(ANNA, slower) == slower
    other = LoopbackWorld(directory)
    assert await other.behaviour(ANNA) == slower
    assert await other.behaviour(BERT) == slow
    assert await other.set_behaviour(ANNA, None) == slow
    other.close()
    assert await world.behaviour(ANNA) == slow
    assert await world.set_behaviour(None, None) == Behaviour()


@pytest.mark.parametrize(
    "wrong",
    [
        {"ack_delay_s": -1},
        {"ack_delay_s": 3601},
        {"ack_delay_s": float("nan")},
        {"ack_refused": 500},
        {"ack_refused": 463, "ack_lost": True},
        {"ack_times": 0},
        {"login_refused": 200},
        {"login_expire_s": -1},
        {"receipts": "loud"},
        {"not_on_whatsapp": frozenset(str(number) for number in range(10_001))},
    ],
)
def test_a_behaviour_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|exclude"):
        Behaviour(**wrong)  # type: ignore[arg-type]  # wrong on purpose


def test_a_behaviour_survives_the_database() -> None:
    told = Behaviour(
        ack_delay_s=0.5, login_refused=402, login_expire_s=9.5, not_on_whatsapp=frozenset({"1"})
    )
    assert load_behaviour(dump_behaviour(told)) == told
