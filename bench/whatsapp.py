"""Sending through the real Baileys, and a handoff of connected accounts: `make bench-whatsapp`.

Compared to bare Baileys with its own file store (`useMultiFileAuthState`), on the same fake server,
in turn with ours: the same accounts at once, the same callers, each of whom waits for the server's
ack. Ours has everything on: HTTP, the outbox, each ack with its changed keys durable in the shared
store (SQLite) before it is answered. One bridge process holds all accounts, as bare Baileys' does.

Three processes of ours and the fake share this host's cores with whoever asks. So the CPU that each
send takes is told beside the sends a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import trio

from bench.client import TO, Line, send_request
from bench.places import Log, bring_up, usage_of
from bench.rows import (
    Row,
    host_facts,
    median,
    percentile,
    progress,
    seconds,
    show,
    write_rows,
)
from tests.system.cluster import TOKEN, Cluster, Node, open_cluster, sqlite_env
from tests.whatsapp.file_clients import FileClients, Sends, open_file_clients
from tests.whatsapp.server import FakeWhatsApp, WhatsAppProcess
from tests.whatsapp.steps import bridges_of

AIM = 0.8
CALLERS_MIN = 16
"""Also through a single account: a caller alone would measure how long a send takes, and with a
late store most of that is waiting, on either side."""
PAIR_S_MAX = 600.0
OPEN_S_MAX = 300.0


@dataclass(frozen=True, slots=True)
class Size:
    """Accounts at once, delays of the store, rounds and their length; handoffs and of how many."""

    accounts: tuple[int, ...]
    delays_ms: tuple[int, ...]
    rounds: int
    round_s: float
    handoff_accounts: int
    handoffs: int


SIZES = {
    "full": Size((1, 50, 200), (0, 5, 20), 3, 4.0, 50, 3),
    "quick": Size((1, 10), (0, 20), 1, 2.0, 10, 1),
    "tiny": Size((1,), (5,), 1, 0.3, 2, 1),
}


@dataclass(frozen=True, slots=True)
class Ground:
    """Where all figures are taken: the server, its process, and directories of linked accounts.

    Ours and theirs are different accounts: a ratchet has one owner.
    """

    whatsapp: FakeWhatsApp
    node: str
    directory: Path

    @property
    def bare(self) -> Path:
        """The directories that bare Baileys uses."""
        return self.directory / "bare"

    def ours(self, accounts: int) -> Path:
        """The directories of so many of our accounts, and of no others."""
        chosen = self.directory / f"ours-{accounts}"
        if not chosen.exists():
            for name in names(accounts):
                shutil.copytree(self.directory / "ours" / name, chosen / name)
        return chosen

    def env(self, directory: Path, accounts: int) -> dict[str, str]:
        """The settings of a group with these accounts, all in one bridge."""
        return {
            **sqlite_env(directory),
            "WATCHKEEPER_CONNECTOR": "baileys",
            "WATCHKEEPER_WHATSAPP_URL": self.whatsapp.url,
            "WATCHKEEPER_NODE": self.node,
            "WATCHKEEPER_LEGACY_SESSIONS_DIR": str(self.ours(accounts)),
            "WATCHKEEPER_BRIDGE_ACCOUNTS_MAX": str(max(accounts, 1)),
            # The first send of many accounts at once takes its time; each is waited for.
            "WATCHKEEPER_SEND_WAIT_S": "25",
            "WATCHKEEPER_DRAIN_S": "40",
            "WATCHKEEPER_LOG_FORMAT": "json",
            "WATCHKEEPER_LOG_LEVEL": "info",
        }


@dataclass
class Rounds:
    """What all rounds of one side came to."""

    rates: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    cpu_s: dict[str, list[float]] = field(default_factory=dict)
    """CPU seconds a send, by process, of each round."""

    def add(self, sends: Sends, cpu_s: Mapping[str, float]) -> None:
        """Take in one round."""
        count = len(sends.took_s)
        self.rates.append(count / sends.seconds)
        self.took_s += sends.took_s
        for name, used in cpu_s.items():
            self.cpu_s.setdefault(name, []).append(used / max(count, 1))

    @property
    def told(self) -> str:
        """For people."""
        cpu = ", ".join(f"{name} {seconds(median(used))}" for name, used in self.cpu_s.items())
        return f"{median(self.rates):,.0f}/s, p50 {seconds(percentile(self.took_s, 50))}, CPU {cpu}"


def names(count: int) -> list[str]:
    """The first accounts."""
    return [f"account-{number:03d}" for number in range(count)]


async def measure(size: Size, node: str) -> list[Row]:
    """Link the accounts, then take every figure."""
    rows: list[Row] = []
    async with open_ground(max(*size.accounts, size.handoff_accounts), node) as ground:
        for accounts in size.accounts:
            rows += await _sends(size, accounts, ground)
        rows.append(await _handoff(size, ground))
    return rows


@asynccontextmanager
async def open_ground(accounts: int, node: str) -> AsyncIterator[Ground]:
    """The server, and so many accounts for each side linked with it."""
    process = WhatsAppProcess()
    with tempfile.TemporaryDirectory(prefix="watchkeeper-bench-") as name:
        try:
            await trio.to_thread.run_sync(process.start)
            async with process.open_control() as whatsapp:
                # Phones that nobody looks into cost nothing: the clients are what is measured.
                await whatsapp.settings(decrypt="lazy")
                ground = Ground(whatsapp, node, Path(name))
                began = time.monotonic()
                for side, prefix in (("bare", "49155501"), ("ours", "49155502")):
                    phones = {each: f"{prefix}{i:05d}" for i, each in enumerate(names(accounts))}
                    home = ground.directory / side
                    home.mkdir()
                    with trio.fail_after(PAIR_S_MAX):
                        async with open_file_clients(home, whatsapp.url, node) as clients:
                            await clients.pair(whatsapp, phones)
                progress(f"linked 2 x {accounts} accounts in {time.monotonic() - began:.0f} s")
                yield ground
        finally:
            process.close()


# --- sends


async def _sends(size: Size, accounts: int, ground: Ground) -> list[Row]:
    """Ours with each delay, in turn with bare Baileys."""
    rows = []
    async with (
        open_file_clients(ground.bare, ground.whatsapp.url, ground.node) as bare,
        _group(ground, accounts) as cluster,
    ):
        with trio.fail_after(OPEN_S_MAX):
            await bare.open(names(accounts))
        node = cluster.make("a")
        for delay_ms in size.delays_ms:
            node.command = ("bench.delayed", str(delay_ms / 1000))
            with trio.fail_after(OPEN_S_MAX):
                await bring_up(cluster, node, "restore.finished")
                await cluster.wait_connected(node, *names(accounts), within_s=OPEN_S_MAX)
            ours, theirs = Rounds(), Rounds()
            for number in range(size.rounds + 1):
                # The first round only warms up: sessions are made, and recipients looked up.
                some = (ours, theirs) if number else (Rounds(), Rounds())
                await _send_ours(node, accounts, size.round_s, some[0])
                await _send_bare(bare, accounts, size.round_s, some[1])
            await node.stop()
            rows.append(sends_row(accounts, delay_ms, ours, theirs))
            progress(f"{rows[-1].name}: {rows[-1].measured}; {rows[-1].against}")
    return rows


@asynccontextmanager
async def _group(ground: Ground, accounts: int) -> AsyncIterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="watchkeeper-bench-") as name:
        directory = Path(name)
        async with open_cluster(directory, ground.env(directory, accounts)) as cluster:
            yield cluster


def _callers(accounts: int) -> int:
    return max(accounts, CALLERS_MIN)


async def _send_bare(bare: FileClients, accounts: int, round_s: float, into: Rounds) -> None:
    before = usage_of(bare.pid)
    sends = await bare.send(names(accounts), callers=_callers(accounts), seconds=round_s, to=TO)
    into.add(sends, {"client": usage_of(bare.pid).cpu_s - before.cpu_s})


async def _send_ours(node: Node, accounts: int, round_s: float, into: Rounds) -> None:
    assert node.process is not None
    (bridge,) = bridges_of(node)
    pids = {"bridge": bridge, "daemon": node.process.pid}
    before = {name: usage_of(pid).cpu_s for name, pid in pids.items()}
    began = time.perf_counter()
    took_s: list[float] = []

    async def keep_sending(account_id: str) -> None:
        async with Line(node.port) as line:
            while (asked_at := time.perf_counter()) - began < round_s:
                answer = await line.ask(send_request(TOKEN, account_id, f"message {len(took_s)}"))
                assert answer.status == 200, answer
                took_s.append(time.perf_counter() - asked_at)

    async with trio.open_nursery() as nursery:
        chosen = names(accounts)
        for caller in range(_callers(accounts)):
            nursery.start_soon(keep_sending, chosen[caller % accounts])
    sends = Sends(took_s, time.perf_counter() - began)
    into.add(sends, {name: usage_of(pid).cpu_s - before[name] for name, pid in pids.items()})


def sends_row(accounts: int, delay_ms: int, ours: Rounds, theirs: Rounds) -> Row:
    """Ours beside theirs."""
    share = median(ours.rates) / median(theirs.rates)
    return Row(
        "whatsapp sends",
        f"{accounts} account{'s' if accounts > 1 else ''}, store +{delay_ms} ms",
        f"{ours.told}; {share:.2f} of bare",
        f"bare Baileys: {theirs.told}",
        f">= {AIM} of bare",
        share >= AIM,
        {
            "callers": _callers(accounts),
            "sends_per_s": ours.rates,
            "bare_sends_per_s": theirs.rates,
            "cpu_s_a_send": ours.cpu_s,
            "bare_cpu_s_a_send": theirs.cpu_s,
            "p99_s": percentile(ours.took_s, 99),
            "bare_p99_s": percentile(theirs.took_s, 99),
        },
    )


# --- handoff


async def _handoff(size: Size, ground: Ground) -> Row:
    """SIGTERM to the holder beside a warm standby: until each account is connected again."""
    accounts = size.handoff_accounts
    firsts, lasts = [], []
    async with _group(ground, accounts) as cluster:
        holder = cluster.make("a")
        await bring_up(cluster, holder, "restore.finished")
        await cluster.wait_connected(holder, *names(accounts), within_s=OPEN_S_MAX)
        standby = cluster.make("b")
        for number in range(size.handoffs):
            await bring_up(cluster, standby, "warm.finished")
            log, since = Log(standby), time.time()
            await holder.stop()
            await log.wait("restore.finished", since)
            connected = [at for at, name, _ in log.events if name == "session.connected"]
            assert len(connected) == accounts, "some were not connected at the first try"
            firsts.append(min(connected) - since)
            lasts.append(max(connected) - since)
            progress(f"handoff {number + 1}: last {seconds(lasts[-1])}")
            holder, standby = standby, holder
        await holder.stop()
    took_s = await _open_bare(ground, accounts)
    return Row(
        "whatsapp handoff",
        f"until {accounts} accounts are connected again",
        f"first {seconds(median(firsts))}, "
        f"last {seconds(median(lasts))} (max {seconds(max(lasts))})",
        f"bare Baileys opens as many: first {seconds(min(took_s))}, last {seconds(max(took_s))}",
        values={"first_s": firsts, "last_s": lasts, "bare_s": took_s},
    )


async def _open_bare(ground: Ground, accounts: int) -> list[float]:
    async with open_file_clients(ground.bare, ground.whatsapp.url, ground.node) as bare:
        with trio.fail_after(OPEN_S_MAX):
            return await bare.open(names(accounts), at_once=accounts)


def main() -> int:
    """Measure, print a table and JSON; an aim that is missed is a figure, not a failure."""
    parser = argparse.ArgumentParser(prog="make bench-whatsapp")
    parser.add_argument("--quick", action="store_true", help="smaller, for CI (< 2 minutes)")
    parser.add_argument("--size", choices=sorted(SIZES), help="instead of --quick")
    parser.add_argument("--node", default=shutil.which("node"), help="the Node.js to use")
    parser.add_argument("--accounts", type=int, nargs="+", help="these numbers of accounts only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    arguments = parser.parse_args()
    if arguments.node is None:
        parser.error("Node.js is not installed: install version 20 or later, or give --node")
    size = SIZES[arguments.size or ("quick" if arguments.quick else "full")]
    if arguments.accounts:
        size = replace(size, accounts=tuple(arguments.accounts))
    version = subprocess.run(
        [arguments.node, "--version"], capture_output=True, text=True, check=True
    )
    before = {**host_facts(), "node": version.stdout.strip()}
    rows = trio.run(partial(measure, size, str(arguments.node)))
    show(rows)
    print(f"Node {before['node']}, load average {before['load_average']} before")
    print(json.dumps({"host": before, "rows": [asdict(row) for row in rows]}))
    if arguments.json is not None:
        write_rows(arguments.json, rows, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
