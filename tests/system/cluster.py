"""Real daemon processes on real stores, driven over HTTP as their users would."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import trio

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TOKEN = "system-tests-only-token"
KEY = base64.b64encode(b"k" * 32).decode()
START_S = 15.0
REACH_S = 30.0
GONE_S = 5.0


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@dataclass
class Node:
    """One instance, restartable on the same port with the same disk.

    `process` is its warden, `daemon_pid` the daemon below it.
    """

    name: str
    port: int
    directory: Path
    env: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    command: tuple[str, ...] = ("daemon", "run")
    """The module to run, and its arguments."""
    root: Path = ROOT
    """The checkout that it is run from."""
    within: tuple[str, ...] = ()
    """What its command begins with, where it runs in a network of its own."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log_path(self) -> Path:
        return self.directory / f"{self.name}.log"

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def spawn(self, **extra: str) -> None:
        """Start the process; see `Cluster.start` for one that also waits."""
        assert self.process is None
        self.starts += 1
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.within, sys.executable, "-m", *self.command],
                cwd=self.root,
                env={**os.environ, **self.env, **extra},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def daemon_pid(self) -> int:
        """The warden's only child. Raises `LookupError` when it has none (yet, or any more)."""
        assert self.process is not None
        pid = self.process.pid
        try:
            (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except (FileNotFoundError, ValueError):
            raise LookupError(f"{self.name} has no daemon") from None
        return int(child)

    def signal(self, number: int) -> None:
        """Send a signal to the warden, as whoever runs it would."""
        assert self.process is not None
        self.process.send_signal(number)

    def signal_daemon(self, number: int) -> None:
        """Send a signal to the daemon alone."""
        os.kill(self.daemon_pid, number)

    async def wait_ended(self, within_s: float = 40.0) -> int:
        """The exit code of a process that was asked to end, or killed."""
        process = self.process
        assert process is not None
        with trio.fail_after(within_s):
            while process.poll() is None:
                await trio.sleep(0.02)
        self.process = None
        return process.returncode

    async def stop(self) -> int:
        """SIGTERM, and wait for the drain."""
        self.signal(signal.SIGTERM)
        return await self.wait_ended()

    async def kill(self) -> None:
        """SIGKILL for the warden, and with it the daemon, as a host's end: nothing is released."""
        daemon = self.daemon_pid
        self.signal(signal.SIGKILL)
        await self.wait_ended()
        with trio.fail_after(GONE_S):
            while alive(daemon):
                await trio.sleep(0.005)

    async def crash(self) -> int:
        """SIGKILL for the daemon alone; the warden's exit code, once it has done its part."""
        self.signal_daemon(signal.SIGKILL)
        return await self.wait_ended()


@dataclass
class Cluster:
    """Instances of one group, and a client that asks them."""

    directory: Path
    env: dict[str, str]
    client: httpx.AsyncClient
    nodes: list[Node] = field(default_factory=list)
    token: str = TOKEN

    def make(self, name: str, **extra: str) -> Node:
        """A node with its own disk and port."""
        port = free_port()
        env = {
            **self.env,
            "WATCHKEEPER_INSTANCE_NAME": name,
            "WATCHKEEPER_HTTP_BIND": f"127.0.0.1:{port}",
            "WATCHKEEPER_STATE_DIR": str(self.directory / f"state-{name}"),
            **extra,
        }
        node = Node(name, port, self.directory, env)
        self.nodes.append(node)
        return node

    async def start(self, name: str, *, state: str | None = None, **extra: str) -> Node:
        """Start a new node and wait until it answers (and is in `state`)."""
        node = self.make(name, **extra)
        return await self.restart(node, state=state)

    async def start_from(self, root: Path, name: str, *, state: str) -> Node:
        """Start a new node of another release, whose checkout is `root`."""
        node = self.make(name)
        node.root = root
        return await self.restart(node, state=state)

    async def restart(self, node: Node, *, state: str | None = None) -> Node:
        """Start a node's process and wait until it answers (and is in `state`)."""
        node.spawn()
        with trio.fail_after(START_S):
            while not await self.answers(node, "/readyz"):
                assert node.process is not None
                assert node.process.poll() is None, node.log()[-4000:]
                await trio.sleep(0.03)
        if state is not None:
            await self.wait_state(node, state)
        return node

    async def restart_with(self, node: Node, **extra: str) -> Node:
        """Start a node's process with settings that only this run has; waits until it answers."""
        before = dict(node.env)
        node.env.update(extra)
        try:
            return await self.restart(node)
        finally:
            node.env = before

    async def answers(self, node: Node, path: str) -> bool:
        try:
            return (await self.client.get(node.url + path)).status_code == 200
        except httpx.TransportError:
            return False

    async def wait_state(self, node: Node, state: str, within_s: float = REACH_S) -> None:
        path = {"ACTIVE": "/active", "PASSIVE": "/passive"}[state]
        with trio.fail_after(within_s):
            while not await self.answers(node, path):
                await trio.sleep(0.02)

    async def wait_active(self, *nodes: Node, within_s: float = REACH_S) -> Node:
        """The one of `nodes` that is, or becomes, ACTIVE."""
        with trio.fail_after(within_s):
            while True:
                for node in nodes or self.nodes:
                    if await self.answers(node, "/active"):
                        return node
                await trio.sleep(0.02)

    async def ask(self, node: Node, method: str, path: str, **given: Any) -> httpx.Response:
        return await self.client.request(
            method, node.url + path, headers={"Authorization": f"Bearer {self.token}"}, **given
        )

    async def json(self, node: Node, method: str, path: str, **given: Any) -> dict[str, Any]:
        response = await self.ask(node, method, path, **given)
        assert response.status_code < 300, (response.status_code, response.text)
        answer: dict[str, Any] = response.json()
        return answer

    async def add_paired(self, node: Node, *account_ids: str) -> None:
        """Create accounts and scan their QR codes; returns when all are connected."""
        for account_id in account_ids:
            await self.json(
                node,
                "POST",
                "/api/whatsapp/accounts",
                json={"accountId": account_id, "name": f"{account_id}'s"},
            )
        for account_id in account_ids:
            with trio.fail_after(REACH_S):
                while True:
                    path = f"/api/loopback/scan/{account_id}"
                    if (await self.ask(node, "POST", path)).status_code < 300:
                        break
                    await trio.sleep(0.05)
        await self.wait_connected(node, *account_ids)

    async def wait_connected(
        self, node: Node, *account_ids: str, within_s: float = REACH_S
    ) -> None:
        with trio.fail_after(within_s):
            while True:
                found = await self.json(node, "GET", "/api/whatsapp/accounts")
                status = {a["accountId"]: a["status"] for a in found["accounts"]}
                if all(status.get(each) == "connected" for each in account_ids):
                    return
                await trio.sleep(0.05)

    async def send(
        self, node: Node, account_id: str, text: str, *, key: str | None = None
    ) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.token}"}
        if key is not None:
            headers["Idempotency-Key"] = key
        return await self.client.post(
            node.url + "/api/whatsapp/send-message",
            json={"accountId": account_id, "to": "4915112345678", "message": text},
            headers=headers,
        )

    async def received(self, node: Node, *, raw: bool = False) -> list[dict[str, Any]]:
        """Everything the recipients got, in order."""
        messages: list[dict[str, Any]] = []
        after = 0
        while True:
            query = {"after": after, "limit": 1000, "raw": str(raw).lower()}
            page = await self.json(node, "GET", "/api/loopback/messages", params=query)
            if not page["messages"]:
                return messages
            messages.extend(page["messages"])
            after = page["next"]

    def end(self) -> None:
        """Kill whatever still runs."""
        for node in self.nodes:
            if node.process is not None and node.process.poll() is None:
                node.process.kill()
                node.process.wait()


def sqlite_env(directory: Path) -> dict[str, str]:
    """The settings of a group on one SQLite file."""
    return {
        "WATCHKEEPER_STORE": "sqlite",
        "WATCHKEEPER_SHARED_DIR": str(directory / "shared"),
        "WATCHKEEPER_LOOPBACK_DIR": str(directory / "loopback"),
        "WATCHKEEPER_CONNECTOR": "loopback",
        "WATCHKEEPER_ADMIN_TOKEN": TOKEN,
        "WATCHKEEPER_ENCRYPTION_KEY": KEY,
        "WATCHKEEPER_LOG_LEVEL": "debug",
    }


def firestore_env(directory: Path, emulator: str) -> dict[str, str]:
    """The settings of a group on the emulator, in a project of its own."""
    return {
        **sqlite_env(directory),
        "WATCHKEEPER_STORE": "firestore",
        "WATCHKEEPER_FIRESTORE_PROJECT": f"test-{uuid.uuid4().hex[:12]}",
        "FIRESTORE_EMULATOR_HOST": emulator,
    }


@asynccontextmanager
async def open_cluster(directory: Path, env: dict[str, str]) -> AsyncIterator[Cluster]:
    """A group whose processes are gone at the end of the block."""
    if env["WATCHKEEPER_STORE"] == "firestore":
        await trio.run_process(
            [sys.executable, "-m", "daemon", "init"],
            cwd=ROOT,
            env={**os.environ, **env},
            capture_stdout=True,
            capture_stderr=True,
        )
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(timeout=30, limits=limits) as client:
        cluster = Cluster(directory, env, client)
        with ending(cluster):
            yield cluster


class ending:  # noqa: N801 - reads as a word in `with ending(cluster)`
    """Kill the cluster's processes however the block ends."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def __enter__(self) -> None: ...

    def __exit__(self, *exc: object) -> None:
        self._cluster.end()


def lines_with(log: str, text: str) -> Iterator[str]:
    """The lines of a log that contain `text`."""
    return (line for line in log.splitlines() if text in line)
