"""The command line as an operator uses it, against instances that really run."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.baileys.directories import make_directories
from tests.system.cluster import ROOT, TOKEN, Cluster, Node, open_cluster, sqlite_env
from tests.system.steps import ALONE, arrived_readable_once, dashboard, restored, wait_logged

pytestmark = pytest.mark.system

COMMAND_S = 30.0
# What the commands themselves need; nothing of whoever runs the tests may leak into them.
BARE = {"PATH": "/usr/local/bin:/usr/bin:/bin", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}


@dataclass(frozen=True)
class Told:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """Stdout, which is one JSON document and nothing else."""
        answer: dict[str, Any] = json.loads(self.out)
        return answer


async def command(node: Node, *words: str, **extra: str) -> Told:
    """Run `watchkeeper …` with the node's settings, to its end."""
    with trio.fail_after(COMMAND_S):
        done = await trio.run_process(
            [sys.executable, "-m", "daemon", *words],
            cwd=node.directory,
            env={**BARE, **node.env, **extra},
            stdin=b"",
            capture_stdout=True,
            capture_stderr=True,
            check=False,
        )
    return Told(done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Cluster]:
    """A group on SQLite: what the commands do is the same on either store."""
    async with open_cluster(tmp_path, sqlite_env(tmp_path)) as cluster:
        yield cluster


async def test_first_account_from_add_to_send(group: Cluster) -> None:
    node = await group.start("a", state="ACTIVE", **ALONE)
    told: list[Told] = []

    async def add() -> None:
        told.append(await command(node, "accounts", "add", "Support", "--id", "support"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(add)
        with trio.fail_after(COMMAND_S):
            while (scanned := await command(node, "loopback", "scan", "support")).code != 0:
                assert scanned.code == 1, scanned
                await trio.sleep(0.1)
    (added,) = told
    assert added.code == 0, added.err
    assert added.out.startswith("support: connected as 49151")
    # The code is drawn for a phone, beside the answer, with the way to scan it here.
    assert any(blocks in added.err for blocks in ("█", "▀", "▄"))
    assert "watchkeeper loopback scan support" in added.err

    listed = await command(node, "accounts", "list", "--json")
    assert [a["status"] for a in listed.json()["accounts"]] == ["connected"]
    assert "Support" in (await command(node, "accounts", "list")).out

    sent = await command(node, "send", "support", "+49 151 12345678", "Good morning", "--json")
    assert (sent.code, sent.json()["status"]) == (0, "server_ack")
    again = await command(
        node, "send", "support", "4915112345678", "Once", "--idempotency-key", "k1", "--json"
    )
    twice = await command(
        node, "send", "support", "4915112345678", "Once", "--idempotency-key", "k1", "--json"
    )
    assert again.json()["messageId"] == twice.json()["messageId"]
    await arrived_readable_once(
        group, node, {sent.json()["messageId"]: "", again.json()["messageId"]: ""}
    )
    assert [m["text"] for m in await group.received(node)] == ["Good morning", "Once"]


@pytest.mark.long
async def test_refusals_say_why_and_end_with_the_documented_codes(group: Cluster) -> None:
    node = await group.start("a", state="ACTIVE", **ALONE)
    unknown = await command(node, "send", "nobody", "4915112345678", "x")
    assert unknown.code == 1
    assert "account_not_found" in unknown.err
    assert unknown.out == ""
    assert (await command(node, "send", "nobody", "12", "x")).code == 1
    assert (await command(node, "send", "nobody")).code == 2
    wrong = await command(node, "status", WATCHKEEPER_ADMIN_TOKEN="some-other-token-entirely")
    assert (wrong.code, "unauthorized" in wrong.err) == (1, True)
    contradiction = await command(node, "status", WATCHKEEPER_LEASE_TTL_S="3")
    assert contradiction.code == 2
    waited = await command(node, "accounts", "add", "Never scanned", "--wait", "1")
    assert waited.code == 4
    assert await node.stop() == 0
    gone = await command(node, "status")
    assert gone.code == 3
    assert "No answer from" in gone.err
    for told in (unknown, wrong, contradiction, waited, gone):
        assert "Traceback" not in told.err
        assert TOKEN not in told.out + told.err


@pytest.mark.long
async def test_step_down_needs_a_standby_or_force(group: Cluster) -> None:
    a = await group.start("a", state="ACTIVE")
    await group.add_paired(a, "ann")
    lonely = await command(a, "step-down", "--reason", "try")
    assert (lonely.code, "no_standby" in lonely.err) == (1, True)
    b = await group.start("b", state="PASSIVE")
    with trio.fail_after(20):
        while not (await dashboard(group, a))["peers"]:
            await trio.sleep(0.05)
    # Asked through the standby: whoever holds the lease steps down.
    told = await command(b, "step-down", "--reason", "maintenance of host a", "--json")
    assert told.code == 0, told.err
    await group.wait_state(b, "ACTIVE")
    await group.wait_state(a, "PASSIVE")
    assert (await restored(group, b))["restored"] == 1
    rows = (await group.json(a, "GET", "/api/status/transitions"))["transitions"]
    assert [(r["from"], r["to"], r["trigger"]) for r in rows][-1] == (
        "ACTIVE",
        "PASSIVE",
        "step_down",
    )
    assert "maintenance of host a" in rows[-1]["reason"]
    assert await a.stop() == 0
    with trio.fail_after(30):
        while (await command(b, "step-down")).code == 0:
            await trio.sleep(0.5)
    forced = await command(b, "step-down", "--force", "--json")
    assert forced.code == 0, forced.err
    await wait_logged(b, r"ACTIVE -> PASSIVE \(step_down\)")
    # Nobody else is there: after standing back it takes the lease again, with every account.
    await group.wait_state(b, "ACTIVE")
    await group.wait_connected(b, "ann")


@pytest.mark.long
async def test_drain_ends_the_instance_and_transitions_outlive_it(group: Cluster) -> None:
    node = await group.start("a", state="ACTIVE", **ALONE)
    told = await command(node, "drain", "--reason", "deploy 7", "--json")
    assert told.code == 0, told.err
    assert await node.wait_ended() == 0
    await group.restart(node, state="ACTIVE")
    await wait_logged(node, r"(?s)(PASSIVE -> ACTIVE .*){2}")
    rows = (await group.json(node, "GET", "/api/status/transitions"))["transitions"]
    assert [(r["from"], r["to"]) for r in rows] == [
        ("BOOTING", "PASSIVE"),
        ("PASSIVE", "ACTIVE"),
        ("ACTIVE", "DRAINING"),
        ("BOOTING", "PASSIVE"),
        ("PASSIVE", "ACTIVE"),
    ]
    assert "deploy 7" in rows[2]["reason"]
    assert rows[1]["epoch"] < rows[4]["epoch"]


@pytest.mark.long
async def test_status_is_readable_and_json(group: Cluster) -> None:
    a = await group.start("a", state="ACTIVE")
    await group.add_paired(a, "ann")
    b = await group.start("b", state="PASSIVE")
    shown = await command(b, "status")
    assert shown.code == 0
    for word in ("PASSIVE", "held by a", "ann", "connected"):
        assert word in shown.out
    told = (await command(a, "status", "--json")).json()
    assert (told["instance"]["id"], told["instance"]["state"]) == ("a", "ACTIVE")
    named = await command(b, "status", "--json", "--url", a.url)
    assert named.json()["instance"]["id"] == "a"


@pytest.mark.long
async def test_doctor_and_config_before_and_beside_a_running_instance(group: Cluster) -> None:
    node = group.make("a", **ALONE)
    before = await command(node, "doctor", "--json")
    assert before.json()["ok"] is (before.code == 0)
    made = await command(node, "init", "--json")
    if made.code == 0:
        assert set(made.json()) == {"ok", "created", "group", "findings"}
    await group.restart(node, state="ACTIVE")
    told = await command(node, "doctor", "--json")
    assert told.code == 0, told.out
    assert {f["verdict"] for f in told.json()["findings"]} <= {"ok", "warn"}
    again = await command(node, "init", "--json")
    assert (again.code, again.json()["created"]) == (0, False)
    shown = (await command(node, "config", "--json")).json()
    assert shown["WATCHKEEPER_INSTANCE_NAME"]["value"] == "a"
    assert TOKEN not in json.dumps(shown)
    for each in ("mermaid", "dot", "svg", "md", "json"):
        drawn = await command(node, "diagram", "--format", each)
        assert drawn.code == 0, drawn.err
        assert "DRAINING" in drawn.out


@pytest.mark.long
async def test_a_state_directory_serves_one_process(group: Cluster) -> None:
    a = await group.start("a", state="ACTIVE", **ALONE)
    second = group.make("b", WATCHKEEPER_STATE_DIR=a.env["WATCHKEEPER_STATE_DIR"])
    second.spawn()
    assert await second.wait_ended() == 2
    (line,) = [x for x in second.log().splitlines() if "not started" in x]
    assert "is used by another instance (process" in line
    assert "Traceback" not in second.log()
    assert await group.answers(a, "/active")


@pytest.mark.long
async def test_import_on_request(group: Cluster, tmp_path: Path) -> None:
    sessions = make_directories(tmp_path / "made" / "sessions", 2)
    (sessions / "account-1" / "creds.json").write_text("{")
    node = await group.start("a", state="ACTIVE", **ALONE)
    told = await command(node, "import", "--from-baileys", str(sessions), "--json")
    assert told.code == 0, told.err
    report = told.json()["report"]
    assert report["imported"] == ["account-0"]
    assert [failure["accountId"] for failure in report["failed"]] == ["account-1"]
    await group.wait_connected(node, "account-0")
    shown = await command(node, "import", "--from-baileys", str(sessions))
    assert shown.code == 0
    shutil.rmtree(sessions)
    missing = await command(node, "import", "--from-baileys", str(sessions))
    assert "Traceback" not in missing.err


@asynccontextmanager
async def _same_name(group: Cluster) -> AsyncIterator[tuple[Node, Node]]:
    a = await group.start("a", state="ACTIVE")
    await group.add_paired(a, "ann")
    twin = group.make("twin", WATCHKEEPER_INSTANCE_NAME="a")
    yield a, await group.restart(twin)


@pytest.mark.long
async def test_two_instances_of_one_name_never_both_act(group: Cluster) -> None:
    async with _same_name(group) as (a, twin):
        await group.wait_state(twin, "PASSIVE")
        for _ in range(20):
            assert not await group.answers(twin, "/active")
            await trio.sleep(0.05)
        answer = await group.send(twin, "ann", "through the twin")
        assert answer.status_code == 200, answer.text
        assert await a.stop() == 0
        await group.wait_state(twin, "ACTIVE")
        await group.wait_connected(twin, "ann")
        evictions = await group.json(twin, "GET", "/api/loopback/evictions")
        assert evictions["count"] == 0
