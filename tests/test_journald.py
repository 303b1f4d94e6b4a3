"""Entries for systemd's journal, on a socket in its stead; `test_systemd` has the real one."""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from daemon import journald, warden
from daemon.journal import MASK, LoguruJournal, answering, open_journal
from daemon.warden import State

SECRET = "a-secret-that-was-in-the-settings"
ROOT = Path(__file__).parent.parent


def parse(datagram: bytes) -> dict[str, str]:
    """The fields of an entry; fails where it is not one."""
    fields: dict[str, str] = {}
    while datagram:
        line, _, rest = datagram.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if equals:
            datagram = rest
        else:
            (length,) = struct.unpack("<Q", rest[:8])
            value, datagram = rest[8 : 8 + length], rest[8 + length :]
            assert datagram[:1] == b"\n"
            datagram = datagram[1:]
        assert name.decode() not in fields
        fields[name.decode()] = value.decode()
    return fields


class System:
    """The journal's end: what came as entries, and what came on the stream."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "socket")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.socket.settimeout(5)
        self.stream_path = directory / "stream"
        self.stream: TextIO = self.stream_path.open("w")

    def next_entry(self) -> dict[str, str]:
        return parse(self.socket.recv(1 << 20))

    def on_stream(self) -> list[str]:
        return self.stream_path.read_text().splitlines()


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[System]:
    """A stream that JOURNAL_STREAM names, and the socket that goes with it."""
    system = System(tmp_path)
    found = os.fstat(system.stream.fileno())
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    yield system
    system.stream.close()
    system.socket.close()


@pytest.fixture
def journal(system: System) -> Iterator[LoguruJournal]:
    with open_journal(
        "a", secrets=[SECRET], stream=system.stream, system_journal=system.path
    ) as journal:
        # What it waits for at its end is read here.
        yield journal


def test_an_entry_has_fields_to_ask_for(journal: LoguruJournal, system: System) -> None:
    journal.note("lease.acquired", epoch=7, previous="b")
    with answering("r1"):
        journal.note("session.stopped", account_id="sales", status="banned", cause="x", advice="y")
    assert system.next_entry()["WATCHKEEPER_EPOCH"] == "7"
    assert system.next_entry() == {
        "MESSAGE": "account sales is banned: x; y [request r1]",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "watchkeeper",
        "WATCHKEEPER_EVENT": "session.stopped",
        "WATCHKEEPER_INSTANCE": "a",
        "WATCHKEEPER_EPOCH": "7",
        "WATCHKEEPER_ACCOUNT_ID": "sales",
        "WATCHKEEPER_REQUEST_ID": "r1",
    }
    assert system.on_stream() == []


def test_with_json_lines_the_message_is_the_line(system: System) -> None:
    with open_journal(
        "a", json_lines=True, stream=system.stream, system_journal=system.path
    ) as journal:
        journal.note("account.created", account_id="sales")
        entry = system.next_entry()
    assert json.loads(entry["MESSAGE"])["fields"] == {"account_id": "sales"}
    assert entry["WATCHKEEPER_ACCOUNT_ID"] == "sales"


def test_no_secret_and_no_forged_field_gets_in(journal: LoguruJournal, system: System) -> None:
    journal.note("account.created", account_id=f"x\nPRIORITY=0\n{SECRET}")
    journal.note("drain.asked", reason=f"Bearer {SECRET} \nWATCHKEEPER_EVENT=lease.lost")
    logging.getLogger("grpc").error("call with %s", SECRET)
    entries = [system.next_entry() for _ in range(3)]
    assert SECRET not in json.dumps(entries)
    assert MASK in json.dumps(entries)
    assert [entry["PRIORITY"] for entry in entries] == ["6", "6", "3"]
    assert entries[1]["WATCHKEEPER_EVENT"] == "drain.asked"
    assert entries[0]["WATCHKEEPER_ACCOUNT_ID"] == f"x\nPRIORITY=0\n{MASK}"
    assert entries[2]["WATCHKEEPER_LOGGER"] == "grpc"


def test_what_the_journal_does_not_take_goes_to_its_stream_with_its_priority(
    system: System,
) -> None:
    with open_journal("a", stream=system.stream, system_journal=system.path + ".none") as journal:
        journal.note("lease.lost", epoch=1, reason="x")
    (line,) = system.on_stream()
    assert line.startswith("<4>20")
    assert line.endswith("WARNING a | lease lost (epoch 1): x")


def test_an_entry_that_is_too_long_goes_to_the_stream(system: System) -> None:
    many = {f"field_{number}": "x" * 2000 for number in range(60)}
    with open_journal(
        "a", json_lines=True, stream=system.stream, system_journal=system.path
    ) as journal:
        journal.note("cat.seen", **many)
        journal.note("drain.asked", reason="short")
        assert system.next_entry()["WATCHKEEPER_EVENT"] == "drain.asked"
    (line,) = system.on_stream()
    assert len(line) > journald.ENTRY_BYTES_MAX
    assert line.startswith('<4>{"ts"')


def test_a_journal_that_is_stuck_keeps_nobody(system: System) -> None:
    way = journald.Journald(system.path)
    taken = 0
    while way.send(b"MESSAGE=x\n", wait=False):
        taken += 1
        assert taken < 100_000
    assert not way.send(b"MESSAGE=x\n")
    way.close()


def test_the_end_waits_until_the_last_entry_is_taken(system: System) -> None:
    way = journald.Journald(system.path)
    assert way.send(b"MESSAGE=last\n")
    taken = threading.Event()

    def take() -> None:
        taken.wait(5)
        system.next_entry()

    reader = threading.Thread(target=take)
    reader.start()
    threading.Timer(0.1, taken.set).start()
    way.close()
    reader.join(0.01)
    assert not reader.is_alive(), "it was closed before the entry was taken"


@pytest.mark.parametrize("named", [None, "", "1:1", "nonsense"])
def test_a_stream_that_systemd_did_not_make_gets_plain_lines(
    system: System, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    if named is None:
        monkeypatch.delenv("JOURNAL_STREAM")
    else:
        monkeypatch.setenv("JOURNAL_STREAM", named)
    with open_journal("a", stream=system.stream, system_journal=system.path) as journal:
        journal.note("lease.lost", epoch=1, reason="x")
    (line,) = system.on_stream()
    assert line.startswith("20")


def test_a_descriptor_that_is_closed_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOURNAL_STREAM", "1:1")
    assert not journald.is_behind(9999)


def test_the_warden_tells_the_journal_too(system: System) -> None:
    told = (
        "from daemon import warden\n"
        "state = warden.State(instance='a')\n"
        f"there, nowhere = {system.path!r}, {system.path + '.none'!r}\n"
        "warden.tell(state, 'warden.killed', {'epoch': 4}, system_journal=there)\n"
        "died = {'signal': 'SIGKILL'}\n"
        "warden.tell(state, 'warden.daemon_died', died, system_journal=nowhere)\n"
    )
    reader = threading.Thread(target=lambda: entries.append(system.next_entry()))
    entries: list[dict[str, str]] = []
    reader.start()
    subprocess.run(
        [sys.executable, "-c", told], cwd=ROOT, check=True, timeout=20, stderr=system.stream
    )
    reader.join(5)
    (entry,) = entries
    assert entry.pop("MESSAGE").startswith("the daemon neither renewed its lease")
    assert entry == {
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "watchkeeper",
        "WATCHKEEPER_EVENT": "warden.killed",
        "WATCHKEEPER_INSTANCE": "a",
        "WATCHKEEPER_EPOCH": "4",
    }
    (line,) = system.on_stream()
    assert line.startswith("<3>")
    assert line.endswith("the daemon was ended by SIGKILL")


def test_every_level_has_a_priority() -> None:
    levels = {level for level, _ in warden.EVENTS.values()} | {"debug", "info"}
    assert levels <= set(journald.PRIORITIES)
    assert State().instance == "-"
