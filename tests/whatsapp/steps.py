"""Steps that the tests with real instances, real Baileys and the fake server have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from tests.bridge.node.install import install_node_side
from tests.system.cluster import REACH_S, Cluster, Node, open_cluster, sqlite_env
from tests.whatsapp.server import FakeWhatsApp


@asynccontextmanager
async def open_whatsapp_cluster(directory: Path, whatsapp: FakeWhatsApp) -> AsyncIterator[Cluster]:
    """Instances on one SQLite store, connected to the fake server through Baileys."""
    install_node_side()
    env = {
        **sqlite_env(directory),
        "WATCHKEEPER_CONNECTOR": "baileys",
        "WATCHKEEPER_WHATSAPP_URL": whatsapp.url,
    }
    async with open_cluster(directory, env) as cluster:
        yield cluster


async def pair(
    cluster: Cluster, node: Node, whatsapp: FakeWhatsApp, account_id: str, phone: str
) -> None:
    """Add an account through the API and scan its QR code; returns when it is connected."""
    path = "/api/whatsapp/accounts"
    body = {"accountId": account_id, "name": f"{account_id}'s"}
    await cluster.json(node, "POST", path, json=body)
    await whatsapp.scan(phone, await shown_qr(cluster, node, account_id))
    await cluster.wait_connected(node, account_id)


async def shown_qr(cluster: Cluster, node: Node, account_id: str) -> str:
    """The QR code to scan now."""
    with trio.fail_after(REACH_S):
        while True:
            answer = await cluster.ask(
                node,
                "GET",
                f"/api/whatsapp/accounts/{account_id}/qr",
            )
            if answer.status_code == 200:
                return str(answer.json()["qr"])
            await trio.sleep(0.05)
