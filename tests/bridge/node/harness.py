"""Drives the bridge's real Node process over its line, and plays the daemon's part of the contract.

Frames are plain dictionaries here, so that a test says exactly what is on the line. What the daemon
would store is kept in an `Account`: its keys after every change set, its mail, its sent texts.
"""

from __future__ import annotations

import json
import math
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from subprocess import Popen
from typing import Any

import trio

from tests.bridge.node.install import NODE_SIDE, install_node_side

Frame = dict[str, Any]
CALL_S = 30.0
EXIT_S = 5.0
BROWSER = ["Linux", "Chrome", "1.0"]


class CallFailed(Exception):
    """A call was answered with an error."""

    def __init__(self, error: Frame) -> None:
        super().__init__(f"{error['kind']} {error.get('code', '')}: {error['message']}")
        self.kind: str = error["kind"]
        self.code: int | None = error.get("code")


@dataclass(slots=True)
class Account:
    """What a daemon has stored of one account."""

    name: str = "shop"
    keys: dict[str, str] | None = None
    mail: list[Frame] = field(default_factory=list)
    bodies: dict[str, str] = field(default_factory=dict)
    change_sets: list[dict[str, str | None]] = field(default_factory=list)

    def apply(self, values: Mapping[str, str | None]) -> None:
        """Store a change set."""
        self.change_sets.append(dict(values))
        if self.keys is None:
            self.keys = {}
        for name, text in values.items():
            if text is None:
                self.keys.pop(name, None)
            else:
                self.keys[name] = text


class NodeLink:
    """One opened connection: its events in order, and how its asks are answered."""

    def __init__(self, node: NodeBridge, number: int, account: Account) -> None:
        self.number = number
        self.account = account
        self.node = node
        self.events: list[Frame] = []
        self.asks: list[Frame] = []
        """Every ask, answered or not."""
        self.held: list[Frame] = []
        """Asks that wait for `answer`, because `holds` said so."""
        self.holds: Callable[[Frame], bool] = lambda ask: False
        self.refuses: Callable[[Frame], bool] = lambda ask: False
        self._seen = 0

    async def next(self, event: str) -> Frame:
        """Wait for the next event of this kind; those before it are passed over."""
        while True:
            for place in range(self._seen, len(self.events)):
                if self.events[place]["event"] == event:
                    self._seen = place + 1
                    return self.events[place]
            await self.node.news()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something that frames change is so."""
        while not condition():
            await self.node.news()

    async def call(self, call: str, **fields: Any) -> Frame:
        return await self.node.call(call, connection=self.number, **fields)

    async def send(self, message_id: str, to: str, text: str, deadline_ms: int = 20_000) -> Frame:
        """Send a text, and store what the reply says, in the step in which it arrives."""
        self.account.bodies[message_id] = text
        frame = {"connection": self.number, "messageId": message_id, "to": to, "text": text}
        return await self.node.call(
            "send", **frame, deadlineMs=deadline_ms, taken=lambda ok: self.account.apply(ok["keys"])
        )

    def take(self, ask: Frame) -> None:
        self.asks.append(ask)
        if self.refuses(ask):
            self.node.write({"answer": ask["id"], "error": {"kind": "failed", "message": "away"}})
        elif self.holds(ask):
            self.held.append(ask)
        else:
            self.answer(ask)

    def answer(self, ask: Frame) -> None:
        """Do what is asked, and say so."""
        ok: Frame = {}
        match ask["ask"]:
            case "keys":
                self.account.apply(ask["values"])
            case "received":
                self.account.mail.append(ask["message"])
                self.account.apply(ask["values"])
            case "body":
                ok = {"text": self.account.bodies.get(ask["messageId"])}
        self.node.write({"answer": ask["id"], "ok": ok})

    def release(self) -> None:
        """Answer everything that was held, and hold no more."""
        self.holds = lambda ask: False
        while self.held:
            self.answer(self.held.pop(0))


class NodeProcess:
    """The process and our end of its line, which tests may take up one after the other."""

    def __init__(self) -> None:
        self.printed = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._line = ours.dup()
            self.process = Popen(
                ["bash", "-c", f"exec node main.mjs 3<&{theirs.fileno()}"],
                cwd=NODE_SIDE,
                pass_fds=(theirs.fileno(),),
                env={"PATH": os.environ["PATH"]},
                stdout=self.printed,
                stderr=self.printed,
            )
        self.ids = count(1)
        self.numbers = count(1)
        self.unread = b""
        """The beginning of a frame that the last reader did not see the end of."""

    def line(self) -> trio.SocketStream:
        """Our end; closing it does not end the line."""
        return trio.SocketStream(trio.socket.from_stdlib_socket(self._line.dup()))

    def end_line(self) -> None:
        """End the line, as a daemon that dies does."""
        self._line.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._line.close()
        self.printed.close()


class NodeBridge:
    """A running bridge process, as one test has it."""

    def __init__(self, shared: NodeProcess, line: trio.SocketStream) -> None:
        self.process = shared.process
        self.printed = shared.printed
        """What it wrote to its standard streams."""
        self.logs: list[Frame] = []
        self.stray: list[Frame] = []
        """Replies to calls that a test wrote by itself."""
        self.ended = False
        self._shared = shared
        self._line = line
        self._calls: dict[int, tuple[trio.Event, Callable[[Frame], None] | None]] = {}
        self._replies: dict[int, Frame] = {}
        self._links: dict[int, NodeLink] = {}
        self._news = trio.Event()
        self._reading = trio.CancelScope()
        self._out, self._queue = trio.open_memory_channel[bytes](math.inf)

    async def news(self) -> None:
        """Wait for the next frame."""
        assert not self.ended, "the process has ended"
        await self._news.wait()

    async def until_ended(self) -> None:
        """Wait until everything that was on the line is read."""
        while not self.ended:
            await self._news.wait()

    async def hello(self, **options: Any) -> Frame:
        given = {"browser": BROWSER, "logLevel": "debug", **options}
        return await self.call("hello", options=given)

    async def open(
        self, account: Account, *, doubtful: tuple[str, ...] = (), distrust: bool = False
    ) -> NodeLink:
        """Open an account with what is stored of it."""
        link = NodeLink(self, next(self._shared.numbers), account)
        self._links[link.number] = link
        await link.call(
            "open",
            account=account.name,
            keys=None if account.keys is None else dict(account.keys),
            doubtful=list(doubtful),
            distrustSessions=distrust,
        )
        return link

    async def call(
        self,
        call: str,
        *,
        deadlineMs: int = 20_000,  # noqa: N803  # as on the line
        taken: Callable[[Frame], None] | None = None,
        **fields: Any,
    ) -> Frame:
        """Call; `taken` gets the reply in the very step in which it is read."""
        call_id = next(self._shared.ids)
        replied = trio.Event()
        self._calls[call_id] = (replied, taken)
        self.write({"call": call, "id": call_id, "deadlineMs": deadlineMs, **fields})
        with trio.fail_after(CALL_S):
            await replied.wait()
        reply = self._replies.pop(call_id)
        if "error" in reply:
            raise CallFailed(reply["error"])
        ok: Frame = reply["ok"]
        return ok

    def write(self, frame: Frame) -> None:
        self.write_bytes(json.dumps({"v": 1, **frame}).encode() + b"\n")

    def write_bytes(self, raw: bytes) -> None:
        """Put bytes on the line as they are."""
        self._out.send_nowait(raw)

    async def wait_exit(self) -> int:
        """The process's exit code."""
        with trio.fail_after(EXIT_S):
            while (code := self.process.poll()) is None:
                await trio.sleep(0.005)
        return code

    def end_line(self) -> None:
        """End the line, as a daemon that dies does."""
        self._shared.end_line()

    def stop_reading(self) -> None:
        """From now on nothing is taken off the line."""
        self._reading.cancel()

    async def close_all(self) -> None:
        """Close every connection, so that the next test finds none."""
        for number in self._links:
            await self.call("close", connection=number)

    async def serve_out(self) -> None:
        async for raw in self._queue:
            try:
                await self._line.send_all(raw)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def serve_in(self) -> None:
        try:
            with self._reading:
                await self._read()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.ended = True
        self._wake()

    async def _read(self) -> None:
        async for chunk in self._line:
            *lines, self._shared.unread = (self._shared.unread + chunk).split(b"\n")
            for each in lines:
                self._take(json.loads(each))
            self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def _take(self, frame: Frame) -> None:
        assert frame.pop("v") == 1
        if "reply" in frame:
            if frame["reply"] not in self._calls:
                self.stray.append(frame)
                return
            replied, taken = self._calls.pop(frame["reply"])
            if taken is not None and "ok" in frame:
                taken(frame["ok"])
            self._replies[frame["reply"]] = frame
            replied.set()
        elif frame.get("event") == "log":
            self.logs.append(frame)
        elif (link := self._links.get(frame["connection"])) is None:
            assert frame["connection"] < next(self._shared.numbers)
        elif "event" in frame:
            link.events.append(frame)
        else:
            link.take(frame)


@asynccontextmanager
async def take_up(process: NodeProcess) -> AsyncIterator[NodeBridge]:
    """Speak with a process that outlives this block."""
    line = process.line()
    bridge = NodeBridge(process, line)
    async with line, trio.open_nursery() as nursery:
        nursery.start_soon(bridge.serve_out)
        nursery.start_soon(bridge.serve_in)
        yield bridge
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_node() -> AsyncIterator[NodeBridge]:
    """Start the process, with nothing said on the line yet; afterwards it is gone."""
    await trio.to_thread.run_sync(install_node_side)
    process = NodeProcess()
    try:
        async with take_up(process) as bridge:
            yield bridge
    finally:
        process.end()
