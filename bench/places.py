"""Where figures are taken: groups of real processes on a store, their logs, and what they use.

Never lives here: a figure.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import trio

from bench.client import Line, NobodyListens, make_request
from tests.emulator import start_emulator
from tests.seed import seed_accounts
from tests.system.cluster import (
    ROOT,
    TOKEN,
    Cluster,
    Node,
    firestore_env,
    open_cluster,
    sqlite_env,
)

CONTACTS = 10
"""Contacts whose sessions each seeded account has, 700 bytes each."""
LOG_WAIT_S = 120.0
LOG_STEP_S = 0.001
"""Log lines have milliseconds, cut off: an event can look that much too early."""
TICKS = os.sysconf("SC_CLK_TCK")


@contextmanager
def emulator_host() -> Iterator[str]:
    """The Firestore emulator: a given one, or one of our own for the block."""
    if host := os.environ.get("WATCHKEEPER_TEST_EMULATOR"):
        yield host
        return
    with start_emulator() as emulator:
        yield emulator.host


@contextmanager
def fresh_env(store: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """A directory and the settings of a new group on `store`; gone after the block."""
    with tempfile.TemporaryDirectory(prefix="watchkeeper-bench-") as name:
        directory = Path(name)
        if store == "sqlite":
            yield directory, sqlite_env(directory)
        else:
            with emulator_host() as host:
                yield directory, firestore_env(directory, host)


@dataclass(frozen=True)
class Group:
    """A new group with its accounts in the store, and nobody running yet."""

    cluster: Cluster
    account_ids: list[str]


@asynccontextmanager
async def open_group(store: str, accounts: int, **settings: str) -> AsyncIterator[Group]:
    """A group with `accounts` paired accounts, logging as JSON. Processes end with the block."""
    with fresh_env(store) as (directory, env):
        # The tests' settings log every detail; an operator's do not, and lines are not free.
        env |= {"WATCHKEEPER_LOG_FORMAT": "json", "WATCHKEEPER_LOG_LEVEL": "info", **settings}
        async with open_cluster(directory, env) as cluster:
            ids = await seed_accounts(env, accounts, contacts=CONTACTS) if accounts else []
            yield Group(cluster, [str(account_id) for account_id in ids])


class Log:
    """A node's JSON log, read on from where the last look ended."""

    def __init__(self, node: Node) -> None:
        self._path = node.log_path
        self._offset = self._path.stat().st_size if self._path.exists() else 0
        self.events: list[tuple[float, str, dict[str, object]]] = []
        """Wall time, event and fields of every line since this was made."""

    def read(self) -> None:
        """Take in what was written since."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            if line.startswith(b"{"):
                entry = json.loads(line)
                at = datetime.fromisoformat(entry["ts"]).timestamp()
                self.events.append((at, entry["event"], entry["fields"]))

    def find(self, event: str, since: float = 0.0) -> tuple[float, dict[str, object]] | None:
        """The first such event at or after a moment: when it was, and its fields."""
        for at, name, fields in self.events:
            if name == event and at > since - LOG_STEP_S:
                return at, fields
        return None

    def at(self, event: str, since: float = 0.0) -> float:
        """When the first such event was. Raises `LookupError`."""
        found = self.find(event, since)
        if found is None:
            raise LookupError(f"{event} is not in {self._path.name}")
        return found[0]

    def last(self, event: str) -> float:
        """When the last such event was. Raises `LookupError`."""
        moments = [at for at, name, _ in self.events if name == event]
        if not moments:
            raise LookupError(f"{event} is not in {self._path.name}")
        return moments[-1]

    async def wait(self, event: str, since: float = 0.0) -> float:
        """Wait until it is there; when it was. Raises `LookupError` after `LOG_WAIT_S`."""
        with trio.move_on_after(LOG_WAIT_S):
            while True:
                self.read()
                found = self.find(event, since)
                if found is not None:
                    return found[0]
                await trio.sleep(0.02)
        newest = "\n".join(f"{name} {fields}" for _, name, fields in self.events[-20:])
        raise LookupError(f"no {event} in {self._path.name} within {LOG_WAIT_S:g} s:\n{newest}")


async def start_holder(cluster: Cluster, name: str, accounts: int, **settings: str) -> Node:
    """Start a node that becomes ACTIVE; returns when its first pass over all accounts is over."""
    node = cluster.make(name, **settings)
    await bring_up(cluster, node, "restore.finished" if accounts else "restore.started")
    await cluster.wait_state(node, "ACTIVE")
    return node


async def start_standby(cluster: Cluster, name: str, **settings: str) -> Node:
    """Start a node that stands by; returns when its copy on disk is warm."""
    node = cluster.make(name, **settings)
    await bring_up(cluster, node, "warm.finished")
    return node


async def bring_up(cluster: Cluster, node: Node, event: str) -> None:
    """Start a node's process, and wait until its log has an event."""
    log = Log(node)
    await cluster.restart(node)
    await log.wait(event)


async def wait_ready(port: int, path: str = "/readyz") -> None:
    """Return the moment a path answers 200."""
    request = make_request("GET", path, bearer=TOKEN)
    async with Line(port) as line:
        while True:
            try:
                if (await line.ask(request)).status == 200:
                    return
            except NobodyListens:
                pass
            await trio.sleep(0.001)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used at one moment."""

    at: float
    cpu_s: float
    rss_bytes: int


def usage_of(pid: int) -> Usage:
    """Read what the kernel says of a process (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text()
    resident = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    assert resident is not None
    cpu_s = (int(fields[11]) + int(fields[12])) / TICKS
    return Usage(time.monotonic(), cpu_s, int(resident[1]) * 1024)


async def store_operations(cluster: Cluster, node: Node) -> dict[str, float]:
    """Firestore operations since the process started, by kind; empty on another store."""
    metrics = (await cluster.ask(node, "GET", "/metrics")).text
    found = re.findall(r'^watchkeeper_store_operations\{kind="(\w+)"\} (\S+)', metrics, re.M)
    return {kind: float(value) for kind, value in found}


async def time_command(*arguments: str) -> float:
    """Seconds that a Python process takes from exec to its end."""
    began = time.perf_counter()
    await trio.run_process([sys.executable, *arguments], cwd=ROOT, capture_stdout=True)
    return time.perf_counter() - began
