"""One fake WhatsApp and one bridge process for most tests: each begins with nobody in either."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import trio

from tests.bridge.node.harness import NodeBridge, NodeProcess, take_up
from tests.bridge.node.install import install_node_side
from tests.bridge.node.steps import SOON_S
from tests.whatsapp.server import FakeWhatsApp, WhatsAppProcess


@pytest.fixture(scope="session")
def whatsapp_process() -> Iterator[WhatsAppProcess]:
    install_node_side()
    process = WhatsAppProcess()
    process.start()
    yield process
    process.close()


@pytest.fixture
async def whatsapp(whatsapp_process: WhatsAppProcess) -> AsyncIterator[FakeWhatsApp]:
    async with whatsapp_process.open_control() as server:
        await server.reset()
        yield server


@pytest.fixture(scope="session")
def node_process() -> Iterator[NodeProcess]:
    install_node_side()
    process = NodeProcess()
    yield process
    process.end()


@pytest.fixture
async def node(node_process: NodeProcess, whatsapp: FakeWhatsApp) -> AsyncIterator[NodeBridge]:
    """A process that has said hello, and whose WhatsApp is the fake one."""
    async with take_up(node_process) as bridge:
        if next(node_process.ids) == 1:
            await bridge.hello(url=whatsapp.url)
        yield bridge
        with trio.fail_after(SOON_S):
            await bridge.close_all()
