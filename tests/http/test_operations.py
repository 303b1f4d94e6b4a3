from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.http.asking import Asking, asked_in_process
from tests.http.fakes import FakeInstance, World

HELLO = {
    "id": "b",
    "incarnation": "b-1",
    "state": "PASSIVE",
    "address": "http://10.0.0.8:8080",
    "version": "1.2.3",
}


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def instance(world: World) -> FakeInstance:
    instance = FakeInstance(world)
    world.activate(instance)
    return instance


@pytest.fixture
async def api(instance: FakeInstance) -> AsyncIterator[Asking]:
    async with asked_in_process(instance) as asking:
        yield asking


async def test_step_down_needs_a_standby(api: Asking, instance: FakeInstance) -> None:
    answer = await api.post("/api/admin/step-down", {"reason": "maintenance"})
    assert (answer.status_code, answer.json()["error"]) == (409, "no_standby")
    assert instance.step_downs == []
    await api.post("/api/internal/hello", HELLO)
    answer = await api.post("/api/admin/step-down", {"reason": "maintenance"})
    assert (answer.status_code, instance.step_downs) == (202, [("maintenance", None)])


async def test_step_down_by_force_needs_nobody(api: Asking, instance: FakeInstance) -> None:
    answer = await api.post("/api/admin/step-down", {"reason": "now", "force": True})
    assert answer.json() == {
        "success": True,
        "instance": "a",
        "state": "ACTIVE",
        "handoffTo": None,
    }
    assert instance.step_downs == [("now", None)]


async def test_handoff_goes_to_a_standby_only(api: Asking, instance: FakeInstance) -> None:
    await api.post("/api/internal/hello", HELLO)
    await api.post("/api/internal/hello", {**HELLO, "id": "c", "state": "DRAINING"})
    for other in ("nobody", "c"):
        answer = await api.post("/api/admin/step-down", {"reason": "x", "handoffTo": other})
        assert answer.json()["error"] == "no_standby"
        assert "These do: b" in answer.json()["message"]
    answer = await api.post("/api/admin/step-down", {"reason": "x", "handoffTo": "b"})
    assert (answer.status_code, instance.step_downs) == (202, [("x", "b")])


async def test_drain_is_for_the_instance_asked(api: Asking, instance: FakeInstance) -> None:
    answer = await api.post("/api/admin/drain", {"reason": "deploy"})
    assert (answer.status_code, instance.drains) == (202, ["deploy"])
    assert answer.headers["x-watchkeeper-state"] == "DRAINING"


@pytest.mark.parametrize("path", ["/api/admin/step-down", "/api/admin/drain"])
@pytest.mark.parametrize("content", [{}, {"reason": ""}, {"reason": " "}, {"reason": "x" * 201}])
async def test_operations_need_a_reason(
    api: Asking, instance: FakeInstance, path: str, content: object
) -> None:
    answer = await api.post(path, content)
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("reason: ")
    assert (instance.drains, instance.step_downs) == ([], [])


async def test_import_reports_what_it_found(api: Asking) -> None:
    answer = await api.post("/api/admin/import", {"directory": "/old/sessions"})
    assert answer.json() == {
        "success": True,
        "report": {"directory": "/old/sessions", "imported": ["old"], "failed": []},
    }
    wrong = await api.post("/api/admin/import", {"directory": ""})
    assert wrong.json()["message"].startswith("directory: ")


async def test_hello_is_remembered_and_told_to_the_next(api: Asking) -> None:
    first = await api.post("/api/internal/hello", HELLO)
    assert [peer["id"] for peer in first.json()["peers"]] == ["a", "b"]
    second = await api.post("/api/internal/hello", {**HELLO, "id": "c"})
    assert [peer["id"] for peer in second.json()["peers"]] == ["a", "b", "c"]
    assert second.json()["peers"][0]["state"] == "ACTIVE"


async def test_silent_peers_are_forgotten(instance: FakeInstance, autojump_clock: object) -> None:
    import trio

    async with asked_in_process(instance) as api:
        await api.post("/api/internal/hello", HELLO)
        await trio.sleep(14)
        assert len(api.peers.known()) == 1
        await trio.sleep(2)
        assert api.peers.known() == ()
        assert (await api.post("/api/admin/step-down", {"reason": "x"})).status_code == 409
        assert api.notes.names()[:2] == ["peer.seen", "peer.forgotten"]


async def test_peers_are_limited(api: Asking) -> None:
    for number in range(150):
        await api.post("/api/internal/hello", {**HELLO, "id": f"peer-{number}"})
    assert len(api.peers.known()) == 100


async def test_hello_to_someone_who_is_not_the_holder_is_refused(api: Asking, world: World) -> None:
    world.activate(None)
    answer = await api.post("/api/internal/hello", HELLO)
    assert (answer.status_code, answer.json()["error"]) == (503, "no_active_instance")


async def test_wrong_hello_names_its_field(api: Asking) -> None:
    answer = await api.post("/api/internal/hello", {**HELLO, "state": "SLEEPING"})
    assert answer.json()["message"].startswith("state: ")
