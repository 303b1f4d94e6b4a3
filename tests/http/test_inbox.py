from __future__ import annotations

import pytest

from machine.inbox import make_cursor
from machine.records import AccountId, InboundMessage, InboxPlace, MessageId
from tests.http.asking import asked_in_process
from tests.http.fakes import NOW, FakeInstance, World, an_account

INBOX = "/api/whatsapp/messages"


def received(number: int, account_id: str = "support") -> InboundMessage:
    return InboundMessage(
        AccountId(account_id),
        MessageId(f"3A{number}"),
        chat="4915123456789",
        sender="4915123456789",
        sender_name=None if number % 2 else "Zoë",
        text=f"text {number} 🙂",
        sent_at=NOW,
        received_at=NOW + 1.5,
    )


@pytest.fixture
def world() -> World:
    world = World()
    world.add(an_account("support"), an_account("sales"))
    world.received = [received(0), received(1), received(7, "sales"), received(2)]
    return world


async def test_received_messages_are_told_in_order_with_a_cursor_that_reads_on(
    world: World,
) -> None:
    async with asked_in_process(FakeInstance(world)) as api:
        asked = {"accountId": "support", "direction": "in", "limit": "2"}
        first = (await api.get(INBOX, params=asked)).json()
        assert first["messages"][0] == {
            "accountId": "support",
            "messageId": "3A0",
            "chat": "4915123456789",
            "from": "4915123456789",
            "fromName": "Zoë",
            "text": "text 0 🙂",
            "sentAt": "2025-01-31T12:00:00.000Z",
            "receivedAt": "2025-01-31T12:00:01.500Z",
        }
        assert [each["messageId"] for each in first["messages"]] == ["3A0", "3A1"]
        assert first["more"] is True
        rest = (await api.get(INBOX, params={**asked, "cursor": first["cursor"]})).json()
        assert [each["messageId"] for each in rest["messages"]] == ["3A2"]
        assert rest["more"] is False
        end = (await api.get(INBOX, params={**asked, "cursor": rest["cursor"]})).json()
        assert end == {"success": True, "messages": [], "cursor": rest["cursor"], "more": False}


async def test_an_instance_without_the_lease_answers_from_the_store_by_itself(
    world: World,
) -> None:
    standby = FakeInstance(world, "b")
    world.activate(FakeInstance(world, "a"))
    async with asked_in_process(standby) as api:
        answer = await api.get(INBOX, params={"accountId": "support"})
        assert answer.status_code == 200
        assert answer.headers["x-watchkeeper-instance"] == "b"
        assert "x-watchkeeper-served-by" not in answer.headers
        assert len(answer.json()["messages"]) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"accountId": "support", "cursor": "not a cursor"},
        {"accountId": "support", "cursor": make_cursor(InboxPlace(1, 2, 3)) + "!"},
        {"accountId": "support", "limit": "0"},
        {"accountId": "support", "limit": "101"},
        {"accountId": "support", "direction": "out"},
        {"accountId": "no/such"},
        {},
    ],
)
async def test_what_cannot_be_asked_is_refused_with_the_field_named(
    world: World, wrong: dict[str, str]
) -> None:
    async with asked_in_process(FakeInstance(world)) as api:
        answer = await api.get(INBOX, params=wrong)
        assert (answer.status_code, answer.json()["error"]) == (400, "invalid_request")
        named = next(iter(set(wrong) - {"accountId"}), "accountId")
        assert named in answer.json()["message"]


async def test_an_unknown_account_and_a_store_that_is_away_are_told_apart(world: World) -> None:
    async with asked_in_process(FakeInstance(world)) as api:
        answer = await api.get(INBOX, params={"accountId": "nobody"})
        assert (answer.status_code, answer.json()["error"]) == (404, "account_not_found")
        world.away = True
        answer = await api.get(INBOX, params={"accountId": "support"})
        assert (answer.status_code, answer.json()["error"]) == (503, "store_unavailable")
