"""Bare Baileys clients, to see what the real client does with the fake server: `client.mjs`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tests.whatsapp.server import START_S_MAX, end_group, read_line

CLIENT = Path(__file__).parent / "client.mjs"

Event = dict[str, Any]


class BaileysClients:
    """Accounts by name, of one test. Every event is kept until somebody waits for it."""

    def __init__(self, stream: trio.SocketStream, url: str) -> None:
        self._stream = stream
        self._url = url
        self._events: list[Event] = []
        self._came = trio.Event()
        self._telling = trio.Lock()

    async def tell(self, command: str, name: str, **fields: Any) -> None:
        """Give a command; what comes of it is an event."""
        line = json.dumps({"command": command, "name": name, **fields}) + "\n"
        async with self._telling:
            await self._stream.send_all(line.encode())

    async def open(self, name: str, **options: Any) -> None:
        """Connect; without credentials a pairing begins."""
        await self.tell("open", name, url=self._url, **options)

    async def next(
        self, name: str, event: str, matches: Callable[[Event], bool] = lambda _: True
    ) -> Event:
        """Wait for such an event and take it. Events are not in order of each other."""
        while True:
            for index, each in enumerate(self._events):
                if each["event"] == "failed":
                    raise AssertionError(f"the client failed: {each}")
                if (each["name"], each["event"]) == (name, event) and matches(each):
                    return self._events.pop(index)
            came = self._came
            await came.wait()

    def seen(self, name: str, event: str) -> list[Event]:
        """Such events that nobody has taken."""
        return [each for each in self._events if (each["name"], each["event"]) == (name, event)]

    async def keep_reading(self) -> None:
        """Collect what happens, until the connection ends."""
        rest = b""
        async for some in self._stream:
            *lines, rest = (rest + some).split(b"\n")
            self._events += [json.loads(line) for line in lines]
            self._came.set()
            self._came = trio.Event()


class ClientsProcess:
    """A Node process for clients, shared by tests: Baileys takes a second to load."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            ["node", str(CLIENT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        ready = read_line(self._process, START_S_MAX)
        assert ready is not None, "the clients' process did not start"
        self._port = int(ready["port"])

    def close(self) -> None:
        end_group(self._process)

    @asynccontextmanager
    async def open_clients(self, url: str) -> AsyncIterator[BaileysClients]:
        """Accounts of the server at `url`; forgotten, and their connections closed, afterwards."""
        stream = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with stream, trio.open_nursery() as nursery:
            clients = BaileysClients(stream, url)
            nursery.start_soon(clients.keep_reading)
            yield clients
            nursery.cancel_scope.cancel()
