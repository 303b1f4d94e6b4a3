"""This host's copies of the accounts as rows. Runs in a worker's transaction.

A copy is one packed blob, with the changes since then as rows beside it: a commit writes only
what it changed, and a listing reads one blob an account. Changes are folded into the blob when
they grow. The versions are plain columns, so that an older copy never overwrites a newer one.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

import msgspec

from daemon.sqlite.account_rows import unreadable
from machine.ports import StaleWrite
from machine.records import (
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
    account_id TEXT PRIMARY KEY,
    epoch INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    copy BLOB NOT NULL
) STRICT;
CREATE TABLE changes (
    row INTEGER PRIMARY KEY,
    account_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    number INTEGER NOT NULL,
    bytes_so_far INTEGER NOT NULL,
    change BLOB NOT NULL
) STRICT;
CREATE INDEX changes_by_account ON changes (account_id, row);
CREATE TABLE archive (
    row INTEGER PRIMARY KEY,
    account_id TEXT NOT NULL,
    at REAL NOT NULL,
    reason TEXT NOT NULL,
    copy BLOB NOT NULL,
    changes BLOB NOT NULL
) STRICT;
CREATE INDEX archive_by_account ON archive (account_id, row)
"""

CHANGES_MAX = 64
"""Changes beside a copy; then they are folded into it."""
CHANGES_BYTES_MAX = 256 * 1024
ARCHIVED_PER_ACCOUNT_MAX = 20


class _Packed(msgspec.Struct, array_like=True, frozen=True):
    """What a blob holds: a whole copy, or a change, in which `None` deletes a part."""

    account: Account
    epoch: int
    revision: int
    commit_id: str
    removed: bool
    parts: dict[PartName, bytes | None]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Packed)


def read_all(connection: sqlite3.Connection) -> Listing:
    """Every copy with its changes applied, the unreadable ones with their fault."""
    changes: dict[str, list[bytes]] = {}
    for account_id, change in connection.execute(
        "SELECT account_id, change FROM changes ORDER BY row"
    ):
        changes.setdefault(account_id, []).append(change)
    rows = connection.execute("SELECT account_id, copy FROM copies")
    return Listing(tuple(_copy(name, blob, changes.get(name, ())) for name, blob in rows))


def save(connection: sqlite3.Connection, copy: AccountCopy) -> None:
    """Replace the account's copy. Raises `StaleWrite` where a newer one can be read."""
    account_id = copy.account.account_id
    found = _newest(connection, account_id)
    if found is not None:
        stored = _read_one(connection, account_id)
        if stored.fault is not None:
            _archive(connection, account_id, f"unreadable: {stored.fault}")
        elif found > copy.version:
            raise StaleWrite(f"{found} of {account_id} is here, {copy.version} is older")
    _replace(connection, copy)


def apply(connection: sqlite3.Connection, commit: AccountCommit) -> None:
    """Put the commit's changes beside the copy. Raises `StaleWrite` without one, or a newer one."""
    account_id, version = commit.account.account_id, commit.version
    found = _newest(connection, account_id)
    if found is None:
        raise StaleWrite(f"there is no copy of {account_id} here")
    if found > version:
        raise StaleWrite(f"{found} of {account_id} is here, {version} is older")
    blob = _encoder.encode(
        _Packed(
            commit.account,
            version.epoch,
            version.revision,
            commit.commit_id,
            False,
            dict(commit.parts),
        )
    )
    number, bytes_so_far = connection.execute(
        "SELECT number, bytes_so_far FROM changes WHERE account_id = ? ORDER BY row DESC LIMIT 1",
        (account_id,),
    ).fetchone() or (0, 0)
    number, bytes_so_far = number + 1, bytes_so_far + len(blob)
    connection.execute(
        "INSERT INTO changes (account_id, epoch, revision, number, bytes_so_far, change)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (account_id, version.epoch, version.revision, number, bytes_so_far, blob),
    )
    if number > CHANGES_MAX or bytes_so_far > CHANGES_BYTES_MAX:
        folded = _read_one(connection, account_id)
        if folded.fault is not None:
            raise StaleWrite(f"the copy of {account_id} cannot be read: {folded.fault}")
        _replace(connection, folded)


def remove(connection: sqlite3.Connection, account_id: AccountId, *, purge: bool) -> None:
    """Archive the copy, readable or not, or destroy it and what was archived before."""
    if purge:
        connection.execute("DELETE FROM archive WHERE account_id = ?", (account_id,))
    elif _newest(connection, account_id) is not None:
        _archive(connection, account_id, "removed")
    connection.execute("DELETE FROM changes WHERE account_id = ?", (account_id,))
    connection.execute("DELETE FROM copies WHERE account_id = ?", (account_id,))


def _newest(connection: sqlite3.Connection, account_id: AccountId) -> Version | None:
    """The version that is here, by the columns alone."""
    row = (
        connection.execute(
            "SELECT epoch, revision FROM changes WHERE account_id = ? ORDER BY row DESC LIMIT 1",
            (account_id,),
        ).fetchone()
        or connection.execute(
            "SELECT epoch, revision FROM copies WHERE account_id = ?", (account_id,)
        ).fetchone()
    )
    return None if row is None else Version(*row)


def _read_one(connection: sqlite3.Connection, account_id: AccountId) -> AccountCopy:
    (blob,) = connection.execute(
        "SELECT copy FROM copies WHERE account_id = ?", (account_id,)
    ).fetchone()
    return _copy(account_id, blob, _changes(connection, account_id))


def _changes(connection: sqlite3.Connection, account_id: AccountId) -> list[bytes]:
    rows = connection.execute(
        "SELECT change FROM changes WHERE account_id = ? ORDER BY row", (account_id,)
    )
    return [change for (change,) in rows]


def _replace(connection: sqlite3.Connection, copy: AccountCopy) -> None:
    account_id, version = copy.account.account_id, copy.version
    blob = _encoder.encode(
        _Packed(
            copy.account,
            version.epoch,
            version.revision,
            copy.commit_id,
            copy.removed,
            dict(copy.parts),
        )
    )
    connection.execute("DELETE FROM changes WHERE account_id = ?", (account_id,))
    connection.execute(
        "REPLACE INTO copies VALUES (?, ?, ?, ?)",
        (account_id, version.epoch, version.revision, blob),
    )


def _archive(connection: sqlite3.Connection, account_id: AccountId, reason: str) -> None:
    """Keep the bytes as they are, of the newest few copies."""
    changes = _encoder.encode(_changes(connection, account_id))
    connection.execute(
        "INSERT INTO archive (account_id, at, reason, copy, changes)"
        " SELECT account_id, ?, ?, copy, ? FROM copies WHERE account_id = ?",
        (time.time(), reason, changes, account_id),
    )
    connection.execute(
        "DELETE FROM archive WHERE account_id = ? AND row NOT IN"
        " (SELECT row FROM archive WHERE account_id = ? ORDER BY row DESC LIMIT ?)",
        (account_id, account_id, ARCHIVED_PER_ACCOUNT_MAX),
    )


def _copy(name: str, blob: bytes, changes: Sequence[bytes]) -> AccountCopy:
    """The copy with its changes applied in order; with a fault where one of them is unreadable."""
    account_id = AccountId(name)
    try:
        packed = [_decoder.decode(one) for one in (blob, *changes)]
    except ValueError as error:
        return unreadable(account_id, f"its row on this disk cannot be read: {error}")
    if any(one.account.account_id != account_id for one in packed):
        return unreadable(account_id, "its row on this disk is another account's")
    newest, parts = packed[-1], packed[0].parts
    for one in packed[1:]:
        parts |= one.parts
    # What is `None` at the end was deleted; what was deleted and came back is not.
    for part in [part for part, data in parts.items() if data is None]:
        del parts[part]
    return AccountCopy(
        newest.account,
        Version(newest.epoch, newest.revision),
        parts,  # type: ignore[arg-type]  # every None has just been taken out
        complete=True,
        commit_id=newest.commit_id,
        removed=newest.removed,
    )
