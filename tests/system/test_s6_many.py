"""S6: 1,000 accounts: restored, and the first send accepted while others are still being opened."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from daemon.loopback import Behaviour, LoopbackWorld
from tests.seed import seed_accounts
from tests.system.cluster import Cluster
from tests.system.steps import LONG_ON_FIRESTORE

pytestmark = [pytest.mark.system, LONG_ON_FIRESTORE]

ACCOUNTS = 1000


@pytest.mark.long
async def test_a_send_is_accepted_while_a_thousand_accounts_are_being_opened(
    cluster: Cluster,
) -> None:
    ids = await seed_accounts(cluster.env, ACCOUNTS)
    # Logins that take their time, 50 at once: the send comes while most of them wait.
    world = LoopbackWorld(Path(cluster.env["WATCHKEEPER_LOOPBACK_DIR"]))
    await world.set_behaviour(None, Behaviour(login_delay_s=0.25))
    world.close()
    node = await cluster.start("a")
    await cluster.wait_state(node, "ACTIVE")
    answer = await cluster.send(node, ids[-1], "while others are opened")
    dashboard = await cluster.json(node, "GET", "/api/status/dashboard")
    assert answer.status_code in (200, 202), answer.text
    still_opening = [a for a in dashboard["accounts"] if a["status"] != "connected"]
    assert still_opening
    with trio.fail_after(60):
        while True:
            dashboard = await cluster.json(node, "GET", "/api/status/dashboard")
            if dashboard["restore"]["finishedAt"] is not None:
                break
            await trio.sleep(0.1)
    assert dashboard["restore"]["total"] == ACCOUNTS
    assert dashboard["restore"]["restored"] == ACCOUNTS
    assert dashboard["restore"]["failed"] == 0
    assert {a["status"] for a in dashboard["accounts"]} == {"connected"}
    done = await cluster.json(node, "GET", f"/api/whatsapp/messages/{answer.json()['messageId']}")
    assert done["status"] in ("server_ack", "delivered", "read")
