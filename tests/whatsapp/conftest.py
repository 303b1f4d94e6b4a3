from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.bridge.node.install import install_node_side
from tests.whatsapp.clients import BaileysClients, ClientsProcess
from tests.whatsapp.server import FakeWhatsApp, WhatsAppProcess


@pytest.fixture(scope="session")
def whatsapp_process() -> Iterator[WhatsAppProcess]:
    """One server for the tests of this directory; it forgets everything between them."""
    install_node_side()
    process = WhatsAppProcess()
    process.start()
    yield process
    process.close()


@pytest.fixture(scope="session")
def clients_process() -> Iterator[ClientsProcess]:
    install_node_side()
    process = ClientsProcess()
    yield process
    process.close()


@pytest.fixture
async def whatsapp(whatsapp_process: WhatsAppProcess) -> AsyncIterator[FakeWhatsApp]:
    async with whatsapp_process.open_control() as server:
        await server.reset()
        yield server


@pytest.fixture
async def clients(
    whatsapp: FakeWhatsApp, clients_process: ClientsProcess
) -> AsyncIterator[BaileysClients]:
    async with clients_process.open_clients(whatsapp.url) as opened:
        yield opened
