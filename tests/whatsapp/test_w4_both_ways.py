"""W4: 150 messages each way at the same time, between an account and one contact."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.system.cluster import Cluster, Node
from tests.whatsapp.server import FakeWhatsApp, Inbox
from tests.whatsapp.steps import open_whatsapp_cluster, pair, wait_received

pytestmark = [pytest.mark.node, pytest.mark.system]

PHONE = "4915550000001"
CONTACT = "4915112345678"
CALLERS = 3
EACH_CALLER = 50
EACH_WAY = CALLERS * EACH_CALLER
WITHIN_S = 120.0


async def keep_calling(cluster: Cluster, node: Node, caller: int) -> None:
    """Send one message after the other, each when the one before was accepted."""
    for number in range(EACH_CALLER):
        sent = await cluster.send(node, "anna", f"caller {caller}: {number}")
        assert sent.status_code in (200, 202), sent.text


async def keep_answering(whatsapp: FakeWhatsApp) -> None:
    for number in range(EACH_WAY):
        await whatsapp.send(CONTACT, PHONE, [f"answer {number}"])


def of_caller(inbox: Inbox, caller: int) -> list[str]:
    """What the contact shows of one caller's messages, in its order."""
    return [text for text in inbox.texts if text.startswith(f"caller {caller}:")]


@pytest.mark.long
async def test_what_two_write_at_once_is_readable_and_in_order_both_ways(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    async with open_whatsapp_cluster(tmp_path, whatsapp) as cluster:
        with trio.fail_after(WITHIN_S):
            node = await cluster.start("a", state="ACTIVE")
            await pair(cluster, node, whatsapp, "anna", PHONE)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_answering, whatsapp)
                for caller in range(CALLERS):
                    nursery.start_soon(keep_calling, cluster, node, caller)
            inbox = await whatsapp.wait_inbox(CONTACT, EACH_WAY)
            mail = await wait_received(cluster, node, "anna", EACH_WAY)
    assert len(inbox.shown) == EACH_WAY
    for caller in range(CALLERS):
        assert of_caller(inbox, caller) == [f"caller {caller}: {n}" for n in range(EACH_CALLER)]
    assert [each["text"] for each in mail] == [f"answer {n}" for n in range(EACH_WAY)]
    # Not one had to be asked for again, on either side.
    assert (inbox.unreadable, inbox.duplicates) == ((), [])
    assert [each for each in inbox.arrivals if each.error is not None] == []
    assert [each for each in await whatsapp.sent(CONTACT) if "retry" in each.receipts] == []
    counts = await whatsapp.counts()
    assert [counts.get(each, 0) for each in ("conflict", "unreadable", "nack")] == [0, 0, 0]
