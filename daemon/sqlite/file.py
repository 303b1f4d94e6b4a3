"""What makes a SQLite file ours: how it is created, recognised, opened, and what its errors mean.

Never lives here: any table, and any thread.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from machine.ports import StoreMisconfigured, StoreUnavailable

BUSY_S = 1.0
"""How long SQLite itself waits for another process's transaction."""

WAL_BYTES_MAX = 64 * 2**20

_HEADER_BYTES = 100
_MAGIC = b"SQLite format 3\x00"
_JOURNALS = (b"\x02\x02", b"\x01\x01")
"""Written with a log, as ours are, or without one, as a copy that SQLite's own tools made."""

_REFUSED_FOR_GOOD = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_SCHEMA,
    }
)


@dataclass(frozen=True, slots=True)
class Schema:
    """One kind of file. `version` rises with every change that an older daemon cannot read."""

    application_id: int
    version: int
    tables: str
    page_bytes: int = 4096
    upgrades: Mapping[int, str] = field(default_factory=dict)
    """For each older version that is still read, what makes the next one of it."""
    views: Mapping[int, str] = field(default_factory=dict)
    """For each of them, temporary views and tables that show it as this version."""

    def __post_init__(self) -> None:
        assert self.upgrades.keys() == set(range(self.version - len(self.upgrades), self.version))
        assert self.views.keys() <= self.upgrades.keys()


class FileBroken(Exception):
    """The file is there and is not, or no longer, a database. Its bytes were not touched."""


def create_file(path: Path, schema: Schema) -> None:
    """Create the file with its tables, unless it is there already.

    It appears whole or not at all, so that an empty file is always a cut one. Raises
    `StoreMisconfigured` where the directory is missing or not ours to write.
    """
    if path.exists():
        return
    new = path.with_name(f"{path.name}.new-{secrets.token_hex(4)}")
    try:
        new.touch(mode=0o600)
        connection = sqlite3.connect(new, isolation_level=None)
        try:
            connection.execute(f"PRAGMA page_size = {schema.page_bytes}")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(
                f"BEGIN; {schema.tables}; PRAGMA application_id = {schema.application_id};"
                f"PRAGMA user_version = {schema.version}; COMMIT;"
            )
        finally:
            connection.close()
        # Another process may have been faster; then its file is the one.
        with contextlib.suppress(FileExistsError):
            os.link(new, path)
        sync_directory(path.parent)
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise StoreMisconfigured(
            f"cannot create {path}: {error.strerror}. Create the directory, or let this user "
            "write to it."
        ) from error
    except (OSError, sqlite3.Error) as error:
        raise StoreUnavailable(f"cannot create {path}: {error}", code="cannot_create") from error
    finally:
        with contextlib.suppress(OSError):
            new.unlink()


def check_file(path: Path, schema: Schema) -> None:
    """Look at the first bytes, without opening a database, so that nothing is changed by it.

    Raises `FileBroken` (not a database, or cut), `StoreMisconfigured` (a newer or another kind).
    What is in the log beside it is `check_log`'s.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER_BYTES)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StoreMisconfigured(f"cannot read {path}: {error.strerror}") from error
    if len(head) < _HEADER_BYTES or not head.startswith(_MAGIC):
        raise FileBroken(f"{path} is not a SQLite file: it was cut, or it is another program's")
    # The offsets are the file format's: https://www.sqlite.org/fileformat.html
    if head[18:20] not in _JOURNALS:
        # SQLite would only say what it writes with, and thereby write.
        raise FileBroken(f"{path} is damaged: its first bytes are of no SQLite that there is")
    page_bytes = int.from_bytes(head[16:18])
    page_bytes = 65536 if page_bytes == 1 else page_bytes
    pages = int.from_bytes(head[28:32])
    version = int.from_bytes(head[60:64])
    application_id = int.from_bytes(head[68:72])
    if application_id != schema.application_id:
        raise StoreMisconfigured(
            f"{path} belongs to another program. Move it away, or set another directory."
        )
    if version > schema.version:
        raise newer_file(path, version, schema)
    wal = path.with_name(f"{path.name}-wal")
    unfinished = wal.exists() and wal.stat().st_size > 0
    if not unfinished and size < pages * page_bytes:
        raise FileBroken(f"{path} is cut: {size} bytes of {pages * page_bytes}")


def check_log(path: Path, schema: Schema) -> None:
    """Refuse a newer file also where that is only in its log yet. Raises as the stores do.

    Read-only: closing another connection would fold the log into the file.
    """
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        with contextlib.closing(connection), garbled_is_corrupt():
            refuse_newer(connection, path, schema)
    except sqlite3.Error as error:
        raise translated(error, path) from error


def newer_file(path: Path, version: int, schema: Schema) -> StoreMisconfigured:
    """What is said of a file that only a newer release reads."""
    return StoreMisconfigured(
        f"{path} was written by a newer watchkeeper (format {version}, this one knows "
        f"{schema.version}). Nothing in it was changed. Run that release, or a later one; going "
        "back is in docs/upgrades.md."
    )


def refuse_newer(connection: sqlite3.Connection, path: Path, schema: Schema) -> int:
    """Which version the file is of, as this transaction sees it. Raises `StoreMisconfigured`."""
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > schema.version:
        raise newer_file(path, version, schema)
    return version


def show_as_newest(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    """Let what is read in this transaction see an older file as one of this version.

    The file stays as it is; the transaction must be rolled back at its end, and the views with it.
    Raises `StoreMisconfigured` for a newer file: another process may have upgraded it meanwhile.
    """
    version = refuse_newer(connection, path, schema)
    if version < schema.version:
        for statement in _views_of(path, version, schema).split(";"):
            connection.execute(statement)


def _views_of(path: Path, version: int, schema: Schema) -> str:
    views = schema.views.get(version)
    if views is None:
        raise StoreMisconfigured(
            f"{path} is of format {version}, and this watchkeeper reads {schema.version} and what "
            "it says in docs/upgrades.md. Run an earlier release first. Nothing was changed."
        )
    return views


def check_newest(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    """Refuse to write to a file of another version. Raises `StoreMisconfigured`."""
    version = refuse_newer(connection, path, schema)
    if version < schema.version:
        raise StoreMisconfigured(
            f"{path} is still of format {version}: the instance that takes the lease makes "
            f"{schema.version} of it. Start one of this release, and end those of the earlier one."
        )


def upgrade(connection: sqlite3.Connection, path: Path, schema: Schema) -> None:
    """Bring an older file up to this version, as part of the transaction that has begun.

    Raises `StoreMisconfigured`, `sqlite3.Error`; the caller then rolls back.
    """
    version = refuse_newer(connection, path, schema)
    if version == schema.version:
        return
    _views_of(path, version, schema)
    for step in range(version, schema.version):
        for statement in schema.upgrades[step].split(";"):
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {schema.version}")


def open_connection(
    path: Path, *, checkpoint_pages: int = 1000, busy_s: float = BUSY_S
) -> sqlite3.Connection:
    """Open for reading and writing; the file must exist. Raises `sqlite3.Error`."""
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw", uri=True, isolation_level=None, timeout=busy_s
    )
    try:
        with garbled_is_corrupt():
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute(f"PRAGMA wal_autocheckpoint = {checkpoint_pages}")
            connection.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_MAX}")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def garbled_is_corrupt() -> Iterator[None]:
    """Raise `sqlite3.DatabaseError` where Python's module cannot even tell SQLite's error.

    A message that quotes a damaged page need not be UTF-8, and then that is what is raised.
    """
    try:
        yield
    except UnicodeDecodeError as error:
        corrupt = sqlite3.DatabaseError("the database is malformed, its names are garbled")
        corrupt.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        corrupt.sqlite_errorname = "SQLITE_CORRUPT"
        raise corrupt from error


def translated(error: sqlite3.Error, path: Path) -> StoreUnavailable | StoreMisconfigured:
    """What a SQLite error means for who asked."""
    number = getattr(error, "sqlite_errorcode", 0)
    name = getattr(error, "sqlite_errorname", "SQLITE_ERROR").lower()
    if number & 0xFF in _REFUSED_FOR_GOOD:
        return StoreMisconfigured(
            f"{path.name}: {error} ({name}). Check the file's owner and disk; if it is damaged, "
            "stop every instance and put back a backup."
        )
    return StoreUnavailable(f"{path.name}: {error}", code=name)


def sync_directory(directory: Path) -> None:
    """Make a new name in `directory` survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
