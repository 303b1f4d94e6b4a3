"""The alert rules fire when they should, and the dashboard shows nothing that does not exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.ports import free_port
from tests.system.cluster import TOKEN, Cluster, Node, open_cluster, sqlite_env
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


def need(program: str) -> None:
    """Skip without `program`; fail in CI."""
    if shutil.which(program) is None:
        missing = f"no {program}: install Debian's package prometheus"
        if os.environ.get("CI"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)


def promtool(*arguments: str | Path, given: str | None = None) -> str:
    """What promtool says. Fails when it finds a fault."""
    need("promtool")
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


# --- a real Prometheus -----------------------------------------------------------------------


class Prometheus:
    """A Prometheus that scrapes every half second, with our rules and none of their waiting."""

    def __init__(self, client: httpx.AsyncClient, port: int) -> None:
        self._client = client
        self._url = f"http://127.0.0.1:{port}/api/v1"

    async def get(self, path: str, **query: str) -> Any:
        answer = (await self._client.get(f"{self._url}/{path}", params=query)).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    async def value(self, query: str) -> list[str]:
        """The values of the series that there are now."""
        return [found["value"][1] for found in (await self.get("query", query=query))["result"]]

    async def firing(self) -> set[str]:
        alerts = (await self.get("alerts"))["alerts"]
        return {each["labels"]["alertname"] for each in alerts if each["state"] == "firing"}


@contextmanager
def start_prometheus(directory: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The process, for the configuration in `directory`; ended with the block."""
    need("prometheus")
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(
            [
                *("prometheus", f"--config.file={directory / 'prometheus.yml'}"),
                f"--storage.tsdb.path={directory / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


@asynccontextmanager
async def open_prometheus(directory: Path, jobs: list[dict[str, Any]]) -> AsyncIterator[Prometheus]:
    """Start one with these jobs; returns when it answers."""
    at_once = re.sub(r"^( +for:) \w+$", r"\1 0s", RULES.read_text(), flags=re.MULTILINE)
    assert at_once != RULES.read_text()
    (directory / "rules.yml").write_text(at_once)
    often = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config = {"global": often, "rule_files": ["rules.yml"], "scrape_configs": jobs}
    # JSON is YAML.
    (directory / "prometheus.yml").write_text(json.dumps(config))
    port = free_port()
    with start_prometheus(directory, port) as process:
        async with httpx.AsyncClient(timeout=5) as client:

            async def ready() -> bool:
                assert process.poll() is None, (directory / "prometheus.log").read_text()
                with suppress(httpx.TransportError):
                    answer = await client.get(f"http://127.0.0.1:{port}/-/ready")
                    return answer.status_code == 200
                return False

            await wait_so("Prometheus to be ready", ready)
            yield Prometheus(client, port)


async def wait_so(what: str, seen: Callable[[], Awaitable[object]]) -> None:
    """Look until it is so."""
    with trio.move_on_after(20) as waited:
        while not await seen():
            await trio.sleep(0.2)
    assert not waited.cancelled_caught, f"waited 20 s in vain for: {what}"


@pytest.mark.system
@pytest.mark.long
async def test_a_real_prometheus_scrapes_an_instance_and_wakes_somebody(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "token").write_text(TOKEN)
    async with open_cluster(tmp_path, sqlite_env(tmp_path)) as cluster:
        bind = f"127.0.0.1:{port}"
        node = await cluster.start("a", state="ACTIVE", WATCHKEEPER_METRICS_BIND=bind, **ALONE)
        jobs: list[dict[str, Any]] = [
            {"job_name": "open", "static_configs": [{"targets": [bind]}]},
            {
                "job_name": "token",
                "authorization": {"credentials_file": str(tmp_path / "token")},
                "static_configs": [{"targets": [f"127.0.0.1:{node.port}"]}],
                # Scraped to see that it can be. Its series are another instance's to the rules.
                "metric_relabel_configs": [
                    {"source_labels": ["__name__"], "regex": "watchkeeper_.*", "action": "drop"}
                ],
            },
        ]
        async with open_prometheus(tmp_path, jobs) as prometheus:

            async def up() -> bool:
                return await prometheus.value("up") == ["1", "1"]

            await wait_so("both ways to scrape", up)

            async def one_active() -> bool:
                return await prometheus.value("group:watchkeeper_active:sum") == ["1"]

            await wait_so("the instance's state", one_active)

            async def evaluated() -> bool:
                groups = (await prometheus.get("rules"))["groups"]
                rules = [rule for group in groups for rule in group["rules"]]
                assert len(rules) == len(ALERTS) + 3
                assert not [rule for rule in rules if rule["health"] == "err"], rules
                return all(rule["health"] == "ok" for rule in rules)

            await wait_so("every rule to be healthy", evaluated)

            async def as_it_should() -> bool:
                # Before the first scrape nobody seemed to be there.
                return await prometheus.firing() == {"WatchkeeperNoStandby"}

            await wait_so("the one alert that there is cause for", as_it_should)
            assert await node.stop() == 0

            async def woken() -> bool:
                return "WatchkeeperNoActive" in await prometheus.firing()

            await wait_so("an alert that nobody is ACTIVE", woken)
