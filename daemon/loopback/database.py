"""The file that all instances of a host share, and how they see and wake each other.

Lives here: opening `loopback.db`, its tables, the signs of life of bridges, and their bells.
Never lives here: what the rows mean (`daemon.loopback.server`).

`synchronous=NORMAL` in WAL mode: what was committed survives the death of any process. A crash of
the host may lose the last commits, which a simulation can afford.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import time
from contextlib import suppress
from pathlib import Path

import trio

from daemon.loopback.waiting import TABLES

BUSY_S = 1.0
"""How long one instance waits for another's transaction. Transactions take a few milliseconds."""

PAGES_MAX = 524_288
"""2 GiB at SQLite's 4 KiB pages. Beyond it the server answers 503."""

FORMAT = 2

UNNAMED = ".new"
BELL = ".bell"
RINGS_MAX = 4096
STARTING_S = 60.0

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('behaviour', 0), ('evictions', 0);
CREATE TABLE behaviour (account_id TEXT PRIMARY KEY, body TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE device (
    device_id TEXT PRIMARY KEY, account_id TEXT NOT NULL, proof TEXT NOT NULL, phone TEXT NOT NULL,
    removed INTEGER NOT NULL, paired_at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX device_account ON device (account_id);
CREATE TABLE pairing (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, connection_id TEXT NOT NULL UNIQUE,
    bridge_id TEXT NOT NULL, account_id TEXT NOT NULL, device_id TEXT NOT NULL,
    proof TEXT NOT NULL, until REAL NOT NULL, code TEXT, code_until REAL, code_phone TEXT);
CREATE INDEX pairing_account ON pairing (account_id);
CREATE TABLE login (
    device_id TEXT PRIMARY KEY, connection_id TEXT NOT NULL, bridge_id TEXT NOT NULL,
    account_id TEXT NOT NULL) WITHOUT ROWID;
CREATE INDEX login_account ON login (account_id);
CREATE TABLE mail (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, bridge_id TEXT NOT NULL, connection_id TEXT NOT NULL,
    kind TEXT NOT NULL, body TEXT NOT NULL);
CREATE INDEX mail_bridge ON mail (bridge_id, seq);
CREATE TABLE message (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, account_id TEXT NOT NULL, recipient TEXT NOT NULL,
    message_id TEXT NOT NULL, text TEXT NOT NULL, at REAL NOT NULL, readable INTEGER NOT NULL,
    duplicate INTEGER NOT NULL);
CREATE INDEX message_name ON message (account_id, recipient, message_id, readable);
CREATE TABLE ratchet (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, device_id TEXT NOT NULL, contact TEXT NOT NULL,
    session_id TEXT NOT NULL, position INTEGER NOT NULL,
    UNIQUE (device_id, contact, session_id));
CREATE TABLE eviction (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, account_id TEXT NOT NULL, at REAL NOT NULL);
"""


class LoopbackUnusable(Exception):
    """The directory or the file cannot be used; the message says what to do."""


def open_database(directory: Path) -> sqlite3.Connection:
    """Open `loopback.db`, making directory (mode 0700), file and tables when they are missing.

    Blocks; for worker threads. Raises `LoopbackUnusable`.
    """
    path = directory / "loopback.db"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        database = sqlite3.connect(
            path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
    except (OSError, sqlite3.Error) as error:
        raise LoopbackUnusable(f"cannot open {path}: {error}") from error
    try:
        _enter_wal(database)
        database.execute("PRAGMA synchronous=NORMAL")
        database.execute(f"PRAGMA max_page_count={PAGES_MAX}")
        _make_tables(database, path)
    except sqlite3.Error as error:
        database.close()
        raise LoopbackUnusable(f"cannot use {path}: {error}; it may be deleted") from error
    except BaseException:
        database.close()
        raise
    return database


def _enter_wal(database: sqlite3.Connection) -> None:
    """Switch to WAL once. SQLite does not wait for others here by itself, so we do."""
    until = time.monotonic() + BUSY_S
    while True:
        try:
            if database.execute("PRAGMA journal_mode=WAL").fetchone()[0] == "wal":
                return
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
        time.sleep(0.01)


def _make_tables(database: sqlite3.Connection, path: Path) -> None:
    if database.execute("PRAGMA user_version").fetchone()[0] == FORMAT:
        return
    database.execute("BEGIN IMMEDIATE")
    try:
        found = database.execute("PRAGMA user_version").fetchone()[0]
        if found in (0, 1):
            # Format 1 has all but what waits for accounts.
            for statement in (*(_TABLES.split(";") if found == 0 else ()), *TABLES.split(";")):
                database.execute(statement)
            database.execute(f"PRAGMA user_version={FORMAT}")
        elif found != FORMAT:
            raise LoopbackUnusable(f"{path} has format {found}, not {FORMAT}; delete it")
        database.execute("COMMIT")
    finally:
        if database.in_transaction:
            database.execute("ROLLBACK")


class Presence:
    """A bridge's sign of life: a file under an exclusive flock, from construction to `close`.

    The kernel drops the flock with the process, so a bridge whose process was killed is seen as
    gone at once, as a server sees its connections reset. A stopped process still counts as alive.
    Beside it is a bell, a FIFO that whoever has mail for the bridge writes to (`ring`).
    """

    def __init__(self, directory: Path) -> None:
        self.bridge_id = secrets.token_hex(8)
        self._path = _sign(directory, self.bridge_id)
        self._path.parent.mkdir(mode=0o700, exist_ok=True)
        # Named only once the flock is held, or another would take it for a dead bridge's.
        unnamed = self._path.with_suffix(UNNAMED)
        self._fd = os.open(unnamed, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        bell = self._path.with_suffix(BELL)
        os.mkfifo(bell, 0o600)
        # For writing too: a FIFO whose last writer has gone would stay readable for ever.
        self._bell = os.open(bell, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        unnamed.rename(self._path)

    async def wait_rung(self) -> None:
        """Wait until there may be mail. Spurious rings happen; rings in a row are one."""
        await trio.lowlevel.wait_readable(self._bell)
        with suppress(BlockingIOError):
            os.read(self._bell, RINGS_MAX)

    def close(self) -> None:
        """Be gone, for everyone, when this returns."""
        _remove_sign(self._path)
        os.close(self._fd)
        os.close(self._bell)


def is_alive(directory: Path, bridge_id: str) -> bool:
    """Whether the bridge's process still runs. Removes the sign of one that does not."""
    path = _sign(directory, bridge_id)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who look at the same time do not take each other for the bridge.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        _remove_sign(path)
        return False
    finally:
        os.close(fd)


def ring(directory: Path, bridge_id: str) -> None:
    """Wake a bridge: it has mail. One that is gone is not missed."""
    # A bell that is gone, has no listener, or is full of rings already: nothing to add.
    with suppress(OSError):
        fd = os.open(
            _sign(directory, bridge_id).with_suffix(BELL),
            os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC,
        )
        try:
            os.write(fd, b"!")
        finally:
            os.close(fd)


def sweep_signs(directory: Path) -> None:
    """Remove the signs of bridges whose processes were killed."""
    with suppress(FileNotFoundError):
        for path in (directory / "bridges").iterdir():
            if not path.suffix:
                is_alive(directory, path.name)
            elif not path.with_suffix("").exists() and _age_s(path) > STARTING_S:
                # Left by a bridge that was killed while it started.
                path.unlink(missing_ok=True)


def _age_s(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _remove_sign(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.with_suffix(BELL).unlink(missing_ok=True)


def _sign(directory: Path, bridge_id: str) -> Path:
    return directory / "bridges" / bridge_id
