"""W3: kill -9 of a daemon, of its bridges, or of both, while messages are between wire and store.

Two windows. *wire*: WhatsApp has our message on its wire, and has neither delivered it nor
acknowledged it. *commit*: it has done both, and the store cannot take the record, nor that of what
the contact wrote meanwhile. The judge is the contact's phone, and the API.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import httpx
import pytest
import trio

from tests.emulator import Emulator
from tests.system.cluster import Cluster, Node, firestore_env
from tests.system.steps import lines_of
from tests.system.test_s3_store_hangs import TIMES, locked_out, paused
from tests.whatsapp.server import FakeWhatsApp
from tests.whatsapp.steps import kill_all, open_whatsapp_cluster, pair, wait_received

pytestmark = [pytest.mark.node, pytest.mark.system]

PHONE = "4915550000001"
CONTACT = "4915112345678"
AHEAD = 3
"""Messages in the window: accepted, and some of them on the wire or acknowledged."""
SPOKEN = ("before first", "before second", "after first", "after second")
"""What is written in each direction outside of it."""
WITHIN_S = 90.0


def kill_daemon(node: Node) -> None:
    """The daemon alone. Its bridges end with it, and its warden gives the lease back."""
    node.signal_daemon(9)


def kill_bridges(node: Node) -> None:
    """Its Node processes; the daemon goes on, and so does its term."""
    kill_all(node, daemon=False)


def kill_both(node: Node) -> None:
    """All in one instant, the warden too, as a host's end: the lease has to run out."""
    kill_all(node)


async def wait_cut(whatsapp: FakeWhatsApp) -> None:
    """Wait until WhatsApp sees that the account's client is gone."""
    while any(each.connected for each in (await whatsapp.person(PHONE)).devices):
        await trio.sleep(0.01)


async def wait_logged_in(whatsapp: FakeWhatsApp, logins: int) -> None:
    """Wait until the account's device has logged in so often, and stays."""
    while True:
        (device,) = (await whatsapp.person(PHONE)).devices
        if device.logins >= logins and device.ready:
            return
        await trio.sleep(0.05)


async def talk(cluster: Cluster, node: Node, whatsapp: FakeWhatsApp, word: str) -> None:
    """A message each way, twice: the sessions have stepped their ratchets."""
    for turn in ("first", "second"):
        sent = await cluster.send(node, "anna", f"{word} {turn}, out")
        assert sent.status_code == 200, sent.text
        (answer,) = await whatsapp.send(CONTACT, PHONE, [f"{word} {turn}, in"])
        while not any(
            each.message_id == answer and set(each.receipts) - {"retry"}
            for each in await whatsapp.sent(CONTACT)
        ):
            await trio.sleep(0.02)


async def send_into_the_window(cluster: Cluster, node: Node, number: int) -> None:
    """Call until somebody says that the message is accepted, always with the same key."""
    nodes = [node, *(each for each in cluster.nodes if each is not node)]
    while True:
        for each in nodes:
            try:
                answer = await cluster.send(
                    each, "anna", f"window {number}, out", key=f"key-{number}"
                )
            except httpx.TransportError:
                continue
            if answer.status_code in (200, 202):
                return
        await trio.sleep(0.1)


async def fill_the_window(
    cluster: Cluster, node: Node, whatsapp: FakeWhatsApp, nursery: trio.Nursery
) -> None:
    """Return when all are accepted, in order, and the first is on the wire."""
    accepted = len(lines_of(node, "of anna accepted"))
    for number in range(AHEAD):
        nursery.start_soon(send_into_the_window, cluster, node, number)
        while len(lines_of(node, "of anna accepted")) <= accepted + number:
            await trio.sleep(0.01)
    while (await whatsapp.person(PHONE)).held == 0:
        await trio.sleep(0.01)


@asynccontextmanager
async def on_the_wire(
    cluster: Cluster, node: Node, whatsapp: FakeWhatsApp, _: Emulator | None
) -> AsyncIterator[None]:
    """In the block, our message is on the wire. After it, what was there is delivered.

    The contact writes nothing meanwhile: to record that would record what our message has made of
    the session too.
    """
    await whatsapp.hold(PHONE)
    async with trio.open_nursery() as nursery:
        await fill_the_window(cluster, node, whatsapp, nursery)
        yield
        await whatsapp.release(PHONE)


@asynccontextmanager
async def before_the_commit(
    cluster: Cluster, node: Node, whatsapp: FakeWhatsApp, emulator: Emulator | None
) -> AsyncIterator[None]:
    """In the block, each side's message has arrived, and no store can say so."""
    path = cluster.directory / "shared" / "shared.db"
    hung = locked_out(path) if emulator is None else paused(emulator)
    await whatsapp.hold(PHONE)
    async with trio.open_nursery() as nursery:
        await fill_the_window(cluster, node, whatsapp, nursery)
        async with hung:
            shown = len((await whatsapp.inbox(CONTACT)).shown)
            await whatsapp.release(PHONE)
            await whatsapp.send(CONTACT, PHONE, ["window, in"])
            await whatsapp.wait_inbox(CONTACT, shown + AHEAD)
            # Long enough for both to be at the store's door; nothing could be told of it.
            await trio.sleep(0.3)
            (device,) = (await whatsapp.person(PHONE)).devices
            assert device.waiting > 0, "the contact was told too early"
            yield


Window = Callable[[Cluster, Node, FakeWhatsApp, Emulator | None], AbstractAsyncContextManager[None]]
WINDOWS: dict[str, Window] = {"wire": on_the_wire, "commit": before_the_commit}


async def everything_once(cluster: Cluster, node: Node, whatsapp: FakeWhatsApp) -> None:
    """Both sides can read all that was written to them, and see it once."""
    out = [f"{each}, out" for each in (*SPOKEN, *(f"window {n}" for n in range(AHEAD)))]
    inbox = await whatsapp.wait_inbox(CONTACT, len(out))
    assert Counter(inbox.texts) == Counter(out)
    inside = [text for text in inbox.texts if text.startswith("window")]
    assert inside == [f"window {n}, out" for n in range(AHEAD)]
    assert inbox.unreadable == ()
    mail = await wait_received(cluster, node, "anna", len(SPOKEN) + 1)
    said = Counter(f"{each}, in" for each in (*SPOKEN, "window"))
    assert Counter(each["text"] for each in mail) == said


async def crashed_in_a_window(
    tmp_path: Path,
    whatsapp: FakeWhatsApp,
    kill: Callable[[Node], None],
    window: str,
    *,
    lids: bool = True,
    emulator: Emulator | None = None,
) -> None:
    env = dict(TIMES)
    if emulator is not None:
        env = {**firestore_env(tmp_path, emulator.host), **TIMES}
        env["WATCHKEEPER_CONNECTOR"] = "baileys"
    async with open_whatsapp_cluster(tmp_path, whatsapp, **env) as cluster:
        with trio.fail_after(WITHIN_S):
            a = await cluster.start("a", state="ACTIVE")
            await pair(cluster, a, whatsapp, "anna", PHONE)
            b = await cluster.start("b", state="PASSIVE")
            await talk(cluster, a, whatsapp, "before")
            await whatsapp.settings(lids=lids)
            (before,) = (await whatsapp.person(PHONE)).devices
            async with WINDOWS[window](cluster, a, whatsapp, emulator):
                kill(a)
                await wait_cut(whatsapp)
            holder = await cluster.wait_active()
            assert holder is (a if kill is kill_bridges else b)
            await wait_logged_in(whatsapp, before.logins + 1)
            await cluster.wait_connected(holder, "anna")
            if window == "wire":
                # Written before, it would be in a session that is dropped, and be asked for again.
                await whatsapp.wait_inbox(CONTACT, len(SPOKEN) // 2 + AHEAD)
                await whatsapp.send(CONTACT, PHONE, ["window, in"])
            await talk(cluster, holder, whatsapp, "after")
            await everything_once(cluster, holder, whatsapp)
            if window == "wire":
                # Nor did the contact get a copy that it could not read, be it for a second. In the
                # other window it may: what the contact wrote was stored and not confirmed, comes
                # again, cannot be read a second time, and is asked for in a new session.
                assert (await whatsapp.counts()).get("unreadable", 0) == 0
        assert (await whatsapp.counts()).get("conflict", 0) == 0
        assert len(lines_of(a, "-> PASSIVE")) == 1, "a killed bridge ends no term"


async def test_a_daemon_killed_before_the_commit_costs_nobody_a_message(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    await crashed_in_a_window(tmp_path, whatsapp, kill_daemon, "commit")


@pytest.mark.long
@pytest.mark.parametrize("lids", [True, False], ids=["new-session", "same-session"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kill", [kill_daemon, kill_bridges, kill_both])
async def test_a_crash_between_wire_and_store_costs_nobody_a_message(
    tmp_path: Path, whatsapp: FakeWhatsApp, kill: Callable[[Node], None], window: str, *, lids: bool
) -> None:
    # Without LIDs Baileys begins no new session after a start, so an old one would be noticed.
    await crashed_in_a_window(tmp_path, whatsapp, kill, window, lids=lids)


@pytest.mark.long
@pytest.mark.emulator
@pytest.mark.parametrize("kill", [kill_daemon, kill_bridges, kill_both])
async def test_a_crash_while_firestore_hangs_costs_nobody_a_message(
    tmp_path: Path, whatsapp: FakeWhatsApp, own_emulator: Emulator, kill: Callable[[Node], None]
) -> None:
    # It may apply, when it goes on, what the dead one asked for.
    await crashed_in_a_window(tmp_path, whatsapp, kill, "commit", lids=False, emulator=own_emulator)
