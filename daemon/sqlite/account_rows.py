"""The accounts of the embedded store as rows. Runs in a worker's transaction.

An account is a row of plain columns with its main part; the other parts are rows of their own,
so that a commit writes only what changed. Removed, it leaves its row as a mark, without bytes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from typing import Any

import msgspec

from daemon.sqlite import inbox_rows, lease_rows, message_rows
from machine.ports import AccountExists, MessageExists, StaleWrite, check_fits
from machine.records import (
    MAIN_PART,
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    AccountStatus,
    Grant,
    Listing,
    PartName,
    Stamp,
    Version,
)

TABLES = """
CREATE TABLE accounts (
    account_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    status TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    since REAL NOT NULL,
    phone TEXT,
    last_error TEXT,
    last_connected_at REAL,
    epoch INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    stamp TEXT NOT NULL,
    commit_id TEXT NOT NULL,
    removed INTEGER NOT NULL,
    main BLOB,
    banned_until REAL,
    sessions_doubtful INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE parts (
    row INTEGER PRIMARY KEY,
    account_id TEXT NOT NULL,
    name TEXT NOT NULL,
    data BLOB NOT NULL,
    UNIQUE (account_id, name)
) STRICT;
CREATE TABLE archive (
    row INTEGER PRIMARY KEY,
    account_id TEXT NOT NULL,
    at REAL NOT NULL,
    reason TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    parts BLOB NOT NULL
) STRICT;
CREATE INDEX archive_by_account ON archive (account_id, row)
"""

ARCHIVED_PER_ACCOUNT_MAX = 20

_COLUMNS = (
    "account_id, name, status, created_at, updated_at, since, phone, last_error,"
    " last_connected_at, epoch, revision, stamp, commit_id, removed, main,"
    " banned_until, sessions_doubtful,"
    " EXISTS (SELECT 1 FROM parts WHERE parts.account_id = accounts.account_id)"
)


def read_all(connection: sqlite3.Connection) -> Listing:
    """Every account with its main part, the unreadable ones with their fault."""
    try:
        rows = connection.execute(f"SELECT {_COLUMNS} FROM accounts")  # noqa: S608  # our names
        return Listing(tuple(_copy(row) for row in rows))
    except sqlite3.DatabaseError:
        return _read_each(connection)


def _read_each(connection: sqlite3.Connection) -> Listing:
    """What can still be read of a damaged table: the names from the index, then row by row."""
    copies: list[AccountCopy] = []
    names: list[str] = []
    fault: str | None = None
    try:
        # What came before the damage counts.
        # The index alone answers this; it may be whole where the table is not.
        for (name,) in connection.execute("SELECT account_id FROM accounts ORDER BY account_id"):
            names.append(name)
    except sqlite3.DatabaseError as error:
        fault = f"not every account can be named: {error}"
    for name in names:
        account_id = AccountId(name)
        try:
            row = connection.execute(
                f"SELECT {_COLUMNS} FROM accounts WHERE account_id = ?",  # noqa: S608  # our names
                (name,),
            ).fetchone()
        except sqlite3.DatabaseError as error:
            copies.append(unreadable(account_id, f"its row cannot be read: {error}"))
        else:
            lost = unreadable(account_id, "its row is not where the index has it")
            copies.append(lost if row is None else _copy(row))
    return Listing(tuple(copies), complete=fault is None, fault=fault)


def read_one(connection: sqlite3.Connection, account_id: AccountId) -> AccountCopy | None:
    """One account with all its parts."""
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM accounts WHERE account_id = ?",  # noqa: S608  # our names
        (account_id,),
    ).fetchone()
    if row is None:
        return None
    copy = _copy(row)
    if copy.fault is not None:
        return copy
    parts = {**copy.parts, **_other_parts(connection, account_id)}
    return AccountCopy(
        copy.account,
        copy.version,
        parts,
        complete=True,
        stamp=copy.stamp,
        commit_id=copy.commit_id,
        removed=copy.removed,
    )


def create(
    connection: sqlite3.Connection,
    grant: Grant,
    account: Account,
    version: Version,
    parts: Mapping[PartName, bytes],
) -> Stamp:
    """A new row, or the mark of a removed one filled again. Raises as the port says."""
    verify_grant(connection, grant)
    account_id = account.account_id
    row = connection.execute(
        "SELECT removed FROM accounts WHERE account_id = ?", (account_id,)
    ).fetchone()
    if row is not None and not row[0]:
        raise AccountExists(f"account {account_id} exists")
    stamp = lease_rows.new_stamp()
    connection.execute(
        "REPLACE INTO accounts VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, '', 0, ?, ?, ?)",
        (
            account_id,
            account.name,
            account.status,
            account.created_at,
            account.updated_at,
            account.since,
            account.phone,
            account.last_error,
            account.last_connected_at,
            version.epoch,
            version.revision,
            stamp,
            parts.get(MAIN_PART),
            account.banned_until,
            account.sessions_doubtful,
        ),
    )
    _put_parts(connection, account_id, parts)
    return stamp


def commit(connection: sqlite3.Connection, commit: AccountCommit) -> Stamp:
    """Apply one commit, or find it applied. Raises `StaleWrite`, `MessageExists`."""
    check_fits(commit)
    account = commit.account
    account_id = account.account_id
    row = connection.execute(
        "SELECT stamp, commit_id, removed FROM accounts WHERE account_id = ?", (account_id,)
    ).fetchone()
    if row is None or row[2]:
        raise StaleWrite(f"account {account_id} is not there")
    if row[1] == commit.commit_id:
        return Stamp(row[0])
    if row[0] != commit.stamp:
        raise StaleWrite(f"account {account_id} has changed since it was read")
    _refuse_older(connection, commit.grant)
    for message in commit.new_messages:
        existing = message_rows.read_one(connection, message.message_id)
        if existing is not None:
            raise MessageExists(existing)
    for message in (*commit.new_messages, *commit.messages):
        message_rows.put(connection, message)
    inbox_rows.put(connection, commit.version, commit.inbound)
    stamp = lease_rows.new_stamp()
    connection.execute(
        "UPDATE accounts SET name = ?, status = ?, created_at = ?, updated_at = ?, since = ?,"
        " phone = ?, last_error = ?, last_connected_at = ?, banned_until = ?,"
        " sessions_doubtful = ?, epoch = ?, revision = ?, stamp = ?, commit_id = ?"
        " WHERE account_id = ?",
        (
            account.name,
            account.status,
            account.created_at,
            account.updated_at,
            account.since,
            account.phone,
            account.last_error,
            account.last_connected_at,
            account.banned_until,
            account.sessions_doubtful,
            commit.version.epoch,
            commit.version.revision,
            stamp,
            commit.commit_id,
            account_id,
        ),
    )
    if MAIN_PART in commit.parts:
        connection.execute(
            "UPDATE accounts SET main = ? WHERE account_id = ?",
            (commit.parts[MAIN_PART], account_id),
        )
    _put_parts(connection, account_id, commit.parts)
    return stamp


def remove(
    connection: sqlite3.Connection,
    grant: Grant,
    account_id: AccountId,
    stamp: Stamp,
    *,
    purge: bool,
) -> None:
    """Leave a mark where the account was; archive its bytes, or destroy all of them."""
    copy = read_one(connection, account_id)
    if copy is None or copy.removed or copy.stamp != stamp:
        raise StaleWrite(f"account {account_id} is not as expected")
    _refuse_older(connection, grant)
    if purge:
        connection.execute("DELETE FROM archive WHERE account_id = ?", (account_id,))
    else:
        archive(connection, copy, "removed")
    connection.execute("DELETE FROM parts WHERE account_id = ?", (account_id,))
    connection.execute(
        "UPDATE accounts SET epoch = ?, revision = revision + 1, stamp = ?, commit_id = '',"
        " removed = 1, main = NULL, phone = NULL WHERE account_id = ?",
        (grant.epoch, lease_rows.new_stamp(), account_id),
    )


def archive(connection: sqlite3.Connection, copy: AccountCopy, reason: str) -> None:
    """Keep the copy's bytes, the newest few of each account."""
    account_id = copy.account.account_id
    connection.execute(
        "INSERT INTO archive (account_id, at, reason, epoch, revision, parts)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            account_id,
            time.time(),
            reason,
            copy.version.epoch,
            copy.version.revision,
            msgspec.msgpack.encode(dict(copy.parts)),
        ),
    )
    connection.execute(
        "DELETE FROM archive WHERE account_id = ? AND row NOT IN"
        " (SELECT row FROM archive WHERE account_id = ? ORDER BY row DESC LIMIT ?)",
        (account_id, account_id, ARCHIVED_PER_ACCOUNT_MAX),
    )


def verify_grant(connection: sqlite3.Connection, grant: Grant) -> None:
    """Raises `StaleWrite` unless the fence still names this epoch and incarnation."""
    found = lease_rows.read_fence(connection)
    if found is None or (found[0].epoch, found[0].incarnation) != (grant.epoch, grant.incarnation):
        raise StaleWrite(f"epoch {grant.epoch} is over")


def unreadable(account_id: AccountId, fault: str) -> AccountCopy:
    """A copy of which only the name could be made out."""
    account = Account(account_id, account_id, AccountStatus.QUARANTINED, 0.0, 0.0, 0.0)
    return AccountCopy(account, Version(0, 0), {}, complete=False, fault=fault)


def _refuse_older(connection: sqlite3.Connection, grant: Grant) -> None:
    """The stamp alone fences an account; that a newer epoch exists at all is free to see here."""
    row = connection.execute("SELECT epoch FROM fence").fetchone()
    if row is not None and row[0] > grant.epoch:
        raise StaleWrite(f"epoch {grant.epoch} is over: the fence is at {row[0]}")


def _copy(row: tuple[Any, ...]) -> AccountCopy:
    account_id, name, status, created_at, updated_at, since, phone, last_error, connected = row[:9]
    epoch, revision, stamp, commit_id, removed, main, banned_until, doubtful, others = row[9:]
    if None in (*row[:6], epoch, revision, stamp, commit_id):
        # STRICT tables keep types, and a damaged page keeps nothing.
        return unreadable(AccountId(account_id or "?"), "a value of its row is missing")
    fault = None
    try:
        known = AccountStatus(status)
    except ValueError:
        known, fault = AccountStatus.QUARANTINED, f"its status is unknown: {status!r}"
    version = Version(epoch, revision)
    if not version.plausible:
        known, fault = AccountStatus.QUARANTINED, f"version {version} was never counted to"
        version = Version(0, 0)
    # STRICT tables: every column has the type that TABLES gives it.
    account = Account(
        account_id,
        name,
        known,
        created_at,
        updated_at,
        since,
        phone,
        last_error,
        connected,
        banned_until,
        bool(doubtful),
    )
    return AccountCopy(
        account,
        version,
        {} if main is None else {MAIN_PART: main},
        complete=not others and fault is None,
        stamp=stamp,
        commit_id=commit_id,
        fault=fault,
        removed=bool(removed),
    )


def _other_parts(connection: sqlite3.Connection, account_id: AccountId) -> dict[PartName, bytes]:
    return dict(
        connection.execute("SELECT name, data FROM parts WHERE account_id = ?", (account_id,))
    )


def _put_parts(
    connection: sqlite3.Connection,
    account_id: AccountId,
    parts: Mapping[PartName, bytes | None],
) -> None:
    """Write all but the main part; `None` deletes one."""
    for name, data in parts.items():
        if name == MAIN_PART:
            continue
        if data is None:
            connection.execute(
                "DELETE FROM parts WHERE account_id = ? AND name = ?", (account_id, name)
            )
        else:
            connection.execute(
                "INSERT INTO parts (account_id, name, data) VALUES (?, ?, ?)"
                " ON CONFLICT (account_id, name) DO UPDATE SET data = excluded.data",
                (account_id, name, data),
            )
