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

import pytest
import trio

from tests.bridge.node.install import install_node_side
from tests.bridge.steps import WITHIN_S, do, is_dead
from tests.system.cluster import ROOT, open_cluster, sqlite_env

DEAD_S = 1.0


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
