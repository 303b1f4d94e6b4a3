"""S4: kill -9 of the holder: the other is ACTIVE within ttl + 1 s, and nothing accepted is lost."""

from __future__ import annotations

import pytest
import trio

from tests.system.cluster import Cluster
from tests.system.steps import LONG_ON_FIRESTORE
from tests.system.test_s3_store_hangs import TIMES, TTL_S
from tests.system.traffic import Traffic, arrived_exactly_once

pytestmark = [pytest.mark.system, LONG_ON_FIRESTORE]


async def test_kill_9_of_the_holder_loses_no_accepted_message(cluster: Cluster) -> None:
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
        await a.kill()
        cluster.nodes.remove(a)
        killed_at = trio.current_time()
        await cluster.wait_state(b, "ACTIVE")
        took_s = trio.current_time() - killed_at
    assert took_s < TTL_S + 1
    # A call that the killed process was answering got no answer: that is what a crash is.
    assert [f for f in traffic.failed if "nobody listens" in f or " 5" in f] == []
    await cluster.wait_connected(b, "ann", "ben")
    await arrived_exactly_once(cluster, b, traffic)
    assert len(traffic.accepted) > 10
