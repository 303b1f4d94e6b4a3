"""Whatever a caller sends, an instance answers as its OpenAPI document says, and never with a bug.

Schemathesis makes the requests from the document of a real instance: for each operation what fits
it, what just does not, and what it was told never to expect. It runs as its own program, so that
its pytest plugin and its Hypothesis settings stay out of these tests.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.system.cluster import TOKEN, Cluster, Node, sqlite_env
from tests.system.steps import ALONE, dashboard, lines_of

pytestmark = pytest.mark.system

CONFIG = Path(__file__).with_name("schemathesis.toml")
ENDING = "/api/admin/drain"
STEPPING_DOWN = "/api/admin/step-down"
SEED = "20261125"
"""Fixed, so that a run repeats; another finds other requests."""

QUICK = {**ALONE, "WATCHKEEPER_SEND_WAIT_S": "0"}
"""A send to nobody is answered at once; what matters here is what, not when."""


@pytest.fixture
def store_env(tmp_path: Path) -> dict[str, str]:
    """What a request meets is the same on both stores."""
    return sqlite_env(tmp_path)


@dataclass(frozen=True)
class Run:
    """What schemathesis did: how many operations it asked, and with how many requests."""

    operations: int
    requests: int


async def ask(
    node: Node, directory: Path, *arguments: str, token: str | None = TOKEN, config: Path = CONFIG
) -> Run:
    """Let schemathesis ask an instance. Fails with its report when an answer is not documented."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config)]
    command += ["run", f"{node.url}/openapi.json", "--no-color", "--generation-database", "none"]
    command += ["--seed", SEED, "--continue-on-failure", *arguments]
    if token is not None:
        command += ["--header", f"Authorization: Bearer {token}"]
    done = await trio.run_process(
        command, cwd=directory, capture_stdout=True, stderr=subprocess.STDOUT, check=False
    )
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said[-20_000:]
    found = re.search(r"Tested: (\d+)\n.*?(\d+) generated", said, re.DOTALL)
    assert found is not None, said
    return Run(int(found[1]), int(found[2]))


async def operations_of(cluster: Cluster, node: Node) -> int:
    paths = (await cluster.json(node, "GET", "/openapi.json"))["paths"]
    return sum(len(methods) for methods in paths.values())


async def unharmed(cluster: Cluster, node: Node, epoch: int) -> None:
    """The instance still acts, under the epoch it had, and met no bug."""
    told = await dashboard(cluster, node)
    assert (told["instance"]["state"], told["instance"]["epoch"]) == ("ACTIVE", epoch)
    assert lines_of(node, "this is a bug|broke the server|Traceback") == []
    metrics = (await cluster.ask(node, "GET", "/metrics")).text
    assert "watchkeeper_journal_faults_total 0.0" in metrics


@pytest.mark.long
async def test_thousands_of_requests_get_documented_answers(
    cluster: Cluster, tmp_path: Path
) -> None:
    node = await cluster.start("a", state="ACTIVE", **QUICK)
    # The examples in the document speak of the first of these.
    await cluster.add_paired(node, "support", "known")
    run = await ask(
        node,
        tmp_path,
        *("--max-examples", "60"),
        *("--exclude-path", ENDING, "--exclude-path", STEPPING_DOWN),
    )
    print(f"\n{run.requests} requests to {run.operations} operations")
    assert run.requests > 2_000
    # The same once more, for an account and a message that are there.
    await cluster.add_paired(node, "kept")
    message = (await cluster.send(node, "kept", "x")).json()["messageId"]
    config = tmp_path / "known.toml"
    known = f"[parameters]\naccountId = 'kept'\nmessageId = '{message}'\n"
    config.write_text(known + CONFIG.read_text())
    names = ("--include-path-regex", r"\{(accountId|messageId)\}$|/(qr|reconnect|pairing-code)$")
    run = await ask(
        node, tmp_path, "--max-examples", "50", "--exclude-method", "DELETE", *names, config=config
    )
    assert run.operations == 5
    assert (await cluster.ask(node, "GET", f"/api/whatsapp/messages/{message}")).status_code == 200
    await unharmed(cluster, node, 1)


@pytest.mark.long
async def test_nobody_without_the_token_reads_or_changes_anything(
    cluster: Cluster, tmp_path: Path
) -> None:
    node = await cluster.start("a", state="ACTIVE", **QUICK)
    await cluster.add_paired(node, "support")
    before = await cluster.json(node, "GET", "/api/whatsapp/accounts")
    for token in (None, "x" * len(TOKEN)):
        # All of them, `drain` and `step-down` too.
        run = await ask(node, tmp_path, "--max-examples", "20", token=token)
        assert run.operations == await operations_of(cluster, node)
    assert await cluster.json(node, "GET", "/api/whatsapp/accounts") == before
    assert await cluster.received(node) == []
    # Nothing that they sent reached anything behind the door.
    assert lines_of(node, r" \| (account|message) (?!support)") == []
    await unharmed(cluster, node, 1)


@pytest.mark.long
async def test_step_downs_and_a_drain_get_documented_answers(
    cluster: Cluster, tmp_path: Path
) -> None:
    node = await cluster.start("a", state="ACTIVE", **QUICK)
    limits = ("--phases", "examples,coverage,fuzzing", "--max-examples", "20")
    await ask(node, tmp_path, "--include-path", STEPPING_DOWN, *limits)
    # Some were valid: the instance stepped down, and took the lease again.
    await cluster.wait_state(node, "ACTIVE")
    epoch = (await dashboard(cluster, node))["instance"]["epoch"]
    assert epoch > 1
    # Only what does not fit: the first valid one would be the last.
    wrong = ("--phases", "fuzzing", "--mode", "negative", "--max-examples", "50")
    await ask(node, tmp_path, "--include-path", ENDING, *wrong)
    await unharmed(cluster, node, epoch)
    answer = await cluster.ask(node, "POST", ENDING, json={"reason": "the last request"})
    assert answer.status_code == 202
    assert await node.wait_ended() == 0
