from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator

import httpx
import pytest
import trio
from fastapi import APIRouter, Request

from daemon.http.auth import OPEN_PATHS, Tokens
from daemon.http.errors import MEANINGS, STATUS_OF, ErrorCode, from_refusal
from daemon.journal import present_request
from machine.states import State
from tests.http.asking import Asking, asked_in_process
from tests.http.fakes import (
    TOKEN,
    FakeInstance,
    World,
    an_account,
    every_refusal,
    make_message_id,
    settings,
)


@pytest.fixture
def instance() -> FakeInstance:
    world = World()
    world.add(an_account("support"))
    instance = FakeInstance(world)
    world.activate(instance)
    return instance


@pytest.fixture
async def api(instance: FakeInstance) -> AsyncIterator[Asking]:
    async with asked_in_process(instance) as asking:
        yield asking


def test_every_code_has_a_status_and_a_meaning() -> None:
    assert set(STATUS_OF) == set(MEANINGS) == set(ErrorCode)


def test_every_refusal_of_the_machine_has_its_code() -> None:
    for kind in every_refusal():
        assert from_refusal(kind("why")).code == kind.code


# --- tokens


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong-token",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}" + " " * 5000,
        "Bearer " + "x" * 100_000,
        "Bearer \xff\xfe",
    ],
)
async def test_wrong_token_is_refused_everywhere(api: Asking, header: str | None) -> None:
    del api.client.headers["authorization"]
    headers = {} if header is None else {b"authorization": header.encode("latin-1")}
    for path in ("/api/whatsapp/accounts", "/api/status/dashboard", "/metrics", "/no/such/path"):
        answer = await api.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert TOKEN not in answer.text


async def test_two_authorization_headers_are_refused(api: Asking) -> None:
    headers = [("authorization", f"Bearer {TOKEN}"), ("authorization", f"Bearer {TOKEN}")]
    api.client.headers = httpx.Headers({})
    assert (await api.get("/api/status/dashboard", headers=headers)).status_code == 401


async def test_scheme_is_any_case_and_former_tokens_count(instance: FakeInstance) -> None:
    given = settings(tokens=Tokens(("a-new-token-1234", TOKEN)))
    async with asked_in_process(instance, given) as api:
        for secret in ("a-new-token-1234", TOKEN):
            headers = {"authorization": f"bearer {secret}"}
            assert (await api.get("/api/status/dashboard", headers=headers)).status_code == 200


async def test_tokens_are_exchanged_while_the_api_runs(instance: FakeInstance) -> None:
    tokens = Tokens((TOKEN,))
    async with asked_in_process(instance, settings(tokens=tokens)) as api:
        tokens.replace(("a-new-token-1234",))
        assert (await api.get("/api/status/dashboard")).status_code == 401
        headers = {"authorization": "Bearer a-new-token-1234"}
        assert (await api.get("/api/status/dashboard", headers=headers)).status_code == 200


async def test_token_in_the_address_is_refused_even_when_right(api: Asking) -> None:
    answer = await api.get(f"/api/status/dashboard?token={TOKEN}")
    assert (answer.status_code, answer.json()["error"]) == (401, "unauthorized")
    assert "logs" in answer.json()["message"]
    assert TOKEN not in answer.text


async def test_open_paths_need_no_token(api: Asking) -> None:
    del api.client.headers["authorization"]
    for path in OPEN_PATHS:
        assert (await api.get(path)).status_code in {200, 503}, path


async def test_token_is_in_no_repr_no_log_and_no_note(
    instance: FakeInstance, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    # The client of this test logs the address it asks; ours never asks with a token in it.
    caplog.set_level(logging.WARNING, "httpx")
    given = settings()
    assert TOKEN not in repr(given)
    async with asked_in_process(instance, given) as api:
        assert instance.desk is not None
        await api.send()
        instance.desk.refusal = RuntimeError(f"holds {TOKEN}")
        answer = await api.send()
        assert answer.json()["error"] == "internal_error"
        await api.get(f"/api/status/dashboard?token={TOKEN}")
        await api.get("/api/status/dashboard", headers={"authorization": f"Bearer {TOKEN}x"})
        told = f"{api.notes.said}{caplog.text}{answer.text}"
    assert TOKEN not in told
    assert "RuntimeError" in told


# --- headers


async def test_every_answer_names_instance_state_and_request(
    api: Asking, instance: FakeInstance
) -> None:
    for path in ("/livez", "/api/whatsapp/accounts", "/nothing", "/api/whatsapp/accounts/nobody"):
        answer = await api.get(path, headers={"x-request-id": "mine-42"})
        assert answer.headers["x-watchkeeper-instance"] == "a"
        assert answer.headers["x-watchkeeper-state"] == "ACTIVE"
        assert answer.headers["x-request-id"] == "mine-42"
        if answer.status_code == 404:
            assert answer.json()["requestId"] == "mine-42"


async def test_unusable_request_id_is_replaced(api: Asking) -> None:
    for sent in ("a b", "x" * 65, '"><script>'):
        answer = await api.get("/livez", headers={"x-request-id": sent})
        assert answer.headers["x-request-id"] != sent
        assert len(answer.headers["x-request-id"]) == 16


async def test_draining_instance_asks_callers_to_connect_elsewhere(
    api: Asking, instance: FakeInstance
) -> None:
    assert "connection" not in (await api.get("/livez")).headers
    instance.state = State.DRAINING
    assert (await api.get("/livez")).headers["connection"] == "close"


# --- bodies and paths


async def test_body_over_the_limit_is_413(api: Asking) -> None:
    answer = await api.send(message="x" * 300_000)
    assert (answer.status_code, answer.json()["error"]) == (413, "payload_too_large")


@pytest.mark.parametrize(
    ("content", "media_type", "told"),
    [
        (b'{"accountId": ', "application/json", "not valid JSON"),
        (b"[1, 2]", "application/json", "must be a JSON object"),
        (b'"text"', "application/json", "must be a JSON object"),
        (b"", "application/json", "must be a JSON object"),
        (b'{"accountId": "support"}', "text/plain", "Content-Type: application/json"),
        (
            b'{"accountId": "support", "to": "12345", "message": "\\ud800"}',
            "application/json",
            "mess",
        ),
        (b"[" * 200_000, "application/json", "JSON"),
        (b"\xff\xfe\x00", "application/json", "JSON"),
    ],
)
async def test_malformed_body_is_400(
    api: Asking, content: bytes, media_type: str, told: str
) -> None:
    answer = await api.client.post(
        "/api/whatsapp/send-message", content=content, headers={"content-type": media_type}
    )
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert told in answer.json()["message"]


async def test_unknown_path_and_method_have_their_codes(api: Asking) -> None:
    assert (await api.get("/api/nothing")).json()["error"] == "not_found"
    answer = await api.client.put("/api/whatsapp/accounts")
    assert (answer.status_code, answer.json()["error"]) == (405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, POST"


async def test_a_path_with_a_slash_too_many_is_not_found_and_leads_nowhere(api: Asking) -> None:
    answer = await api.get("/api/whatsapp/accounts/", headers={"host": "elsewhere.invalid"})
    assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
    assert "location" not in answer.headers


async def test_slow_body_is_408(instance: FakeInstance, autojump_clock: object) -> None:
    async with asked_in_process(instance, settings(body_s=2)) as api:

        async def drip() -> AsyncIterator[bytes]:
            yield b"{"
            await trio.sleep(60)
            yield b"}"

        answer = await api.client.post("/api/whatsapp/send-message", content=drip())
    assert (answer.status_code, answer.json()["error"]) == (408, "request_timeout")


async def test_bug_is_a_500_with_its_request_id_and_a_note(
    api: Asking, instance: FakeInstance
) -> None:
    assert instance.desk is not None
    instance.desk.refusal = ZeroDivisionError("secret detail")
    for path in ("/api/whatsapp/accounts", "/api/status/dashboard"):
        answer = await api.get(path)
        assert (answer.status_code, answer.json()["error"]) == (500, "internal_error")
        assert "secret detail" not in answer.text
        event, fields = api.notes.said[-1]
        assert event == "http.request_failed"
        assert re.fullmatch(r"ZeroDivisionError at \w+\.py:\d+", str(fields["error"]))
        assert fields["request_id"] == answer.json()["requestId"]


async def test_further_routes_are_behind_the_token_and_get_the_same_errors(
    instance: FakeInstance,
) -> None:
    router = APIRouter(prefix="/api/loopback")

    @router.post("/scan/{account_id}")
    async def scan(account_id: str, request: Request) -> dict[str, str]:
        return {"accountId": account_id}

    async with asked_in_process(instance, routers=[router]) as api:
        assert (await api.post("/api/loopback/scan/x")).json() == {"accountId": "x"}
        del api.client.headers["authorization"]
        assert (await api.post("/api/loopback/scan/x")).status_code == 401


async def test_what_a_request_causes_in_the_log_carries_its_id(instance: FakeInstance) -> None:
    router = APIRouter(prefix="/api/loopback")

    @router.get("/present")
    async def present() -> dict[str, str | None]:
        return {"requestId": present_request()}

    async with asked_in_process(instance, routers=[router]) as api:
        answer = await api.get("/api/loopback/present", headers={"x-request-id": "mine-42"})
    assert answer.json() == {"requestId": "mine-42"}
    assert present_request() is None


def test_contradicting_settings_are_refused_with_their_numbers() -> None:
    with pytest.raises(ValueError, match="at least 8 characters"):
        Tokens(())
    with pytest.raises(ValueError, match=r"2 \* hello_s = 10"):
        settings(peer_ttl_s=9)
    with pytest.raises(ValueError, match="handoff_wait_s"):
        settings(handoff_wait_s=1)
    with pytest.raises(ValueError, match=r"answer_s \(20\)"):
        settings(answer_s=20)


def test_fake_makes_ids_as_the_machine_does() -> None:
    from machine.outbox import make_message_id as real

    rng = __import__("random").Random(1)
    for make in (real, make_message_id):
        assert make(an_account("x").account_id, "k", rng) == make(
            an_account("x").account_id, "k", rng
        )
        assert make(an_account("x").account_id, None, rng) != make(
            an_account("x").account_id, None, rng
        )
