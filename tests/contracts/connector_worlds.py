"""One connector each to hold to the contract, with the phones and recipients of its WhatsApp.

The real Baileys, against the fake server, is imported only when asked for.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from daemon.loopback import Behaviour, LoopbackConnector, LoopbackTiming, LoopbackWorld
from machine.ports import Connector
from machine.records import AccountId, MessageState
from tests.fakes.clocks import FakeClocks
from tests.fakes.connector import FakeWhatsApp
from tests.fakes.journal import RecordingJournal

ANNA = AccountId("anna")
PHONE = "4915550000001"
STRANGER = "4915599999999"
WRITER = "4917012345678"
"""A number without WhatsApp."""


@dataclass(frozen=True)
class ConnectorWorld:
    """Two instances' ways to one WhatsApp, and what people do there.

    `scan(qr)` is done by Anna's phone; `cut` and `unlink` befall her account. `shown(to)` is what a
    recipient could read; `unreadable(to)` how many messages it could not. `write(text)` has
    `WRITER` write to her.
    """

    connector: Connector
    another: Connector
    scan: Callable[[str], Awaitable[None]]
    cut: Callable[[int], Awaitable[None]]
    unlink: Callable[[], Awaitable[None]]
    shown: Callable[[str], Awaitable[list[tuple[str, str]]]]
    unreadable: Callable[[str], Awaitable[int]]
    evictions: Callable[[], Awaitable[int]]
    write: Callable[[str], Awaitable[None]]


def open_connector_world(
    adapter: str, directory: Path
) -> AbstractAsyncContextManager[ConnectorWorld]:
    """A world without any account, behind `adapter`."""
    if adapter == "fake":
        return _open_fake()
    if adapter == "loopback":
        return _open_loopback(directory)
    return _open_baileys()


@asynccontextmanager
async def _open_fake() -> AsyncIterator[ConnectorWorld]:
    world = FakeWhatsApp()
    script = world.script(ANNA)
    script.receipts = (MessageState.DELIVERED,)
    script.not_on_whatsapp = {STRANGER}

    async def scan(qr: str) -> None:
        world.scan(ANNA, PHONE)

    async def cut(code: int) -> None:
        world.cut(ANNA, code)

    async def unlink() -> None:
        world.unlinked.add(ANNA)

    async def shown(to: str) -> list[tuple[str, str]]:
        return [(each.message_id, each.text) for each in world.inbox(to)]

    async def unreadable(to: str) -> int:
        return sum(each.to == to for each in world.unreadable())

    async def evictions() -> int:
        return len(world.evictions)

    async def write(text: str) -> None:
        world.post(ANNA, f"3A{len(world.mail_delivered)}", text, sender=WRITER)

    yield ConnectorWorld(
        world.connector(), world.connector(), scan, cut, unlink, shown, unreadable, evictions, write
    )


@asynccontextmanager
async def _open_loopback(directory: Path) -> AsyncIterator[ConnectorWorld]:
    world = LoopbackWorld(directory)
    timing = LoopbackTiming(watch_every_s=60)
    await world.set_behaviour(ANNA, Behaviour(not_on_whatsapp=frozenset({STRANGER})))

    async def scan(qr: str) -> None:
        await world.scan(ANNA, PHONE)

    async def cut(code: int) -> None:
        await world.cut(ANNA, code)

    async def unlink() -> None:
        await world.unlink(ANNA)

    async def shown(to: str) -> list[tuple[str, str]]:
        arrivals = (await world.list_messages()).arrivals
        return [(each.message_id, each.text) for each in arrivals if each.to == to]

    async def unreadable(to: str) -> int:
        arrivals = (await world.list_messages(raw=True)).arrivals
        return sum(not each.readable for each in arrivals if each.to == to)

    async def evictions() -> int:
        return (await world.list_evictions())[0]

    async def write(text: str) -> None:
        await world.receive(ANNA, WRITER, text)

    try:
        yield ConnectorWorld(
            LoopbackConnector(directory, timing=timing),
            LoopbackConnector(directory, timing=timing),
            scan,
            cut,
            unlink,
            shown,
            unreadable,
            evictions,
            write,
        )
    finally:
        world.close()


@asynccontextmanager
async def _open_baileys() -> AsyncIterator[ConnectorWorld]:
    from daemon.bridge.connector import BridgeLimits, open_baileys
    from daemon.bridge.frames import Options
    from daemon.bridge.install import PROGRAM, find_node
    from daemon.bridge.process import ProcessPlan
    from tests.bridge.node.install import install_node_side
    from tests.whatsapp.server import open_whatsapp

    program = install_node_side() / PROGRAM
    node = await trio.to_thread.run_sync(find_node, "node")
    async with open_whatsapp() as server:
        plan = ProcessPlan(
            (node.path, str(program)),
            Options(
                browser=("Ubuntu", "Chrome", "22.04.4"),
                log_level="warning",
                connect_timeout_ms=10_000,
                url=server.url,
            ),
        )
        await server.change(STRANGER, exists=False)

        def make() -> AbstractAsyncContextManager[Connector]:
            return open_baileys(
                plan,
                BridgeLimits(),
                journal=RecordingJournal(),
                clocks=FakeClocks(),
                rng=random.Random(1),
            )

        async def scan(qr: str) -> None:
            await server.scan(PHONE, qr)

        async def cut(code: int) -> None:
            await server.close(PHONE, code)

        async def unlink() -> None:
            await server.unlink(PHONE)

        async def shown(to: str) -> list[tuple[str, str]]:
            return [(each.message_id, each.text) for each in (await server.inbox(to)).shown]

        async def unreadable(to: str) -> int:
            return len((await server.inbox(to)).unreadable)

        async def evictions() -> int:
            return (await server.counts()).get("conflict", 0)

        async def write(text: str) -> None:
            await server.send(WRITER, PHONE, [text])

        async with make() as connector, make() as another:
            yield ConnectorWorld(
                connector, another, scan, cut, unlink, shown, unreadable, evictions, write
            )
