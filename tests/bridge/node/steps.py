"""What nearly every test with the fake WhatsApp does first."""

from __future__ import annotations

import trio

from tests.bridge.node.harness import Account, NodeBridge, NodeLink
from tests.whatsapp.server import FakeWhatsApp

SHOP = "4915550000001"
ANNA = "491700000001"
BERND = "491700000002"
SOON_S = 20.0


async def pair(
    node: NodeBridge, whatsapp: FakeWhatsApp, name: str = "shop", number: str = SHOP
) -> Account:
    """Pair a new account by QR code; what is stored of it when the server restarts it."""
    account = Account(name)
    with trio.fail_after(SOON_S):
        link = await node.open(account)
        await whatsapp.scan(number, (await link.next("qr"))["qr"])
        assert (await link.next("closed"))["code"] == 515
    return account


async def log_in(node: NodeBridge, account: Account) -> NodeLink:
    with trio.fail_after(SOON_S):
        link = await node.open(account)
        assert (await link.next("connected"))["connection"] == link.number
    return link
