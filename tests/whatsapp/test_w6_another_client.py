"""W6: another client logs in as our device: one more try after a ttl, then it is left to him."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.system.cluster import Cluster, Node
from tests.system.steps import lines_of, statuses
from tests.system.test_s3_store_hangs import TIMES, TTL_S
from tests.whatsapp.server import FakeWhatsApp
from tests.whatsapp.steps import open_whatsapp_cluster, pair, wait_received

pytestmark = [pytest.mark.node, pytest.mark.system, pytest.mark.long]

PHONE = "4915550000001"
OTHER_PHONE = "4915550000002"
CONTACT = "4915112345678"
WITHIN_S = 120.0
CALM_S = TTL_S + 2
"""Long enough for a second try to be seen, if there were one."""


async def times_of(whatsapp: FakeWhatsApp, event: str) -> list[float]:
    """When it happened to the account, oldest first."""
    log = await whatsapp.log()
    return [each["at"] for each in log if (each["event"], each.get("number")) == (event, PHONE)]


async def logins(whatsapp: FakeWhatsApp, phone: str = PHONE) -> int:
    """How often our client has logged in; what the other does is not counted."""
    (device,) = (await whatsapp.person(phone)).devices
    return device.logins


async def wait_status(cluster: Cluster, node: Node, status: str) -> None:
    while (await statuses(cluster, node))["anna"] != status:
        await trio.sleep(0.05)


async def paired(cluster: Cluster, whatsapp: FakeWhatsApp) -> Node:
    """An instance with two accounts, of which one is meant to hear nothing of it all."""
    node = await cluster.start("a", state="ACTIVE")
    await pair(cluster, node, whatsapp, "anna", PHONE)
    await pair(cluster, node, whatsapp, "ben", OTHER_PHONE)
    assert (await logins(whatsapp), await logins(whatsapp, OTHER_PHONE)) == (1, 1)
    return node


async def both_ways_work(
    cluster: Cluster, node: Node, whatsapp: FakeWhatsApp, text: str, *, in_all: int
) -> None:
    """The contact can read what we write now, and we what it writes; `in_all` so far."""
    sent = await cluster.send(node, "anna", text)
    assert sent.status_code == 200, sent.text
    inbox = await whatsapp.wait_inbox(CONTACT, in_all)
    assert (inbox.texts[-1], inbox.unreadable, inbox.duplicates) == (text, (), [])
    await whatsapp.send(CONTACT, PHONE, [f"answer to {text}"])
    mail = await wait_received(cluster, node, "anna", in_all)
    assert [each["text"] for each in mail].count(f"answer to {text}") == 1


async def test_a_client_that_logs_in_once_costs_a_ttl(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    async with open_whatsapp_cluster(tmp_path, whatsapp, **TIMES) as cluster:
        with trio.fail_after(WITHIN_S):
            node = await paired(cluster, whatsapp)
            await both_ways_work(cluster, node, whatsapp, "before", in_all=1)
            await whatsapp.foreign_login(PHONE)
            await wait_status(cluster, node, "backing_off")
            # Accepted meanwhile, and sent when the account is ours again; so is what came in.
            assert (await cluster.send(node, "anna", "meanwhile")).status_code == 202
            await whatsapp.send(CONTACT, PHONE, ["to whoever reads it"])
            await wait_status(cluster, node, "connected")
            await both_ways_work(cluster, node, whatsapp, "after", in_all=3)
            assert (await logins(whatsapp), await logins(whatsapp, OTHER_PHONE)) == (2, 1)
            lost_at, _ = await times_of(whatsapp, "conflict")
            _, back_at = await times_of(whatsapp, "login")
            assert back_at - lost_at >= TTL_S
        assert len(lines_of(node, "account anna was opened by another client")) == 1
        assert lines_of(node, "account anna is quarantined") == []
        assert len(lines_of(node, "-> PASSIVE")) == 1, "the term went on"


async def test_a_client_that_comes_back_gets_the_device_and_nobody_fights_over_it(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    async with open_whatsapp_cluster(tmp_path, whatsapp, **TIMES) as cluster:
        with trio.fail_after(WITHIN_S):
            a = await paired(cluster, whatsapp)
            await both_ways_work(cluster, a, whatsapp, "before", in_all=1)
            await whatsapp.foreign_login(PHONE, fights=1, every_ms=300)
            await wait_status(cluster, a, "quarantined")
            # One try, a ttl later. No other follows, not even by the next instance.
            lost_at, *_ = await times_of(whatsapp, "conflict")
            _, tried_at = await times_of(whatsapp, "login")
            assert tried_at - lost_at >= TTL_S
            (alert,) = lines_of(a, "ERROR.*account anna is quarantined")
            assert "another client opened this device" in alert
            assert "stop it, then reconnect" in alert
            await trio.sleep(CALM_S)
            b = await cluster.start("b", state="PASSIVE")
            assert await a.stop() == 0
            await cluster.wait_state(b, "ACTIVE")
            await cluster.wait_connected(b, "ben")
            await trio.sleep(CALM_S)
            assert (await statuses(cluster, b))["anna"] == "quarantined"
            assert await logins(whatsapp) == 2
            refused = await cluster.send(b, "anna", "to nobody")
            assert (refused.status_code, refused.json()["error"]) == (409, "account_quarantined")

            # He does not come back any more: an operator says so, and everything goes on.
            await cluster.json(b, "POST", "/api/whatsapp/accounts/anna/reconnect")
            await wait_status(cluster, b, "connected")
            await both_ways_work(cluster, b, whatsapp, "after", in_all=2)
            await trio.sleep(CALM_S)
            assert (await statuses(cluster, b))["anna"] == "connected"
            assert await logins(whatsapp) == 3
        assert (await whatsapp.counts())["paired"] == 2
        # Two evictions by the other, two of him by us: his first, our one try, his answer, ours.
        assert (await whatsapp.counts())["conflict"] == 4
