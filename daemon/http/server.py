"""Sockets and connections: binding, accepting, limits, and a stop that lets requests finish.

Hypercorn (0.18) speaks HTTP/1.1 and HTTP/2 on each connection, through its Trio `TCPServer`. The
accept loop is ours, because Hypercorn's own has no limit on connections, ends the whole server at
an error in one of them, and drops what waits in the backlog when it stops.

Never lives here: anything that knows what a request means.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from daemon.http.closing import Closing

if TYPE_CHECKING:
    from hypercorn.typing import ASGIFramework

SEND_BYTES_MAX = 64 * 1024
"""A caller must take at least this much of an answer within `send_s`."""

BACKLOG = 4096
"""Connections that the kernel holds before we accept them; it may allow fewer (somaxconn)."""

FILES_RESERVED = 512
"""Open files kept free for stores, bridges and forwarding."""

REFUSALS_MAX = 256
"""Callers over the connection limit that are being told so; further ones wait in the backlog."""

RECEIVE_BYTES_MAX = 64 * 1024

LAST_CALL_S = 0.2
"""Between the end of accepting and the end of idle connections."""

FIRST_WORD_S = 2.0
"""How long who has connected and not asked yet may take to, at the end: on a busy host, more than
a moment. At most half of `stop_s`."""

LAST_WORD_S = 2.0
"""So long before the end of `stop_s`, requests without an answer get one; longer than an event loop
is held up on a busy host. At most a quarter of `stop_s`."""

HEAD_BYTES_MAX = 16 * 1024
"""A request's line and headers; over it Hypercorn answers 431 and closes."""

FULL_ANSWER = (
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 5\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
)
FULL_BODY = (
    b'{"success":false,"error":"too_many_connections","message":"This instance has as many '
    b'connections as it may have: close idle ones, or ask again later.","requestId":""}'
)

OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class BindFailed(Exception):
    """The address cannot be listened at; the message says why and what to change."""


class Note(Protocol):
    """`machine.ports.Journal.note`."""

    def __call__(self, event: str, /, **fields: object) -> None: ...


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """Seconds, counts; see `ApiSettings` for what each means."""

    connections_max: int
    keep_alive_s: float
    send_s: float
    stop_s: float


@dataclass(frozen=True, slots=True)
class Listening:
    """Bound sockets that already queue callers; nobody is accepted yet."""

    sockets: tuple[socket.socket, ...]
    host: str
    port: int

    @property
    def address(self) -> str:
        """`http://host:port` as it was bound."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    def close(self) -> None:
        """Close the sockets; callers in their backlog are reset. Twice is fine."""
        for sock in self.sockets:
            sock.close()


def bind_http(bind: str) -> Listening:
    """Listen at `host:port` (`[::1]:8080` for IPv6; port 0: any free one), before the API runs.

    Raises `BindFailed`.
    """
    host, _, port_text = bind.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port_text.isdecimal() or int(port_text) > 65535:
        raise BindFailed(
            f"{bind!r} is no address to listen at: WATCHKEEPER_HTTP_BIND is host:port, "
            "for example 127.0.0.1:8080 or [::]:8080"
        )
    port = int(port_text)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise BindFailed(f"{host!r} cannot be resolved: {error.strerror}") from None
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            try:
                sockets.append(_listen(family, (str(address[0]), port)))
            except OSError as error:
                # A name may stand for IPv6 too, on a host that has none.
                if error.errno not in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}:
                    raise
                absent = error
                continue
            # With port 0 the second family takes the port that the first one was given.
            port = sockets[0].getsockname()[1]
        if not sockets and absent is not None:
            raise absent
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise BindFailed(_why(host, port, error)) from None
    return Listening(sockets=tuple(sockets), host=host, port=port)


def _listen(family: int, address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"{host}:{port} is in use: another program, or another instance, listens there. "
            "Stop it, or set WATCHKEEPER_HTTP_BIND to another port"
        )
    if error.errno == errno.EACCES:
        return f"{host}:{port} may not be listened at: ports below 1024 need a privilege"
    return f"{host}:{port} cannot be listened at: {error.strerror}"


def raise_files_limit() -> int:
    """Raise the soft limit of open files to the hard one; the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return soft
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft


def affordable_connections(wanted: int, files: int) -> int:
    """How many of the wanted connections the limit of open files allows; at least one."""
    if files == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, files - FILES_RESERVED))


class _BoundedStream:
    """A connection as Hypercorn sees it: with a deadline for a caller who takes no bytes.

    Hypercorn shields its sends from cancellation, so a caller who stops reading would otherwise
    keep the whole server from stopping. It has no `do_handshake`: that tells Hypercorn that there
    is no TLS.
    """

    def __init__(self, stream: trio.SocketStream, send_s: float) -> None:
        self._stream = stream
        self._send_s = send_s
        self._ended = False
        self.socket = stream.socket

    async def receive_some(self, max_bytes: int) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_all(self, data: bytes) -> None:
        if self._ended:
            raise trio.ClosedResourceError("the connection is being closed")
        for start in range(0, len(data), SEND_BYTES_MAX):
            with trio.move_on_after(self._send_s) as scope:
                await self._stream.send_all(memoryview(data)[start : start + SEND_BYTES_MAX])
            if scope.cancelled_caught:
                await trio.aclose_forcefully(self._stream)
                raise trio.BrokenResourceError("the caller stopped reading")

    async def send_eof(self) -> None:
        # Hypercorn closes without its lock for sends: an answer may be half out in another task,
        # and would find the stream busy with its end, which Hypercorn does not expect.
        self._ended = True
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Connection(TCPServer):
    """Hypercorn's connection, closed in time in two cases where its own would linger.

    A caller who has hung up is let go at once, not after the keep-alive; and an HTTP/2 connection
    that never makes a request is idle from its beginning, not forever busy.
    """

    _busy = False
    first_word: Callable[[], None] | None = None
    """Called once, when the caller has said anything, or the connection is over."""

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, Updated):
            self._busy = not event.idle
        await super().protocol_send(event)

    async def _read_data(self) -> None:
        data = b"begun"
        while data:
            try:
                data = bytes(await self.stream.receive_some(RECEIVE_BYTES_MAX))
            except (trio.ClosedResourceError, trio.BrokenResourceError):
                break
            await self.protocol.handle(RawData(data))
            # Only now is the connection not idle any more: told before, it might be closed as such.
            self.tell_first_word()
            spoken = self.protocol.protocol
            if self._busy and isinstance(spoken, H2Protocol) and spoken.idle:
                await self.protocol_send(Updated(idle=True))
        await self.protocol.handle(Closed())
        await self.idle_task.stop()

    def tell_first_word(self) -> None:
        """Tell, once, that the caller has spoken or has gone."""
        told, self.first_word = self.first_word, None
        if told is not None:
            told()


class Server:
    """Accepts connections and runs Hypercorn's protocols on them, within limits.

    Between calls: `open_connections` counts the connections that are being served.
    """

    def __init__(
        self, app: Callable[..., Awaitable[None]], limits: ConnectionLimits, note: Note
    ) -> None:
        self._app = ASGIWrapper(cast("ASGIFramework", app))
        self._limits = limits
        self._note = note
        self._config = _hypercorn_config(limits)
        self._context = WorkerContext(None)
        self._refusals = trio.Semaphore(REFUSALS_MAX)
        self._full = False
        self._cut_off = 0
        self._connections_max = limits.connections_max
        self._silent = 0
        self._all_have_spoken = trio.Event()
        self.open_connections = 0

    async def serve(
        self,
        listening: Listening,
        *,
        shutdown: trio.Event,
        closing: Closing,
    ) -> None:
        """Serve until `shutdown` is set or the caller cancels; `closing` begins when it ends.

        Either way: stops accepting, closes idle connections, and lets requests in flight finish
        for at most `stop_s`. `shutdown` set: returns. Cancelled: so does this, after that.
        """
        files = raise_files_limit()
        self._connections_max = affordable_connections(self._limits.connections_max, files)
        if self._connections_max < self._limits.connections_max:
            self._note("http.connections_lowered", files=files, count=self._connections_max)
        async with trio.open_nursery() as nursery:
            connections = cast(trio.Nursery, await nursery.start(self._hold_connections, closing))
            try:
                with _listeners(listening) as listeners:
                    async with trio.open_nursery() as acceptors:
                        for listener in listeners:
                            acceptors.start_soon(self._keep_accepting, listener, connections)
                        await shutdown.wait()
                        acceptors.cancel_scope.cancel()
            finally:
                stop_s = self._limits.stop_s
                last_word_s = min(LAST_WORD_S, stop_s / 4)
                closing.begin(trio.current_time() + LAST_CALL_S + stop_s - last_word_s)

    async def _hold_connections(
        self, closing: Closing, *, task_status: trio.TaskStatus[trio.Nursery]
    ) -> None:
        # Shielded: a cancelled server still lets requests in flight finish, for `stop_s`.
        with trio.CancelScope(shield=True) as grace:
            async with trio.open_nursery() as connections:
                task_status.started(connections)
                await closing.wait_begun()
                grace.deadline = trio.current_time() + LAST_CALL_S + self._limits.stop_s
                # Hypercorn closes a connection without a request at once when it is told to end;
                # who has just connected gets this long to say what for.
                await trio.sleep(LAST_CALL_S)
                with trio.move_on_after(min(FIRST_WORD_S, self._limits.stop_s / 2)):
                    await self._wait_all_have_spoken()
                await self._context.terminated.set()
        if grace.cancelled_caught:
            self._note("http.closed", in_flight=self._cut_off)

    async def _wait_all_have_spoken(self) -> None:
        """Wait until no connection is left that has never asked anything."""
        while self._silent:
            self._all_have_spoken = trio.Event()
            await self._all_have_spoken.wait()

    def _has_spoken(self) -> None:
        self._silent -= 1
        if not self._silent:
            self._all_have_spoken.set()

    async def _keep_accepting(
        self, listener: trio.SocketListener, connections: trio.Nursery
    ) -> None:
        """Accept until cancelled, then take in what already waits in the backlog."""
        try:
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:
                    if error.errno not in OUT_OF_FILES:
                        raise
                    self._note("http.accept_failed", error=os.strerror(error.errno))
                    await trio.sleep(0.2)
                    continue
                await self._admit(stream, connections)
        finally:
            # These callers have connected and perhaps asked: closing the listener would reset
            # them. Each is served one request, like all that is in flight.
            for stream in _backlog(listener):
                self._start(stream, connections)
            # At once: whoever connected between this and a later close would be reset.
            listener.socket.close()

    async def _admit(self, stream: trio.SocketStream, connections: trio.Nursery) -> None:
        if self.open_connections < self._connections_max:
            self._start(stream, connections)
            return
        if not self._full:
            self._full = True
            self._note("http.connections_full", count=self.open_connections)
        await self._refusals.acquire()
        connections.start_soon(self._refuse, stream)

    def _start(self, stream: trio.SocketStream, connections: trio.Nursery) -> None:
        self.open_connections += 1
        connections.start_soon(self._speak, stream)

    async def _speak(self, stream: trio.SocketStream) -> None:
        # Hypercorn types the stream as a TLS one; without `do_handshake` it takes a plain one.
        connection = _Connection(
            self._app,
            self._config,
            self._context,
            cast(Any, ConnectionState({})),
            cast(Any, _BoundedStream(stream, self._limits.send_s)),
        )
        connection.first_word = self._has_spoken
        self._silent += 1
        ended = False
        try:
            await connection
            ended = True
        except* Exception as group:  # noqa: BLE001  (see the next line; bugs are in the journal)
            # One connection's trouble, whatever it is, must not end all the others.
            self._note("http.connection_failed", error=_kinds(group))
            ended = True
        finally:
            connection.tell_first_word()
            self.open_connections -= 1
            self._cut_off += not ended
            # Told once for each time that it fills up, not for each caller refused.
            self._full = self._full and self.open_connections > self._connections_max * 0.9
            await trio.aclose_forcefully(stream)

    async def _refuse(self, stream: trio.SocketStream) -> None:
        """Say that there are too many connections; read what was asked, so that it is seen."""
        try:
            with trio.move_on_after(1.0), contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(FULL_ANSWER % (len(FULL_BODY), FULL_BODY))
                await stream.send_eof()
                while await stream.receive_some(SEND_BYTES_MAX):
                    pass
        finally:
            self._refusals.release()
            await trio.aclose_forcefully(stream)


def _hypercorn_config(limits: ConnectionLimits) -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = logging.getLogger("hypercorn.error")
    config.include_server_header = False
    config.keep_alive_timeout = limits.keep_alive_s
    config.h11_max_incomplete_size = HEAD_BYTES_MAX
    config.h2_max_header_list_size = HEAD_BYTES_MAX
    config.graceful_timeout = limits.stop_s
    config.websocket_max_message_size = 1024
    return config


@contextlib.contextmanager
def _listeners(listening: Listening) -> Iterator[tuple[trio.SocketListener, ...]]:
    listeners = tuple(
        trio.SocketListener(trio.socket.from_stdlib_socket(sock)) for sock in listening.sockets
    )
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.socket.close()


def _backlog(listener: trio.SocketListener) -> Iterator[trio.SocketStream]:
    """Whoever has connected and was not accepted yet, without waiting."""
    # A duplicate shares the listening state and leaves the listener itself to its owner.
    with (
        contextlib.suppress(OSError),
        socket.socket(fileno=os.dup(listener.socket.fileno())) as plain,
    ):
        for _ in range(BACKLOG):
            caller, _address = plain.accept()
            caller.setblocking(False)
            yield trio.SocketStream(trio.socket.from_stdlib_socket(caller))


def _kinds(group: BaseExceptionGroup[BaseException]) -> str:
    """The kinds of errors in a group; never their texts, which may quote a request."""
    return ", ".join(
        _kinds(error) if isinstance(error, BaseExceptionGroup) else type(error).__name__
        for error in group.exceptions
    )
