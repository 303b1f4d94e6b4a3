"""W1: an account is paired and used, from the HTTP API to a phone that reads what was sent."""

from __future__ import annotations

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
