"""Steps that the tests of the bridge have in common."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from daemon.bridge.connector import BaileysConnector, BridgeLimits, open_baileys
from daemon.bridge.frames import Options
from daemon.bridge.process import BridgeProcess, ProcessPlan
from machine.ports import Bridge, Connected, Connection
from machine.records import AccountId, KeyName, MessageId
from tests.fakes.clocks import FakeClocks
from tests.fakes.journal import RecordingJournal

ANNA = AccountId("anna")
BERT = AccountId("bert")
TO = "4915187654321"
KEYS = {KeyName("creds"): b'{"me":1}'}
OPTIONS = Options(browser=("Ubuntu", "Chrome", "22.04.4"), log_level="info", connect_timeout_ms=1)
PEER = (sys.executable, "-I", "-S", str(Path(__file__).with_name("peer.py")))
WITHIN_S = 20.0
"""For what takes milliseconds on a machine that is not busy."""


def plan(*arguments: str, **times: float) -> ProcessPlan:
    """The scripted peer as the bridge's program."""
    return ProcessPlan((*PEER, *arguments), OPTIONS, **times)


def message_id(number: int) -> MessageId:
    return MessageId(f"3EB0{number:012X}")


def is_gone(pid: int) -> bool:
    """Whether no such process exists, dead and unreaped ones included."""
    return not Path(f"/proc/{pid}").exists()


def is_dead(pid: int) -> bool:
    """Whether it runs no more; whoever is its parent now may not have reaped it yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in "ZX"


def do(*actions: dict[str, Any]) -> str:
    """A text that the peer takes for a script."""
    return "do:" + json.dumps(actions)


@asynccontextmanager
async def running(process: BridgeProcess) -> AsyncIterator[None]:
    """A process from its hello to its end."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.run)
        await process.wait_ready()
        yield
        process.kill("the test is over", stopped=True)


@asynccontextmanager
async def connector(
    given: ProcessPlan | None = None, limits: BridgeLimits | None = None
) -> AsyncIterator[tuple[BaileysConnector, RecordingJournal]]:
    """A connector of scripted peers, and what it tells."""
    journal = RecordingJournal()
    async with open_baileys(
        given or plan(),
        limits or BridgeLimits(),
        journal=journal,
        clocks=FakeClocks(),
        rng=random.Random(1),
    ) as made:
        yield made, journal


@asynccontextmanager
async def connected(
    bridge: Bridge, account_id: AccountId = ANNA, **given: Any
) -> AsyncIterator[Connection]:
    """A connection that has said that it is connected."""
    async with bridge.open_connection(account_id, KEYS, **given) as connection:
        while not isinstance(await connection.next_event(), Connected):
            pass
        yield connection
