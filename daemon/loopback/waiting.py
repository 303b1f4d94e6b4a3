"""What accounts were sent and have not acknowledged, as rows: the server delivers it at each login.

Never lives here: who is logged in (`server`), and when something counts as acknowledged: a device
says so once its machine has stored it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field

from machine.records import AccountId

TABLES = """
CREATE TABLE waiting (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, account_id TEXT NOT NULL, message_id TEXT NOT NULL,
    sender TEXT NOT NULL, sender_name TEXT, text TEXT NOT NULL, sent_at REAL NOT NULL);
CREATE INDEX waiting_account ON waiting (account_id, seq);
"""

WAITING_MAX = 1000
"""Messages that wait for one account; then more are refused."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A message to an account. `seq` is the server's own number for it."""

    seq: int
    message_id: str
    sender: str
    sender_name: str | None
    text: str = field(repr=False)
    sent_at: float


_COLUMNS = "seq, message_id, sender, sender_name, text, sent_at"


def put(database: sqlite3.Connection, account_id: AccountId, letter: Letter) -> Letter:
    """Keep a letter; it comes back with its number."""
    cursor = database.execute(
        "INSERT INTO waiting (account_id, message_id, sender, sender_name, text, sent_at)"
        " VALUES (?, ?, ?, ?, ?, ?)",
        (
            account_id,
            letter.message_id,
            letter.sender,
            letter.sender_name,
            letter.text,
            letter.sent_at,
        ),
    )
    assert cursor.lastrowid is not None
    return Letter(
        cursor.lastrowid,
        letter.message_id,
        letter.sender,
        letter.sender_name,
        letter.text,
        letter.sent_at,
    )


def list_waiting(database: sqlite3.Connection, account_id: AccountId) -> list[Letter]:
    """What waits for an account, oldest first."""
    rows = database.execute(
        f"SELECT {_COLUMNS} FROM waiting WHERE account_id = ? ORDER BY seq",  # noqa: S608 (our own names)
        (account_id,),
    )
    return [Letter(*row) for row in rows]


def count_waiting(database: sqlite3.Connection, account_id: AccountId) -> int:
    """How much waits for an account."""
    row = database.execute(
        "SELECT count(*) FROM waiting WHERE account_id = ?", (account_id,)
    ).fetchone()
    return int(row[0])


def forget(database: sqlite3.Connection, account_id: AccountId, numbers: Sequence[int]) -> None:
    """An account has acknowledged these."""
    database.executemany(
        "DELETE FROM waiting WHERE account_id = ? AND seq = ?",
        [(account_id, number) for number in numbers],
    )
