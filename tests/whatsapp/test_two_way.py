"""Both ways at once, and over a redeploy: one ratchet for each contact, changed by two tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.system.cluster import Cluster, Node
from tests.whatsapp.server import FakeWhatsApp
from tests.whatsapp.steps import open_whatsapp_cluster, pair

pytestmark = [pytest.mark.node, pytest.mark.system, pytest.mark.long]

PHONE = "4915550000001"
CONTACT = "4915112345678"
EACH_WAY = 50
"""Twice that is one page of what was received."""
WITHIN_S = 120.0


async def send_all(cluster: Cluster, node: Node, prefix: str) -> None:
    """Send through the API, several at a time, as callers do."""

    async def send(number: int) -> None:
        async with places:
            sent = await cluster.send(node, "anna", f"{prefix} {number}")
            assert sent.status_code in (200, 202), sent.text

    places = trio.Semaphore(4)
    async with trio.open_nursery() as nursery:
        for number in range(EACH_WAY):
            nursery.start_soon(send, number)


async def answer_all(whatsapp: FakeWhatsApp, prefix: str) -> None:
    for number in range(EACH_WAY):
        await whatsapp.send(CONTACT, PHONE, [f"{prefix} {number}"])


async def received(cluster: Cluster, node: Node, count: int) -> list[dict[str, Any]]:
    """What the account has received, once it is so many."""
    path = "/api/whatsapp/messages?accountId=anna&direction=in&limit=100"
    while len(found := (await cluster.json(node, "GET", path))["messages"]) < count:
        await trio.sleep(0.1)
    return list(found)


async def test_what_two_write_to_each_other_at_once_stays_readable_over_a_redeploy(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    async with open_whatsapp_cluster(tmp_path, whatsapp) as cluster:
        with trio.fail_after(WITHIN_S):
            node = await cluster.start("a", state="ACTIVE")
            await pair(cluster, node, whatsapp, "anna", PHONE)
            for turn in ("before", "after"):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send_all, cluster, node, turn)
                    nursery.start_soon(answer_all, whatsapp, turn)
                count = EACH_WAY * (1 if turn == "before" else 2)
                await whatsapp.wait_inbox(CONTACT, count)
                await received(cluster, node, count)
                if turn == "before":
                    assert await node.stop() == 0
                    await cluster.restart(node, state="ACTIVE")
                    await cluster.wait_connected(node, "anna")
            inbox = await whatsapp.wait_inbox(CONTACT, 2 * EACH_WAY)
            mail = await received(cluster, node, 2 * EACH_WAY)
    wanted = sorted(
        f"{turn} {number}" for turn in ("before", "after") for number in range(EACH_WAY)
    )
    assert sorted(inbox.texts) == wanted
    assert sorted(each["text"] for each in mail) == wanted
    assert inbox.unreadable == ()
    # Not one had to be asked for again, on either side.
    assert [(each.text, each.type, each.error) for each in inbox.arrivals if each.error] == []
    sent = await whatsapp.sent(CONTACT)
    assert [each for each in sent if "retry" in each.receipts] == []
