"""W5: an older copy of the keys is not used while there is a newer one. Where there is none, its
Signal sessions begin anew. Without LIDs Baileys would go on with whatever session it has."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
import trio

from tests.system.cluster import Cluster, Node
from tests.system.steps import ALONE, BOTH, DISK, SHARED, restored, state_dir
from tests.system.test_s3_store_hangs import TIMES
from tests.whatsapp.server import FakeWhatsApp
from tests.whatsapp.steps import open_whatsapp_cluster, pair, received, wait_received

pytestmark = [pytest.mark.node, pytest.mark.system, pytest.mark.long]

PHONE = "4915550000001"
CONTACT = "4915112345678"
WITHIN_S = 120.0


class Conversation:
    """What the account and its contact have written to each other, and whether both could read."""

    def __init__(self, cluster: Cluster, node: Node, whatsapp: FakeWhatsApp) -> None:
        self.sent: list[str] = []
        self.written: list[str] = []
        self._cluster = cluster
        self._node = node
        self._whatsapp = whatsapp

    async def send(self, text: str) -> None:
        """The account writes, and the contact can read it, at once or when it has asked again."""
        answer = await self._cluster.send(self._node, "anna", text)
        assert answer.status_code == 200, answer.text
        self.sent.append(text)
        await self._whatsapp.wait_inbox(CONTACT, len(self.sent))

    async def write(self, text: str) -> None:
        """The contact writes. Whether somebody is there to read it is not waited for."""
        await self._whatsapp.send(CONTACT, PHONE, [text])
        self.written.append(text)

    async def exchange(self, word: str) -> None:
        """A message each way: the ratchet has turned on both sides."""
        await self.send(f"{word}, out")
        await self.write(f"{word}, in")
        await self.wait_read()

    async def wait_read(self) -> None:
        """Wait until the account has received all that was written."""
        await wait_received(self._cluster, self._node, "anna", len(self.written))

    async def forget_what_is_lost(self) -> None:
        """From here on, only what the store still has of what the contact wrote is looked for."""
        mail = await received(self._cluster, self._node, "anna")
        self.written = [each["text"] for each in mail]

    async def is_whole(self) -> None:
        """Both sides have everything, once."""
        inbox = await self._whatsapp.inbox(CONTACT)
        assert (inbox.texts, inbox.unreadable, inbox.duplicates) == (self.sent, (), [])
        mail = await wait_received(self._cluster, self._node, "anna", len(self.written))
        assert [each["text"] for each in mail] == self.written


async def sends_behind(conversation: Conversation) -> None:
    for number in range(3):
        await conversation.send(f"newer than the copy: {number}")


async def ratchet_step_behind(conversation: Conversation) -> None:
    for number in range(2):
        await conversation.exchange(f"newer than the copy: {number}")


BEHIND = pytest.mark.parametrize("fall_behind", [sends_behind, ratchet_step_behind])


async def with_an_old_copy(
    cluster: Cluster,
    whatsapp: FakeWhatsApp,
    fall_behind: Callable[[Conversation], Awaitable[None]],
) -> tuple[Node, Conversation]:
    """A stopped instance with the disk copy of an earlier day, and what was said until today."""
    node = await cluster.start("a", state="ACTIVE", **ALONE)
    await pair(cluster, node, whatsapp, "anna", PHONE)
    conversation = Conversation(cluster, node, whatsapp)
    for word in ("first", "second"):
        await conversation.exchange(word)
    assert await node.stop() == 0
    backup = Path(shutil.copytree(state_dir(node), cluster.directory / "backup"))
    await whatsapp.settings(lids=False)

    await cluster.restart(node, state="ACTIVE")
    await cluster.wait_connected(node, "anna")
    await fall_behind(conversation)
    assert await node.stop() == 0
    shutil.rmtree(state_dir(node))
    shutil.copytree(backup, state_dir(node))
    return node, conversation


async def wait_text(cluster: Cluster, node: Node, text: str) -> None:
    """Wait until the account has received it."""
    while text not in [each["text"] for each in await received(cluster, node, "anna")]:
        await trio.sleep(0.05)


async def asked_again(whatsapp: FakeWhatsApp) -> int:
    """How often either side could not read what it got."""
    counts = await whatsapp.counts()
    return counts.get("unreadable", 0) + counts.get("nack", 0)


@BEHIND
async def test_an_older_copy_on_the_disk_is_not_used_while_the_store_has_a_newer_one(
    tmp_path: Path, whatsapp: FakeWhatsApp, fall_behind: Callable[[Conversation], Awaitable[None]]
) -> None:
    async with open_whatsapp_cluster(tmp_path, whatsapp) as cluster:
        with trio.fail_after(WITHIN_S):
            node, conversation = await with_an_old_copy(cluster, whatsapp, fall_behind)
            await conversation.write("while nobody was there")
            await cluster.restart(node, state="ACTIVE")
            await cluster.wait_connected(node, "anna")
            report = await restored(cluster, node)
            # The standby may have brought its copy up to date before it became ACTIVE.
            assert sum(report["takenFrom"].get(source, 0) for source in (SHARED, BOTH)) == 1
            assert report["doubted"] == 0
            await conversation.wait_read()
            await conversation.exchange("after")
            await conversation.is_whole()
        assert await asked_again(whatsapp) == 0


def lose_the_record(shared: Path) -> None:
    """The shared store has never heard of the account."""
    with closing(sqlite3.connect(shared / "shared.db")) as database, database:
        for table in ("accounts", "parts"):
            gone = database.execute(f"DELETE FROM {table} WHERE account_id = 'anna'")
            assert gone.rowcount > 0


def lose_the_store(shared: Path) -> None:
    """A new one takes its place."""
    shutil.rmtree(shared)


@BEHIND
@pytest.mark.parametrize("lose", [lose_the_record, lose_the_store])
async def test_where_only_an_older_copy_is_left_its_sessions_begin_anew(
    tmp_path: Path,
    whatsapp: FakeWhatsApp,
    fall_behind: Callable[[Conversation], Awaitable[None]],
    lose: Callable[[Path], None],
) -> None:
    async with open_whatsapp_cluster(tmp_path, whatsapp, **TIMES) as cluster:
        with trio.fail_after(WITHIN_S):
            node, conversation = await with_an_old_copy(cluster, whatsapp, fall_behind)
            lose(cluster.directory / "shared")
            await cluster.restart(node, state="ACTIVE")
            await cluster.wait_connected(node, "anna")
            report = await restored(cluster, node)
            assert (report["takenFrom"], report["doubted"]) == ({DISK: 1}, 1)
            await conversation.forget_what_is_lost()
            for number in range(3):
                await conversation.exchange(f"after: {number}")
            await conversation.is_whole()
            # The first message began a new session, and the contact answered in that.
            assert await asked_again(whatsapp) == 0

            # Nor is there a doubt left for the next.
            assert await node.stop() == 0
            await cluster.restart(node, state="ACTIVE")
            await cluster.wait_connected(node, "anna")
            assert (await restored(cluster, node))["doubted"] == 0
            await conversation.exchange("after a redeploy")
            await conversation.is_whole()
        assert await asked_again(whatsapp) == 0


async def test_what_was_written_into_a_lost_session_is_asked_for_again_and_read(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    async with open_whatsapp_cluster(tmp_path, whatsapp, **TIMES) as cluster:
        with trio.fail_after(WITHIN_S):
            node, conversation = await with_an_old_copy(cluster, whatsapp, ratchet_step_behind)
            lose_the_record(cluster.directory / "shared")
            await conversation.write("while nobody was there")
            await cluster.restart(node, state="ACTIVE")
            await cluster.wait_connected(node, "anna")
            await wait_text(cluster, node, "while nobody was there")
            assert await asked_again(whatsapp) == 1
            await conversation.forget_what_is_lost()
            for number in range(3):
                await conversation.exchange(f"after: {number}")
            await conversation.is_whole()
        assert await asked_again(whatsapp) == 1
