"""A holder that hangs or is stopped: its warden ends it before anybody else could act."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from datetime import datetime

import pytest
import trio

from tests.system.cluster import Cluster, Node, alive, lines_with
from tests.system.steps import ALONE, LONG_ON_FIRESTORE
from tests.system.test_s3_store_hangs import TIMES, TTL_S
from tests.system.traffic import Traffic, arrived_exactly_once

pytestmark = [pytest.mark.system, LONG_ON_FIRESTORE]


def logged_at(node: Node, text: str) -> float:
    """Wall time of the last line of the node's log that has `text`."""
    *_, last = lines_with(node.log(), text)
    return datetime.fromisoformat(last[:23] + "+00:00").timestamp()


async def wait_dead(pid: int, within_s: float) -> float:
    """Wall time at which the process was gone."""
    with trio.fail_after(within_s):
        while alive(pid):
            await trio.sleep(0.002)
    return time.time()


async def _holder_and_standby(cluster: Cluster) -> tuple[Node, Node]:
    a = cluster.make("a", **TIMES)
    a.command = ("tests.system.wedged", "run")
    await cluster.restart(a, state="ACTIVE")
    await cluster.add_paired(a, "ann", "ben")
    b = await cluster.start("b", state="PASSIVE", **TIMES)
    # Acks that take a while: the fault finds messages between the wire and their record.
    await cluster.json(a, "POST", "/api/loopback/behaviour", json={"ackDelayS": 0.2})
    return a, b


async def _hang(cluster: Cluster, number: int) -> None:
    """Hang the holder under traffic, and see it dead, silent and replaced, in that order."""
    a, b = await _holder_and_standby(cluster)
    traffic = Traffic(cluster, ("ann", "ben"), every_s=0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(traffic.keep_sending)
        await trio.sleep(1.0)
        daemon = a.daemon_pid
        a.signal_daemon(number)
        traffic.stopping.set()
        hung_at = time.time()
        # Nobody but the hung one could send until the standby acts.
        sent = len(await cluster.received(b, raw=True))
        died_at = await wait_dead(daemon, TTL_S)
        await cluster.wait_state(b, "ACTIVE", within_s=TTL_S)
    renewed_at = max(logged_at(a, "lease renewed"), logged_at(a, "lease acquired"))
    acquired_at = logged_at(b, "lease acquired")
    assert died_at < renewed_at + TTL_S
    assert died_at < acquired_at + 0.01
    assert acquired_at - hung_at < TTL_S + 0.5
    assert await a.wait_ended() == 128 + signal.SIGKILL
    cluster.nodes.remove(a)
    # Somebody lets a stopped process go on: there is none.
    with suppress(ProcessLookupError):
        os.kill(daemon, signal.SIGCONT)
    assert "neither renewed its lease nor ended its term" in a.log()
    early = [m for m in await cluster.received(b, raw=True) if m["at"] < acquired_at]
    assert len(early) == sent
    await cluster.wait_connected(b, "ann", "ben")
    await arrived_exactly_once(cluster, b, traffic)
    assert (await cluster.json(b, "GET", "/api/loopback/evictions"))["count"] == 0


@pytest.mark.long
async def test_a_blocked_event_loop_is_killed_before_the_lease_can_be_taken(
    cluster: Cluster,
) -> None:
    await _hang(cluster, signal.SIGUSR1)


@pytest.mark.long
async def test_a_stopped_daemon_is_killed_and_sends_nothing_any_more(cluster: Cluster) -> None:
    await _hang(cluster, signal.SIGSTOP)


async def test_a_drain_leaves_nothing_for_the_warden_to_do(cluster: Cluster) -> None:
    a = await cluster.start("a", state="ACTIVE", **ALONE)
    assert await a.stop() == 0
    assert "dead daemon" not in a.log()


@pytest.mark.long
async def test_without_a_warden_a_stopped_holder_is_still_logged_in_when_the_next_one_acts(
    cluster: Cluster,
) -> None:
    """What is lost without one; and that the count of evictions, which others rest on, can rise."""
    a = cluster.make("a", **TIMES)
    a.command = ("daemon", "run", "--no-warden")
    await cluster.restart(a, state="ACTIVE")
    await cluster.add_paired(a, "ann")
    b = await cluster.start("b", state="PASSIVE", **TIMES)
    a.signal(signal.SIGSTOP)
    await cluster.wait_state(b, "ACTIVE", within_s=TTL_S + 5)
    await cluster.wait_connected(b, "ann")
    assert (await cluster.json(b, "GET", "/api/loopback/evictions"))["count"] == 1
    a.signal(signal.SIGCONT)
    await cluster.wait_state(a, "PASSIVE")


@pytest.mark.long
async def test_without_a_warden_an_instance_serves_drains_and_says_nothing(
    cluster: Cluster,
) -> None:
    a = cluster.make("a", **ALONE)
    a.command = ("daemon", "run", "--no-warden")
    await cluster.restart(a, state="ACTIVE")
    with pytest.raises(LookupError):
        assert a.daemon_pid
    await cluster.add_paired(a, "ann")
    assert await a.stop() == 0
    assert "warden" not in a.log()
