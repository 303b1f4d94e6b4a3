"""Nothing of a bridge outlives its daemon, however that dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from daemon.bridge.install import PROGRAM, find_node
from daemon.bridge.process import BridgeProcess, ProcessPlan
from tests.bridge.node.install import install_node_side
from tests.bridge.steps import OPTIONS, WITHIN_S, do, is_dead, running
from tests.fakes.journal import RecordingJournal
from tests.system.cluster import ROOT, open_cluster, sqlite_env

DEAD_S = 1.0
LEASE = {
    "WATCHKEEPER_LEASE_TTL_S": "6",
    "WATCHKEEPER_LEASE_RENEW_S": "1",
    "WATCHKEEPER_LEASE_ATTEMPT_S": "1",
    "WATCHKEEPER_LEASE_MARGIN_S": "1.5",
}
SILENT_S = 3.5
"""What is left of that ttl after a renewal's interval and the margin."""


async def wait_dead(pids: list[int]) -> None:
    with trio.fail_after(DEAD_S):
        while not all(map(is_dead, pids)):
            await trio.sleep(0.01)


@contextmanager
def dying_daemon(text: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process with a bridge of two processes, each given `text`; it is killed at the latest."""
    command = [sys.executable, "-m", "tests.bridge.dying_daemon", text]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stdout is not None
            yield daemon, [int(pid) for pid in daemon.stdout.readline().split()]
        finally:
            daemon.kill()


@pytest.mark.parametrize(
    "text",
    ["x", do({"hang": 60.0}), do({"signal": signal.SIGSTOP})],
    ids=["that serve", "that hang", "that are stopped"],
)
async def test_kill_9_of_the_daemon_leaves_no_processes(text: str) -> None:
    with dying_daemon(text) as (daemon, pids):
        assert len(pids) == 2
        assert not any(map(is_dead, pids))
        daemon.kill()
        await wait_dead(pids)


@pytest.mark.node
@pytest.mark.system
async def test_kill_9_of_a_real_daemon_leaves_no_node_within_a_second(tmp_path: Path) -> None:
    install_node_side()
    env = {**sqlite_env(tmp_path), "WATCHKEEPER_CONNECTOR": "baileys"}
    async with open_cluster(tmp_path, {**env, "WATCHKEEPER_WHATSAPP_URL": "ws://127.0.0.1:9/"}) as (
        cluster
    ):
        node = await cluster.start("a", state="ACTIVE")
        with trio.fail_after(WITHIN_S):
            while not (found := re.findall(r"bridge process \d+ \(pid (\d+)\) is up", node.log())):
                await trio.sleep(0.05)
        pids = [int(pid) for pid in found]
        assert b"main.mjs" in Path(f"/proc/{pids[0]}/cmdline").read_bytes()
        environment = Path(f"/proc/{pids[0]}/environ").read_bytes()
        assert b"WATCHKEEPER" not in environment
        # The group that the warden kills as a whole.
        assert os.getpgid(pids[0]) == node.daemon_pid
        node.signal_daemon(signal.SIGKILL)
        await wait_dead(pids)
        await node.wait_ended()


@pytest.mark.node
@pytest.mark.parametrize(
    ("ping_every_s", "ends"), [(60.0, True), (0.1, False)], ids=["silence", "pings"]
)
async def test_node_ends_when_it_hears_nothing_and_not_before(
    ping_every_s: float, ends: bool
) -> None:
    program = str(install_node_side() / PROGRAM)
    options = msgspec.structs.replace(OPTIONS, silent_ms=500)
    journal = RecordingJournal()
    node = await trio.to_thread.run_sync(find_node, "node")
    plan = ProcessPlan((node.path, program), options, ping_every_s=ping_every_s)
    process = BridgeProcess(1, plan, journal)
    with trio.fail_after(WITHIN_S):
        async with running(process):
            if ends:
                await process.wait_ended()
                assert "has said nothing for 500 ms" in str(journal.of("bridge.complained"))
            else:
                await trio.sleep(1.5)
                assert process.alive


@pytest.mark.node
@pytest.mark.system
@pytest.mark.long
async def test_a_daemon_that_hangs_without_a_warden_keeps_no_connection_into_another_term(
    tmp_path: Path,
) -> None:
    install_node_side()
    env = {**sqlite_env(tmp_path), "WATCHKEEPER_CONNECTOR": "baileys"}
    env |= {"WATCHKEEPER_WHATSAPP_URL": "ws://127.0.0.1:9/", **LEASE}
    async with open_cluster(tmp_path, env) as cluster:
        node = cluster.make("a")
        node.command = ("daemon", "run", "--no-warden")
        await cluster.restart(node, state="ACTIVE")
        with trio.fail_after(WITHIN_S):
            while not (found := re.findall(r"bridge process \d+ \(pid (\d+)\) is up", node.log())):
                await trio.sleep(0.05)
        pids = [int(pid) for pid in found]
        await trio.sleep(SILENT_S + 1)
        assert not any(map(is_dead, pids)), "pings are enough of a word"
        node.signal(signal.SIGSTOP)
        with trio.fail_after(float(LEASE["WATCHKEEPER_LEASE_TTL_S"]) - 1):
            while not all(map(is_dead, pids)):
                await trio.sleep(0.01)
