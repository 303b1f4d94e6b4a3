"""What the server tells a bridge about its connections, in whichever process it is.

Lives here: the mail and the box that it is read from. The server writes it (`server`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from daemon.loopback.database import open_database
from daemon.loopback.waiting import Letter


@dataclass(frozen=True, slots=True)
class Mail:
    """What a bridge is told about one of its connections: `closed`, `scanned` or `received`."""

    seq: int
    connection_id: str
    kind: str
    code: int = 0
    detail: str = ""
    expire_s: float | None = None
    phone: str = ""
    letter: Letter | None = None


def read_mail(row: tuple[int, str, str, str]) -> Mail:
    """Mail from its row: seq, connection, kind, and the rest as JSON."""
    body = json.loads(row[3])
    if row[2] == "received":
        return Mail(row[0], row[1], row[2], letter=Letter(**body))
    return Mail(row[0], row[1], row[2], **body)


class Mailbox:
    """A bridge's mail, watched through a database connection of its own.

    For one thread at a time.
    """

    def __init__(self, directory: Path, bridge_id: str) -> None:
        self._bridge_id = bridge_id
        self._database = open_database(directory)
        self._version = -1
        self._seq = 0

    def close(self) -> None:
        self._database.close()

    def collect(self) -> tuple[Mail, ...]:
        """The mail that came since the last call. Raises `sqlite3.Error`."""
        # Costs no query while nobody has written: a counter in the write-ahead log's index.
        version = self._database.execute("PRAGMA data_version").fetchone()[0]
        if version == self._version:
            return ()
        rows = self._database.execute(
            "SELECT seq, connection_id, kind, body FROM mail"
            " WHERE bridge_id = ? AND seq > ? ORDER BY seq",
            (self._bridge_id, self._seq),
        ).fetchall()
        self._version = version
        mails = tuple(read_mail(row) for row in rows)
        self._seq = mails[-1].seq if mails else self._seq
        return mails
