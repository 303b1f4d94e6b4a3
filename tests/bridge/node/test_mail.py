"""What becomes of messages to an account: kept before the server hears that they were read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from tests.bridge.node.harness import Frame, NodeBridge, NodeLink, open_node
from tests.bridge.node.steps import ANNA, BERND, SHOP, SOON_S, log_in, pair
from tests.whatsapp.server import FakeWhatsApp

pytestmark = pytest.mark.node


def is_mail(ask: Frame) -> bool:
    return bool(ask["ask"] == "received")


def until_held(link: NodeLink) -> Callable[[], bool]:
    return lambda: link.held != []


async def receipts(whatsapp: FakeWhatsApp) -> list[tuple[str, ...]]:
    return [sent.receipts for sent in await whatsapp.sent(ANNA)]


async def test_no_receipt_leaves_before_the_message_is_stored(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    link.holds = is_mail
    with trio.fail_after(SOON_S):
        await whatsapp.send(ANNA, SHOP, ["one"])
        await link.until(until_held(link))
        await trio.sleep(0.3)
        assert await receipts(whatsapp) == [()]
        assert account.mail == []
        link.release()
        await whatsapp.wait_for("receipt")
    assert await receipts(whatsapp) == [("inactive",)]
    assert [each["text"] for each in account.mail] == ["one"]


async def test_message_travels_with_the_keys_that_reading_it_changed(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    with trio.fail_after(SOON_S):
        await whatsapp.send(ANNA, SHOP, ["one"])
        await link.until(lambda: account.mail != [])
    (received,) = [ask for ask in link.asks if is_mail(ask)]
    assert any(name.startswith("session-") for name in received["values"])
    assert any(
        name.startswith("pre-key-") and text is None for name, text in received["values"].items()
    )


async def test_process_that_dies_before_the_message_is_stored_gets_it_again(
    whatsapp: FakeWhatsApp,
) -> None:
    async with open_node() as first:
        await first.hello(url=whatsapp.url)
        account = await pair(first, whatsapp)
        link = await log_in(first, account)
        link.holds = is_mail
        with trio.fail_after(SOON_S):
            await whatsapp.send(ANNA, SHOP, ["one", "two"])
            await link.until(until_held(link))
    assert account.mail == []
    async with open_node() as second:
        await second.hello(url=whatsapp.url)
        link = await log_in(second, account)
        with trio.fail_after(SOON_S):
            await link.until(lambda: len(account.mail) == 2)
    assert [each["text"] for each in account.mail] == ["one", "two"]


async def test_process_that_dies_after_the_message_is_stored_does_not_read_it_twice(
    whatsapp: FakeWhatsApp,
) -> None:
    async with open_node() as first:
        await first.hello(url=whatsapp.url)
        account = await pair(first, whatsapp)
        link = await log_in(first, account)
        link.holds = is_mail
        with trio.fail_after(SOON_S):
            await whatsapp.send(ANNA, SHOP, ["one"])
            await link.until(until_held(link))
        # Stored, and the answer is lost with the process.
        ask = link.held[0]
        account.mail.append(ask["message"])
        account.apply(ask["values"])
    async with open_node() as second:
        await second.hello(url=whatsapp.url)
        link = await log_in(second, account)
        with trio.fail_after(SOON_S):
            await whatsapp.send(ANNA, SHOP, ["two"])
            await link.until(lambda: len(account.mail) == 2)
            while (await whatsapp.person(SHOP)).devices[0].waiting > 0:
                await trio.sleep(0.05)
    assert [each["text"] for each in account.mail] == ["one", "two"]


async def test_message_that_could_not_be_stored_ends_the_connection_without_a_word_to_the_server(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    link.refuses = is_mail
    before = await whatsapp.counts()
    with trio.fail_after(SOON_S):
        await whatsapp.send(ANNA, SHOP, ["one"])
        closed = await link.next("closed")
        assert closed["code"] == 503
        counts = await whatsapp.counts()
        for word in ("receipt", "nack"):
            assert counts.get(word, 0) == before.get(word, 0)
        again = await log_in(node, account)
        await again.until(lambda: account.mail != [])
    assert [each["text"] for each in account.mail] == ["one"]


async def test_what_came_while_the_account_was_away_is_mail_in_its_order(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    texts = [f"nr {number}" for number in range(20)]
    with trio.fail_after(SOON_S):
        await whatsapp.send(ANNA, SHOP, texts)
        link = await log_in(node, account)
        await link.until(lambda: len(account.mail) == len(texts))
    assert [each["text"] for each in account.mail] == texts


async def test_stanza_that_comes_twice_is_one_message(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    with trio.fail_after(SOON_S):
        await whatsapp.send(ANNA, SHOP, ["one"], twice=True)
        await whatsapp.wait_for("nack")
        await whatsapp.send(ANNA, SHOP, ["two"])
        await link.until(lambda: len(account.mail) == 2)
    assert [each["text"] for each in account.mail] == ["one", "two"]


@pytest.mark.parametrize("is_known", [True, False], ids=["known", "unknown"])
async def test_recipient_that_cannot_read_a_message_gets_it_again_after_a_restart(
    whatsapp: FakeWhatsApp, is_known: bool
) -> None:
    async with open_node() as first:
        await first.hello(url=whatsapp.url)
        account = await pair(first, whatsapp)
        link = await log_in(first, account)
        await whatsapp.change(ANNA, decrypt="lazy")
        with trio.fail_after(SOON_S):
            await link.send("3EB0A1", ANNA, "one")
            await whatsapp.inbox(ANNA)
            await link.send("3EB0A2", ANNA, "two")
    await whatsapp.forget(ANNA, SHOP)
    if not is_known:
        account.bodies.clear()
    async with open_node() as second:
        await second.hello(url=whatsapp.url)
        link = await log_in(second, account)
        with trio.fail_after(SOON_S):
            await whatsapp.inbox(ANNA)  # The phone looks, and asks for it again.
            await link.until(lambda: any(ask["ask"] == "body" for ask in link.asks))
            if is_known:
                assert (await whatsapp.wait_inbox(ANNA, 2)).texts == ["one", "two"]
            else:
                await link.send("3EB0A3", ANNA, "three")
                assert (await whatsapp.wait_inbox(ANNA, 2)).texts == ["one", "three"]


# --- doubt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_doubted", [True, False], ids=["doubted", "not doubted"])
async def test_send_that_was_never_recorded_costs_no_message_when_it_is_doubted(
    whatsapp: FakeWhatsApp, is_doubted: bool
) -> None:
    """Without the doubt the next message reuses a key, and cannot be read: the fault is real."""
    async with open_node() as first:
        await first.hello(url=whatsapp.url)
        account = await pair(first, whatsapp)
        link = await log_in(first, account)
        with trio.fail_after(SOON_S):
            await link.send("3EB0A0", ANNA, "zero")
            await whatsapp.send(ANNA, SHOP, ["hello"])  # From now on no session is a first one.
            await link.until(lambda: account.mail != [])
            await link.send("3EB0A1", ANNA, "one")
            await trio.sleep(0.3)
            stored = dict(account.keys or {})
            await link.send("3EB0A2", ANNA, "two")  # On the wire; then the process dies.
    account.keys = stored
    await whatsapp.settings(lids=False)  # Told of one, Baileys would begin a new session anyway.
    async with open_node() as second:
        await second.hello(url=whatsapp.url)
        with trio.fail_after(SOON_S):
            link = await second.open(account, doubtful=(ANNA,) if is_doubted else ())
            await link.next("connected")
            await link.send("3EB0A2", ANNA, "two")
            await link.send("3EB0A3", ANNA, "three")
            inbox = await whatsapp.wait_inbox(ANNA, 4)
    assert inbox.texts == ["zero", "one", "two", "three"]
    unread = [each.message_id for each in inbox.arrivals if each.text is None]
    assert (unread == []) is is_doubted
    if is_doubted:
        assert inbox.duplicates == ["3EB0A2"]


@pytest.mark.parametrize("is_distrusted", [True, False], ids=["distrusted", "trusted"])
async def test_old_sessions_cost_messages_unless_they_are_distrusted(
    whatsapp: FakeWhatsApp, is_distrusted: bool
) -> None:
    async with open_node() as first:
        await first.hello(url=whatsapp.url)
        account = await pair(first, whatsapp)
        link = await log_in(first, account)
        with trio.fail_after(SOON_S):
            await link.send("3EB0A0", ANNA, "zero")
            await link.send("3EB0B0", BERND, "zero")
            await trio.sleep(0.3)
            stored = dict(account.keys or {})
            for number in range(1, 4):
                await link.send(f"3EB0A{number}", ANNA, f"nr {number}")
                await whatsapp.send(ANNA, SHOP, [f"answer {number}"])
                await link.until(lambda number=number: len(account.mail) == number)  # type: ignore[misc]
    account.keys = stored
    await whatsapp.settings(lids=False)  # Told of one, Baileys would begin a new session anyway.
    async with open_node() as second:
        await second.hello(url=whatsapp.url)
        with trio.fail_after(SOON_S):
            link = await second.open(account, distrust=is_distrusted)
            await link.next("connected")
            await link.send("3EB0A9", ANNA, "last")
            await link.send("3EB0B9", BERND, "last")
            unread = []
            for contact, count in ((ANNA, 5), (BERND, 2)):
                inbox = await whatsapp.wait_inbox(contact, count)
                unread += [each.message_id for each in inbox.arrivals if each.text is None]
    assert (unread == []) is is_distrusted
    if not is_distrusted:
        return
    sessions = {name for name in stored if name.startswith("session-")}
    dropped = {name for name, text in link.asks[0]["values"].items() if text is None}
    assert dropped == sessions != set()


# --- both ways at once -----------------------------------------------------------------------


@pytest.mark.parametrize("count", [25, pytest.param(150, marks=pytest.mark.long)])
async def test_traffic_both_ways_at_once_is_all_readable(
    node: NodeBridge, whatsapp: FakeWhatsApp, count: int
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    with trio.fail_after(SOON_S * 6):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                whatsapp.send, ANNA, SHOP, [f"in {number}" for number in range(count)]
            )
            for number in range(count):
                await link.send(f"3EB0{number:04}", ANNA, f"out {number}")
        inbox = await whatsapp.wait_inbox(ANNA, count)
        await link.until(lambda: len(account.mail) == count)
    assert inbox.unreadable == ()
    assert [each.message_id for each in inbox.arrivals if each.text is None] == []
    assert sorted(inbox.texts) == sorted(f"out {number}" for number in range(count))
    assert [each["text"] for each in account.mail] == [f"in {number}" for number in range(count)]
    assert (await whatsapp.counts()).get("nack", 0) == 0
