from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from daemon.http.models import NUMBER, NUMBER_CHARS_MAX, normal_number
from machine.records import MessageState
from machine.refusals import (
    AccountBanned,
    AccountNotPaired,
    AccountQuarantined,
    IdempotencyKeyReused,
    NotOnWhatsapp,
    OutboxFull,
    Refusal,
    StoreAway,
)
from tests.http.asking import Asking, asked_in_process
from tests.http.fakes import FakeDesk, FakeInstance, World, an_account, settings


@pytest.fixture
def world() -> World:
    world = World()
    world.add(an_account("support"))
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


async def test_send_answers_200_once_the_server_has_it(api: Asking, world: World) -> None:
    answer = await api.send()
    assert answer.status_code == 200
    sent = answer.json()
    assert sent == {"success": True, "messageId": sent["messageId"], "status": "server_ack"}
    assert world.messages[sent["messageId"]].to == "491512345"


async def test_send_says_server_ack_also_when_a_receipt_came_in_first(
    api: Asking, desk: FakeDesk
) -> None:
    desk.ends_as = MessageState.DELIVERED
    answer = await api.send()
    assert (answer.status_code, answer.json()["status"]) == (200, "server_ack")


async def test_send_answers_202_while_it_is_only_durable(
    instance: FakeInstance, desk: FakeDesk, autojump_clock: object
) -> None:
    desk.acks = False
    async with asked_in_process(instance, settings(send_wait_s=5.0)) as api:
        before = trio.current_time()
        answer = await api.send()
    assert trio.current_time() - before == pytest.approx(5.0, abs=0.1)
    assert (answer.status_code, answer.json()["status"]) == (202, "sending")


async def test_send_stays_202_when_the_term_ends_after_it_was_accepted(
    world: World, instance: FakeInstance, desk: FakeDesk, autojump_clock: object
) -> None:
    desk.acks = False
    async with (
        asked_in_process(instance, settings(send_wait_s=5.0)) as api,
        trio.open_nursery() as nursery,
    ):

        async def end_soon() -> None:
            await trio.sleep(1)
            world.activate(None)

        nursery.start_soon(end_soon)
        answer = await api.send()
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    assert len(world.messages) == 1


@pytest.mark.parametrize(
    ("reason", "code"),
    [("not_on_whatsapp", "not_on_whatsapp"), ("463: account restricted", "message_failed")],
)
async def test_failed_message_is_a_422_with_its_reason(
    api: Asking, desk: FakeDesk, reason: str, code: str
) -> None:
    desk.ends_as, desk.failure = MessageState.FAILED, reason
    answer = await api.send()
    assert (answer.status_code, answer.json()["error"]) == (422, code)
    assert reason in answer.json()["message"]


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (AccountNotPaired, 409),
        (AccountQuarantined, 409),
        (AccountBanned, 409),
        (IdempotencyKeyReused, 409),
        (NotOnWhatsapp, 422),
        (OutboxFull, 429),
        (StoreAway, 503),
    ],
)
async def test_refused_send_has_its_code_and_sentence(
    api: Asking, desk: FakeDesk, kind: type[Refusal], status: int
) -> None:
    desk.refusal = kind("because of this", retry_after_s=6.2)
    answer = await api.send()
    assert (answer.status_code, answer.json()["error"]) == (status, kind.code)
    assert answer.json()["message"] == "because of this"
    assert answer.headers["retry-after"] == "7"


async def test_send_from_an_unknown_account_is_404(api: Asking) -> None:
    answer = await api.send(accountId="nobody")
    assert (answer.status_code, answer.json()["error"]) == (404, "account_not_found")


@pytest.mark.parametrize(
    ("to", "digits"),
    [
        ("+49 151 234-567", "49151234567"),
        ("12345", "12345"),
        ("49151234567@s.whatsapp.net", "49151234567"),
        ("1" * 20, "1" * 20),
    ],
)
async def test_recipient_is_normalised(api: Asking, world: World, to: str, digits: str) -> None:
    sent = (await api.send(to=to)).json()
    assert world.messages[sent["messageId"]].to == digits


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"to": ""}, "to"),
        ({"to": "1234"}, "to"),
        ({"to": "1" * 21}, "to"),
        ({"to": "++4915123"}, "to"),
        ({"to": "٤٩١٥١٢٣"}, "to"),
        ({"to": 4915123}, "to"),
        ({"to": "120363@g.us"}, "to"),
        ({"to": "12345@evil.example"}, "to"),
        ({"message": ""}, "message"),
        ({"message": " \n"}, "message"),
        ({"message": "x" * 65_537}, "message"),
        ({"message": None}, "message"),
        ({"accountId": "../etc"}, "accountId"),
        ({"text": "what is this"}, "text"),
    ],
)
async def test_wrong_field_is_named_and_never_repeated(
    api: Asking, desk: FakeDesk, changes: dict[str, object], field: str
) -> None:
    answer = await api.send(**changes)
    assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
    assert answer.json()["message"].startswith(f"{field}: ")
    assert "what is this" not in answer.text
    assert desk.calls == []


async def test_longest_text_is_accepted(api: Asking, world: World) -> None:
    assert (await api.send(message="x" * 65_536)).status_code == 200


async def test_same_key_and_body_is_the_same_message(api: Asking, world: World) -> None:
    first = await api.send(headers={"idempotency-key": "order 17"})
    again = await api.send(headers={"idempotency-key": "order 17"})
    other = await api.send(headers={"idempotency-key": "order 18"})
    assert first.json()["messageId"] == again.json()["messageId"] == "KEY-support-order_17"
    assert other.json()["messageId"] != first.json()["messageId"]
    reused = await api.send(headers={"idempotency-key": "order 17"}, message="Another")
    assert (reused.status_code, reused.json()["error"]) == (409, "idempotency_key_reused")


@pytest.mark.parametrize("key", ["", "x" * 256, b"\xff\xfe"])
async def test_unusable_idempotency_key_is_refused(
    api: Asking, desk: FakeDesk, key: str | bytes
) -> None:
    answer = await api.send(headers={"idempotency-key": key})
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("Idempotency-Key: ")
    assert desk.calls == []


async def test_internal_headers_of_an_outsider_count_for_nothing(api: Asking, world: World) -> None:
    await api.send(headers={"x-watchkeeper-message-id": "CHOSEN-BY-A-CALLER"})
    assert "CHOSEN-BY-A-CALLER" not in world.messages


async def test_message_tells_its_progress_and_not_its_text(api: Asking) -> None:
    message_id = (await api.send(message="private words")).json()["messageId"]
    answer = await api.get(f"/api/whatsapp/messages/{message_id}")
    assert answer.json() == {
        "success": True,
        "messageId": message_id,
        "accountId": "support",
        "to": "491512345",
        "status": "server_ack",
        "error": None,
        "attempts": 0,
        "createdAt": "2025-01-31T12:00:00.000Z",
        "updatedAt": "2025-01-31T12:00:00.000Z",
        "timestamps": {
            "queued": "2025-01-31T12:00:00.000Z",
            "server_ack": "2025-01-31T12:00:00.000Z",
        },
    }
    missing = await api.get("/api/whatsapp/messages/3EB0UNKNOWN")
    assert (missing.status_code, missing.json()["error"]) == (404, "message_not_found")


numbers = st.one_of(
    st.text(),
    st.text("0123456789 +-().\u00a0\u2011@s\n", max_size=70),
    st.from_regex(NUMBER),
    st.from_regex(r"\A\+?[0-9]{4,21}(@s\.whatsapp\.net|@g\.us)?\Z"),
)


@given(numbers)
def test_the_document_says_exactly_which_numbers_are_taken(number: str) -> None:
    taken = None
    with suppress(ValueError):
        taken = normal_number(number)
    documented = re.search(NUMBER.removesuffix("$") + r"\Z", number) is not None
    assert (taken is not None) == (documented and len(number) <= NUMBER_CHARS_MAX)
    assert taken is None or (isinstance(taken, str) and re.fullmatch("[0-9]{5,20}", taken))
