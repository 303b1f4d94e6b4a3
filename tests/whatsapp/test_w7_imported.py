"""W7: the directories of a backend on Baileys become accounts that nobody has to scan again."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.baileys.directories import fingerprints
from tests.system.cluster import Cluster, Node
from tests.system.steps import lines_of
from tests.system.test_operator import command
from tests.whatsapp.file_clients import open_file_clients
from tests.whatsapp.server import FakeWhatsApp
from tests.whatsapp.steps import open_whatsapp_cluster, wait_received

pytestmark = [pytest.mark.node, pytest.mark.system]

CONTACT = "4915112345678"
PHONES = {"anna": "4915550000001", "ben": "4915550000002"}
"""The directories' names, and whose sessions are in them."""
ROUNDS = 3
WITHIN_S = 90.0


async def wait_shown(whatsapp: FakeWhatsApp, text: str) -> None:
    """Wait until the contact shows it."""
    while text not in (await whatsapp.inbox(CONTACT)).texts:
        await trio.sleep(0.02)


async def sessions_of_an_old_backend(
    whatsapp: FakeWhatsApp, directory: Path, *, lids: bool
) -> None:
    """Directories, by real Baileys, of accounts in the middle of a conversation."""
    async with open_file_clients(directory, whatsapp.url) as backend:
        await backend.pair(whatsapp, PHONES)
        await backend.open(list(PHONES))
        for name, phone in PHONES.items():
            for number in range(ROUNDS):
                await backend.say(name, CONTACT, f"{name}, long ago: {number}")
                await wait_shown(whatsapp, f"{name}, long ago: {number}")
                await whatsapp.send(CONTACT, phone, [f"to {name}, long ago: {number}"])
                await backend.wait_heard(name, f"to {name}, long ago: {number}")
        await backend.close()
    # From here on Baileys takes the session that it has with the contact, and begins no new one.
    await whatsapp.settings(lids=lids)
    # Between two deploys, somebody writes.
    for name, phone in PHONES.items():
        await whatsapp.send(CONTACT, phone, [f"to {name}, meanwhile"])


async def both_ways_are_readable(cluster: Cluster, node: Node, whatsapp: FakeWhatsApp) -> None:
    """What waited for the accounts, and what is written now: readable at once on either side."""
    for name, phone in PHONES.items():
        await wait_received(cluster, node, name, 1)
        body = {"accountId": name, "to": CONTACT, "message": f"{name}, from here"}
        sent = await cluster.ask(node, "POST", "/api/whatsapp/send-message", json=body)
        assert sent.status_code == 200, sent.text
        await wait_shown(whatsapp, f"{name}, from here")
        await whatsapp.send(CONTACT, phone, [f"to {name}, now"])
        mail = await wait_received(cluster, node, name, 2)
        assert [each["text"] for each in mail] == [f"to {name}, meanwhile", f"to {name}, now"]
        listed = await cluster.json(node, "GET", f"/api/whatsapp/accounts/{name}")
        assert listed["account"]["phone"] == phone
    inbox = await whatsapp.inbox(CONTACT)
    assert len(inbox.shown) == len(PHONES) * (ROUNDS + 1)
    assert inbox.duplicates == []
    assert [each for each in inbox.arrivals if each.error is not None] == []
    assert [each for each in await whatsapp.sent(CONTACT) if "retry" in each.receipts] == []
    counts = await whatsapp.counts()
    # Nobody scanned again: each device was paired once, by the old backend.
    assert counts["paired"] == len(PHONES)
    assert [counts.get(each, 0) for each in ("conflict", "unreadable", "nack")] == [0, 0, 0]


@pytest.mark.long
@pytest.mark.parametrize("lids", [True, False], ids=["new-session", "same-session"])
async def test_an_old_backends_accounts_go_on_here_from_the_first_start(
    tmp_path: Path, whatsapp: FakeWhatsApp, *, lids: bool
) -> None:
    sessions = tmp_path / "sessions"
    sessions.mkdir()
    with trio.fail_after(WITHIN_S):
        await sessions_of_an_old_backend(whatsapp, sessions, lids=lids)
        before = fingerprints(sessions)
        legacy = {"WATCHKEEPER_LEGACY_SESSIONS_DIR": str(sessions)}
        async with open_whatsapp_cluster(tmp_path, whatsapp, **legacy) as cluster:
            node = await cluster.start("a", state="ACTIVE")
            await cluster.wait_connected(node, *PHONES)
            await both_ways_are_readable(cluster, node, whatsapp)
            assert await node.stop() == 0
            assert fingerprints(sessions) == before

            # The directories are older than what is here by now. They are not looked at again.
            await cluster.restart(node, state="ACTIVE")
            await cluster.wait_connected(node, *PHONES)
            sent = await cluster.send(node, "anna", "after a redeploy")
            assert sent.status_code == 200, sent.text
            await wait_shown(whatsapp, "after a redeploy")
        assert (await whatsapp.counts()).get("unreadable", 0) == 0
    assert len(lines_of(node, "account anna imported")) == 1
    assert fingerprints(sessions) == before


async def test_an_old_backends_accounts_are_imported_by_command_into_a_running_instance(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    sessions = tmp_path / "sessions"
    sessions.mkdir()
    with trio.fail_after(WITHIN_S):
        await sessions_of_an_old_backend(whatsapp, sessions, lids=False)
        before = fingerprints(sessions)
        async with open_whatsapp_cluster(tmp_path, whatsapp) as cluster:
            node = await cluster.start("a", state="ACTIVE")
            told = await command(node, "import", "--from-baileys", str(sessions), "--json")
            assert told.code == 0, told.err
            assert sorted(told.json()["report"]["imported"]) == sorted(PHONES)
            await cluster.wait_connected(node, *PHONES)
            await both_ways_are_readable(cluster, node, whatsapp)

            # Asked a second time, it changes nothing: what is here is newer.
            again = await command(node, "import", "--from-baileys", str(sessions), "--json")
            assert again.json()["report"]["imported"] == []
            sent = await cluster.send(node, "anna", "after another import")
            assert sent.status_code == 200, sent.text
            await wait_shown(whatsapp, "after another import")
        assert (await whatsapp.counts()).get("unreadable", 0) == 0
    assert fingerprints(sessions) == before
