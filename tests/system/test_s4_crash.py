"""S4: kill -9 of the holder. Of its host, with the warden: the other is ACTIVE within ttl + 1 s. Of
the daemon alone: within 2 s. Nothing accepted is lost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio

from tests.system.cluster import Cluster, Node
from tests.system.steps import LONG_ON_FIRESTORE
from tests.system.test_s3_store_hangs import TIMES, TTL_S
from tests.system.traffic import Traffic, arrived_exactly_once

pytestmark = [pytest.mark.system, LONG_ON_FIRESTORE]

PROCESS_CRASH_S = 2.0


@pytest.mark.long
async def test_kill_9_of_the_holders_host_loses_no_accepted_message(cluster: Cluster) -> None:
    a, took_s = await _crash(cluster, Node.kill)
    assert took_s < TTL_S + 1
    assert "dead daemon" not in a.log()


async def test_kill_9_of_the_daemon_is_over_in_two_seconds_instead_of_a_ttl(
    cluster: Cluster,
) -> None:
    a, took_s = await _crash(cluster, Node.crash)
    assert took_s < PROCESS_CRASH_S
    assert "released in the dead daemon's name" in a.log()


async def _crash(
    cluster: Cluster, crash: Callable[[Node], Awaitable[int | None]]
) -> tuple[Node, float]:
    """Crash the holder under traffic; the holder, and how long until the other was ACTIVE."""
    a = await cluster.start("a", state="ACTIVE", **TIMES)
    await cluster.add_paired(a, "ann", "ben")
    b = await cluster.start("b", state="PASSIVE", **TIMES)
    # Acks that take a while: the kill finds messages between the wire and their record.
    await cluster.json(a, "POST", "/api/loopback/behaviour", json={"ackDelayS": 0.2})
    traffic = Traffic(cluster, ("ann", "ben"), every_s=0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(traffic.keep_sending)
        await trio.sleep(1.5)
        traffic.stopping.set()
        await trio.sleep(0.1)
        killed_at = trio.current_time()
        nursery.start_soon(crash, a)
        cluster.nodes.remove(a)
        await cluster.wait_state(b, "ACTIVE")
        took_s = trio.current_time() - killed_at
    # A call that the killed process was answering got no answer: that is what a crash is.
    assert [f for f in traffic.failed if "nobody listens" in f or " 5" in f] == []
    await cluster.wait_connected(b, "ann", "ben")
    await arrived_exactly_once(cluster, b, traffic)
    assert len(traffic.accepted) > 10
    return a, took_s
