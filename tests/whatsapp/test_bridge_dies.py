"""A bridge process that dies, or hangs, costs its accounts a moment and nothing else."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import trio

from tests.system.cluster import Cluster, Node
from tests.whatsapp.server import FakeWhatsApp
from tests.whatsapp.steps import open_whatsapp_cluster, pair

pytestmark = [pytest.mark.node, pytest.mark.system, pytest.mark.long]

PHONE = "4915550000001"
CONTACT = "4915112345678"
WITHIN_S = 60.0


def bridge_pids(node: Node) -> list[int]:
    """The Node processes that were started so far, oldest first."""
    return [int(pid) for pid in re.findall(r"bridge process \d+ \(pid (\d+)\) is up", node.log())]


async def wait_connections(cluster: Cluster, node: Node, count: int) -> None:
    """Wait until the account has said so often that it is connected."""
    while node.log().count("account anna connected") < count:
        await trio.sleep(0.05)
    await cluster.wait_connected(node, "anna")


@pytest.mark.parametrize(
    ("number", "reason"),
    [(signal.SIGKILL, "was ended by SIGKILL"), (signal.SIGSTOP, "did not answer a ping")],
    ids=["killed", "hung"],
)
async def test_accounts_of_a_lost_process_are_back_and_their_messages_arrive_once(
    tmp_path: Path, whatsapp: FakeWhatsApp, number: int, reason: str
) -> None:
    async with open_whatsapp_cluster(tmp_path, whatsapp) as cluster:
        with trio.fail_after(WITHIN_S):
            node = await cluster.start("a", state="ACTIVE", WATCHKEEPER_BRIDGE_PING_S="1")
            await pair(cluster, node, whatsapp, "anna", PHONE)
            assert (await cluster.send(node, "anna", "before")).json()["status"] == "server_ack"
            os.kill(bridge_pids(node)[-1], number)
            # Accepted while nobody can send it: it goes out when the account is back.
            during = await cluster.send(node, "anna", "during")
            assert during.status_code in (200, 202), during.text
            await wait_connections(cluster, node, 2)
            assert (await cluster.send(node, "anna", "after")).json()["status"] == "server_ack"
            inbox = await whatsapp.wait_inbox(CONTACT, 3)
            assert sorted(inbox.texts) == ["after", "before", "during"]
            assert inbox.unreadable == ()
        assert reason in node.log()
        assert len(set(bridge_pids(node))) == 2
        counts = await whatsapp.counts()
        # The old process was dead before the account was opened in another.
        assert counts.get("conflict", 0) == 0
        assert node.log().count("-> PASSIVE") == 1, "the term went on"
