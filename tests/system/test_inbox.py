"""What accounts receive: nothing is lost in a crash and a handoff, and readers see it once."""

from __future__ import annotations

import pytest
import trio

from tests.system.cluster import Cluster, Node
from tests.system.steps import LONG_ON_FIRESTORE
from tests.system.test_s3_store_hangs import TIMES

pytestmark = [pytest.mark.system, LONG_ON_FIRESTORE]

READ_WITHIN_S = 20.0


class Reader:
    """Somebody who reads an account's messages with a cursor, at whichever instance."""

    def __init__(self, cluster: Cluster, account_id: str) -> None:
        self.cluster = cluster
        self.account_id = account_id
        self.cursor = ""
        self.read: list[str] = []

    async def read_on(self, node: Node) -> None:
        while True:
            page = await self.cluster.json(
                node,
                "GET",
                "/api/whatsapp/messages",
                params={"accountId": self.account_id, "cursor": self.cursor, "limit": "7"},
            )
            self.read += [message["messageId"] for message in page["messages"]]
            self.cursor = page["cursor"]
            if not page["more"]:
                return

    async def read_all(self, node: Node, written: list[str]) -> None:
        with trio.fail_after(READ_WITHIN_S):
            while set(self.read) != set(written):
                await self.read_on(node)
                await trio.sleep(0.05)


async def write(cluster: Cluster, node: Node, account_id: str, count: int) -> list[str]:
    """Be somebody who writes so many messages; their ids. Each third is delivered twice."""
    ids = []
    for number in range(count):
        answer = await cluster.json(
            node,
            "POST",
            "/api/loopback/receive",
            json={
                "accountId": account_id,
                "from": "4915187654321",
                "text": f"text {number} äöü 🙂",
                "copies": 1 + (number % 3 == 0),
            },
        )
        ids.append(str(answer["messageId"]))
    return ids


async def waiting(cluster: Cluster, node: Node, account_id: str) -> int:
    answer = await cluster.json(node, "GET", f"/api/loopback/waiting/{account_id}")
    return int(answer["count"])


@pytest.mark.long
async def test_received_messages_outlive_a_crash_and_a_handoff_and_are_read_once(
    cluster: Cluster,
) -> None:
    a = await cluster.start("a", state="ACTIVE", **TIMES)
    await cluster.add_paired(a, "ann", "ben")
    b = await cluster.start("b", state="PASSIVE", **TIMES)
    reader = Reader(cluster, "ann")
    written = await write(cluster, b, "ann", 20)
    other = await write(cluster, b, "ben", 3)
    await reader.read_all(a, written)
    # Killed with messages between the wire and the store; more come while nobody is ACTIVE.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.kill)
        cluster.nodes.remove(a)
        written += await write(cluster, b, "ann", 20)
    await cluster.wait_state(b, "ACTIVE")
    await reader.read_all(b, written)
    c = await cluster.start("c", state="PASSIVE", **TIMES)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.stop)
        cluster.nodes.remove(b)
        written += await write(cluster, c, "ann", 20)
    await cluster.wait_state(c, "ACTIVE")
    # The cursor goes on where it was, at an instance that has never seen it.
    await reader.read_all(c, written)
    assert len(reader.read) == len(written)
    anew = Reader(cluster, "ann")
    await anew.read_all(c, written)
    assert anew.read == reader.read
    of_ben = Reader(cluster, "ben")
    await of_ben.read_all(c, other)
    with trio.fail_after(READ_WITHIN_S):
        while await waiting(cluster, c, "ann") + await waiting(cluster, c, "ben"):
            await trio.sleep(0.05)
