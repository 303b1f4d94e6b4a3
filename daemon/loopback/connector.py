"""The connector: what the machine holds in its hands when it speaks with the loopback WhatsApp.

Lives here: bridges, and the two tasks of each (writing in batches, watching).
Never lives here: what a connection does (`connection`), what the server decides (`server`).

SQLite is only called in worker threads, so none of this runs under Trio's autojump clock.
"""

from __future__ import annotations

import secrets
import sqlite3
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    ExitStack,
    asynccontextmanager,
    suppress,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import trio

from daemon.loopback.connection import LoopbackConnection, LoopbackTiming
from daemon.loopback.database import LoopbackUnusable, Presence
from daemon.loopback.mail import Mail, Mailbox
from daemon.loopback.server import Action, Answer, LoopbackServer, Place
from machine.ports import (
    Bridge,
    Clocks,
    Connection,
    ConnectionClosed,
    ConnectorDown,
)
from machine.records import AccountId, KeyName

BATCH_MAX = 500
"""Requests in one transaction."""
REQUESTS_MAX = 50_000
"""Requests waiting for the writer of one bridge. Beyond it connections end with 503."""
CONNECTIONS_MAX = 20_000
"""Open connections of one bridge. Beyond it opening ends with 503."""
HANG_UP_S = 1.0
"""How long a closing connection waits for the server to take note, even when cancelled."""

T = TypeVar("T")


class LoopbackConnector:
    """Makes bridges to the loopback WhatsApp whose state is in `directory`."""

    def __init__(
        self,
        directory: Path,
        *,
        clocks: Clocks | None = None,
        timing: LoopbackTiming | None = None,
    ) -> None:
        self._directory = directory
        self._wall = time.time if clocks is None else clocks.wall
        self._timing = timing or LoopbackTiming()

    def open_bridge(self) -> AbstractAsyncContextManager[Bridge]:
        """See `machine.ports.Connector`. Raises `ConnectorDown` when the file is unusable."""
        return self._open_bridge()

    @asynccontextmanager
    async def _open_bridge(self) -> AsyncIterator[Bridge]:
        try:
            line = await trio.to_thread.run_sync(_Line, self._directory, self._wall)
        except (LoopbackUnusable, OSError, sqlite3.Error) as error:
            raise ConnectorDown(f"the loopback world does not start: {error}") from error
        bridge = LoopbackBridge(line, self._wall, self._timing)
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as nursery:
                bridge.nursery = nursery
                nursery.start_soon(bridge.keep_writing)
                nursery.start_soon(bridge.keep_watching)
                try:
                    yield bridge
                except Exception as error:  # noqa: BLE001 (raised below, outside of the nursery)
                    # The block's own errors reach the caller as they are, not in a group.
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            # The last word: closing also tidies the file, which takes some milliseconds.
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(line.close)
        if failure is not None:
            raise failure


class _Line:
    """What a bridge has open: its sign of life, the server and its mailbox. For worker threads."""

    def __init__(self, directory: Path, wall: Callable[[], float]) -> None:
        with ExitStack() as stack:
            self.server = LoopbackServer(directory, wall)
            stack.callback(self.server.close)
            self.server.perform([LoopbackServer.sweep])
            self.presence = Presence(directory)
            stack.callback(self.presence.close)
            self.mailbox = Mailbox(directory, self.presence.bridge_id)
            stack.callback(self.mailbox.close)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Hang up. When this returns the server counts all connections of the bridge as gone."""
        self._stack.close()


@dataclass(slots=True, eq=False)
class _Request:
    """One action for the server, and its answer once `done` is set."""

    action: Action[object]
    done: trio.Event = field(default_factory=trio.Event)
    wanted: bool = True
    result: object = None
    error: Exception | None = None


class LoopbackBridge:
    """Many connections over one writer and one watcher, however many there are.

    Requests that arrive during a transaction go together in the next one.
    """

    nursery: trio.Nursery

    def __init__(self, line: _Line, wall: Callable[[], float], timing: LoopbackTiming) -> None:
        self.wall = wall
        self.timing = timing
        self._line = line
        self._bridge_id = line.presence.bridge_id
        self._connections: dict[str, LoopbackConnection] = {}
        self._requests: deque[_Request] = deque()
        self._arrived = trio.Event()
        self._write_limiter = trio.CapacityLimiter(1)
        self._watch_limiter = trio.CapacityLimiter(1)
        self._has_ended = False

    # --- connections -------------------------------------------------------------------------

    def open_connection(
        self,
        account_id: AccountId,
        keys: Mapping[KeyName, bytes] | None,
        *,
        doubtful: Collection[str] = (),
        distrust_sessions: bool = False,
    ) -> AbstractAsyncContextManager[Connection]:
        """See `machine.ports.Bridge`. A login has succeeded when the block is entered."""
        return self._open_connection(account_id, keys, doubtful, distrust_sessions)

    @asynccontextmanager
    async def _open_connection(
        self,
        account_id: AccountId,
        keys: Mapping[KeyName, bytes] | None,
        doubtful: Collection[str],
        distrust_sessions: bool,
    ) -> AsyncIterator[Connection]:
        if len(self._connections) >= CONNECTIONS_MAX:
            raise ConnectionClosed(503, f"more than {CONNECTIONS_MAX} connections on one bridge")
        place = Place(account_id, self._bridge_id, secrets.token_hex(8))
        connection = LoopbackConnection(self, place)
        self._connections[place.connection_id] = connection
        try:
            if keys is None:
                await connection.begin_pairing()
            else:
                await connection.log_in(keys, doubtful, distrust_sessions)
            yield connection
        finally:
            connection.end(428, "closed on this side")
            del self._connections[place.connection_id]
            await self._hang_up(place, connection.device_id)

    async def _hang_up(self, place: Place, device_id: str) -> None:
        """See to it that the server knows, so that the next login anywhere evicts nobody."""
        with trio.move_on_after(HANG_UP_S, shield=True), suppress(ConnectionClosed):
            await self.perform(lambda server: server.disconnect(place, device_id))

    def _end(self) -> None:
        """Close what is still open and refuse what still waits."""
        self._has_ended = True
        for connection in self._connections.values():
            connection.end(428, "the bridge has ended")
        while self._requests:
            _answer(self._requests.popleft(), None, ConnectionClosed(428, "the bridge has ended"))

    # --- requests ----------------------------------------------------------------------------

    async def perform(self, action: Action[T]) -> T:
        """Have the server run `action`, in a transaction shared with others.

        Raises what `action` raises; `ConnectionClosed` (503) when the database does not answer.
        Cancelled: it may have run, and if it has not begun it never will.
        """
        if self._has_ended:
            raise ConnectionClosed(428, "the bridge has ended")
        if len(self._requests) >= REQUESTS_MAX:
            raise ConnectionClosed(503, "too many requests are waiting")
        # Else the writer might wake before we do, and begin for someone who has left.
        await trio.lowlevel.checkpoint_if_cancelled()
        request = _Request(action)
        self._put(request)
        try:
            await request.done.wait()
        finally:
            request.wanted = False
        if request.error is not None:
            raise request.error
        return cast(T, request.result)

    def _put(self, request: _Request) -> None:
        self._requests.append(request)
        self._arrived.set()

    async def keep_writing(self) -> None:
        """Run requests in batches, until cancelled: then the bridge has ended."""
        try:
            while True:
                await self._arrived.wait()
                self._arrived = trio.Event()
                while self._requests:
                    size = min(BATCH_MAX, len(self._requests))
                    batch = [self._requests.popleft() for _ in range(size)]
                    await self._write([request for request in batch if request.wanted])
        finally:
            self._end()

    async def _write(self, batch: list[_Request]) -> None:
        """Run one batch and answer it. A thread that has begun is waited for, even cancelled."""
        actions = [request.action for request in batch]
        answers: list[Answer] = [
            (None, ConnectionClosed(428, "the bridge has ended")) for _ in batch
        ]
        try:
            answers = await trio.to_thread.run_sync(
                self._line.server.perform, actions, limiter=self._write_limiter
            )
        except sqlite3.Error as error:
            refusal = f"the loopback database does not answer: {error}"
            answers = [(None, ConnectionClosed(503, refusal)) for _ in batch]
        finally:
            for request, (result, refused) in zip(batch, answers, strict=True):
                _answer(request, result, refused)

    async def keep_watching(self) -> None:
        """Hand the server's mail to its connections, until cancelled.

        Trouble with the database is left to those who send: the next look may succeed.
        """
        while True:
            with trio.move_on_after(self.timing.watch_every_s):
                await self._line.presence.wait_rung()
            with suppress(sqlite3.Error):
                mails = await trio.to_thread.run_sync(
                    self._line.mailbox.collect, limiter=self._watch_limiter
                )
                for mail in mails:
                    self._hand_over(mail)
                if mails:
                    self._discard(mails[-1].seq)

    def _hand_over(self, mail: Mail) -> None:
        connection = self._connections.get(mail.connection_id)
        if connection is None:
            return  # It was closed here in the meantime.
        if mail.kind == "closed":
            connection.end(mail.code, mail.detail, expire_s=mail.expire_s)
        elif mail.letter is not None:
            connection.be_written_to(mail.letter)
        else:
            connection.be_scanned(mail.phone)

    def _discard(self, seq: int) -> None:
        self._put(_Request(lambda server: server.discard_mail(self._bridge_id, seq)))


def _answer(request: _Request, result: object, error: Exception | None) -> None:
    request.result, request.error = result, error
    request.done.set()
