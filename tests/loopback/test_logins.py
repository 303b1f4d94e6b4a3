from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from daemon.loopback import LoopbackConnector, LoopbackTiming, LoopbackWorld
from daemon.loopback.device import CREDS, Device, new_session
from daemon.loopback.server import Envelope, LoopbackServer, Place
from machine.ports import ConnectionClosed
from tests.loopback.conftest import QUICK
from tests.loopback.steps import (
    ANNA,
    BERT,
    TO,
    Keys,
    expect_closed,
    logged_in,
    message_id,
    pair,
)


async def test_a_second_login_evicts_the_first_with_440(
    connector: LoopbackConnector, world: LoopbackWorld, directory: Path
) -> None:
    other = LoopbackConnector(directory, timing=QUICK)
    async with connector.open_bridge() as first, other.open_bridge() as second:
        keys = await pair(first, world)
        async with logged_in(first, keys) as old, logged_in(second, keys) as new:
            with trio.fail_after(1):
                assert (await expect_closed(old)).code == 440
            await new.send_text(message_id(1), TO, "from the new one")
    count, evictions = await world.list_evictions()
    assert count == 1
    assert [each.account_id for each in evictions] == [ANNA]


def test_an_evicted_connection_cannot_send_even_before_it_hears_of_it(directory: Path) -> None:
    server = LoopbackServer(directory, time.time)
    device = Device("device", "proof", "491", adopted=True)
    old, new = (Place(ANNA, "bridge", name) for name in ("old", "new"))
    envelope = Envelope(message_id(1), TO, "x", new_session())
    answers = server.perform(
        [
            lambda server: server.log_in(old, device),
            lambda server: server.log_in(new, device),
            lambda server: server.deliver(old, "device", envelope),
        ]
    )
    refused = answers[2][1]
    assert isinstance(refused, ConnectionClosed)
    assert refused.code == 440
    assert server.list_messages(None, raw=True, after=0, limit=1).arrivals == ()
    server.close()


async def test_an_unrung_bell_delays_mail_and_loses_none(
    directory: Path, world: LoopbackWorld
) -> None:
    connector = LoopbackConnector(directory, timing=LoopbackTiming(watch_every_s=0.05))
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            for bell in await trio.Path(directory / "bridges").glob("*.bell"):
                await bell.unlink()
            await world.cut(ANNA)
            with trio.fail_after(1):
                assert (await expect_closed(connection)).code == 428


async def test_a_second_login_in_the_same_bridge_evicts_too(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as old, logged_in(bridge, keys):
            assert (await expect_closed(old)).code == 440
    assert (await world.list_evictions())[0] == 1


async def test_a_connection_that_was_closed_evicts_nobody(
    connector: LoopbackConnector, world: LoopbackWorld, directory: Path
) -> None:
    other = LoopbackConnector(directory, timing=QUICK)
    async with connector.open_bridge() as first, other.open_bridge() as second:
        keys = await pair(first, world)
        for bridge in (first, second) * 5:
            async with logged_in(bridge, keys):
                pass
    assert (await world.list_evictions())[0] == 0


async def test_a_cancelled_bridge_leaves_nobody_logged_in(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
    with trio.CancelScope() as scope:
        async with connector.open_bridge() as bridge, logged_in(bridge, keys) as connection:
            assert await world.list_connected() == (ANNA,)
            scope.cancel()
            await connection.next_event()
    assert scope.cancelled_caught
    assert await world.list_connected() == ()
    async with connector.open_bridge() as bridge, logged_in(bridge, keys):
        assert (await world.list_evictions())[0] == 0


async def test_an_error_in_a_bridges_block_reaches_the_caller_as_it_is(
    connector: LoopbackConnector,
) -> None:
    with pytest.raises(LookupError, match="mine"):
        async with connector.open_bridge():
            raise LookupError("mine")


async def test_a_removed_device_ends_with_401_and_stays_out(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            assert await world.unlink(ANNA) == 1
            assert (await expect_closed(connection)).code == 401
        with pytest.raises(ConnectionClosed, match="401"):
            async with bridge.open_connection(ANNA, keys):
                pytest.fail("logged in")


async def test_a_device_whose_secret_is_not_the_paired_one_stays_out_and_evicts_nobody(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        creds = json.loads(keys[CREDS])
        forged = {CREDS: json.dumps({**creds, "secret": "Zm9yZ2Vk"}).encode()}
        async with logged_in(bridge, keys) as connection:
            with pytest.raises(ConnectionClosed, match="401"):
                async with bridge.open_connection(ANNA, forged):
                    pytest.fail("logged in")
            await connection.send_text(message_id(1), TO, "not disturbed")


async def test_logging_out_removes_the_device(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            await connection.log_out()
            for call in (connection.log_out, connection.next_event):
                with pytest.raises(ConnectionClosed, match="401"):
                    await call()
        with pytest.raises(ConnectionClosed, match="401"):
            async with bridge.open_connection(ANNA, keys):
                pytest.fail("logged in")


async def test_a_cut_ends_one_accounts_connection_and_it_may_come_back(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        others = await pair(bridge, world, BERT)
        async with logged_in(bridge, others, BERT) as spared:
            async with logged_in(bridge, keys) as connection:
                assert await world.cut(ANNA) == 1
                assert (await expect_closed(connection)).code == 428
            async with logged_in(bridge, keys) as connection:
                assert await world.cut(ANNA, 402, expire_s=60.0) == 1
                closed = await expect_closed(connection)
                assert (closed.code, closed.expire_s) == (402, 60.0)
                assert await world.cut(ANNA) == 0
            await spared.send_text(message_id(1), TO, "still here")
            assert await world.cut(None) == 1
    with pytest.raises(ValueError, match="code must be one of"):
        await world.cut(ANNA, 999)
    assert (await world.list_evictions())[0] == 0


# --- with a second process -------------------------------------------------------------------


async def read_line(process: trio.Process) -> str:
    assert process.stdout is not None
    line = b""
    with trio.fail_after(20):
        while not line.endswith(b"\n"):
            more = await process.stdout.receive_some(1)
            assert more, f"the other process ended after {line!r}"
            line += more
    return line.decode().strip()


@asynccontextmanager
async def other_process(
    directory: Path, keys: Keys, *, sends: int = 0
) -> AsyncIterator[trio.Process]:
    """Another process in which the account is connected, and which then sends."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.loopback.other_process", str(directory), str(sends)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        told = {name: value.decode() for name, value in keys.items()}
        await process.stdin.send_all(json.dumps(told).encode() + b"\n")
        assert await read_line(process) == "connected"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            await pipe.aclose()


async def test_another_process_is_evicted_and_a_killed_one_is_not(
    connector: LoopbackConnector, world: LoopbackWorld, directory: Path
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with other_process(directory, keys) as other:
            assert await world.list_connected() == (ANNA,)
            async with logged_in(bridge, keys):
                assert await read_line(other) == "closed with 440"
        assert (await world.list_evictions())[0] == 1

        async with other_process(directory, keys) as killed:
            killed.send_signal(signal.SIGKILL)
            await killed.wait()
            assert await world.list_connected() == ()
            async with logged_in(bridge, keys):
                pass
        assert (await world.list_evictions())[0] == 1

        async with other_process(directory, keys) as stopped:
            # A server does not see that its peer was stopped: its connection still stands.
            stopped.send_signal(signal.SIGSTOP)
            async with logged_in(bridge, keys):
                assert (await world.list_evictions())[0] == 2
    async with connector.open_bridge():
        signs = await trio.to_thread.run_sync(os.listdir, directory / "bridges")
    assert len(signs) == 2, "the dead leave neither sign nor bell"


async def test_what_was_acknowledged_survives_the_kill_of_its_sender(
    connector: LoopbackConnector, world: LoopbackWorld, directory: Path
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
    async with other_process(directory, keys, sends=100_000) as sender:
        while (line := await read_line(sender)) != "acknowledged 50":
            assert "acknowledged" in line
        sender.kill()
        await sender.wait()
    arrived = [each.message_id for each in (await world.list_messages(raw=True)).arrivals]
    assert arrived[:51] == [str(number) for number in range(51)]
