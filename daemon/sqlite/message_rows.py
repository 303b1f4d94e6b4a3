"""The outbox of the embedded store as rows. Runs in a worker's transaction."""

from __future__ import annotations

import sqlite3
from contextlib import suppress
from typing import Any

import msgspec

from machine.ports import StoreMisconfigured
from machine.records import Message, MessageId, MessageState

TABLES = """
CREATE TABLE messages (
    message_id TEXT PRIMARY KEY,
    account_id TEXT NOT NULL,
    recipient TEXT NOT NULL,
    text TEXT NOT NULL,
    state TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    idempotency_key TEXT,
    error TEXT,
    attempts INTEGER NOT NULL,
    state_at TEXT NOT NULL
) STRICT;
CREATE INDEX messages_pending ON messages (created_at, message_id)
    WHERE state IN ('queued', 'sending');
CREATE INDEX messages_settled ON messages (updated_at)
    WHERE state NOT IN ('queued', 'sending')
"""

_COLUMNS = (
    "message_id, account_id, recipient, text, state, epoch, created_at, updated_at,"
    " idempotency_key, error, attempts, state_at"
)


def read_one(connection: sqlite3.Connection, message_id: MessageId) -> Message | None:
    """The message with this id. Raises `StoreMisconfigured` when its row means nothing to us."""
    row = connection.execute(
        f"SELECT {_COLUMNS} FROM messages WHERE message_id = ?",  # noqa: S608  # our names
        (message_id,),
    ).fetchone()
    if row is None:
        return None
    try:
        return _message(row)
    except ValueError as error:
        raise StoreMisconfigured(f"message {message_id} cannot be read: {error}") from error


def read_pending(connection: sqlite3.Connection) -> list[Message]:
    """Every message that is queued or sending, oldest first; one that cannot be read hides none.

    An unreadable one stays where it is: `read_one` says what is wrong with it.
    """
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM messages"  # noqa: S608  # our names
        " WHERE state IN ('queued', 'sending') ORDER BY created_at, message_id"
    )
    messages = []
    for row in rows:
        with suppress(ValueError):
            messages.append(_message(row))
    return messages


def put(connection: sqlite3.Connection, message: Message) -> None:
    """Write the message over what is there."""
    connection.execute(
        "REPLACE INTO messages VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            message.message_id,
            message.account_id,
            message.to,
            message.text,
            message.state,
            message.epoch,
            message.created_at,
            message.updated_at,
            message.idempotency_key,
            message.error,
            message.attempts,
            msgspec.json.encode(dict(message.state_at)).decode(),
        ),
    )


def purge(connection: sqlite3.Connection, before: float, count_max: int) -> int:
    """Delete the oldest settled messages; how many went."""
    return connection.execute(
        "DELETE FROM messages WHERE message_id IN (SELECT message_id FROM messages"
        " WHERE state NOT IN ('queued', 'sending') AND updated_at < ?"
        " ORDER BY updated_at LIMIT ?)",
        (before, max(0, count_max)),
    ).rowcount


def _message(row: tuple[Any, ...]) -> Message:
    """Raises `ValueError`."""
    message_id, account_id, to, text, state, epoch, created_at, updated_at = row[:8]
    idempotency_key, error, attempts, state_at = row[8:]
    return Message(
        message_id,
        account_id,
        to,
        text,
        MessageState(state),
        epoch,
        created_at,
        updated_at,
        idempotency_key,
        error,
        attempts,
        msgspec.json.decode(state_at, type=dict[MessageState, float]),
    )
