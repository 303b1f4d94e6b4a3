"""What the threads promise: no task waits in SQLite, and what meets shares one transaction."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from daemon.sqlite.file import Schema, create_file, open_connection
from daemon.sqlite.worker import GROUP_MAX, Turnstile, Worker
from machine.ports import StoreMisconfigured, StoreUnavailable

SCHEMA = Schema(application_id=1, version=1, tables="CREATE TABLE t (n INTEGER UNIQUE) STRICT")


class Refused(Exception):
    """What a caller's own work says no with."""


def insert(n: int, db: sqlite3.Connection) -> None:
    db.execute("INSERT INTO t VALUES (?)", (n,))


def numbers(db: sqlite3.Connection) -> list[int]:
    return [n for (n,) in db.execute("SELECT n FROM t ORDER BY n")]


@asynccontextmanager
async def a_worker(path: Path, turnstile: Turnstile | None = None) -> AsyncIterator[Worker]:
    create_file(path, SCHEMA)
    connect = partial(open_connection, path, busy_s=0.01)
    worker = Worker(path, connect, turnstile or Turnstile(), name="test")
    try:
        yield worker
    finally:
        await worker.aclose()


class Gate:
    """Work that keeps the thread until it is let go, as a hung disk does."""

    def __init__(self) -> None:
        self.entered = trio.Event()
        self._trio = trio.lowlevel.current_trio_token()
        self._let_go = threading.Event()

    def work(self, db: sqlite3.Connection) -> None:
        self._trio.run_sync_soon(self.entered.set)
        assert self._let_go.wait(10)
        insert(-1, db)

    def let_go(self) -> None:
        self._let_go.set()


async def test_writes_that_meet_share_a_transaction(tmp_path: Path) -> None:
    async with a_worker(tmp_path / "t.db") as worker, trio.open_nursery() as nursery:
        gate = Gate()
        nursery.start_soon(worker.write, gate.work)
        await gate.entered.wait()
        async with trio.open_nursery() as writers:
            for n in range(GROUP_MAX):
                writers.start_soon(worker.write, partial(insert, n))
            await trio.testing.wait_all_tasks_blocked()
            gate.let_go()
        assert await worker.read(numbers) == list(range(-1, GROUP_MAX))
        assert worker.transactions == 2


async def test_a_refused_write_takes_nothing_of_the_others_with_it(tmp_path: Path) -> None:
    def insert_and_refuse(db: sqlite3.Connection) -> None:
        insert(500, db)
        raise Refused

    def insert_twice(db: sqlite3.Connection) -> None:
        insert(600, db)
        insert(600, db)

    refusals: list[Exception] = []

    async def expect_refusal() -> None:
        with pytest.raises(Refused):
            await worker.write(insert_and_refuse)
        refusals.append(Refused())

    async def expect_sqlite_error() -> None:
        with pytest.raises(StoreUnavailable) as error:
            await worker.write(insert_twice)
        refusals.append(error.value)

    async with a_worker(tmp_path / "t.db") as worker, trio.open_nursery() as nursery:
        gate = Gate()
        nursery.start_soon(worker.write, gate.work)
        await gate.entered.wait()
        async with trio.open_nursery() as writers:
            writers.start_soon(worker.write, partial(insert, 1))
            writers.start_soon(expect_refusal)
            writers.start_soon(expect_sqlite_error)
            writers.start_soon(worker.write, partial(insert, 2))
            await trio.testing.wait_all_tasks_blocked()
            gate.let_go()
        assert len(refusals) == 2
        assert await worker.read(numbers) == [-1, 1, 2]
        assert worker.transactions == 2


async def test_a_caller_of_a_hung_disk_leaves_at_its_deadline(tmp_path: Path) -> None:
    async with a_worker(tmp_path / "t.db") as worker:
        gate = Gate()
        begun = trio.current_time()
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.05):
            await worker.write(gate.work)
        with pytest.raises(trio.TooSlowError), trio.fail_after(0.05):
            await worker.write(partial(insert, 7))
        assert trio.current_time() - begun < 1.0
        gate.let_go()
        # What had begun went on; what had not was skipped.
        assert await worker.read(numbers) == [-1]


async def test_a_cancelled_callers_write_never_overlaps_the_next(tmp_path: Path) -> None:
    inside = 0
    overlaps = 0

    def count(_db: sqlite3.Connection) -> None:
        nonlocal inside, overlaps
        inside += 1
        overlaps += inside > 1
        threading.Event().wait(0.002)
        inside -= 1

    async with a_worker(tmp_path / "t.db") as worker:
        for _ in range(10):
            with trio.move_on_after(0.001):
                await worker.write(count)
        await worker.write(count)
    assert overlaps == 0


async def test_a_busy_file_is_unavailable_and_later_available_again(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    async with a_worker(path) as worker:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable) as unavailable, trio.fail_after(5):
            await worker.write(partial(insert, 1))
        assert unavailable.value.code == "sqlite_busy"
        assert await worker.read(numbers) == []
        other.execute("ROLLBACK")
        other.close()
        await worker.write(partial(insert, 1))
        assert await worker.read(numbers) == [1]


async def test_a_missing_file_is_unavailable_and_not_made(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    async with a_worker(path) as worker:
        path.unlink()
        with pytest.raises(StoreUnavailable) as unavailable:
            await worker.read(numbers)
        assert unavailable.value.code == "sqlite_cantopen"
        assert not path.exists()


async def test_a_damaged_page_is_refused_for_good(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, SCHEMA)
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 8192)
    async with a_worker(path) as worker:
        with pytest.raises(StoreMisconfigured, match="backup"):
            await worker.read(numbers)


async def test_what_waits_at_the_end_is_told_that_it_is_closed(tmp_path: Path) -> None:
    closed = 0

    async def write() -> None:
        nonlocal closed
        with pytest.raises(trio.ClosedResourceError):
            await worker.write(partial(insert, 1))
        closed += 1

    async with a_worker(tmp_path / "t.db") as worker, trio.open_nursery() as nursery:
        gate = Gate()
        nursery.start_soon(worker.write, gate.work)
        await gate.entered.wait()
        nursery.start_soon(write)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(worker.aclose)
        await trio.testing.wait_all_tasks_blocked()
        gate.let_go()
    assert closed == 1
    with pytest.raises(trio.ClosedResourceError):
        await worker.read(numbers)


def test_the_turnstile_lets_the_urgent_in_first() -> None:
    turnstile = Turnstile()
    order: list[str] = []

    def enter(name: str, urgent: bool) -> None:
        with turnstile.enter(urgent=urgent):
            order.append(name)

    with turnstile.enter(urgent=False):
        threads = []
        for name, urgent in (("bulk-1", False), ("bulk-2", False), ("renewal", True)):
            threads.append(threading.Thread(target=enter, args=(name, urgent)))
            threads[-1].start()
        while turnstile.waiting < 3:
            threading.Event().wait(0.001)
    for thread in threads:
        thread.join(5)
    assert order[0] == "renewal"
    assert sorted(order) == ["bulk-1", "bulk-2", "renewal"]
