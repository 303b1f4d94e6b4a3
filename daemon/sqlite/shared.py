"""The embedded shared store: lease, accounts and outbox in one SQLite file, for one host.

Every process of the host opens the same file. The lease's age is CLOCK_BOOTTIME's, which they
share; a lease written before the last boot is infinitely old, for its holder cannot live. For the
same reason the file must never be shared between hosts: each would think the other dead.

A file of an earlier release is read as it is, for the holder may be of that release; it is upgraded
in the transaction that takes the lease (docs/upgrades.md).
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import trio

from daemon.sqlite import account_rows, inbox_rows, lease_rows, message_rows
from daemon.sqlite.file import (
    FileBroken,
    Schema,
    check_file,
    check_log,
    check_newest,
    create_file,
    open_connection,
    refuse_newer,
    show_as_newest,
    upgrade,
)
from daemon.sqlite.worker import Turnstile, Worker
from machine.ports import StaleWrite, StoreMisconfigured
from machine.records import (
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    Fence,
    Grant,
    Heartbeat,
    InboxEntry,
    InboxPlace,
    LeaseStamps,
    LeaseView,
    LeaseWrite,
    Listing,
    Message,
    MessageId,
    PartName,
    Stamp,
    Version,
)

FILE_NAME = "shared.db"
SCHEMA = Schema(
    application_id=0x57544B53,
    version=2,
    tables=";".join(
        (lease_rows.TABLES, account_rows.TABLES, message_rows.TABLES, inbox_rows.TABLES)
    ),
    upgrades={
        1: f"""
ALTER TABLE fence ADD COLUMN settled INTEGER NOT NULL DEFAULT 0;
ALTER TABLE accounts ADD COLUMN banned_until REAL;
ALTER TABLE accounts ADD COLUMN sessions_doubtful INTEGER NOT NULL DEFAULT 0;
{inbox_rows.TABLES}
"""
    },
    views={
        1: """
CREATE TEMP VIEW fence AS SELECT *, 0 AS settled FROM main.fence;
CREATE TEMP VIEW accounts AS SELECT *, NULL AS banned_until, 0 AS sessions_doubtful
    FROM main.accounts;
CREATE TEMP TABLE inbox (account_id, chat, message_id, epoch, revision, number, sender,
    sender_name, text, sent_at, received_at)
"""
    },
)
WATCH_EVERY_S = 0.025
"""How often the fence's watcher asks whether the file has changed: about 5 µs each."""
WATCH_AGAIN_S = 1.0
"""How long a watcher that could not read waits before it opens the file again."""
SEAL_GROUP_MAX = 500
"""Accounts sealed in one transaction: some 20 ms, so that a renewal never waits for long."""
LEASE_CHECKPOINT_PAGES = 8000
"""The lease's connection leaves checkpoints to the others unless nobody else writes."""


def host_boottime() -> float:
    """CLOCK_BOOTTIME in seconds: goes on in a suspend, and is the same for every process."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def host_boot_id() -> str:
    """Which boot of this host it is. Raises `StoreMisconfigured` where the kernel does not say."""
    path = Path("/proc/sys/kernel/random/boot_id")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise StoreMisconfigured(
            f"cannot read {path}: the embedded store needs Linux. Use the Firestore store."
        ) from error


@asynccontextmanager
async def open_sqlite_shared(
    path: Path,
    *,
    boottime: Callable[[], float] = host_boottime,
    boot_id: str | None = None,
) -> AsyncIterator[SqliteSharedStore]:
    """Open the store in the file `path`; a file that is not there is made, without a lease.

    `boottime` (seconds) and `boot_id` are this host's own unless given. Raises
    `StoreMisconfigured` for a file that is no database, cut, or of a newer version: it is left
    as it is. Raises `StoreUnavailable`.
    """
    boot = lease_rows.Boot(host_boot_id() if boot_id is None else boot_id, boottime)
    await trio.to_thread.run_sync(_prepare, path, abandon_on_cancel=True)
    store = SqliteSharedStore(path, boot)
    try:
        yield store
    finally:
        await store.aclose()


def _prepare(path: Path) -> None:
    create_file(path, SCHEMA)
    try:
        check_file(path, SCHEMA)
    except FileBroken as broken:
        raise StoreMisconfigured(
            f"{broken}. Stop every instance, then put back a backup of it, or move it away to "
            "begin with an empty store."
        ) from broken
    check_log(path, SCHEMA)


class SqliteSharedStore:
    """`LeaseStore`, `AccountStore`, `OutboxStore` and `InboxStore` in one file.

    Three threads, each with a connection of its own: the lease is never queued behind accounts,
    nor commits behind a listing.
    """

    def __init__(self, path: Path, boot: lease_rows.Boot) -> None:
        self._path = path
        self._boot = boot
        turnstile = Turnstile()
        connect = partial(open_connection, path)
        connect_lease = partial(open_connection, path, checkpoint_pages=LEASE_CHECKPOINT_PAGES)
        show = partial(show_as_newest, path=path, schema=SCHEMA)
        check = partial(check_newest, path=path, schema=SCHEMA)
        self._lease = Worker(
            path,
            connect_lease,
            turnstile,
            name="shared-lease",
            urgent=True,
            read_begun=show,
            write_begun=partial(refuse_newer, path=path, schema=SCHEMA),
        )
        self._reads = Worker(path, connect, turnstile, name="shared-reads", read_begun=show)
        self._writes = Worker(path, connect, turnstile, name="shared-writes", write_begun=check)

    @property
    def transactions(self) -> int:
        """Write transactions of accounts and outbox so far: fewer than commits that met."""
        return self._writes.transactions

    async def aclose(self) -> None:
        """End the threads. What waits for them raises `trio.ClosedResourceError`."""
        for worker in (self._lease, self._reads, self._writes):
            await worker.aclose()

    # -- LeaseStore

    async def read(self) -> LeaseView:
        return await self._lease.read(lambda db: lease_rows.read(db, self._boot))

    async def read_heartbeat(self) -> Heartbeat:
        return await self._lease.read(lambda db: lease_rows.read_heartbeat(db, self._boot))

    async def write(self, write: LeaseWrite) -> LeaseStamps:
        def put(db: sqlite3.Connection) -> LeaseStamps:
            if write.takes_lease:
                # Nobody else acts from here on: what the one before could not read may come.
                upgrade(db, self._path, SCHEMA)
            check_newest(db, self._path, SCHEMA)
            return lease_rows.write(db, self._boot, write)

        return await self._lease.write(put)

    async def initialise(self, *, epoch: int = 0) -> bool:
        def put(db: sqlite3.Connection) -> bool:
            if not lease_rows.is_any_there(db):
                upgrade(db, self._path, SCHEMA)
            return lease_rows.initialise(db, self._boot, epoch)

        return await self._lease.write(put)

    def watch_fence(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Fence]]:
        return self._watch_fence()

    @asynccontextmanager
    async def _watch_fence(self) -> AsyncIterator[trio.MemoryReceiveChannel[Fence]]:
        send, receive = trio.open_memory_channel[Fence](1)
        with send, receive:
            watcher = _FenceWatcher(self._path, send, receive)
            try:
                yield receive
            finally:
                watcher.stop()

    # -- AccountStore

    async def list_accounts(self) -> Listing:
        return await self._reads.read(account_rows.read_all)

    async def fetch_account(self, account_id: AccountId) -> AccountCopy | None:
        return await self._reads.read(lambda db: account_rows.read_one(db, account_id))

    async def create_account(
        self, grant: Grant, account: Account, version: Version, parts: Mapping[PartName, bytes]
    ) -> Stamp:
        return await self._writes.write(
            lambda db: account_rows.create(db, grant, account, version, parts)
        )

    async def commit(self, commit: AccountCommit) -> Stamp:
        return await self._writes.write(lambda db: account_rows.commit(db, commit))

    async def seal(self, commits: Sequence[AccountCommit]) -> Sequence[Stamp | None]:
        stamps: list[Stamp | None] = []
        for start in range(0, len(commits), SEAL_GROUP_MAX):
            group = commits[start : start + SEAL_GROUP_MAX]
            stamps += await self._writes.write(partial(_seal, commits=group))
        return stamps

    async def remove_account(
        self, grant: Grant, account_id: AccountId, stamp: Stamp, *, purge: bool
    ) -> None:
        await self._writes.write(
            lambda db: account_rows.remove(db, grant, account_id, stamp, purge=purge)
        )

    async def archive_parts(self, copy: AccountCopy, reason: str) -> None:
        await self._writes.write(lambda db: account_rows.archive(db, copy, reason))

    # -- OutboxStore

    async def list_pending(self) -> Sequence[Message]:
        return await self._reads.read(message_rows.read_pending)

    async def fetch_message(self, message_id: MessageId) -> Message | None:
        return await self._reads.read(lambda db: message_rows.read_one(db, message_id))

    async def purge_messages(self, grant: Grant, *, before: float, count_max: int) -> int:
        def purge(db: sqlite3.Connection) -> int:
            account_rows.verify_grant(db, grant)
            return message_rows.purge(db, before, count_max)

        return await self._writes.write(purge)

    # -- InboxStore

    async def list_inbox(
        self, account_id: AccountId, *, after: InboxPlace | None, count_max: int
    ) -> Sequence[InboxEntry]:
        return await self._reads.read(
            lambda db: inbox_rows.read_after(db, account_id, after, count_max)
        )

    async def purge_inbox(self, grant: Grant, *, before: float, count_max: int) -> int:
        def purge(db: sqlite3.Connection) -> int:
            account_rows.verify_grant(db, grant)
            return inbox_rows.purge(db, before, count_max)

        return await self._writes.write(purge)


def _seal(db: sqlite3.Connection, commits: Sequence[AccountCommit]) -> list[Stamp | None]:
    stamps: list[Stamp | None] = []
    for commit in commits:
        try:
            stamps.append(account_rows.commit(db, commit))
        except StaleWrite:
            stamps.append(None)
    return stamps


class _FenceWatcher:
    """A thread that offers the fence whenever it has changed, and reopens the file as needed.

    `PRAGMA data_version` changes with every commit of another connection, of any process.
    """

    def __init__(
        self,
        path: Path,
        send: trio.MemorySendChannel[Fence],
        receive: trio.MemoryReceiveChannel[Fence],
    ) -> None:
        self._path = path
        self._send = send
        self._receive = receive
        self._stopped = threading.Event()
        self._trio = trio.lowlevel.current_trio_token()
        threading.Thread(target=self._watch, name="shared-fence", daemon=True).start()

    def stop(self) -> None:
        """Let the thread end by itself; a disk that hangs keeps nobody waiting."""
        self._stopped.set()

    def _watch(self) -> None:
        last: Stamp | None = None
        while not self._stopped.is_set():
            connection: sqlite3.Connection | None = None
            # The lease's own reads report what is wrong with the file; the watcher only hurries.
            with suppress(sqlite3.Error, StoreMisconfigured, trio.RunFinishedError):
                connection = open_connection(self._path)
                last = self._watch_with(connection, last)
            if connection is not None:
                connection.close()
            self._stopped.wait(WATCH_AGAIN_S)

    def _watch_with(self, connection: sqlite3.Connection, last: Stamp | None) -> Stamp | None:
        seen = None
        while not self._stopped.is_set():
            version = connection.execute("PRAGMA data_version").fetchone()[0]
            if version != seen:
                seen = version
                found = self._read_fence(connection)
                if found is not None and found[1] != last:
                    self._trio.run_sync_soon(self._offer, found[0])
                    last = found[1]
            self._stopped.wait(WATCH_EVERY_S)
        return last

    def _read_fence(self, connection: sqlite3.Connection) -> tuple[Fence, Stamp] | None:
        connection.execute("BEGIN")
        try:
            show_as_newest(connection, self._path, SCHEMA)
            return lease_rows.read_fence(connection)
        except StoreMisconfigured:
            # Of a newer release, as a rule: whom to forward to can be made out all the same.
            return lease_rows.read_lasting_fence(connection)
        finally:
            connection.execute("ROLLBACK")

    def _offer(self, fence: Fence) -> None:
        """Leave `fence` as the only one to read."""
        with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
            try:
                self._send.send_nowait(fence)
            except trio.WouldBlock:
                self._receive.receive_nowait()
                self._send.send_nowait(fence)
