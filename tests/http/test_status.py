from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from machine.records import AccountId, Transition
from machine.states import State
from machine.views import LeaseStatus, RestoreFailure, RestoreReport
from tests.http.asking import Asking, asked_in_process
from tests.http.fakes import NOW, FakeInstance, World, an_account


@pytest.fixture
def world() -> World:
    world = World()
    world.add(an_account("support"))
    return world


@pytest.fixture
def instance(world: World) -> FakeInstance:
    return FakeInstance(world)


@pytest.fixture
async def api(instance: FakeInstance) -> AsyncIterator[Asking]:
    async with asked_in_process(instance) as asking:
        yield asking


async def test_dashboard_of_the_holder(api: Asking, world: World, instance: FakeInstance) -> None:
    world.activate(instance)
    instance.lease_status = LeaseStatus("a", 1, 15.0, 12.3456, 31, NOW, False)
    instance.restore_report = RestoreReport(
        epoch=1,
        started_at=NOW,
        finished_at=NOW + 1.5,
        found_shared=2,
        found_disk=1,
        total=2,
        restored=1,
        failures=(RestoreFailure(AccountId("billing"), "cut short", "pair it again"),),
        durations={"firestore": 0.25},
    )
    api.peers.see(name="b", incarnation="i", state="PASSIVE", address="http://b", version="1")
    answer = await api.get("/api/status/dashboard")
    shown = answer.json()
    assert answer.status_code == 200
    assert shown["instance"] == {
        "id": "a",
        "state": "ACTIVE",
        "since": "2025-01-31T12:00:00.000Z",
        "version": "1.2.3",
        "epoch": 1,
        "address": "http://127.0.0.1:9",
    }
    assert shown["lease"] == {
        "holder": "a",
        "epoch": 1,
        "ttlSeconds": 15.0,
        "remainingSeconds": 12.346,
        "renewals": 31,
        "lastRenewalAt": "2025-01-31T12:00:00.000Z",
        "paused": False,
    }
    assert shown["restore"]["finishedAt"] == "2025-01-31T12:00:01.500Z"
    assert shown["restore"]["failed"] == 1
    assert shown["restore"]["failures"][0]["accountId"] == "billing"
    assert [account["inMemory"] for account in shown["accounts"]] == [True]
    assert shown["accountsFrom"] == "memory"
    assert shown["outbox"] == {"depth": 0}
    assert [peer["id"] for peer in shown["peers"]] == ["b"]


async def test_dashboard_without_a_holder_shows_the_store(api: Asking, world: World) -> None:
    shown = (await api.get("/api/status/dashboard")).json()
    assert (shown["accountsFrom"], shown["accounts"][0]["inMemory"]) == ("store", False)
    assert (shown["instance"]["epoch"], shown["lease"], shown["restore"]) == (None, None, None)
    world.away = True
    shown = (await api.get("/api/status/dashboard")).json()
    assert (shown["accountsFrom"], shown["accounts"]) == ("none", [])


async def test_dashboard_answers_although_the_term_hangs(
    world: World, instance: FakeInstance, autojump_clock: object
) -> None:
    world.activate(instance)
    assert instance.desk is not None
    instance.desk.hangs = True
    async with asked_in_process(instance) as api:
        shown = (await api.get("/api/status/dashboard")).json()
    assert shown["accountsFrom"] == "store"


async def test_transitions_are_the_last_thousand_newest_last(
    api: Asking, instance: FakeInstance
) -> None:
    instance.transitions = [
        Transition("PASSIVE", "ACTIVE", "activate", f"reason {n}", NOW, 0.25, n, "a")
        for n in range(1005)
    ]
    shown = (await api.get("/api/status/transitions")).json()
    assert shown["count"] == 1000
    assert shown["transitions"][-1] == {
        "from": "PASSIVE",
        "to": "ACTIVE",
        "trigger": "activate",
        "reason": "reason 1004",
        "at": "2025-01-31T12:00:00.000Z",
        "durationSeconds": 0.25,
        "epoch": 1004,
        "instance": "a",
    }


@pytest.mark.parametrize(
    ("query", "accept", "media_type", "holds"),
    [
        ("", "*/*", "image/svg+xml", "<svg"),
        ("?format=mermaid", "*/*", "text/vnd.mermaid; charset=utf-8", "stateDiagram"),
        ("?format=dot", "*/*", "text/vnd.graphviz; charset=utf-8", "digraph"),
        ("", "text/plain", "text/vnd.mermaid; charset=utf-8", "stateDiagram"),
        ("", "text/vnd.graphviz", "text/vnd.graphviz; charset=utf-8", "digraph"),
    ],
)
async def test_diagram_in_the_format_asked_for(
    api: Asking, query: str, accept: str, media_type: str, holds: str
) -> None:
    answer = await api.get(f"/api/status/diagram{query}", headers={"accept": accept})
    assert answer.headers["content-type"] == media_type
    assert holds in answer.text


async def test_diagram_marks_the_present_state(api: Asking, instance: FakeInstance) -> None:
    passive = (await api.get("/api/status/diagram?format=mermaid")).text
    instance.state = State.DRAINING
    assert (await api.get("/api/status/diagram?format=mermaid")).text != passive
    refused = await api.get("/api/status/diagram?format=bmp")
    assert (refused.status_code, refused.json()["error"]) == (406, "not_acceptable")


@pytest.mark.parametrize(
    ("state", "alive", "expected"),
    [
        (State.BOOTING, True, {"livez": 200, "readyz": 503, "startupz": 503}),
        (State.PASSIVE, True, {"livez": 200, "readyz": 200, "startupz": 200, "passive": 200}),
        (State.ACTIVE, True, {"livez": 200, "readyz": 200, "startupz": 200, "active": 200}),
        (State.DRAINING, True, {"livez": 200, "readyz": 503, "startupz": 200}),
        (State.ACTIVE, False, {"livez": 503, "readyz": 503, "startupz": 200, "active": 200}),
    ],
)
async def test_health(
    api: Asking, instance: FakeInstance, state: State, alive: bool, expected: dict[str, int]
) -> None:
    instance.state, instance.alive = state, alive
    for path in ("livez", "readyz", "startupz", "active", "passive"):
        answer = await api.get(f"/{path}")
        assert answer.status_code == expected.get(path, 503), path
        assert answer.json() == {"ok": answer.status_code == 200, "state": state.value}


async def test_metrics_are_behind_the_token(instance: FakeInstance) -> None:
    async with asked_in_process(instance, render_metrics=lambda: b"watchkeeper_state 1\n") as api:
        answer = await api.get("/metrics")
        assert answer.text == "watchkeeper_state 1\n"
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        del api.client.headers["authorization"]
        assert (await api.get("/metrics")).status_code == 401


async def test_no_metrics_is_not_found(api: Asking) -> None:
    assert (await api.get("/metrics")).json()["error"] == "not_found"
