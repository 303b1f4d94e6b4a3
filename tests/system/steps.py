"""What several system tests do and look at: messages sent and arrived, a restore and its report."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.system.cluster import Cluster, Node

SHARED = "the shared store"
DISK = "this disk"
BOTH = "this disk (same version in the shared store)"
"""Where a restore takes a copy from, as its report says it."""

LONG_ON_FIRESTORE = pytest.mark.parametrize(
    "store_env",
    ["sqlite", pytest.param("firestore", marks=[pytest.mark.emulator, pytest.mark.long])],
    indirect=True,
)
"""For tests whose subject is the same on both stores: Firestore's turn is among the long ones."""

ALONE = {"WATCHKEEPER_DRAIN_LINGER_S": "0"}
"""For an instance without a successor: there is nobody to forward to after its release."""

FINISHED_S = 40.0
ARRIVED_S = 20.0


async def send_all(cluster: Cluster, node: Node, account_id: str, *texts: str) -> dict[str, str]:
    """Send each text and see it acknowledged by the server; message id → text."""
    accepted = {}
    for text in texts:
        answer = await cluster.send(node, account_id, text)
        assert answer.status_code == 200, answer.text
        accepted[answer.json()["messageId"]] = text
    return accepted


async def arrived_readable_once(cluster: Cluster, node: Node, accepted: dict[str, str]) -> None:
    """Everything accepted reached its recipient once, and nothing came from an old ratchet."""
    with trio.fail_after(ARRIVED_S):
        while True:
            shown = Counter(m["messageId"] for m in await cluster.received(node))
            if set(accepted) <= set(shown):
                break
            await trio.sleep(0.05)
    assert {each: n for each, n in shown.items() if n > 1} == {}
    raw = await cluster.received(node, raw=True)
    assert [m["text"] for m in raw if not m["readable"]] == []


async def dashboard(cluster: Cluster, node: Node) -> dict[str, Any]:
    """What the node says of itself and of the group."""
    return await cluster.json(node, "GET", "/api/status/dashboard")


async def restored(cluster: Cluster, node: Node, within_s: float = FINISHED_S) -> dict[str, Any]:
    """The report of the node's restore, once its first pass is over."""
    with trio.fail_after(within_s):
        while True:
            report = (await dashboard(cluster, node))["restore"]
            if report is not None and report["finishedAt"] is not None:
                told: dict[str, Any] = report
                return told
            await trio.sleep(0.05)


async def statuses(cluster: Cluster, node: Node) -> dict[str, str]:
    """Account id → status, of every account that is listed."""
    found = await cluster.json(node, "GET", "/api/whatsapp/accounts")
    return {account["accountId"]: account["status"] for account in found["accounts"]}


def lines_of(node: Node, pattern: str) -> list[str]:
    """The lines of the node's log that match `pattern`."""
    return [line for line in node.log().splitlines() if re.search(pattern, line)]


async def wait_logged(node: Node, pattern: str, within_s: float = 20.0) -> None:
    """Until a line of the node's log matches `pattern`."""
    with trio.fail_after(within_s):
        while re.search(pattern, node.log()) is None:
            await trio.sleep(0.05)


def state_dir(node: Node) -> Path:
    """Where the node keeps its own copy."""
    return Path(node.env["WATCHKEEPER_STATE_DIR"])
