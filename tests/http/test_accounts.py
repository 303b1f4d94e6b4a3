from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from machine.records import AccountStatus
from machine.refusals import AccountBanned, AccountNotPaired, AccountQuarantined, NotAwaitingScan
from tests.http.asking import Asking, asked_in_process
from tests.http.fakes import FakeDesk, FakeInstance, World, an_account, settings

ACCOUNTS = "/api/whatsapp/accounts"


@pytest.fixture
def world() -> World:
    world = World()
    world.add(an_account("support"), an_account("billing", AccountStatus.QR_READY))
    return world


@pytest.fixture
def instance(world: World) -> FakeInstance:
    instance = FakeInstance(world)
    world.activate(instance)
    return instance


@pytest.fixture
def desk(instance: FakeInstance) -> FakeDesk:
    assert instance.desk is not None
    return instance.desk


@pytest.fixture
async def api(instance: FakeInstance) -> AsyncIterator[Asking]:
    async with asked_in_process(instance) as asking:
        yield asking


async def test_list_has_every_account_by_id_with_all_documented_fields(api: Asking) -> None:
    answer = await api.get(ACCOUNTS)
    assert answer.status_code == 200
    listed = answer.json()
    assert listed["count"] == 2
    assert [account["accountId"] for account in listed["accounts"]] == ["billing", "support"]
    assert listed["accounts"][1] == {
        "accountId": "support",
        "name": "Support",
        "phone": "4915123456789",
        "status": "connected",
        "inMemory": True,
        "lastError": None,
        "since": "2025-01-31T12:00:00.000Z",
        "createdAt": "2025-01-31T12:00:00.000Z",
        "updatedAt": "2025-01-31T12:00:00.000Z",
        "lastConnectedAt": None,
        "queued": 0,
    }


async def test_list_comes_from_the_store_without_a_holder(
    world: World, autojump_clock: object
) -> None:
    instance = FakeInstance(world)
    async with asked_in_process(instance) as api:
        listed = (await api.get(ACCOUNTS)).json()
        assert [account["inMemory"] for account in listed["accounts"]] == [False, False]
        world.away = True
        answer = await api.get(ACCOUNTS)
    assert answer.status_code == 503
    assert answer.json()["error"] == "store_unavailable"
    assert answer.headers["retry-after"] == "2"


async def test_added_account_begins_pairing(api: Asking) -> None:
    answer = await api.post(ACCOUNTS, {"accountId": "sales", "name": "Sales"})
    assert answer.status_code == 201
    assert answer.json()["account"]["status"] == "qr_ready"
    made_up = await api.post(ACCOUNTS, {"name": "Anyone"})
    assert made_up.json()["account"]["accountId"].startswith("account-")


async def test_taken_account_id_is_refused(api: Asking) -> None:
    answer = await api.post(ACCOUNTS, {"accountId": "support", "name": "Again"})
    assert answer.status_code == 409
    assert answer.json()["error"] == "account_exists"


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "  "}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": 7}, "name"),
        ({"name": "x", "accountId": "a b"}, "accountId"),
        ({"name": "x", "accountId": ".."}, "accountId"),
        ({"name": "x", "accountId": "__x__"}, "accountId"),
        ({"name": "x", "accountId": "x" * 65}, "accountId"),
        ({"name": "x", "acountId": "typo"}, "acountId"),
    ],
)
async def test_wrong_account_is_refused_with_its_field(
    api: Asking, content: object, field: str
) -> None:
    answer = await api.post(ACCOUNTS, content)
    assert answer.status_code == 400
    assert answer.json()["error"] == "invalid_request"
    assert answer.json()["message"].startswith(f"{field}: ")


async def test_one_account_or_not_found(api: Asking) -> None:
    assert (await api.get(f"{ACCOUNTS}/support")).json()["account"]["name"] == "Support"
    answer = await api.get(f"{ACCOUNTS}/nobody")
    assert (answer.status_code, answer.json()["error"]) == (404, "account_not_found")
    assert (await api.get(f"{ACCOUNTS}/{'x' * 65}")).json()["error"] == "invalid_request"


@pytest.mark.parametrize(
    ("accept", "media_type", "begins"),
    [
        ("application/json", "application/json", b'{"success":true,"qr":"2@xxx'),
        ("*/*", "application/json", b"{"),
        ("image/svg+xml", "image/svg+xml", b"<?xml"),
        ("image/png", "image/png", b"\x89PNG"),
        ("text/html;q=0.9, image/*;q=0.5, image/png;q=0.6", "image/png", b"\x89PNG"),
        ("text/plain", "text/plain; charset=utf-8", "█".encode()),
    ],
)
async def test_qr_comes_in_the_format_accepted(
    api: Asking, accept: str, media_type: str, begins: bytes
) -> None:
    answer = await api.get(f"{ACCOUNTS}/billing/qr", headers={"accept": accept})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == media_type
    if accept == "text/plain":
        assert begins in answer.content
        assert b"\x1b" not in answer.content
    else:
        assert answer.content.startswith(begins)
    assert answer.headers["cache-control"] == "no-store"


async def test_qr_by_query_and_formats_not_offered(api: Asking) -> None:
    answer = await api.get(f"{ACCOUNTS}/billing/qr?format=svg", headers={"accept": "text/plain"})
    assert answer.headers["content-type"] == "image/svg+xml"
    for refused in (
        await api.get(f"{ACCOUNTS}/billing/qr?format=gif"),
        await api.get(f"{ACCOUNTS}/billing/qr", headers={"accept": "video/mp4"}),
    ):
        assert (refused.status_code, refused.json()["error"]) == (406, "not_acceptable")
        assert "image/png (?format=png)" in refused.json()["message"]


async def test_no_qr_for_a_paired_account(api: Asking, desk: FakeDesk) -> None:
    desk.refusal = NotAwaitingScan("support is paired")
    answer = await api.get(f"{ACCOUNTS}/support/qr")
    assert (answer.status_code, answer.json()["error"]) == (409, "not_awaiting_scan")


async def test_pairing_code_normalises_the_phone(api: Asking, desk: FakeDesk) -> None:
    answer = await api.post(f"{ACCOUNTS}/billing/pairing-code", {"phone": "+49 (151) 234-567"})
    assert answer.json() == {
        "success": True,
        "code": "ABCD1234",
        "expiresAt": "2025-01-31T12:01:00.000Z",
    }
    assert desk.asked_phone == "49151234567"


@pytest.mark.parametrize(
    ("verb", "call"), [("reconnect", "reconnect"), ("logout", "log_out"), ("repair", "repair")]
)
async def test_verbs_of_an_account(api: Asking, desk: FakeDesk, verb: str, call: str) -> None:
    answer = await api.post(f"{ACCOUNTS}/support/{verb}")
    assert answer.status_code == 202
    assert desk.calls == [call]
    assert (await api.post(f"{ACCOUNTS}/nobody/{verb}")).json()["error"] == "account_not_found"


@pytest.mark.parametrize("kind", [AccountNotPaired, AccountQuarantined, AccountBanned])
async def test_reconnect_tells_why_not(api: Asking, desk: FakeDesk, kind: type[Exception]) -> None:
    desk.refusal = kind("because")
    answer = await api.post(f"{ACCOUNTS}/support/reconnect")
    assert answer.status_code == 409
    assert answer.json()["message"] == "because"


async def test_removed_account_is_archived_unless_purged(api: Asking, desk: FakeDesk) -> None:
    answer = await api.client.delete(f"{ACCOUNTS}/support")
    assert (answer.status_code, answer.content) == (204, b"")
    await api.client.delete(f"{ACCOUNTS}/billing?purge=true")
    assert desk.purges == [False, True]
    assert (await api.client.delete(f"{ACCOUNTS}/support")).status_code == 404
    wrong = await api.client.delete(f"{ACCOUNTS}/support?purge=maybe")
    assert wrong.json()["message"].startswith("purge: ")


async def test_machine_that_does_not_answer_is_a_store_unavailable(
    instance: FakeInstance, desk: FakeDesk, autojump_clock: object
) -> None:
    desk.hangs = True
    async with asked_in_process(instance, settings(answer_s=3)) as api:
        answer = await api.get(f"{ACCOUNTS}/support")
    assert (answer.status_code, answer.json()["error"]) == (503, "store_unavailable")
