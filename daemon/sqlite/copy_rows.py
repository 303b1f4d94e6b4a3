"""This host's copies of the accounts as rows. Runs in a worker's transaction.

What entering ACTIVE reads of every account is one small row: its plain fields, versions and main
part. The other parts are one packed blob in a table of its own, with the changes since then as
rows beside it, and are read for one account at a time: a commit writes only what it changed.
Changes are folded into the blob when they grow. The versions are plain columns, so that an older
copy never overwrites a newer one.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from daemon.sqlite.account_rows import unreadable
from machine.ports import StaleWrite
from machine.records import (
    MAIN_PART,
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    Listing,
    PartName,
    Version,
)

TABLES = """
CREATE TABLE copies (
    row INTEGER PRIMARY KEY,
    account_id TEXT NOT NULL UNIQUE,
    epoch INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    head BLOB NOT NULL,
    main BLOB
) STRICT;
CREATE TABLE rests (
    row INTEGER PRIMARY KEY,
    rest BLOB NOT NULL
) STRICT;
CREATE TABLE changes (
    row INTEGER PRIMARY KEY,
    copy INTEGER NOT NULL,
    number INTEGER NOT NULL,
    bytes_so_far INTEGER NOT NULL,
    change BLOB NOT NULL
) STRICT;
CREATE INDEX changes_by_copy ON changes (copy, row);
CREATE TABLE archive (
    row INTEGER PRIMARY KEY,
    account_id TEXT NOT NULL,
    at REAL NOT NULL,
    reason TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    head BLOB NOT NULL,
    main BLOB,
    rest BLOB,
    changes BLOB NOT NULL
) STRICT;
CREATE INDEX archive_by_account ON archive (account_id, row)
"""

CHANGES_MAX = 64
"""Changes beside a copy; then they are folded into it."""
CHANGES_BYTES_MAX = 256 * 1024
ARCHIVED_PER_ACCOUNT_MAX = 20


class _Head(msgspec.Struct, array_like=True, frozen=True):
    """What is listed of a copy beside its version and main part.

    `others` names every other part, so that one that is lost, or left over, is noticed.
    """

    account: Account
    commit_id: str
    removed: bool
    others: tuple[PartName, ...]


class _Parts(msgspec.Struct, array_like=True, frozen=True):
    """All parts but the main one, or a change of some, in which `None` deletes one."""

    account_id: AccountId
    parts: dict[PartName, bytes | None]


_COLUMNS = "row, account_id, epoch, revision, head, main"
_Row = tuple[int, str, int, int, bytes, bytes | None]

_encoder = msgspec.msgpack.Encoder()
_head_decoder = msgspec.msgpack.Decoder(_Head)
_parts_decoder = msgspec.msgpack.Decoder(_Parts)


def read_heads(connection: sqlite3.Connection) -> Listing:
    """Every copy with its main part alone, the unreadable ones with their fault."""
    rows = connection.execute(f"SELECT {_COLUMNS} FROM copies")  # noqa: S608  # our own names
    return Listing(tuple(map(_listed, rows)))


def read_one(connection: sqlite3.Connection, account_id: AccountId) -> AccountCopy | None:
    """One copy with all its parts, its changes applied; with its fault if it is unreadable.

    Raises `sqlite3.OperationalError` where the disk fails: that says nothing about the bytes.
    """
    row = _find(connection, account_id)
    if row is None:
        return None
    copy = _listed(row)
    if copy.fault is not None:
        return copy
    try:
        others = _others(connection, account_id, row[0])
    except sqlite3.OperationalError:
        raise
    except (sqlite3.DatabaseError, ValueError) as error:
        return _faulty(copy, f"its parts on this disk cannot be read: {error}")
    if others.keys() != set(_head_decoder.decode(row[4]).others):
        return _faulty(copy, "its parts on this disk are not the ones that it is made of")
    return replace(copy, parts={**copy.parts, **others}, complete=True)


def save(connection: sqlite3.Connection, copy: AccountCopy) -> None:
    """Replace the account's copy. Raises `StaleWrite` where a newer one can be read."""
    account_id = copy.account.account_id
    stored = read_one(connection, account_id)
    if stored is not None:
        if stored.fault is not None:
            _archive(connection, account_id, f"unreadable: {stored.fault}")
        elif stored.version > copy.version:
            raise StaleWrite(f"{stored.version} of {account_id} is here, {copy.version} is older")
    head = _Head(copy.account, copy.commit_id, copy.removed, _names(copy.parts))
    _put_head(connection, head, copy.version, copy.parts.get(MAIN_PART))
    _put_rest(connection, copy)


def apply(connection: sqlite3.Connection, commit: AccountCommit) -> None:
    """Write the commit's head, and its other parts beside the copy.

    Raises `StaleWrite` without a copy that can be read, or where a newer one is.
    """
    account_id, version = commit.account.account_id, commit.version
    row = _find(connection, account_id)
    if row is None:
        raise StaleWrite(f"there is no copy of {account_id} here")
    stored = _listed(row)
    if stored.version > version:
        raise StaleWrite(f"{stored.version} of {account_id} is here, {version} is older")
    if stored.fault is not None:
        raise StaleWrite(f"the copy of {account_id} cannot be read: {stored.fault}")
    changed = {name: data for name, data in commit.parts.items() if name != MAIN_PART}
    names = {**dict.fromkeys(_head_decoder.decode(row[4]).others, b""), **changed}
    head = _Head(commit.account, commit.commit_id, False, _names(names))
    _put_head(connection, head, version, commit.parts.get(MAIN_PART, row[5]))
    if changed:
        _add_change(connection, account_id, row[0], changed)


def remove(connection: sqlite3.Connection, account_id: AccountId, *, purge: bool) -> None:
    """Archive the copy, readable or not, or destroy it and what was archived before."""
    if purge:
        connection.execute("DELETE FROM archive WHERE account_id = ?", (account_id,))
    row = _find(connection, account_id)
    if row is None:
        return
    if not purge:
        _archive(connection, account_id, "removed")
    connection.execute("DELETE FROM changes WHERE copy = ?", row[:1])
    connection.execute("DELETE FROM rests WHERE row = ?", row[:1])
    connection.execute("DELETE FROM copies WHERE row = ?", row[:1])


def _find(connection: sqlite3.Connection, account_id: AccountId) -> _Row | None:
    found: _Row | None = connection.execute(
        f"SELECT {_COLUMNS} FROM copies WHERE account_id = ?",  # noqa: S608  # our own names
        (account_id,),
    ).fetchone()
    return found


def _listed(row: _Row) -> AccountCopy:
    """The copy as it is listed; with a fault where its head is unreadable.

    The version is known all the same: an unreadable copy must not lose to an older one.
    """
    _, name, epoch, revision, packed, main = row
    if None in (name, epoch, revision, packed):
        return unreadable(AccountId(name or "?"), "a value of its row on this disk is missing")
    account_id, version = AccountId(name), Version(epoch, revision)
    if not version.plausible:
        return unreadable(account_id, f"version {version} was never counted to")
    try:
        head = _head_decoder.decode(packed)
    except ValueError as error:
        fault = f"its row on this disk cannot be read: {error}"
        return replace(unreadable(account_id, fault), version=version)
    if head.account.account_id != account_id:
        fault = "its row on this disk is another account's"
        return replace(unreadable(account_id, fault), version=version)
    return AccountCopy(
        head.account,
        version,
        {} if main is None else {MAIN_PART: main},
        complete=not head.others,
        commit_id=head.commit_id,
        removed=head.removed,
    )


def _faulty(copy: AccountCopy, fault: str) -> AccountCopy:
    return replace(copy, parts={}, complete=False, fault=fault)


def _others(
    connection: sqlite3.Connection, account_id: AccountId, row: int
) -> dict[PartName, bytes]:
    """Every part but the main one. Raises `ValueError`, `sqlite3.DatabaseError`."""
    packed = [_rest(connection, row), *_changes(connection, row)]
    parts: dict[PartName, bytes | None] = {}
    for one in map(_parts_decoder.decode, packed):
        if one.account_id != account_id:
            raise ValueError("they are another account's")
        parts |= one.parts
    # What is `None` at the end was deleted; what was deleted and came back is not.
    return {name: data for name, data in parts.items() if data is not None}


def _rest(connection: sqlite3.Connection, row: int) -> bytes:
    """The packed blob. Raises `ValueError` where there is none, `sqlite3.DatabaseError`."""
    # Straight from the pages into our bytes: a SELECT would gather it in SQLite's memory first.
    try:
        with connection.blobopen("rests", "rest", row, readonly=True) as blob:
            return blob.read()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:
            raise
        # "No such rowid", which is how SQLite says it of a blob.
        raise ValueError("they are not there") from error


def _changes(connection: sqlite3.Connection, row: int) -> list[bytes]:
    rows = connection.execute("SELECT change FROM changes WHERE copy = ? ORDER BY row", (row,))
    return [change for (change,) in rows]


def _names(parts: Mapping[PartName, bytes | None]) -> tuple[PartName, ...]:
    return tuple(name for name, data in parts.items() if data is not None and name != MAIN_PART)


def _put_head(
    connection: sqlite3.Connection, head: _Head, version: Version, main: bytes | None
) -> None:
    connection.execute(
        "INSERT INTO copies (account_id, epoch, revision, head, main) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (account_id) DO UPDATE SET epoch = excluded.epoch,"
        " revision = excluded.revision, head = excluded.head, main = excluded.main",
        (
            head.account.account_id,
            version.epoch,
            version.revision,
            _encoder.encode(head),
            main,
        ),
    )


def _put_rest(connection: sqlite3.Connection, copy: AccountCopy) -> None:
    """Replace every part but the main one, and the changes with them. The head is there."""
    account_id = copy.account.account_id
    (row,) = connection.execute(
        "SELECT row FROM copies WHERE account_id = ?", (account_id,)
    ).fetchone()
    others = {name: data for name, data in copy.parts.items() if name != MAIN_PART}
    rest = _encoder.encode(_Parts(account_id, dict(others)))
    connection.execute("DELETE FROM changes WHERE copy = ?", (row,))
    connection.execute("REPLACE INTO rests VALUES (?, ?)", (row, rest))


def _add_change(
    connection: sqlite3.Connection,
    account_id: AccountId,
    row: int,
    parts: dict[PartName, bytes | None],
) -> None:
    """Put the change beside the copy, and fold when there are enough of them.

    Raises `StaleWrite` where there is nothing that it could be folded into.
    """
    change = _encoder.encode(_Parts(account_id, parts))
    number, bytes_so_far = connection.execute(
        "SELECT number, bytes_so_far FROM changes WHERE copy = ? ORDER BY row DESC LIMIT 1", (row,)
    ).fetchone() or (0, 0)
    number, bytes_so_far = number + 1, bytes_so_far + len(change)
    connection.execute(
        "INSERT INTO changes (copy, number, bytes_so_far, change) VALUES (?, ?, ?, ?)",
        (row, number, bytes_so_far, change),
    )
    if number > CHANGES_MAX or bytes_so_far > CHANGES_BYTES_MAX:
        folded = read_one(connection, account_id)
        assert folded is not None
        if folded.fault is not None:
            raise StaleWrite(f"the copy of {account_id} cannot be read: {folded.fault}")
        _put_rest(connection, folded)


def _archive(connection: sqlite3.Connection, account_id: AccountId, reason: str) -> None:
    """Keep the bytes as they are, of the newest few copies."""
    (row,) = connection.execute(
        "SELECT row FROM copies WHERE account_id = ?", (account_id,)
    ).fetchone()
    changes = _encoder.encode(_changes(connection, row))
    connection.execute(
        "INSERT INTO archive"
        " (account_id, at, reason, epoch, revision, head, main, rest, changes)"
        " SELECT account_id, ?, ?, epoch, revision, head, main,"
        " (SELECT rest FROM rests WHERE rests.row = copies.row), ? FROM copies WHERE row = ?",
        (time.time(), reason, changes, row),
    )
    connection.execute(
        "DELETE FROM archive WHERE account_id = ? AND row NOT IN"
        " (SELECT row FROM archive WHERE account_id = ? ORDER BY row DESC LIMIT ?)",
        (account_id, account_id, ARCHIVED_PER_ACCOUNT_MAX),
    )
