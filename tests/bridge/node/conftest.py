"""One fake WhatsApp and one bridge process for most tests: each begins with nobody in either."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
import trio

from tests.bridge.node.harness import NodeBridge, NodeProcess, take_up
from tests.bridge.node.install import install_node_side
from tests.bridge.node.steps import SOON_S
from tests.whatsapp.server import MAIN, FakeWhatsApp


@pytest.fixture(scope="session")
def whatsapp_process() -> Iterator[subprocess.Popen[bytes]]:
    install_node_side()
    command = ["node", str(MAIN)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        yield process
        process.kill()


@pytest.fixture(scope="session")
def addresses(whatsapp_process: subprocess.Popen[bytes]) -> dict[str, str]:
    """Where the fake WhatsApp is: `url` for clients, `control` for us."""
    assert whatsapp_process.stdout is not None
    ready: dict[str, str] = json.loads(whatsapp_process.stdout.readline())
    return ready


@pytest.fixture
async def whatsapp(addresses: dict[str, str]) -> AsyncIterator[FakeWhatsApp]:
    async with httpx.AsyncClient(base_url=addresses["control"], timeout=SOON_S) as client:
        server = FakeWhatsApp(addresses["url"], client)
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
