"""What an instance's JSON lines carry, whoever collects them: request, account, epoch, instance."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.system.cluster import TOKEN, Cluster, Node, open_cluster, sqlite_env
from tests.system.steps import ALONE

pytestmark = pytest.mark.system


def lines_of(node: Node) -> list[dict[str, Any]]:
    return [json.loads(line) for line in node.log().splitlines() if line.startswith("{")]


async def ask_as(cluster: Cluster, node: Node, request_id: str, path: str, **given: Any) -> None:
    """A request with an id of the caller's own."""
    headers = {"Authorization": f"Bearer {TOKEN}", "X-Request-Id": request_id}
    answer = await cluster.client.post(node.url + path, headers=headers, **given)
    assert answer.status_code < 300, answer.text


async def wait_told(node: Node, event: str) -> None:
    with trio.fail_after(10):
        while not any(line["event"] == event for line in lines_of(node)):
            await trio.sleep(0.05)


async def _metric(cluster: Cluster, node: Node, line: str) -> None:
    with trio.fail_after(10):
        while line not in (await cluster.ask(node, "GET", "/metrics")).text.splitlines():
            await trio.sleep(0.05)


async def test_lines_carry_request_account_and_epoch(tmp_path: Path) -> None:
    env = {**sqlite_env(tmp_path), "WATCHKEEPER_LOG_FORMAT": "json"}
    async with open_cluster(tmp_path, env) as cluster:
        first = await cluster.start("a", state="ACTIVE", **ALONE)
        await first.stop()
        node = await cluster.start("b", state="ACTIVE", **ALONE)
        body = {"accountId": "ann", "name": "Ann"}
        await ask_as(cluster, node, "of-ann", "/api/whatsapp/accounts", json=body)
        await cluster.add_paired(node, "ben")
        await ask_as(cluster, node, "of-scan", "/api/loopback/scan/ann")
        await cluster.wait_connected(node, "ann")
        message = {"accountId": "ann", "to": "4915112345678", "message": "x"}
        await ask_as(cluster, node, "of-send", "/api/whatsapp/send-message", json=message)
        await wait_told(node, "message.acked")
        assert await node.stop() == 0
    lines = lines_of(node)
    assert len(lines) == len(node.log().splitlines()), "every line is JSON"
    acquired = next(n for n, line in enumerate(lines) if line["event"] == "lease.acquired")
    assert all(line["instance"] == "b" and line["ts"] and line["level"] for line in lines)
    assert all(line["epoch"] == 2 for line in lines[acquired:]), "each line of a term has its epoch"
    for line in lines:
        assert line.get("accountId") == line["fields"].get("account_id")
        # An account that a sentence names is a field, too.
        if found := re.search(r"account (ann|ben)\b", line["message"]):
            assert line["accountId"] == found[1]
    of = {line["event"]: line for line in lines if line.get("accountId") == "ann"}
    assert of["account.created"]["requestId"] == "of-ann"
    assert of["message.accepted"]["requestId"] == "of-send"
    assert {line["requestId"] for line in lines if line.get("requestId", "").startswith("of-")} <= {
        *("of-ann", "of-scan", "of-send")
    }
    # What goes on by itself is nobody's request.
    released = [line for line in lines if line["event"] == "lease.released"]
    assert ["requestId" in line for line in released] == [False]


async def test_what_needs_a_person_shows_in_the_metrics(tmp_path: Path) -> None:
    async with open_cluster(tmp_path, sqlite_env(tmp_path)) as cluster:
        node = await cluster.start("a", state="ACTIVE", **ALONE)
        await cluster.add_paired(node, "ann", "ben", "cleo")
        await _metric(cluster, node, "watchkeeper_client_refused 0.0")
        for account_id, code in (("ann", 403), ("cleo", 402), ("ben", 405)):
            cut = {"code": code, "expireS": 600}
            await cluster.json(node, "POST", f"/api/loopback/cut/{account_id}", json=cut)
            await trio.sleep(0.2)
        for line in (
            "watchkeeper_client_refused 1.0",
            'watchkeeper_accounts{status="banned"} 1.0',
            'watchkeeper_events_total{event="session.stopped"} 1.0',
            'watchkeeper_events_total{event="session.banned"} 1.0',
            'watchkeeper_events_total{event="client.refused"} 1.0',
        ):
            await _metric(cluster, node, line)
        assert await node.stop() == 0
