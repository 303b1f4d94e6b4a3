"""The fake server against bare, unmodified Baileys: what the system tests stand on."""

from __future__ import annotations

import pytest
import trio

from tests.whatsapp.clients import BaileysClients, Event
from tests.whatsapp.server import FakeWhatsApp, Inbox, Refused

pytestmark = pytest.mark.node

SHOP = "4915550000001"
KIOSK = "4915550000002"
ANNA = "491700000001"
BERND = "491700000002"
SOON_S = 20.0


async def pair(clients: BaileysClients, whatsapp: FakeWhatsApp, name: str, number: str) -> None:
    """Pair by QR code, and log in."""
    with trio.fail_after(SOON_S):
        await clients.open(name)
        qr = (await clients.next(name, "qr"))["qr"]
        await whatsapp.scan(number, qr)
        assert (await clients.next(name, "closed"))["code"] == 515
        await log_in(clients, name)


async def log_in(clients: BaileysClients, name: str) -> None:
    with trio.fail_after(SOON_S):
        await clients.open(name)
        await clients.next(name, "open")


async def send(clients: BaileysClients, name: str, to: str, text: str, message_id: str) -> Event:
    """Send a text; the server's ack."""
    with trio.fail_after(SOON_S):
        await clients.tell("send", name, to=to, text=text, id=message_id)
        return await clients.next(name, "ack", lambda ack: ack["id"] == message_id)


async def closed(clients: BaileysClients, name: str) -> Event:
    with trio.fail_after(SOON_S):
        return await clients.next(name, "closed")


async def received(clients: BaileysClients, name: str) -> Event:
    """The next message of others."""
    with trio.fail_after(SOON_S):
        return await clients.next(name, "message", lambda each: not each["fromMe"])


async def get_acquainted(clients: BaileysClients, whatsapp: FakeWhatsApp) -> None:
    """Anna and the shop have a session that has turned both ways."""
    await send(clients, "shop", ANNA, "hello", "3EB0AA1")
    await whatsapp.send(ANNA, SHOP, ["hello"])
    await received(clients, "shop")
    await send(clients, "shop", ANNA, "nice to meet you", "3EB0AA2")
    with trio.fail_after(SOON_S):
        await whatsapp.wait_inbox(ANNA, 2)


# --- pairing ---------------------------------------------------------------------------------


async def test_account_paired_by_qr_code_logs_in(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    (device,) = (await whatsapp.person(SHOP)).devices
    assert (device.connected, device.logins, device.conflicts) == (True, 1, 0)
    assert device.pre_keys == 5


async def test_account_paired_by_code_logs_in(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    with trio.fail_after(SOON_S):
        await clients.open("shop")
        await clients.next("shop", "qr")
        await clients.tell("code", "shop", phone=SHOP)
        code = (await clients.next("shop", "code"))["code"]
        with pytest.raises(Refused, match="wrong code"):
            await whatsapp.enter_code(SHOP, "ABCDEFGH" if code != "ABCDEFGH" else "HGFEDCBA")
        await whatsapp.enter_code(SHOP, code)
    assert (await closed(clients, "shop"))["code"] == 515
    await log_in(clients, "shop")
    assert (await whatsapp.counts())["paired"] == 1


async def test_qr_codes_rotate_and_every_one_of_them_pairs(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    with trio.fail_after(SOON_S):
        await clients.open("shop", qrTimeout=200)
        first, second = [(await clients.next("shop", "qr"))["qr"] for _ in range(2)]
        assert first != second
        await whatsapp.scan(SHOP, second)
        assert (await closed(clients, "shop"))["code"] == 515


async def test_unused_qr_codes_end_the_pairing(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await clients.open("shop", qrTimeout=50)
    assert (await closed(clients, "shop"))["code"] == 408
    with trio.fail_after(SOON_S):
        await whatsapp.wait_for("closed")
        qr = (await clients.next("shop", "qr"))["qr"]
        with pytest.raises(Refused, match="expired"):
            await whatsapp.scan(SHOP, qr)


async def test_code_that_was_shown_too_long_has_expired(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await whatsapp.settings(qrTtlMs=100)
    with trio.fail_after(SOON_S):
        await clients.open("shop")
        qr = (await clients.next("shop", "qr"))["qr"]
        await trio.sleep(0.2)
        with pytest.raises(Refused, match="expired"):
            await whatsapp.scan(SHOP, qr)


async def test_a_phone_links_four_devices_and_no_fifth(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    for name in ("one", "two", "three", "four"):
        await pair(clients, whatsapp, name, SHOP)
    devices = (await whatsapp.person(SHOP)).devices
    assert [(each.device, each.connected) for each in devices] == [(n, True) for n in (1, 2, 3, 4)]
    with trio.fail_after(SOON_S):
        await clients.open("five")
        qr = (await clients.next("five", "qr"))["qr"]
        with pytest.raises(Refused, match="unlink one first"):
            await whatsapp.scan(SHOP, qr)
        await whatsapp.unlink(SHOP)
        assert (await whatsapp.scan(SHOP, qr)).device == 5


# --- messages --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["hello", "Grüße aus Łódź", "☕️👩‍👩‍👧‍👦", "مرحبا", "a\nb\t" * 500])
async def test_contact_reads_what_was_sent(
    clients: BaileysClients, whatsapp: FakeWhatsApp, text: str
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    assert "error" not in await send(clients, "shop", ANNA, text, "3EB0A1")
    with trio.fail_after(SOON_S):
        inbox = await whatsapp.wait_inbox(ANNA, 1)
        (shown,) = inbox.shown
        assert (shown.message_id, shown.sender, shown.text) == ("3EB0A1", SHOP, text)
        assert (shown.times, inbox.unreadable) == (1, ())
        await whatsapp.send(ANNA, SHOP, [text])
        answer = await received(clients, "shop")
    assert (answer["type"], answer["text"]) == ("notify", text)


async def test_message_sent_again_under_its_id_is_shown_once_and_counted(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    for _ in range(2):
        await send(clients, "shop", ANNA, "hello", "3EB0A1")
    await send(clients, "shop", ANNA, "bye", "3EB0A2")
    with trio.fail_after(SOON_S):
        inbox = await whatsapp.wait_inbox(ANNA, 2)
    assert [(each.text, each.times) for each in inbox.shown] == [("hello", 2), ("bye", 1)]
    assert (inbox.duplicates, len(inbox.arrivals)) == (["3EB0A1"], 3)


async def test_receipts_come_as_delivered_and_read(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.receipts(SHOP, "withhold", times=1)
    await send(clients, "shop", ANNA, "hello", "3EB0A1")
    with trio.fail_after(SOON_S):
        await clients.next("shop", "sent")
        await whatsapp.wait_inbox(ANNA, 1)
        assert (await whatsapp.release(SHOP))["receipts"] == 1
        assert (await clients.next("shop", "update"))["status"] == 3
        assert await whatsapp.read(ANNA, SHOP) == ["3EB0A1"]
        assert (await clients.next("shop", "update"))["status"] == 4


async def test_two_accounts_write_to_each_other(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await pair(clients, whatsapp, "kiosk", KIOSK)
    await send(clients, "shop", KIOSK, "coffee?", "3EB0A1")
    assert (await received(clients, "kiosk"))["text"] == "coffee?"
    await send(clients, "kiosk", SHOP, "always", "3EB0B1")
    assert (await received(clients, "shop"))["text"] == "always"


async def test_numbers_that_do_not_exist_are_known(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.change(BERND, exists=False)
    with trio.fail_after(SOON_S):
        for number, exists in ((ANNA, True), (BERND, False)):
            await clients.tell("known", "shop", phone=number)
            assert (await clients.next("shop", "known"))["exists"] is exists


async def test_message_that_a_contact_cannot_read_is_asked_for_again(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await send(clients, "shop", ANNA, "one", "3EB0A1")
    await whatsapp.send(ANNA, SHOP, ["a session that has turned"])
    await received(clients, "shop")
    await whatsapp.forget(ANNA, SHOP)
    await send(clients, "shop", ANNA, "two", "3EB0A2")
    with trio.fail_after(SOON_S):
        inbox = await whatsapp.wait_inbox(ANNA, 2)
    assert inbox.texts == ["one", "two"]
    first, second = [each for each in inbox.arrivals if each.message_id == "3EB0A2"]
    assert (first.text, second.text, second.type) == (None, "two", "pkmsg")
    assert inbox.unreadable == ()


async def test_message_that_a_client_cannot_read_is_sent_again(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await clients.tell("copy", "shop", **{"as": "older"})
    await whatsapp.send(ANNA, SHOP, ["one"])
    await received(clients, "shop")
    await send(clients, "shop", ANNA, "turn", "3EB0A1")
    await whatsapp.send(ANNA, SHOP, ["two"])
    await received(clients, "shop")
    await clients.tell("close", "shop")
    await closed(clients, "shop")
    await clients.tell("becomes", "shop", **{"as": "older"})
    await log_in(clients, "shop")
    (message_id,) = await whatsapp.send(ANNA, SHOP, ["three"])
    stub = await received(clients, "shop")
    assert (stub["id"], stub["text"], stub["stub"]) == (message_id, None, 2)
    again = await received(clients, "shop")
    assert (again["id"], again["text"]) == (message_id, "three")


async def test_lazy_phone_confirms_at_once_and_reads_when_asked(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.settings(decrypt="lazy")
    for number in range(3):
        await send(clients, "shop", ANNA, f"number {number}", f"3EB0A{number}")
    with trio.fail_after(SOON_S):
        for _ in range(3):
            assert (await clients.next("shop", "update"))["status"] == 3
    assert "read" not in await whatsapp.counts()
    assert (await whatsapp.inbox(ANNA)).texts == ["number 0", "number 1", "number 2"]
    assert (await whatsapp.counts())["read"] == 3


async def test_without_lids_a_ratchet_that_was_rolled_back_is_seen(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await get_acquainted(clients, whatsapp)
    await clients.tell("copy", "shop", **{"as": "older"})
    await send(clients, "shop", ANNA, "newer", "3EB0A1")
    await clients.tell("close", "shop")
    await closed(clients, "shop")
    await clients.tell("becomes", "shop", **{"as": "older"})
    await whatsapp.settings(lids=False)
    await log_in(clients, "shop")
    await send(clients, "shop", ANNA, "with a key that was used", "3EB0A2")
    with trio.fail_after(SOON_S):
        await whatsapp.wait_for("unreadable")
        await whatsapp.settings(lids=True)


# --- acks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [463, 479])
async def test_refused_message_is_not_delivered(
    clients: BaileysClients, whatsapp: FakeWhatsApp, error: int
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.acks(SHOP, "error", error=error, times=1)
    assert (await send(clients, "shop", ANNA, "no", "3EB0A1"))["error"] == str(error)
    assert "error" not in await send(clients, "shop", ANNA, "yes", "3EB0A2")
    with trio.fail_after(SOON_S):
        assert (await whatsapp.wait_inbox(ANNA, 1)).texts == ["yes"]


@pytest.mark.parametrize("deliver", [True, False])
async def test_withheld_ack_comes_when_it_is_released(
    clients: BaileysClients, whatsapp: FakeWhatsApp, *, deliver: bool
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.acks(SHOP, "withhold", times=1, deliver=deliver)
    with trio.fail_after(SOON_S):
        await clients.tell("send", "shop", to=ANNA, text="hello", id="3EB0A1")
        await whatsapp.wait_for("message")
        assert clients.seen("shop", "ack") == []
        assert (await whatsapp.release(SHOP))["acks"] == 1
        assert (await clients.next("shop", "ack"))["id"] == "3EB0A1"
        if deliver:
            await whatsapp.wait_inbox(ANNA, 1)
        else:
            assert (await whatsapp.inbox(ANNA)).arrivals == ()


async def test_delayed_ack_comes_later(clients: BaileysClients, whatsapp: FakeWhatsApp) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.acks(SHOP, "delay", delayMs=300, times=1)
    start = trio.current_time()
    await send(clients, "shop", ANNA, "hello", "3EB0A1")
    assert trio.current_time() - start > 0.3


@pytest.mark.parametrize("drop", [False, True])
async def test_held_wire_neither_delivers_nor_acknowledges(
    clients: BaileysClients, whatsapp: FakeWhatsApp, *, drop: bool
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.hold(SHOP)
    with trio.fail_after(SOON_S):
        await clients.tell("send", "shop", to=ANNA, text="hello", id="3EB0A1")
        await whatsapp.wait_for("message")
        await clients.tell("close", "shop")
        await closed(clients, "shop")
        held = await whatsapp.person(SHOP)
        assert (held.held, (await whatsapp.inbox(ANNA)).arrivals) == (1, ())
        await whatsapp.release(SHOP, drop=drop)
        if drop:
            assert (await whatsapp.inbox(ANNA)).arrivals == ()
        else:
            assert (await whatsapp.wait_inbox(ANNA, 1)).texts == ["hello"]


async def test_stanza_delivered_twice_is_a_message_and_a_stub(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.send(ANNA, SHOP, ["once"], ids=["3EB0C1"], twice=True)
    assert (await received(clients, "shop"))["text"] == "once"
    with trio.fail_after(SOON_S):
        await whatsapp.wait_for("nack")
    assert (await whatsapp.person(SHOP)).devices[0].waiting == 0


# --- the backlog -----------------------------------------------------------------------------


async def test_what_came_meanwhile_arrives_at_the_next_login(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await clients.tell("close", "shop")
    await closed(clients, "shop")
    texts = [f"number {number}" for number in range(20)]
    await whatsapp.send(ANNA, SHOP, texts)
    assert (await whatsapp.person(SHOP)).devices[0].waiting == 20
    await log_in(clients, "shop")
    came = [await received(clients, "shop") for _ in texts]
    assert [each["text"] for each in came] == texts
    assert {each["type"] for each in came} == {"append"}
    with trio.fail_after(SOON_S):
        await whatsapp.wait_for("receipt", 20)
    assert (await whatsapp.person(SHOP)).devices[0].waiting == 0
    assert {each.receipts for each in await whatsapp.sent(ANNA)} == {("inactive",)}


async def test_what_is_lost_in_silence_is_delivered_again_at_the_next_login(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await get_acquainted(clients, whatsapp)
    await whatsapp.silence(SHOP, on=True)
    await whatsapp.send(ANNA, SHOP, ["into the void"])
    await clients.tell("send", "shop", to=ANNA, text="out of the void", id="3EB0A1")
    with trio.fail_after(SOON_S):
        await clients.next("shop", "sent", lambda each: each["id"] == "3EB0A1")
    await whatsapp.cut(SHOP)
    await closed(clients, "shop")
    assert clients.seen("shop", "message") == []
    assert "out of the void" not in (await whatsapp.inbox(ANNA)).texts
    await whatsapp.silence(SHOP, on=False)
    await log_in(clients, "shop")
    assert (await received(clients, "shop"))["text"] == "into the void"


# --- endings ---------------------------------------------------------------------------------


async def test_second_login_of_a_device_replaces_the_first(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await clients.tell("copy", "shop", **{"as": "other"})
    await log_in(clients, "other")
    assert (await closed(clients, "shop"))["code"] == 440
    (device,) = (await whatsapp.person(SHOP)).devices
    assert (device.logins, device.conflicts, device.connected) == (2, 1, True)
    assert (await whatsapp.counts())["conflict"] == 1


async def test_foreign_client_evicts_and_fights(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.foreign_login(SHOP, fights=1, every_ms=50)
    assert (await closed(clients, "shop"))["code"] == 440
    await clients.open("shop")
    assert (await closed(clients, "shop"))["code"] == 440
    assert (await whatsapp.person(SHOP)).devices[0].foreign
    await clients.open("shop")
    with trio.fail_after(SOON_S):
        await whatsapp.wait_for("conflict", 4)
    assert not (await whatsapp.person(SHOP)).devices[0].foreign


@pytest.mark.parametrize("code", [401, 402, 403, 405, 406, 411, 428, 440, 500, 501, 503, 515])
async def test_close_code_arrives_as_that_status(
    clients: BaileysClients, whatsapp: FakeWhatsApp, code: int
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    expire_s = 3600 if code == 402 else None
    assert await whatsapp.close(SHOP, code, expire_s=expire_s) == 1
    ended = await closed(clients, "shop")
    assert ended["code"] == code
    if code == 402:
        assert ended["attrs"]["expire"] == "3600"
    await whatsapp.refuse(SHOP, code, times=1, expire_s=expire_s)
    await clients.open("shop")
    assert (await closed(clients, "shop"))["code"] == code
    await log_in(clients, "shop")


async def test_unlinked_device_is_told_and_refused_from_then_on(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.unlink(SHOP)
    ended = await closed(clients, "shop")
    assert (ended["code"], ended["attrs"]) == (401, {"type": "device_removed"})
    await clients.open("shop")
    ended = await closed(clients, "shop")
    assert (ended["code"], ended["attrs"]["reason"]) == (401, "401")


async def test_login_with_other_keys_than_the_devices_is_refused(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await clients.tell("copy", "shop", **{"as": "thief"})
    await clients.tell("rekey", "thief")
    await clients.open("thief")
    assert (await closed(clients, "thief"))["code"] == 401
    (device,) = (await whatsapp.person(SHOP)).devices
    assert (device.connected, device.logins, device.conflicts) == (True, 1, 0)


async def test_client_that_logs_out_is_no_device_any_more(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await clients.tell("logout", "shop")
    await closed(clients, "shop")
    with trio.fail_after(SOON_S):
        await whatsapp.wait_for("logged-out")
    assert (await whatsapp.person(SHOP)).devices == ()


@pytest.mark.long  # Baileys waits 5 s longer than it was told to
async def test_cut_connection_is_a_428_and_a_silent_one_a_408(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    assert await whatsapp.cut(SHOP) == 1
    assert (await closed(clients, "shop"))["code"] == 428
    with trio.fail_after(SOON_S):
        await clients.open("shop", keepAliveMs=200)
        await clients.next("shop", "open")
    await whatsapp.silence(SHOP, on=True)
    assert (await closed(clients, "shop"))["code"] == 408


async def test_outage_refuses_connections_until_it_is_over(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.settings(outage="reset")
    await whatsapp.cut(SHOP)
    await closed(clients, "shop")
    await clients.open("shop")
    await closed(clients, "shop")
    await whatsapp.settings(outage="none")
    await log_in(clients, "shop")


# --- much at once ----------------------------------------------------------------------------


async def write_at_once(
    clients: BaileysClients, whatsapp: FakeWhatsApp, count: int
) -> tuple[Inbox, list[str]]:
    """Both sides write so many; what Anna has and what the shop could read, when both have all."""
    ours = {f"3EB0{number:04}": f"from the shop {number}" for number in range(count)}
    theirs = [f"from Anna {number}" for number in range(count)]
    before = len((await whatsapp.inbox(ANNA)).shown)
    came: list[str] = []
    with trio.fail_after(3 * SOON_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(whatsapp.send, ANNA, SHOP, theirs)
            for message_id, text in ours.items():
                await clients.tell("send", "shop", to=ANNA, text=text, id=message_id)
        inbox = await whatsapp.wait_inbox(ANNA, before + count)
        while set(came) != set(theirs):
            came += [text] if (text := (await received(clients, "shop"))["text"]) else []
    assert sorted(inbox.texts[before:]) == sorted(ours.values())
    return inbox, came


@pytest.mark.parametrize("count", [30, pytest.param(150, marks=pytest.mark.long)])
async def test_everything_is_readable_at_once_when_both_sides_write(
    clients: BaileysClients, whatsapp: FakeWhatsApp, count: int
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await get_acquainted(clients, whatsapp)
    inbox, came = await write_at_once(clients, whatsapp, count)
    assert [each.error for each in inbox.arrivals if each.error] == []
    assert (len(came), "nack" in await whatsapp.counts()) == (count, False)


@pytest.mark.long
async def test_strangers_that_write_at_once_read_everything_in_the_end(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    inbox, _ = await write_at_once(clients, whatsapp, 30)
    assert inbox.unreadable == ()


@pytest.mark.long
async def test_without_the_caching_key_store_messages_are_lost(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await get_acquainted(clients, whatsapp)
    await clients.tell("close", "shop")
    await closed(clients, "shop")
    await clients.open("shop", cached=False)
    with trio.fail_after(SOON_S):
        await clients.next("shop", "open")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(whatsapp.send, ANNA, SHOP, ["hello"] * 50)
            for number in range(50):
                await clients.tell("send", "shop", to=ANNA, text="hello", id=f"3EB0{number:04}")
        # The fake sees it when it happens: what the test above asserts is worth something.
        while not (await whatsapp.counts()).get("unreadable"):
            await trio.sleep(0.05)


async def test_told_count_of_one_time_keys_decides_what_a_client_uploads(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await whatsapp.change(SHOP, preKeyCount=3)
    await pair(clients, whatsapp, "shop", SHOP)
    assert (await whatsapp.person(SHOP)).devices[0].pre_keys == 5
    await whatsapp.cut(SHOP)
    await closed(clients, "shop")
    await log_in(clients, "shop")
    assert (await whatsapp.person(SHOP)).devices[0].pre_keys == 10


async def test_latency_is_added_to_every_answer(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await get_acquainted(clients, whatsapp)
    await whatsapp.settings(latencyMs=200)
    start = trio.current_time()
    await send(clients, "shop", ANNA, "hello", "3EB0A1")
    assert trio.current_time() - start > 0.2


@pytest.mark.long
async def test_client_asked_for_keys_uploads_812_of_them(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await whatsapp.settings(preKeys="real")
    await pair(clients, whatsapp, "shop", SHOP)
    assert (await whatsapp.person(SHOP)).devices[0].pre_keys == 812


async def test_one_time_keys_are_handed_out_once_and_asked_for_when_few_are_left(
    clients: BaileysClients, whatsapp: FakeWhatsApp
) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    writers = [f"49170000010{number}" for number in range(4)]
    for writer in writers:
        await whatsapp.send(writer, SHOP, ["hello"])
    for _ in writers:
        assert (await received(clients, "shop"))["text"] == "hello"
    with trio.fail_after(SOON_S):
        await whatsapp.wait_for("pre-keys", 2)
    assert (await whatsapp.person(SHOP)).devices[0].pre_keys == 5 - 4 + 5


# --- the control API -------------------------------------------------------------------------


async def test_nonsense_is_refused_with_what_is_wrong(whatsapp: FakeWhatsApp) -> None:
    with pytest.raises(Refused, match="no code of WhatsApp"):
        await whatsapp.scan(SHOP, "nonsense")
    with pytest.raises(Refused, match="code cannot be 999"):
        await whatsapp.close(SHOP, 999)
    with pytest.raises(Refused, match="unknown field colour"):
        await whatsapp.settings(colour="red")
    with pytest.raises(Refused, match="no linked device"):
        await whatsapp.send(ANNA, SHOP, ["hello"])
    with pytest.raises(Refused, match="no phone number"):
        await whatsapp.inbox("anna")


async def test_reset_forgets_everybody(clients: BaileysClients, whatsapp: FakeWhatsApp) -> None:
    await pair(clients, whatsapp, "shop", SHOP)
    await whatsapp.reset()
    assert (await closed(clients, "shop"))["code"] == 428
    await clients.open("shop")
    assert (await closed(clients, "shop"))["code"] == 401
