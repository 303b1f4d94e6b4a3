"""No secret of an account leaves through the bridge: its logs, its environment, its death."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
import trio

from tests.system.cluster import KEY, TOKEN
from tests.system.secrets import credentials, forms
from tests.whatsapp.server import FakeWhatsApp
from tests.whatsapp.steps import open_whatsapp_cluster, pair
from tests.whatsapp.test_bridge_dies import bridge_pids, wait_connections

pytestmark = [pytest.mark.node, pytest.mark.system, pytest.mark.long]

PHONE = "4915550000001"
CONTACT = "4915112345678"
TEXT = "confidential: the launch is on friday"


async def test_no_secret_leaves_through_a_bridge_that_fails_in_every_way(
    tmp_path: Path, whatsapp: FakeWhatsApp
) -> None:
    async with open_whatsapp_cluster(tmp_path, whatsapp) as cluster:
        with trio.fail_after(90):
            node = await cluster.start("a", state="ACTIVE", WATCHKEEPER_BRIDGE_PING_S="1")
            await pair(cluster, node, whatsapp, "anna", PHONE)
            assert (await cluster.send(node, "anna", TEXT)).json()["status"] == "server_ack"
            await whatsapp.send(CONTACT, PHONE, TEXT)
            (pid,) = bridge_pids(node)
            seen = [
                Path(f"/proc/{pid}/{name}").read_text(errors="replace")
                for name in ("environ", "cmdline")
            ]
            limits = Path(f"/proc/{pid}/limits").read_text()
            place = Path(f"/proc/{pid}/cwd").readlink()
            before = set(place.glob("core*"))
            # A message for somebody whom the server does not know, and connections that end badly.
            await cluster.ask(
                node,
                "POST",
                "/api/whatsapp/send-message",
                json={"accountId": "anna", "to": "4900000", "message": TEXT},
            )
            await whatsapp.cut(PHONE)
            await wait_connections(cluster, node, 2)
            # Node dies as it does of a bug of its own: with an abort, which would leave a core.
            os.kill(pid, signal.SIGABRT)
            await wait_connections(cluster, node, 3)
            assert (await cluster.send(node, "anna", TEXT)).status_code in (200, 202)
            secrets = await credentials(cluster) | forms(TOKEN.encode()) | {TOKEN, KEY}
            await whatsapp.unlink(PHONE)
            while "account anna is logged_out" not in node.log():
                await trio.sleep(0.05)
            assert await node.stop() == 0
    assert len(secrets) > 50
    assert re.search(r"^Max core file size +1 +1 +bytes", limits, re.MULTILINE), limits
    assert set(place.glob("core*")) == before
    for where, content in (("the log", node.log()), ("the process list", "\n".join(seen))):
        leaked = sum(1 for secret in secrets if secret in content)
        assert leaked == 0, f"{leaked} secrets in {where}"
        assert TEXT not in content, where
    assert "WATCHKEEPER" not in seen[0]
