"""W2: redeploys under traffic in both directions, with real Baileys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import pytest
import trio

from tests.system.cluster import Cluster, Node
from tests.system.traffic import Traffic
from tests.whatsapp.server import FakeWhatsApp
from tests.whatsapp.steps import open_whatsapp_cluster, pair, received

pytestmark = [pytest.mark.node, pytest.mark.system]

CONTACT = "4915112345678"
"""Whom `Cluster.send` writes to, and who writes to every account here."""


def phone(number: int) -> str:
    return f"49155500{number:05d}"


class Writer:
    """The contact, writing to each account in turn. `written` is the texts of each account."""

    def __init__(self, whatsapp: FakeWhatsApp, account_ids: Sequence[str], every_s: float) -> None:
        self.written: dict[str, list[str]] = {each: [] for each in account_ids}
        self.stopping = trio.Event()
        self._whatsapp = whatsapp
        self._every_s = every_s

    async def keep_writing(self) -> None:
        accounts = list(self.written)
        for number in count():
            if self.stopping.is_set():
                return
            turn = number % len(accounts)
            text = f"to {accounts[turn]}: {number}"
            await self._whatsapp.send(CONTACT, phone(turn), [text])
            self.written[accounts[turn]].append(text)
            await trio.sleep(self._every_s)


async def redeploy(cluster: Cluster, old: Node, name: str) -> Node:
    """A new instance beside the old one, then SIGTERM to that: what a deploy does."""
    new = await cluster.start(name)
    await cluster.wait_state(new, "PASSIVE")
    assert await old.stop() == 0, old.log()[-3000:]
    # From here on callers ask the new one only, as a load balancer would have them.
    cluster.nodes.remove(old)
    await cluster.wait_state(new, "ACTIVE")
    return new


async def redeployed_under_traffic(
    tmp_path: Path, whatsapp: FakeWhatsApp, *, accounts: int, redeploys: int, every_s: float
) -> None:
    account_ids = tuple(f"account-{number}" for number in range(accounts))
    async with open_whatsapp_cluster(tmp_path, whatsapp) as cluster:
        node = await cluster.start("instance-0", state="ACTIVE")
        for number, account_id in enumerate(account_ids):
            await pair(cluster, node, whatsapp, account_id, phone(number))
        traffic = Traffic(cluster, account_ids, every_s, repeats=True)
        writer = Writer(whatsapp, account_ids, every_s)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(traffic.keep_sending)
            nursery.start_soon(writer.keep_writing)
            for turn in range(redeploys):
                await trio.sleep(1)
                node = await redeploy(cluster, node, f"instance-{turn + 1}")
                await cluster.wait_connected(node, *account_ids, within_s=60)
            traffic.stopping.set()
            writer.stopping.set()
        print(
            f"{redeploys} redeploys, {accounts} accounts: {len(traffic.accepted)} sent, "
            f"{sum(map(len, writer.written.values()))} received, "
            f"slowest answer {max(traffic.seconds):.2f} s"
        )
        assert traffic.failed == []
        # At most the one call that an ending instance may have been about to read.
        assert traffic.repeated <= redeploys
        await everything_arrived_once(cluster, node, whatsapp, traffic)
        await everything_was_received_once(cluster, node, writer)
        counts = await whatsapp.counts()

        # Nobody scanned again, no login of ours threw another of ours out, all was readable.
        assert counts["paired"] == accounts
        assert {each: counts.get(each, 0) for each in ("conflict", "unreadable", "nack")} == {
            "conflict": 0,
            "unreadable": 0,
            "nack": 0,
        }


async def everything_arrived_once(
    cluster: Cluster, node: Node, whatsapp: FakeWhatsApp, traffic: Traffic
) -> None:
    with trio.fail_after(60):
        inbox = await whatsapp.wait_inbox(CONTACT, len(traffic.accepted))
    assert {each.message_id: each.text for each in inbox.shown} == traffic.accepted
    assert Counter(inbox.texts).most_common(1)[0][1] == 1
    assert inbox.unreadable == ()


async def everything_was_received_once(cluster: Cluster, node: Node, writer: Writer) -> None:
    for account_id, texts in writer.written.items():
        with trio.fail_after(60):
            while len(found := await received(cluster, node, account_id)) < len(texts):
                await trio.sleep(0.1)
        assert Counter(each["text"] for each in found) == Counter(texts)


async def test_two_redeploys_under_traffic_lose_nothing(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    await redeployed_under_traffic(tmp_path, whatsapp, accounts=3, redeploys=2, every_s=0.1)


@pytest.mark.long
async def test_ten_redeploys_of_twenty_accounts_under_traffic_lose_nothing(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    await redeployed_under_traffic(tmp_path, whatsapp, accounts=20, redeploys=10, every_s=0.1)
