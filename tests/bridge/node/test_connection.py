"""Pairing, logging in, sending and closing, with the real Baileys and the fake WhatsApp."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from contextlib import suppress

import pytest
import trio

from tests.bridge.node.harness import Account, CallFailed, Frame, NodeBridge, open_node
from tests.bridge.node.steps import ANNA, BERND, SHOP, SOON_S, log_in, pair
from tests.whatsapp.server import FakeWhatsApp, Refused, WhatsAppProcess

pytestmark = pytest.mark.node


async def test_paired_account_logs_in_sends_and_reads(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    assert link.events[0]["phone"] == SHOP
    with trio.fail_after(SOON_S):
        assert await link.call("onWhatsApp", to=ANNA) == {"exists": True}
        await link.send("3EB0A1", ANNA, "Grüße ☕")
        inbox = await whatsapp.wait_inbox(ANNA, 1)
        assert [(each.message_id, each.text) for each in inbox.shown] == [("3EB0A1", "Grüße ☕")]
        receipt = await link.next("receipt")
        assert (receipt["messageId"], receipt["state"]) == ("3EB0A1", "delivered")
        await whatsapp.read(ANNA, SHOP)
        assert (await link.next("receipt"))["state"] == "read"
        (message_id,) = await whatsapp.send(ANNA, SHOP, ["Danke 👍"])
        await link.until(lambda: account.mail != [])
    mail = account.mail[0]
    assert (mail["messageId"], mail["text"]) == (message_id, "Danke 👍")
    assert (mail["chat"], mail["sender"], mail["senderName"]) == (ANNA, ANNA, ANNA)
    assert abs(mail["sentAt"] - time.time()) < 60


async def test_number_that_is_not_on_whatsapp_is_told(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    link = await log_in(node, await pair(node, whatsapp))
    await whatsapp.change(BERND, exists=False)
    assert await link.call("onWhatsApp", to=BERND) == {"exists": False}


async def test_number_that_whatsapp_spells_otherwise_is_told_as_unknown(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    link = await log_in(node, await pair(node, whatsapp))
    typed, spelled = "5511987654321", "551187654321"
    await whatsapp.change(typed, spelledAs=spelled)
    assert await link.call("onWhatsApp", to=typed) == {"exists": False}
    assert await link.call("onWhatsApp", to=spelled) == {"exists": True}


# --- pairing ---------------------------------------------------------------------------------


async def test_nothing_of_a_pairing_is_stored_before_a_phone_has_scanned(
    whatsapp: FakeWhatsApp,
) -> None:
    async with open_node() as node:
        await node.hello(url=whatsapp.url, qrTimeoutMs=300)
        account = Account()
        with trio.fail_after(SOON_S):
            link = await node.open(account)
            first, second = await link.next("qr"), await link.next("qr")
            assert first["qr"] != second["qr"]
            assert 0 < second["expiresAt"] - time.time() <= 0.3
            # A code changes the credentials too, and is no phone's word either.
            code = await link.call("pairingCode", phone=SHOP)
            assert len(code["code"]) == 8
            assert code["expiresAt"] > time.time()
            closed = await link.next("closed")
        assert closed["code"] == 408
        assert link.asks == []
        assert account.keys is None
        assert [each["event"] for each in link.events if each["event"] == "scanned"] == []


async def test_account_is_paired_by_a_code_typed_on_the_phone(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = Account()
    with trio.fail_after(SOON_S):
        link = await node.open(account)
        await link.next("qr")
        code = await link.call("pairingCode", phone=SHOP)
        await whatsapp.enter_code(SHOP, code["code"])
        await link.next("scanned")
        assert (await link.next("closed"))["code"] == 515
        await log_in(node, account)


async def test_pairing_is_completed_only_when_the_new_identity_is_stored(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = Account()
    with trio.fail_after(SOON_S):
        link = await node.open(account)
        link.holds = lambda ask: True
        qr = (await link.next("qr"))["qr"]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(whatsapp.scan, SHOP, qr)
            await link.next("scanned")
            await link.until(lambda: link.held != [])
            await trio.sleep(0.2)
            assert (await whatsapp.counts()).get("paired", 0) == 0
            link.release()
            assert (await link.next("closed"))["code"] == 515
        await log_in(node, account)


async def test_pairing_whose_identity_was_not_stored_is_no_pairing(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = Account()
    with trio.fail_after(SOON_S):
        link = await node.open(account)
        link.refuses = lambda ask: True
        qr = (await link.next("qr"))["qr"]
        with trio.move_on_after(1):
            with suppress(Refused):  # The phone heard no answer.
                await whatsapp.scan(SHOP, qr)
        assert (await link.next("closed"))["code"] == 503
    assert account.keys is None
    assert (await whatsapp.counts()).get("paired", 0) == 0


# --- sending ---------------------------------------------------------------------------------


async def test_what_a_send_changed_travels_with_its_ack_and_not_before(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    await link.send("3EB0A0", ANNA, "first")
    await trio.sleep(0.3)  # What else a first contact changes.
    account.change_sets.clear()
    await whatsapp.acks(SHOP, "delay", delayMs=400)
    with trio.fail_after(SOON_S):
        await link.send("3EB0A1", ANNA, "second")
    assert len(account.change_sets) == 1
    (with_ack,) = account.change_sets
    assert any(name.startswith("session-") for name in with_ack)


@pytest.mark.parametrize("code", [463, 479])
async def test_message_that_the_server_refuses_is_refused(
    node: NodeBridge, whatsapp: FakeWhatsApp, code: int
) -> None:
    link = await log_in(node, await pair(node, whatsapp))
    await whatsapp.acks(SHOP, "error", error=code, times=1)
    with trio.fail_after(SOON_S):
        with pytest.raises(CallFailed) as failed:
            await link.send("3EB0A1", ANNA, "first")
        assert (failed.value.kind, failed.value.code) == ("refused", code)
        await link.send("3EB0A2", ANNA, "second")
        assert (await whatsapp.wait_inbox(ANNA, 1)).texts == ["second"]


async def test_message_without_an_ack_fails_at_its_deadline_and_its_keys_are_told(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    await whatsapp.acks(SHOP, "withhold", times=1)
    began = time.monotonic()
    with pytest.raises(CallFailed) as failed:
        await link.send("3EB0A1", ANNA, "first", deadline_ms=500)
    assert failed.value.kind == "failed"
    assert 0.4 < time.monotonic() - began < 5
    with trio.fail_after(SOON_S):
        await link.until(
            lambda: any(
                name.startswith("session-") for change in account.change_sets for name in change
            )
        )
        # A refusal that comes later is told; a good ack has nobody to tell.
        await whatsapp.acks(SHOP, "good")
        await link.send("3EB0A2", ANNA, "second")


async def test_message_on_its_way_when_the_connection_ends_is_told_as_closed(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    link = await log_in(node, await pair(node, whatsapp))
    await whatsapp.acks(SHOP, "withhold")
    failed: list[CallFailed] = []

    async def send() -> None:
        with pytest.raises(CallFailed) as raised:
            await link.send("3EB0A1", ANNA, "first")
        failed.append(raised.value)

    with trio.fail_after(SOON_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await whatsapp.wait_for("message")
            await whatsapp.cut(SHOP)
        assert (await link.next("closed"))["code"] == 428
    assert (failed[0].kind, failed[0].code) == ("closed", 428)


async def test_server_is_told_of_new_pre_keys_only_when_they_are_stored(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    def has_pre_keys(ask: Frame) -> bool:
        return any(name.startswith("pre-key-") for name in ask.get("values", {}))

    account = await pair(node, whatsapp)
    with trio.fail_after(SOON_S):
        link = await node.open(account)
        link.holds = has_pre_keys
        await link.until(lambda: link.held != [])
        await trio.sleep(0.2)
        (device,) = (await whatsapp.person(SHOP)).devices
        assert device.pre_keys == 0
        assert link.events == []
        link.release()
        await link.next("connected")
    (device,) = (await whatsapp.person(SHOP)).devices
    stored = [name for name in account.keys or {} if name.startswith("pre-key-")]
    assert device.pre_keys == len(stored) > 0


async def test_account_that_finds_everything_as_it_was_writes_nothing(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    await whatsapp.change(SHOP, preKeyCount=500)
    account = await pair(node, whatsapp)
    with trio.fail_after(SOON_S):
        link = await log_in(node, account)
        await link.send("3EB0A1", ANNA, "one")
        await trio.sleep(0.3)
        await link.call("close")
        again = await log_in(node, account)
        await trio.sleep(0.3)
    assert again.asks == []


# --- closing ---------------------------------------------------------------------------------


async def test_each_close_comes_with_its_code(node: NodeBridge, whatsapp: FakeWhatsApp) -> None:
    account = await pair(node, whatsapp)
    with trio.fail_after(3 * SOON_S):
        for code in (401, 403, 405, 411, 440, 500, 501, 503, 515):
            link = await log_in(node, account)
            await whatsapp.close(SHOP, code)
            assert (await link.next("closed"))["code"] == code
        for code in (401, 403, 405):
            await whatsapp.refuse(SHOP, code, times=1)
            link = await node.open(account)
            assert (await link.next("closed"))["code"] == code


async def test_removed_device_is_a_401_and_no_conflict(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    await whatsapp.unlink(SHOP)
    with trio.fail_after(SOON_S):
        assert (await link.next("closed"))["code"] == 401
        again = await node.open(account)
        assert (await again.next("closed"))["code"] == 401


async def test_temporary_ban_says_how_long(node: NodeBridge, whatsapp: FakeWhatsApp) -> None:
    account = await pair(node, whatsapp)
    await whatsapp.refuse(SHOP, 402, expire_s=3600)
    with trio.fail_after(SOON_S):
        link = await node.open(account)
        closed = await link.next("closed")
    assert (closed["code"], closed["expireS"]) == (402, 3600)


async def test_second_login_of_a_device_is_a_440_for_the_first(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    first = await log_in(node, account)
    async with open_node() as other:
        await other.hello(url=whatsapp.url)
        await log_in(other, account)
        with trio.fail_after(SOON_S):
            assert (await first.next("closed"))["code"] == 440
    assert (await whatsapp.counts())["conflict"] == 1


async def test_closed_connection_ends_at_the_server_and_mentions_itself_no_more(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    other = await log_in(node, await pair(node, whatsapp, "kiosk", BERND))
    with trio.fail_after(SOON_S):
        assert await link.call("close") == {}
        events = len(link.events)
        (device,) = (await whatsapp.person(SHOP)).devices
        assert not device.connected
        assert (await node.call("ping"))["connections"] == 1
        await other.send("3EB0A1", ANNA, "still here")
    assert len(link.events) == events
    assert "closed" not in [each["event"] for each in link.events]


async def test_server_that_hangs_does_not_hold_a_close_up(
    node: NodeBridge, whatsapp: FakeWhatsApp, whatsapp_process: WhatsAppProcess
) -> None:
    link = await log_in(node, await pair(node, whatsapp))
    os.kill(whatsapp_process.pid, signal.SIGSTOP)
    try:
        half_open = await node.open(Account("kiosk"))  # No handshake is answered.
        for each in (link, half_open):
            began = time.monotonic()
            await each.call("close")
            assert time.monotonic() - began < 5
    finally:
        os.kill(whatsapp_process.pid, signal.SIGCONT)


async def test_end_of_the_line_ends_a_process_with_a_live_connection_at_once(
    whatsapp: FakeWhatsApp,
) -> None:
    async with open_node() as node:
        await node.hello(url=whatsapp.url)
        await log_in(node, await pair(node, whatsapp))
        began = time.monotonic()
        node.end_line()
        assert await node.wait_exit() == 0
        assert time.monotonic() - began < 1


async def test_logout_unlinks_the_device(node: NodeBridge, whatsapp: FakeWhatsApp) -> None:
    link = await log_in(node, await pair(node, whatsapp))
    with trio.fail_after(SOON_S):
        assert await link.call("logout") == {}
        assert (await link.next("closed"))["code"] == 401
    assert (await whatsapp.person(SHOP)).devices == ()


async def test_keys_that_were_not_stored_end_the_connection(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    stored = dict(account.keys or {})
    link = await node.open(account)
    link.refuses = lambda ask: True
    with trio.fail_after(SOON_S):
        assert (await link.next("closed"))["code"] == 503
    assert account.keys == stored


async def test_store_that_is_slow_for_one_account_holds_no_other_up(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    shop = await log_in(node, await pair(node, whatsapp))
    kiosk = await log_in(node, await pair(node, whatsapp, "kiosk", BERND))
    shop.holds = lambda ask: True
    with trio.fail_after(SOON_S):
        await whatsapp.send(ANNA, SHOP, ["one"])
        await shop.until(lambda: shop.held != [])
        await kiosk.send("3EB0A1", ANNA, "two")
        await whatsapp.send(ANNA, BERND, ["three"])
        await kiosk.until(lambda: kiosk.account.mail != [])
    assert shop.account.mail == []


@pytest.mark.long
async def test_daemon_that_does_not_read_loses_the_process(
    whatsapp: FakeWhatsApp, node: NodeBridge
) -> None:
    """Seven changes of 12 MB are more than the 64 MB that may wait to be written."""
    account = await pair(node, whatsapp)
    creds = json.loads((account.keys or {})["creds"])
    account.keys = {"creds": json.dumps({**creds, "additionalData": "x" * 12_000_000})}
    async with open_node() as deaf:
        await deaf.hello(url=whatsapp.url)
        deaf.stop_reading()
        for number in range(100, 107):
            fields = {"account": "shop", "keys": account.keys, "connection": number}
            more = {"doubtful": [], "distrustSessions": False}
            deaf.write({"call": "open", "id": number, "deadlineMs": 1000, **fields, **more})
        with trio.fail_after(SOON_S):
            while deaf.process.poll() is None:
                await trio.sleep(0.05)
        assert deaf.process.returncode == 1


async def test_no_log_record_holds_a_number_a_text_or_a_key(
    node: NodeBridge, whatsapp: FakeWhatsApp
) -> None:
    account = await pair(node, whatsapp)
    link = await log_in(node, account)
    with trio.fail_after(SOON_S):
        await link.send("3EB0A1", ANNA, "meet me at noon")
        await whatsapp.forget(ANNA, SHOP)  # libsignal closes a session, and would print it.
        await link.send("3EB0A2", ANNA, "meet me at one")
        await whatsapp.wait_inbox(ANNA, 2)
        await whatsapp.send(ANNA, SHOP, ["at noon then"])
        await link.until(lambda: account.mail != [])
        await link.call("close")
    printed = json.dumps(node.logs, ensure_ascii=False)
    consoles = [each["message"] for each in node.logs if "console." in each["message"]]
    assert any("session" in each for each in consoles)
    node.printed.seek(0)
    assert node.printed.read() == b""
    # Objects are described by their kind: nothing of them is shown.
    assert [each for each in consoles if re.search(r"[\[{]", each)] == []
    creds = json.loads((account.keys or {})["creds"])
    secret = creds["signedIdentityKey"]["private"]["data"]
    for needle in ("noon", "meet", SHOP, ANNA, SHOP[2:], secret, secret[:20]):
        assert needle not in printed
