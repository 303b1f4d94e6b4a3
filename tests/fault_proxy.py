"""A TCP proxy with faults, for gRPC: between a store and its server, switched at run time.

It runs in the test's own loop. A direction that lost bytes can never go on (HTTP/2 would be torn),
so connections that did are reset when the fault is over.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from enum import Enum, auto

import trio

from tests.ports import free_port

CHUNK_BYTES = 64 * 1024


class Fault(Enum):
    """What the proxy does to bytes and connections."""

    PASS = auto()
    DROP_REQUESTS = auto()
    """What the client sends is swallowed: it waits for ever, nothing is applied."""
    DROP_REPLIES = auto()
    """What the server answers is swallowed: it waits for ever, all is applied."""
    LOSE_REPLIES = auto()
    """As `DROP_REPLIES`, and the connection is reset `LOSS_S` after the first swallowed byte."""
    FREEZE = auto()
    """Bytes stay where they are, both ways, and go on when it is over."""
    RESET = auto()
    """Every connection is reset, new ones as soon as they are made."""
    REFUSE = auto()
    """Every connection is reset and nobody listens."""


LOSS_S = 0.3


class FaultProxy:
    """A running proxy. `delay_s` holds back every chunk for that long, each way.

    `accepted` counts the connections that there ever were. `refused` resets a connection as soon as
    the client sends these bytes on it: for a fault of one kind of call while the other connections
    live; `refusals` counts how often.
    """

    def __init__(self, target: str, nursery: trio.Nursery) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._nursery = nursery
        self._listening: trio.CancelScope | None = None
        self._beginning = trio.Lock()
        self._port = free_port()
        self._fault = Fault.PASS
        self._changed = trio.Event()
        self._connections: set[_Connection] = set()
        self.delay_s = 0.0
        self.accepted = 0
        self.refused: bytes | None = None
        self.refusals = 0

    @property
    def host(self) -> str:
        """Where clients connect, as `host:port`."""
        return f"127.0.0.1:{self._port}"

    @property
    def connections(self) -> int:
        """How many are open now."""
        return len(self._connections)

    async def set_fault(self, fault: Fault) -> None:
        """Begin `fault`, or end the present one with `PASS`."""
        self._fault = fault
        changed, self._changed = self._changed, trio.Event()
        changed.set()
        for connection in list(self._connections):
            if connection.torn or fault in {Fault.RESET, Fault.REFUSE}:
                connection.reset()
        if fault is Fault.REFUSE and self._listening is not None:
            self._listening.cancel()
            self._listening = None
        if fault is not Fault.REFUSE:
            await self.listen()

    def leave_frozen(self) -> None:
        """What is open now stays frozen, whatever comes: packets vanish, TCP sees nothing."""
        for connection in self._connections:
            connection.frozen = True

    async def listen(self) -> None:
        """Take connections, unless it does already. Two faults may end at the same time."""
        async with self._beginning:
            if self._listening is None and self._fault is not Fault.REFUSE:
                listeners = await trio.open_tcp_listeners(self._port, host="127.0.0.1")
                self._listening = trio.CancelScope()
                self._nursery.start_soon(self._serve, listeners, self._listening)

    async def _serve(
        self, listeners: list[trio.SocketListener], listening: trio.CancelScope
    ) -> None:
        with listening:
            await trio.serve_listeners(self._carry, listeners, handler_nursery=self._nursery)

    async def _carry(self, client: trio.SocketStream) -> None:
        self.accepted += 1
        with suppress(OSError):
            async with await trio.open_tcp_stream(*self._target) as server:
                connection = _Connection(client, server)
                self._connections.add(connection)
                try:
                    if self._fault is Fault.RESET:
                        connection.reset()
                    with connection.open:
                        async with trio.open_nursery() as nursery:
                            nursery.start_soon(self._pump, connection, client, server, True)
                            nursery.start_soon(self._pump, connection, server, client, False)
                finally:
                    self._connections.discard(connection)

    async def _pump(
        self,
        connection: _Connection,
        source: trio.SocketStream,
        sink: trio.SocketStream,
        requests: bool,
    ) -> None:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while chunk := await source.receive_some(CHUNK_BYTES):
                if self.delay_s:
                    await trio.sleep(self.delay_s)
                while self._fault is Fault.FREEZE or connection.frozen:
                    await self._changed.wait()
                if requests and self.refused is not None and self.refused in chunk:
                    self.refusals += 1
                    break
                if requests and self._fault is Fault.DROP_REQUESTS:
                    connection.torn = True
                elif not requests and self._fault in {Fault.DROP_REPLIES, Fault.LOSE_REPLIES}:
                    connection.torn = True
                    if self._fault is Fault.LOSE_REPLIES:
                        connection.open.deadline = trio.current_time() + LOSS_S
                else:
                    await sink.send_all(chunk)
        connection.reset()


class _Connection:
    def __init__(self, client: trio.SocketStream, server: trio.SocketStream) -> None:
        self.open = trio.CancelScope()
        self.torn = False
        self.frozen = False
        for stream in (client, server):
            # Closing then sends a reset instead of a polite end.
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def reset(self) -> None:
        self.open.cancel()


@asynccontextmanager
async def open_fault_proxy(target: str) -> AsyncIterator[FaultProxy]:
    """Run a proxy to `target` (`host:port`) until the block's end; nothing is connected before."""
    async with trio.open_nursery() as nursery:
        proxy = FaultProxy(target, nursery)
        await proxy.listen()
        yield proxy
        nursery.cancel_scope.cancel()
