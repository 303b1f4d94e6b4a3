"""Bare Baileys with its own file store, as most backends use it: `file_clients.mjs`.

What its directories hold is what people bring along to us; what it does is what we are compared to.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import trio

from tests.whatsapp.server import FakeWhatsApp

PROGRAM = Path(__file__).parent / "file_clients.mjs"
AT_ONCE = 20


@dataclass(frozen=True, slots=True)
class Sends:
    """What came of sending for a while: how long each send took to its ack, and all of them."""

    took_s: list[float]
    seconds: float


class FileClients:
    """A Node process with accounts, each a directory of the same name. One command at a time.

    No command has a deadline: callers write `trio.fail_after`. One that fails is an
    `AssertionError` with what Baileys said.
    """

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._rest = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    async def pair(self, whatsapp: FakeWhatsApp, phones: dict[str, str]) -> None:
        """Link a device for each name with the phone of that number; nothing stays open."""
        await self._tell(command="pair", names=list(phones), atOnce=AT_ONCE)
        async with trio.open_nursery() as nursery:
            while (event := await self._next())["event"] != "done":
                if event["event"] == "qr":
                    phone = phones[event["name"]]
                    nursery.start_soon(partial(whatsapp.scan, phone, event["qr"]))

    async def open(self, names: Sequence[str], at_once: int = AT_ONCE) -> list[float]:
        """Connect, some at a time; when each was connected, in seconds since the beginning."""
        await self._tell(command="open", names=list(names), atOnce=at_once)
        return list((await self._next())["tookS"])

    async def send(self, names: Sequence[str], *, callers: int, seconds: float, to: str) -> Sends:
        """Callers that send and wait for the ack, each through the next of the accounts."""
        await self._tell(command="send", names=list(names), callers=callers, seconds=seconds, to=to)
        done = await self._next()
        return Sends(list(done["tookS"]), float(done["seconds"]))

    async def say(self, name: str, to: str, text: str) -> None:
        """Send a text through an open account, and wait for its ack."""
        await self._tell(command="say", name=name, to=to, text=text)
        assert (await self._next())["event"] == "done"

    async def wait_heard(self, name: str, text: str) -> None:
        """Wait until an open account has read it. What others heard before that is dropped."""
        wanted = {"event": "heard", "name": name, "text": text}
        while await self._next() != wanted:
            pass

    async def close(self) -> None:
        """End every connection, and wait until all of it is on the disk."""
        await self._tell(command="close")
        assert (await self._next())["event"] == "done"

    async def wait_ready(self) -> None:
        assert (await self._next())["event"] == "ready"

    async def _tell(self, **command: Any) -> None:
        assert self._process.stdin is not None
        await self._process.stdin.send_all(json.dumps(command).encode() + b"\n")

    async def _next(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            some = await self._process.stdout.receive_some()
            assert some, "the clients' process has ended"
            self._rest += some
        line, _, self._rest = self._rest.partition(b"\n")
        event: dict[str, Any] = json.loads(line)
        if event["event"] == "failed":
            raise AssertionError(f"bare Baileys failed: {event}")
        return event


@asynccontextmanager
async def open_file_clients(
    directory: Path, url: str, node: str = "node"
) -> AsyncIterator[FileClients]:
    """A process on the accounts in `directory`; killed afterwards."""
    process = await trio.lowlevel.open_process(
        [node, str(PROGRAM), str(directory), url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        clients = FileClients(process)
        await clients.wait_ready()
        yield clients
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
