"""A thread that owns one connection and does what tasks ask, in order, in transactions.

SQLite blocks, and a disk may hang: so no task ever waits inside it. A caller that is cancelled
leaves at once; the thread goes on with what it has begun, alone with its connection, and what it
has not begun is skipped. Never lives here: any table.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import trio

from daemon.sqlite.file import garbled_is_corrupt, translated
from machine.ports import StoreMisconfigured, StoreUnavailable

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]
Begun = Callable[[sqlite3.Connection], object]


def _nothing_to_see(_connection: sqlite3.Connection) -> None: ...


GROUP_MAX = 128
"""Writes in one transaction, so that one never takes long and renewals get their turn."""
WAITING_MAX = 20_000
"""Jobs that wait for one worker; then `StoreUnavailable`."""
CLOSE_S = 2.0
"""How long a closing worker is waited for; a disk that hangs keeps its thread, not us."""


def _told(error: sqlite3.Error | StoreMisconfigured, path: Path) -> StoreUnavailable:
    return error if isinstance(error, StoreMisconfigured) else translated(error, path)


class Turnstile:
    """Lets one writer of this process in at a time, urgent ones first.

    SQLite has one writer a file and no queue: without this, a bulk of commits in a row would let
    a renewal wait until its busy timeout.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = False
        self._urgent = 0
        self.waiting = 0
        """Writers at the turnstile now."""

    @contextmanager
    def enter(self, *, urgent: bool) -> Iterator[None]:
        with self._changed:
            self._urgent += urgent
            self.waiting += 1
            self._changed.wait_for(lambda: not self._inside and (urgent or not self._urgent))
            self.waiting -= 1
            self._urgent -= urgent
            self._inside = True
        try:
            yield
        finally:
            with self._changed:
                self._inside = False
                self._changed.notify_all()


class _Job(Generic[T]):
    """What one caller wants, and later its outcome. `left` is set by a caller that is gone."""

    def __init__(self, work: Work[T], *, writes: bool) -> None:
        self.work = work
        self.writes = writes
        self.left = False
        self.value: T | None = None
        self.error: Exception | None = None
        self._done = trio.Event()
        self._trio = trio.lowlevel.current_trio_token()

    def run(self, connection: sqlite3.Connection, path: Path) -> None:
        """Do the work; its error is for the caller.

        Raises `sqlite3.Error` when the transaction, and with it the whole group, is lost.
        """
        try:
            with garbled_is_corrupt():
                self.value, self.error = self.work(connection), None
        except sqlite3.Error as error:
            if not connection.in_transaction:
                raise
            self.error = translated(error, path)
        except Exception as error:  # noqa: BLE001  # raised again in the task that asked
            self.error = error

    def settle(self) -> None:
        """Wake the caller, from the worker's thread."""
        # The run may have ended while the disk hung; then nobody is there to be told.
        with contextlib.suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(self._done.set)

    async def wait(self) -> T:
        try:
            await self._done.wait()
        finally:
            self.left = True
        # The thread may keep the job until its next one: not with a whole listing in it.
        value, self.value = self.value, None
        if self.error is not None:
            raise self.error
        return value  # type: ignore[return-value]  # work() returned it


class Worker:
    """One thread, one connection. Between jobs it holds no transaction.

    Writes that wait together share one transaction, each in a savepoint: one fsync for all, and
    one that is refused takes nothing of the others with it.
    `read_begun` and `write_begun` see each transaction first, and may refuse it with
    `StoreMisconfigured`.
    """

    def __init__(
        self,
        path: Path,
        connect: Callable[[], sqlite3.Connection],
        turnstile: Turnstile,
        *,
        name: str,
        urgent: bool = False,
        read_begun: Begun = _nothing_to_see,
        write_begun: Begun = _nothing_to_see,
    ) -> None:
        self._path = path
        self._connect = connect
        self._turnstile = turnstile
        self._urgent = urgent
        self._read_begun = read_begun
        self._write_begun = write_begun
        self._connection: sqlite3.Connection | None = None
        self._jobs: deque[_Job[object]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._ended = trio.Event()
        self._trio = trio.lowlevel.current_trio_token()
        self.transactions = 0
        """Write transactions committed: fewer than writes where they came together."""
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def read(self, work: Work[T]) -> T:
        """Run `work` in a transaction of its own that sees one moment and writes nothing."""
        return await self._ask(_Job(work, writes=False))

    async def write(self, work: Work[T]) -> T:
        """Run `work` in a write transaction; returns when the disk has it.

        Raises what `work` raises, with nothing written. Raises `StoreUnavailable`.
        """
        return await self._ask(_Job(work, writes=True))

    async def aclose(self) -> bool:
        """End the thread once its present job is done; false when it did not end in time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        with trio.move_on_after(CLOSE_S, shield=True):
            await self._ended.wait()
        return self._ended.is_set()

    async def _ask(self, job: _Job[T]) -> T:
        with self._changed:
            if self._closing:
                raise trio.ClosedResourceError(f"{self._path.name} is closed")
            if len(self._jobs) >= WAITING_MAX:
                raise StoreUnavailable(f"{self._path.name}: too much waits", code="overloaded")
            # The queue holds jobs of every type and reads none of their values.
            self._jobs.append(job)  # type: ignore[arg-type]
            self._changed.notify()
        return await job.wait()

    # -- in the thread

    def _serve(self) -> None:
        while group := self._next_group():
            try:
                if group[0].writes:
                    self._write(group)
                else:
                    self._read(group[0])
            except (sqlite3.Error, StoreMisconfigured) as error:
                # What was to be written together is gone together.
                for job in group:
                    job.error = _told(error, self._path)
                self._discard()
            for job in group:
                job.settle()
        self._discard()
        for job in self._jobs:
            job.error = trio.ClosedResourceError(f"{self._path.name} is closed")
            job.settle()
        with contextlib.suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(self._ended.set)

    def _next_group(self) -> list[_Job[object]]:
        """Wait for work: one read, or all writes in a row. Empty: it is over."""
        group: list[_Job[object]] = []
        with self._changed:
            while not group:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if self._closing:
                    return []
                while self._jobs and len(group) < GROUP_MAX:
                    if group and not (group[0].writes and self._jobs[0].writes):
                        break
                    job = self._jobs.popleft()
                    if not job.left:
                        group.append(job)
        return group

    def _write(self, group: list[_Job[object]]) -> None:
        connection = self._open()
        with self._turnstile.enter(urgent=self._urgent):
            connection.execute("BEGIN IMMEDIATE")
            self._write_begun(connection)
            for job in group:
                connection.execute("SAVEPOINT job")
                job.run(connection, self._path)
                if job.error is not None:
                    connection.execute("ROLLBACK TO job")
                connection.execute("RELEASE job")
            connection.execute("COMMIT")
        self.transactions += 1

    def _read(self, job: _Job[object]) -> None:
        connection = self._open()
        connection.execute("BEGIN")
        self._read_begun(connection)
        job.run(connection, self._path)
        # Not COMMIT: over a damaged page that fails, even after everything else was read.
        connection.execute("ROLLBACK")

    def _open(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._connect()
        return self._connection

    def _discard(self) -> None:
        """Close the connection, and with it what it had begun; the next job opens another."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()
