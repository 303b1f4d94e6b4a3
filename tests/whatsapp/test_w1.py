"""W1: an account is paired and used, from the HTTP API to a phone that reads what was sent."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio

from tests.whatsapp.server import FakeWhatsApp
from tests.whatsapp.steps import open_whatsapp_cluster, pair

pytestmark = [pytest.mark.node, pytest.mark.system]

PHONE = "4915550000001"
CONTACT = "4915112345678"
WITHIN_S = 60.0


async def test_an_account_is_paired_sends_and_is_answered(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    async with open_whatsapp_cluster(tmp_path, whatsapp) as cluster:
        with trio.fail_after(WITHIN_S):
            node = await cluster.start("a", state="ACTIVE")
            await pair(cluster, node, whatsapp, "anna", PHONE)
            listed = await cluster.json(node, "GET", "/api/whatsapp/accounts/anna")
            assert listed["account"]["phone"] == PHONE

            sent = await cluster.send(node, "anna", "Grüße aus Ł - 🌍")
            assert sent.status_code == 200, sent.text
            assert sent.json()["status"] == "server_ack"
            inbox = await whatsapp.wait_inbox(CONTACT, 1)
            assert inbox.texts == ["Grüße aus Ł - 🌍"]
            assert [each.message_id for each in inbox.shown] == [sent.json()["messageId"]]
            assert inbox.unreadable == ()

            # The contact hears that its answer arrived only when the store has it, so it is there.
            (answer,) = await whatsapp.send(CONTACT, PHONE, ["Antwort: žluťoučký kůň"])
            await wait_receipt(whatsapp, answer)
            path = "/api/whatsapp/messages?accountId=anna&direction=in"
            (mail,) = (await cluster.json(node, "GET", path))["messages"]
            assert (mail["messageId"], mail["from"], mail["chat"]) == (answer, CONTACT, CONTACT)
            assert mail["text"] == "Antwort: žluťoučký kůň"

            metrics = (await cluster.ask(node, "GET", "/metrics")).text
            assert "watchkeeper_bridge_processes 1.0\n" in metrics
            assert "watchkeeper_bridge_connections 1.0\n" in metrics

            # Redeployed, the same device goes on: nobody scans again, both ways stay readable.
            assert await node.stop() == 0
            await cluster.restart(node, state="ACTIVE")
            await cluster.wait_connected(node, "anna")
            again = await cluster.send(node, "anna", "zurück")
            assert again.json()["status"] == "server_ack"
            inbox = await whatsapp.wait_inbox(CONTACT, 2)
            assert (inbox.texts[1], inbox.unreadable, inbox.duplicates) == ("zurück", (), [])
            await wait_receipt(whatsapp, *await whatsapp.send(CONTACT, PHONE, ["noch da?"]))
            received = (await cluster.json(node, "GET", path))["messages"]
            assert [each["text"] for each in received] == ["Antwort: žluťoučký kůň", "noch da?"]
        counts = await whatsapp.counts()
        assert (counts.get("paired"), counts.get("conflict", 0)) == (1, 0)
        log = node.log()
        for text in ("Grüße", "Antwort", "zurück", "noch da"):
            assert text not in log
        assert re.search(r"[A-Za-z0-9+/]{43}=", log) is None, "a key in base64"


async def wait_receipt(whatsapp: FakeWhatsApp, message_id: str) -> None:
    """Wait until the contact's message was received: stored, and then confirmed."""
    while True:
        for sent in await whatsapp.sent(CONTACT):
            if sent.message_id == message_id and sent.receipts:
                assert "retry" not in sent.receipts
                return
        await trio.sleep(0.05)
