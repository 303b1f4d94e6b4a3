"""The alert rules fire when they should, and the dashboard shows nothing that does not exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.system.cluster import Cluster, Node, open_cluster, sqlite_env
from tests.system.steps import ALONE

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "deploy" / "prometheus"
RULES = HERE / "watchkeeper.rules.yml"
RULE_TESTS = HERE / "watchkeeper.rules.test.yml"
DASHBOARD = HERE / "grafana-dashboard.json"
ALERTS = re.findall(r"- alert: (\w+)", RULES.read_text())

ELSEWHERE = {
    "watchkeeper_store_operations": "store_operations",
    "watchkeeper_fence_listener_restarts_total": "fence_listener_restarts",
    "watchkeeper_bridge_resident_bytes": "bridge_resident_bytes",
}
"""Metrics that come with Firestore or with Baileys' bridge, and what names them in the code."""


def promtool(*arguments: str | Path, given: str | None = None) -> str:
    """What promtool says. Fails when it finds a fault."""
    if shutil.which("promtool") is None:
        missing = "no promtool: install Debian's package prometheus"
        if os.environ.get("CI"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    done = subprocess.run(
        ["promtool", *arguments], input=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def names_in(text: str) -> set[str]:
    """Metrics that a text speaks of; a histogram's series by the name of the histogram."""
    found = set(re.findall(r"(?<![\w:{])((?:watchkeeper|process)_\w+)\b", text))
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in found}


def test_the_rules_are_rules() -> None:
    assert f"{len(ALERTS) + 3} rules found" in promtool("check", "rules", RULES)


def test_each_alert_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", RULE_TESTS)
    text = RULE_TESTS.read_text()
    for alert in ALERTS:
        # Both ways, or the line above says nothing of it.
        assert re.search(rf"alertname: {alert}, exp_alerts: \[\]", text), alert
        assert re.search(rf"alertname: {alert}\n +exp_alerts:\n +- exp_labels", text), alert


def test_each_alert_says_how_bad_it_is_and_has_a_row_in_the_operating_page() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    for block in RULES.read_text().split("- alert: ")[1:]:
        alert = block.partition("\n")[0]
        assert re.search(r"severity: (critical|warning|info) ", block), alert
        assert f"| `{alert}` |" in page, alert
    assert set(re.findall(r"^\| `(Watchkeeper\w+)`", page, re.MULTILINE)) == set(ALERTS)


def test_every_expression_of_the_dashboard_is_one(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$group", "main")}
        for number, expression in enumerate(expressions())
    ]
    assert len(rules) > 20
    path = tmp_path / "dashboard.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", path)


def test_the_dashboard_is_in_order() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    for panel in panels():
        assert panel["title"]
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
        assert panel["datasource"]["uid"] == "${datasource}"


@pytest.fixture
async def metrics(tmp_path: Path) -> str:
    """What a real instance shows after a restore and a send."""
    async with open_cluster(tmp_path, sqlite_env(tmp_path)) as cluster:
        return await _metrics_of(cluster)


async def _metrics_of(cluster: Cluster) -> str:
    node = await cluster.start("a", state="ACTIVE", **ALONE)
    await cluster.add_paired(node, "ann")
    assert (await cluster.send(node, "ann", "x")).status_code == 200
    with trio.fail_after(5):
        # The answer may be out a moment before the acknowledgement is told.
        while "send_seconds_count 1.0" not in (shown := await _scrape(cluster, node)):
            await trio.sleep(0.05)
    assert await node.stop() == 0
    return shown


async def _scrape(cluster: Cluster, node: Node) -> str:
    return (await cluster.ask(node, "GET", "/metrics")).text


@pytest.mark.system
async def test_what_rules_and_dashboard_speak_of_is_there(metrics: str) -> None:
    exist = set(re.findall(r"^# TYPE (\w+) ", metrics, re.MULTILINE))
    main = (ROOT / "daemon" / "main.py").read_text()
    for name, named in ELSEWHERE.items():
        assert f'"{named}"' in main, name
    for text in (RULES.read_text(), RULE_TESTS.read_text(), *expressions()):
        assert names_in(text) - exist - ELSEWHERE.keys() == set()
    # The labels, too: a misspelt one selects nothing, for ever.
    states = set(re.findall(r'watchkeeper_state\{state="(\w+)"\}', metrics))
    statuses = set(re.findall(r'watchkeeper_accounts\{status="(\w+)"\}', metrics))
    for text in (RULES.read_text(), *expressions()):
        assert set(re.findall(r'state="(\w+)"', text)) <= states
        assert set(re.findall(r'status="(\w+)"', text)) <= statuses
    events = set(re.findall(r'watchkeeper_events_total\{event="([\w.]+)"\}', metrics))
    for text in (RULES.read_text(), *expressions()):
        for pattern in re.findall(r'event=~?"([^"]+)"', text):
            # Each alternative of the pattern is an event.
            matching = [event for event in events if re.fullmatch(pattern, event)]
            assert len(matching) == pattern.count("|") + 1, pattern


@pytest.mark.system
async def test_metrics_have_units_and_help_and_say_what_happened(metrics: str) -> None:
    promtool("check", "metrics", given=metrics)
    for name in re.findall(r"^# TYPE (watchkeeper_\w+) ", metrics, re.MULTILINE):
        assert re.search(rf"^# HELP {name} \S.*[.)]$", metrics, re.MULTILINE), name
    for shown in (
        'watchkeeper_instance_info{group="default",name="a",',
        'watchkeeper_state{state="ACTIVE"} 1.0',
        'watchkeeper_transitions_total{dest="ACTIVE",source="PASSIVE",trigger="activate"} 1.0',
        "watchkeeper_epoch 1.0",
        'watchkeeper_accounts{status="connected"} 1.0',
        'watchkeeper_restore_phase_seconds{phase="the shared store"}',
        "watchkeeper_send_seconds_count 1.0",
        "watchkeeper_outbox_oldest_seconds 0.0",
        "watchkeeper_lease_losses_total 0.0",
    ):
        assert shown in metrics, shown
