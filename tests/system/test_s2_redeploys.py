"""S2: three redeploys in quick succession under 20 sends a second."""

from __future__ import annotations

import pytest
import trio

from tests.system.cluster import Cluster
from tests.system.steps import LONG_ON_FIRESTORE
from tests.system.traffic import Traffic, arrived_exactly_once

pytestmark = [pytest.mark.system, LONG_ON_FIRESTORE]


async def test_three_redeploys_in_a_row_fail_no_request_and_lose_no_message(
    cluster: Cluster,
) -> None:
    node = await cluster.start("v1", state="ACTIVE")
    await cluster.add_paired(node, "ann", "ben", "cem")
    traffic = Traffic(cluster, ("ann", "ben", "cem"), every_s=0.05)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(traffic.keep_sending)
        await trio.sleep(0.5)
        for version in ("v2", "v3", "v4"):
            # As a rolling deploy does: the new one is up before the old one is asked to end.
            newer = await cluster.start(version, state="PASSIVE")
            assert await node.stop() == 0
            cluster.nodes.remove(node)
            await cluster.wait_state(newer, "ACTIVE")
            node = newer
        await trio.sleep(0.5)
        traffic.stopping.set()
    assert traffic.failed == []
    assert traffic.sent > 40
    await cluster.wait_connected(node, "ann", "ben", "cem")
    await arrived_exactly_once(cluster, node, traffic)
    evictions = await cluster.json(node, "GET", "/api/loopback/evictions")
    assert evictions["count"] == 0
    for version in ("v2", "v3", "v4"):
        log = (cluster.directory / f"{version}.log").read_text()
        assert "restore finished" in log
        assert "qr_ready" not in log
