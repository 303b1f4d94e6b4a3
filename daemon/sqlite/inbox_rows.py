"""The received messages of the embedded store as rows. Runs in a worker's transaction."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from machine.records import (
    AccountId,
    InboundMessage,
    InboxEntry,
    InboxPlace,
    MessageId,
    Version,
)

TABLES = """
CREATE TABLE inbox (
    account_id TEXT NOT NULL,
    chat TEXT NOT NULL,
    message_id TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    revision INTEGER NOT NULL,
    number INTEGER NOT NULL,
    sender TEXT NOT NULL,
    sender_name TEXT,
    text TEXT NOT NULL,
    sent_at REAL NOT NULL,
    received_at REAL NOT NULL,
    PRIMARY KEY (account_id, chat, message_id)
) STRICT;
CREATE UNIQUE INDEX inbox_places ON inbox (account_id, epoch, revision, number);
CREATE INDEX inbox_by_age ON inbox (received_at)
"""

_COLUMNS = (
    "account_id, chat, message_id, epoch, revision, number, sender, sender_name, text, sent_at,"
    " received_at"
)


def put(
    connection: sqlite3.Connection, version: Version, messages: Sequence[InboundMessage]
) -> None:
    """Write the messages that are not there yet, at the places of `version`."""
    connection.executemany(
        # Only their own key may be taken: two messages at one place would be a bug.
        f"INSERT INTO inbox ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608  # our names
        " ON CONFLICT (account_id, chat, message_id) DO NOTHING",
        [
            (
                message.account_id,
                message.chat,
                message.message_id,
                version.epoch,
                version.revision,
                number,
                message.sender,
                message.sender_name,
                message.text,
                message.sent_at,
                message.received_at,
            )
            for number, message in enumerate(messages)
        ],
    )


def read_after(
    connection: sqlite3.Connection,
    account_id: AccountId,
    after: InboxPlace | None,
    count_max: int,
) -> list[InboxEntry]:
    """The account's messages after a place, in order."""
    place = (-1, 0, 0) if after is None else (after.epoch, after.revision, after.number)
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM inbox"  # noqa: S608  # our names
        " WHERE account_id = ? AND (epoch, revision, number) > (?, ?, ?)"
        " ORDER BY epoch, revision, number LIMIT ?",
        (account_id, *place, max(0, count_max)),
    )
    return [
        InboxEntry(
            InboxPlace(epoch, revision, number),
            InboundMessage(AccountId(owner), MessageId(message_id), chat, *rest),
        )
        for owner, chat, message_id, epoch, revision, number, *rest in rows
    ]


def purge(connection: sqlite3.Connection, before: float, count_max: int) -> int:
    """Delete the oldest messages received before a moment; how many went."""
    return connection.execute(
        "DELETE FROM inbox WHERE rowid IN (SELECT rowid FROM inbox WHERE received_at < ?"
        " ORDER BY received_at LIMIT ?)",
        (before, max(0, count_max)),
    ).rowcount
