"""This host's own copy of the accounts, its transitions and reports, and the highest epoch seen.

One directory, one instance: a second one is refused. What is found damaged is set aside, its bytes
kept, and said so; it is never overwritten and never stands in the way of starting.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO

import msgspec
import trio

from daemon.sqlite import copy_rows
from daemon.sqlite.file import (
    FileBroken,
    Schema,
    check_file,
    create_file,
    open_connection,
    sync_directory,
)
from daemon.sqlite.worker import Turnstile, Worker
from machine.ports import StoreMisconfigured, StoreUnavailable
from machine.records import (
    AccountCommit,
    AccountCopy,
    AccountId,
    Listing,
    Transition,
)

FILE_NAME = "local.db"
EPOCH_FILE_NAME = "epoch"
IN_USE_FILE_NAME = "in-use"

FETCHED_TOGETHER_MAX = 32
"""Accounts read in one go: some milliseconds, so that no other reader waits long."""

QUARANTINED_SILENT_MAX = 3
"""More files set aside than this are told with every listing."""

TRANSITIONS_MAX = 1000
REPORTS_MAX = 100

_TABLES = """
CREATE TABLE transitions (row INTEGER PRIMARY KEY, record TEXT NOT NULL) STRICT;
CREATE TABLE reports (row INTEGER PRIMARY KEY, report TEXT NOT NULL) STRICT
"""
SCHEMA = Schema(
    application_id=0x57544B4C,
    version=2,
    tables=";".join((copy_rows.TABLES, _TABLES)),
    page_bytes=16384,
)


class StateDirInUse(StoreMisconfigured):
    """Another process of this host uses the state directory. Two instances need two."""


@asynccontextmanager
async def open_local(directory: Path) -> AsyncIterator[SqliteLocalStore]:
    """Open this host's store in `directory` (made if need be), for this process alone.

    A damaged file is set aside as `local.db.quarantined-<n>` and an empty one opened: the listing
    of this run then says so. Raises `StateDirInUse`; `StoreMisconfigured` where the directory is
    not ours to write, or the file is of another version; `StoreUnavailable`.
    """
    in_use, fault, hoard = await trio.to_thread.run_sync(
        _prepare, directory, abandon_on_cancel=True
    )
    store = SqliteLocalStore(directory, fault, hoard)
    ended = False
    try:
        yield store
    finally:
        ended = await store.aclose()
        # A thread that a hung disk keeps may still write: then only our end frees the directory.
        if ended:
            in_use.close()
        else:
            _kept_until_the_end.append(in_use)


_kept_until_the_end: list[IO[str]] = []


def _prepare(directory: Path) -> tuple[IO[str], str | None, str | None]:
    """Take the directory and make sure that there is a sound file in it.

    With it come what was wrong with the file, and what is to be said of those set aside before.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        in_use = _take(directory)
    except OSError as error:
        raise StoreMisconfigured(
            f"cannot write to {directory}: {error.strerror}. Let this user write to it, or set "
            "another state directory."
        ) from error
    try:
        path = directory / FILE_NAME
        fault = _inspect(path) if path.exists() else None
        create_file(path, SCHEMA)
        hoard = _hoard(directory)
    except BaseException:
        in_use.close()
        raise
    return in_use, fault, hoard


def _take(directory: Path) -> IO[str]:
    """Hold the directory for as long as the answer is open. Raises `StateDirInUse`."""
    path = directory / IN_USE_FILE_NAME
    in_use = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(in_use, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        in_use.seek(0)
        by = in_use.read(20).strip() or "unknown"
        in_use.close()
        raise StateDirInUse(
            f"{directory} is used by another instance (process {by}). Give each instance a state "
            "directory of its own, or stop that one first."
        ) from error
    in_use.truncate(0)
    in_use.write(f"{os.getpid()}\n")
    in_use.flush()
    return in_use


def _inspect(path: Path) -> str | None:
    """Set the file aside if it is damaged; what was wrong with it.

    Raises `StoreMisconfigured` for a file of another version, which it leaves as it is.
    """
    try:
        check_file(path, SCHEMA)
        connection = open_connection(path)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version < SCHEMA.version:
                raise StoreMisconfigured(
                    f"{path} was written by an older watchkeeper (format {version}, this one "
                    f"reads {SCHEMA.version}). Run that version, or move the file away: the "
                    "accounts are then copied from the shared store again."
                )
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        finally:
            connection.close()
        if verdict == "ok":
            return None
    except (FileBroken, sqlite3.DatabaseError) as error:
        # A disk that fails now, or is full, says nothing about the bytes.
        if isinstance(error, sqlite3.OperationalError):
            raise StoreUnavailable(f"cannot open {path}: {error}", code="cannot_open") from error
        verdict = str(error)
    aside = _set_aside(path)
    return f"{path.name} was damaged ({verdict}); its bytes are kept as {aside.name}"


def _set_aside(path: Path) -> Path:
    """Rename the file, and what SQLite keeps beside it, to the next free name."""
    number = 1
    while (aside := path.with_name(f"{path.name}.quarantined-{number}")).exists():
        number += 1
    for suffix in ("-wal", "-shm", ""):
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    sync_directory(path.parent)
    return aside


def _hoard(directory: Path) -> str | None:
    """What is said of the files set aside when there are many. We never delete any."""
    kept = list(directory.glob(f"{FILE_NAME}.quarantined-*"))
    count = sum(not path.name.endswith(("-wal", "-shm")) for path in kept)
    if count <= QUARANTINED_SILENT_MAX:
        return None
    megabytes = sum(path.stat().st_size for path in kept) / 1e6
    return (
        f"{count} damaged files are kept in {directory} ({megabytes:.1f} MB): check the disk; "
        "they can be moved away"
    )


class SqliteLocalStore:
    """`LocalStore`. One thread writes, another reads; the instance alone has the directory."""

    def __init__(self, directory: Path, fault: str | None, hoard: str | None) -> None:
        self._directory = directory
        self._fault = fault
        self._hoard = hoard
        path = directory / FILE_NAME
        turnstile = Turnstile()
        connect = partial(open_connection, path)
        self._reads = Worker(path, connect, turnstile, name="local-reads")
        self._writes = Worker(path, connect, turnstile, name="local-writes")
        self._fetches = _Fetches(self._reads)

    @property
    def fault(self) -> str | None:
        """What was wrong with the file that this run found, if anything."""
        return self._fault

    @property
    def transactions(self) -> int:
        """Write transactions so far: fewer than writes that met."""
        return self._writes.transactions

    @property
    def fetching(self) -> int:
        """Callers of `fetch_account` that wait now."""
        return self._fetches.waiting

    async def aclose(self) -> bool:
        """End the threads; false when a hung disk kept one of them."""
        return all([await self._reads.aclose(), await self._writes.aclose()])

    async def list_accounts(self) -> Listing:
        listing = await self._reads.read(copy_rows.read_heads)
        said = "; ".join(filter(None, (self._fault, self._hoard)))
        # Old files say nothing about what this one holds.
        return replace(listing, complete=self._fault is None, fault=said or None)

    async def fetch_account(self, account_id: AccountId) -> AccountCopy | None:
        return await self._fetches.fetch(account_id)

    async def save_account(self, copy: AccountCopy) -> None:
        await self._writes.write(lambda db: copy_rows.save(db, copy))

    async def apply(self, commit: AccountCommit) -> None:
        await self._writes.write(lambda db: copy_rows.apply(db, commit))

    async def remove_account(self, account_id: AccountId, *, purge: bool) -> None:
        await self._writes.write(lambda db: copy_rows.remove(db, account_id, purge=purge))

    async def highest_epoch(self) -> int:
        return await self._writes.read(lambda _db: _read_epoch(self._directory))

    async def raise_epoch(self, epoch: int) -> None:
        # Not in the database: it must outlive a file that is set aside.
        await self._writes.read(lambda _db: _raise_epoch(self._directory, epoch))

    async def append_transition(self, transition: Transition) -> None:
        record = msgspec.json.encode(transition).decode()
        await self._writes.write(partial(_append_transition, record=record))

    async def list_transitions(self, count_max: int) -> Sequence[Transition]:
        return await self._reads.read(partial(_list_transitions, count_max=count_max))

    async def append_report(self, report: Mapping[str, object]) -> None:
        record = msgspec.json.encode(report).decode()
        await self._writes.write(partial(_append_report, record=record))


class _Wanted:
    """An account that a caller waits for."""

    def __init__(self, account_id: AccountId) -> None:
        self.account_id = account_id
        self.copy: AccountCopy | None = None
        self.fetched = False


class _Fetches:
    """Reads accounts one by one, those that are wanted at once in one go.

    While a restore opens accounts by the dozen, waking a thread and being woken by it for each
    would take longer than the reading.
    """

    def __init__(self, reads: Worker) -> None:
        self._reads = reads
        self._waiting: deque[_Wanted] = deque()
        self._turn = trio.Lock()

    @property
    def waiting(self) -> int:
        """Callers whose account was not read yet."""
        return len(self._waiting)

    async def fetch(self, account_id: AccountId) -> AccountCopy | None:
        """One copy, complete. Raises `StoreUnavailable`.

        Cancelled: whoever else waits reads for itself.
        """
        wanted = _Wanted(account_id)
        self._waiting.append(wanted)
        try:
            async with self._turn:
                # It may have been read by whom it waited for.
                if not wanted.fetched:
                    await self._fetch_waiting()
        finally:
            if not wanted.fetched:
                self._waiting.remove(wanted)
        return wanted.copy

    async def _fetch_waiting(self) -> None:
        """Read for the first that wait, the caller among them: who has the turn waits longest."""
        batch = [self._waiting[n] for n in range(min(len(self._waiting), FETCHED_TOGETHER_MAX))]
        account_ids = [wanted.account_id for wanted in batch]
        copies = await self._reads.read(
            lambda db: [copy_rows.read_one(db, account_id) for account_id in account_ids]
        )
        for wanted, copy in zip(batch, copies, strict=True):
            wanted.copy, wanted.fetched = copy, True
            # Who was cancelled meanwhile is not waiting any more.
            if self._waiting and self._waiting[0] is wanted:
                self._waiting.popleft()


def _append_transition(db: sqlite3.Connection, record: str) -> None:
    row = db.execute("INSERT INTO transitions (record) VALUES (?)", (record,)).lastrowid or 0
    db.execute("DELETE FROM transitions WHERE row <= ?", (row - TRANSITIONS_MAX,))


def _list_transitions(db: sqlite3.Connection, count_max: int) -> list[Transition]:
    rows = db.execute(
        "SELECT record FROM transitions ORDER BY row DESC LIMIT ?", (max(0, count_max),)
    ).fetchall()
    return [msgspec.json.decode(record, type=Transition) for (record,) in reversed(rows)]


def _append_report(db: sqlite3.Connection, record: str) -> None:
    row = db.execute("INSERT INTO reports (report) VALUES (?)", (record,)).lastrowid or 0
    db.execute("DELETE FROM reports WHERE row <= ?", (row - REPORTS_MAX,))


def _read_epoch(directory: Path) -> int:
    """Raises `StoreMisconfigured` when the file means nothing: an epoch is not guessed."""
    path = directory / EPOCH_FILE_NAME
    with _as_unavailable(path):
        try:
            text = path.read_text(encoding="ascii")
        except FileNotFoundError:
            return 0
        except UnicodeDecodeError:
            text = ""
    if not text.strip().isdecimal():
        raise StoreMisconfigured(
            f"{path} does not hold a number. Write the lease's present epoch into it."
        )
    return int(text)


def _raise_epoch(directory: Path, epoch: int) -> None:
    if epoch <= _read_epoch(directory):
        return
    path = directory / EPOCH_FILE_NAME
    new = path.with_name(f"{path.name}.new")
    with _as_unavailable(path):
        with new.open("w", encoding="ascii") as file:
            file.write(f"{epoch}\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        sync_directory(directory)


@contextmanager
def _as_unavailable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"{path}: {error.strerror}", code="os_error") from error
