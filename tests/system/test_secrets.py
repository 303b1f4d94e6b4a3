"""What must stay secret does, through failures and at log level debug.

Looked for in every line of the logs, every error the API answers, the metrics, the process list and
what is in plain on disk: tokens, encryption keys, credentials, and the text of messages.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.baileys.directories import CREDENTIALS, SECRET, make_directories
from tests.system.cluster import KEY, ROOT, TOKEN, Cluster, Node
from tests.system.secrets import credentials, forms, strings_in
from tests.system.steps import ALONE, LONG_ON_FIRESTORE, restored, state_dir, wait_logged

pytestmark = pytest.mark.system

ON_SQLITE = pytest.mark.parametrize("store_env", ["sqlite"], indirect=True)

OTHER_KEY = base64.b64encode(bytes(range(100, 132))).decode()
WRONG_TOKEN = "a-wrong-token-of-somebody"
TEXT = "confidential: the launch is on friday"


async def _errors(node: Node) -> list[str]:
    """What the API answers to everything that callers do wrong, with secrets in the wrong place."""
    right = {"Authorization": f"Bearer {TOKEN}"}
    send = "/api/whatsapp/send-message"
    answers: list[str] = []
    async with httpx.AsyncClient(base_url=node.url, timeout=30) as client:

        async def ask(method: str, path: str, **given: Any) -> None:
            answer = await client.request(method, path, **given)
            assert answer.status_code >= 400, (method, path, answer.status_code)
            answers.append(f"{answer.headers} {answer.text}")

        await ask("GET", "/api/whatsapp/accounts")
        await ask("GET", "/metrics")
        await ask("GET", "/api/status/dashboard", headers={"Authorization": TOKEN})
        await ask("GET", "/api/whatsapp/accounts", headers={"Authorization": f"Basic {TOKEN}"})
        await ask(
            "GET", "/api/whatsapp/accounts", headers={"Authorization": f"Bearer {WRONG_TOKEN}"}
        )
        await ask("GET", f"/api/whatsapp/accounts?token={TOKEN}")
        await ask("POST", send, content=f'{{"message": "{TEXT}"', headers=right)
        await ask("POST", send, json={"message": TEXT, "token": TOKEN}, headers=right)
        await ask("POST", send, json={"accountId": 7, "to": TEXT, "message": TEXT}, headers=right)
        unknown = {"accountId": "nobody", "to": "4915112345678", "message": TEXT}
        await ask("POST", send, json=unknown, headers=right)
        await ask("POST", "/api/whatsapp/accounts", content=TOKEN, headers=right)
        await ask("GET", "/api/nothing/here", headers=right)
    return answers


async def _command_lines(stop: trio.Event, seen: set[str]) -> None:
    """Every command line of every process, again and again: what `ps` would show."""
    while not stop.is_set():
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                # A process may end between the listing and the look.
                with suppress(OSError):
                    seen.add((entry / "cmdline").read_text(errors="replace"))
        await trio.sleep(0.05)


@LONG_ON_FIRESTORE
@pytest.mark.node
@pytest.mark.long
async def test_no_secret_leaves_through_logs_errors_metrics_or_processes(
    cluster: Cluster, tmp_path: Path
) -> None:
    sessions = make_directories(tmp_path / "made" / "sessions", 2)
    broken = sessions / "account-1" / "creds.json"
    creds = broken.read_text()
    secrets = strings_in(json.loads(creds))
    broken.write_text(creds[: len(creds) // 2])
    public: list[str] = []
    command_lines: set[str] = set()
    stop = trio.Event()
    legacy = {"WATCHKEEPER_LEGACY_SESSIONS_DIR": str(sessions)}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_command_lines, stop, command_lines)
        node = await cluster.start("a", state="ACTIVE", **legacy, **ALONE)
        await cluster.add_paired(node, "ann", "ben")
        sent = await cluster.send(node, "ann", TEXT)
        assert sent.status_code == 200
        public += await _errors(node)
        public.append((await cluster.ask(node, "GET", "/metrics")).text)
        assert await node.stop() == 0
        secrets |= await credentials(cluster)

        # A damaged disk under the wrong key: everything that can be unreadable is.
        (state_dir(node) / "local.db").write_bytes(b"\xff" * 50_000)
        node.env["WATCHKEEPER_ENCRYPTION_KEY"] = OTHER_KEY
        await cluster.restart(node, state="ACTIVE")
        await restored(cluster, node)
        public += await _errors(node)
        for account_id in ("ann", "ben"):
            path = f"/api/whatsapp/accounts/{account_id}/reconnect"
            public.append((await cluster.ask(node, "POST", path)).text)
            public.append((await cluster.send(node, account_id, TEXT)).text)
        public.append((await cluster.ask(node, "GET", "/api/status/dashboard")).text)
        public.append((await cluster.ask(node, "GET", "/metrics")).text)
        assert await node.stop() == 0

        # Refused settings: their complaint must not repeat what it complains about.
        node.env["WATCHKEEPER_ENCRYPTION_KEY"] = KEY[:-8]
        node.spawn()
        assert await node.wait_ended() == 2
        node.env["WATCHKEEPER_ENCRYPTION_KEY"] = KEY
        await cluster.restart_with(node, WATCHKEEPER_ENCRYPTION_KEYS_OLD=OTHER_KEY)
        assert (await restored(cluster, node))["restored"] >= 2
        await node.kill()
        stop.set()

    secrets |= {KEY[:-8]} | _given_secrets()
    # The search would find them: some are in the file that the import was given.
    assert any(secret in creds for secret in secrets)
    assert len(secrets) > 100
    assert "WATCHKEEPER_ENCRYPTION_KEY" in node.log()
    assert any("daemon" in line and "run" in line for line in command_lines)
    _assert_nowhere(
        secrets,
        {
            "the log": node.log(),
            "an answer": "\n".join(public),
            "a process list": "\n".join(command_lines),
        },
    )
    assert TEXT not in node.log()
    assert TEXT not in "\n".join(public)


def _given_secrets() -> set[str]:
    """What these tests hand to a daemon, in each of its forms."""
    secrets = {TOKEN, WRONG_TOKEN, KEY, OTHER_KEY}
    for key in (KEY, OTHER_KEY):
        secrets |= forms(base64.b64decode(key))
    return secrets


def _assert_nowhere(secrets: set[str], places: dict[str, str]) -> None:
    for place, content in places.items():
        # Which secret it was stays unsaid here, too: a test's report is a log.
        leaked = sum(1 for secret in secrets if secret in content)
        assert leaked == 0, f"{leaked} secrets in {place}"


@LONG_ON_FIRESTORE
async def test_what_is_on_disk_is_encrypted_and_private(cluster: Cluster) -> None:
    node = await cluster.start("a", state="ACTIVE", **ALONE)
    await cluster.add_paired(node, "ann")
    assert (await cluster.send(node, "ann", "x")).status_code == 200
    assert await node.stop() == 0
    secrets = await credentials(cluster) | {TOKEN, KEY}
    directories = [state_dir(node), cluster.directory / "shared"]
    for path in [p for each in directories if each.exists() for p in each.rglob("*")]:
        if path.is_file() and "loopback" not in str(path):
            content = path.read_bytes()
            leaked = sum(1 for secret in secrets if secret.encode() in content)
            assert leaked == 0, f"{leaked} secrets in {path.name}"
    for directory in directories:
        if directory.exists():
            assert directory.stat().st_mode & 0o077 == 0, directory.name


# --- failing stores, sockets and callers ----------------------------------------------------------

QUICK_LEASE = {
    "WATCHKEEPER_LEASE_TTL_S": "4",
    "WATCHKEEPER_LEASE_RENEW_S": "1",
    "WATCHKEEPER_LEASE_ATTEMPT_S": "0.5",
    "WATCHKEEPER_LEASE_MARGIN_S": "0.5",
    "WATCHKEEPER_HANDOFF_WAIT_S": "2",
}


async def _shout(node: Node, request: bytes) -> str:
    """Send bytes that are no request, and take what comes."""
    async with await trio.open_tcp_stream("127.0.0.1", node.port) as stream:
        with suppress(trio.BrokenResourceError), trio.move_on_after(2):
            await stream.send_all(request)
            return bytes(await stream.receive_some(65536)).decode(errors="replace")
    return ""


async def _pairing_secrets(cluster: Cluster, node: Node) -> set[str]:
    """A QR code and a pairing code: whoever has one links a device."""
    await cluster.json(
        node, "POST", "/api/whatsapp/accounts", json={"accountId": "new", "name": "New"}
    )
    found: set[str] = set()
    for method, path, body in (
        ("GET", "qr", None),
        ("POST", "pairing-code", {"phone": "4915112345678"}),
    ):
        with trio.fail_after(10):
            while True:
                asked = f"/api/whatsapp/accounts/new/{path}"
                answer = await cluster.ask(node, method, asked, json=body)
                if answer.status_code == 200:
                    break
                await trio.sleep(0.05)
        told = answer.json()
        found |= {told[name] for name in ("qr", "code") if name in told}
    assert len(found) == 2
    return found


@ON_SQLITE
@pytest.mark.long
async def test_no_secret_leaves_through_failing_stores_sockets_and_callers(
    cluster: Cluster, tmp_path: Path
) -> None:
    node = await cluster.start("a", state="ACTIVE", **QUICK_LEASE, **ALONE)
    await cluster.add_paired(node, "ann", "ben")
    assert (await cluster.send(node, "ann", TEXT)).status_code == 200
    secrets = _given_secrets() | await _pairing_secrets(cluster, node)

    # What is no HTTP at all, and what is nearly some.
    bearer = f"Authorization: Bearer {TOKEN}\r\n".encode()
    requests = (
        TOKEN.encode() + b"\r\n\r\n",
        b"GET /?token=" + TOKEN.encode() + b" HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + bearer + bearer + b"\r\n",
        b"GET /api/status/dashboard HTTP/1.1\r\nhost: x\r\n" + bearer + b"x" * 40_000,
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n" + bearer + b"\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bearer * 20,
        b"GET /" + TOKEN.encode() + b" HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\n\r\n",
    )
    public = [await _shout(node, request) for request in requests]

    # The store hangs for longer than the lease: renewals fail, the term ends, sends are refused.
    held = sqlite3.connect(cluster.directory / "shared" / "shared.db", isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")
    await wait_logged(node, "lease lost|step_down|PASSIVE: ")
    public.append((await cluster.send(node, "ann", TEXT)).text)
    public.append((await cluster.ask(node, "GET", "/api/status/dashboard")).text)
    held.close()
    await cluster.wait_state(node, "ACTIVE")
    await restored(cluster, node)

    # Somebody else's port, somebody else's directory.
    other = cluster.make("b")
    other.env["WATCHKEEPER_HTTP_BIND"] = node.env["WATCHKEEPER_HTTP_BIND"]
    other.spawn()
    assert await other.wait_ended() == 2
    other.env["WATCHKEEPER_HTTP_BIND"] = f"127.0.0.1:{other.port}"
    other.env["WATCHKEEPER_STATE_DIR"] = node.env["WATCHKEEPER_STATE_DIR"]
    other.spawn()
    assert await other.wait_ended() == 2

    # A directory of a former backend, broken in one account, a twin in others.
    sessions = tmp_path / "sessions"
    for name, creds in (("x", CREDENTIALS), ("y", CREDENTIALS), ("z", {"me": CREDENTIALS})):
        (sessions / name).mkdir(parents=True)
        (sessions / name / "creds.json").write_text(json.dumps(creds))
    secrets |= strings_in(CREDENTIALS) | forms(SECRET)
    asked = {"directory": str(sessions)}
    public.append((await cluster.ask(node, "POST", "/api/admin/import", json=asked)).text)
    secrets |= await credentials(cluster)
    for method, path in (("POST", "ben/logout"), ("POST", "ann/repair"), ("DELETE", "ben")):
        answer = await cluster.ask(node, method, f"/api/whatsapp/accounts/{path}")
        assert answer.status_code < 300
        public.append(answer.text)
    public.append((await cluster.ask(node, "GET", "/metrics")).text)
    await node.kill()

    # A shared file that is none, and one of a later version.
    shared = cluster.directory / "shared" / "shared.db"
    for damage in (b"\0" * 50_000, _of_version(shared, 99)):
        shared.write_bytes(damage)
        node.spawn()
        assert await node.wait_ended() == 2
        assert shared.read_bytes() == damage
    log = node.log() + other.log()
    for said in ("in use", "used by another instance", "newer watchkeeper", "not a SQLite file"):
        assert said in log
    assert len(secrets) > 50
    places = {"the log": log, "an answer": "\n".join(public)}
    # An account's own number is in plain sight by design.
    _assert_nowhere({each for each in secrets if not each.isdigit()}, places)
    assert TEXT not in log
    assert TEXT not in places["an answer"]


def _of_version(database: Path, version: int) -> bytes:
    """The same file, as a later version would have written it."""
    content = bytearray(database.read_bytes())
    content[60:64] = version.to_bytes(4)
    return bytes(content)


@ON_SQLITE
@pytest.mark.parametrize("abort", [Node.signal_daemon, Node.signal], ids=["daemon", "warden"])
async def test_whatever_aborts_leaves_no_core(
    cluster: Cluster, tmp_path: Path, abort: Callable[[Node, int], None]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    node = cluster.make("a", **ALONE)
    with node.log_path.open("ab") as log:
        node.process = subprocess.Popen(  # noqa: ASYNC220 - as `Node.spawn`, from another place
            ["prlimit", "--core=unlimited:unlimited", sys.executable, "-m", "daemon", "run"],
            cwd=place,
            env={**os.environ, **node.env, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    await cluster.wait_state(node, "ACTIVE")
    await cluster.add_paired(node, "ann")
    abort(node, signal.SIGABRT)
    assert await node.wait_ended() in (-signal.SIGABRT, 128 + signal.SIGABRT)
    assert list(place.rglob("core*")) == []
