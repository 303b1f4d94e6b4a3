"""systemd's journal, spoken to directly: an entry is one datagram, with fields to ask for.

Standard library only, for the warden uses it too. The protocol is that of
https://systemd.io/JOURNAL_NATIVE_PROTOCOL/. Never lives here: which fields an entry has, and what
must not be in them (`daemon.journal` masks secrets before anything comes here).
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import termios
import time
from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"

IDENTIFIER = "watchkeeper"
"""As what an entry shows in `journalctl`."""

PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3}
"""syslog(3)'s number of each of our levels."""

ENTRY_BYTES_MAX = 48 * 1024
"""Journald takes more, but not in one datagram everywhere; and nobody reads so long a line."""

SEND_S = 1.0
"""How long `send` waits for a journal that is behind."""

TAKEN_S = 0.5
TAKEN_STEP_S = 0.005


def is_behind(descriptor: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether what is written to `descriptor` goes to the journal.

    Systemd names the stream that it made in JOURNAL_STREAM (systemd.exec(5)); a descriptor that
    was redirected since is another file.
    """
    named = environ.get("JOURNAL_STREAM")
    if not named:
        return False
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return named == f"{found.st_dev}:{found.st_ino}"


def encode(level: str, message: str, fields: Mapping[str, object]) -> bytes:
    """An entry. `fields` get WATCHKEEPER_ before their names; `None` is left out."""
    named = {f"WATCHKEEPER_{name}": value for name, value in fields.items() if value is not None}
    entry: dict[str, object] = {
        "MESSAGE": message,
        "PRIORITY": PRIORITIES.get(level, PRIORITIES["warning"]),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        **named,
    }
    return b"".join(_field(name, str(value)) for name, value in entry.items())


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "backslashreplace")
    if b"\n" in data:
        # Its length instead of its end: nothing in a value can begin a field of its own.
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


def prefixed(level: str, line: str) -> str:
    """A line for the stream to the journal, with its priority (sd-daemon(3)).

    For what cannot go as an entry; the stream is systemd's, which reads the prefix.
    """
    return f"<{PRIORITIES.get(level, PRIORITIES['warning'])}>{line}"


class Journald:
    """The way to the journal. Connected to nothing, so that it outlives a restart of journald."""

    def __init__(self, path: str = SOCKET) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def send(self, entry: bytes, *, wait: bool = True) -> bool:
        """Whether the journal has it. Waits at most `SEND_S`, without `wait` not at all."""
        if len(entry) > ENTRY_BYTES_MAX:
            return False
        self._socket.settimeout(SEND_S if wait else 0)
        try:
            self._socket.sendto(entry, self._path)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Wait until journald has taken the last entry, for at most `TAKEN_S`; then close.

        It looks up which service an entry is from by the process that sent it: of one that is gone
        it finds nothing, and `journalctl -u` would lack the last words.
        """
        give_up_at = time.monotonic() + TAKEN_S
        # For a UNIX socket this is what the receiver has not read (linux/net/unix/af_unix.c).
        unread = bytearray(4)
        while time.monotonic() < give_up_at:
            fcntl.ioctl(self._socket, termios.TIOCOUTQ, unread)
            # Taken, and not yet looked up: the wait is once more for that.
            select.select([], [], [], TAKEN_STEP_S)
            if not any(unread):
                break
        self._socket.close()
