from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import pytest
import trio
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from daemon.loopback import LoopbackConnector, LoopbackWorld, loopback_router
from machine.ports import QrShown, SendRefused
from machine.refusals import Refusal
from tests.loopback.steps import ANNA, TO, expect_closed, logged_in, message_id, pair


@pytest.fixture
def app(world: LoopbackWorld) -> FastAPI:
    app = FastAPI()
    app.include_router(loopback_router(world))

    async def refuse(_request: Request, refusal: Exception) -> JSONResponse:
        assert isinstance(refusal, Refusal)
        return JSONResponse({"error": refusal.code}, 409)

    app.add_exception_handler(Refusal, refuse)
    return app


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://loopback") as client:
        yield client


async def test_a_qr_code_is_scanned_over_http(
    connector: LoopbackConnector, client: httpx.AsyncClient
) -> None:
    refused = await client.post("/api/loopback/scan/anna")
    assert (refused.status_code, refused.json()) == (409, {"error": "not_awaiting_scan"})
    async with connector.open_bridge() as bridge, bridge.open_connection(ANNA, None) as connection:
        assert isinstance(await connection.next_event(), QrShown)
        answer = await client.post("/api/loopback/scan/anna", json={"phone": "491701234567"})
    assert answer.json() == {"success": True, "accountId": "anna", "phone": "491701234567"}


async def test_messages_over_http(
    connector: LoopbackConnector, world: LoopbackWorld, client: httpx.AsyncClient
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            for number in (1, 1, 2):
                await connection.send_text(message_id(number), TO, f"text {number}")
            assert (await client.get("/api/loopback/connections")).json() == {
                "count": 1,
                "accounts": ["anna"],
            }
    answer = (await client.get("/api/loopback/messages")).json()
    first = answer["messages"][0]
    assert isinstance(first.pop("at"), float)
    assert first == {
        "sequence": 1,
        "accountId": "anna",
        "to": TO,
        "messageId": message_id(1),
        "text": "text 1",
    }
    assert [each["text"] for each in answer["messages"]] == ["text 1", "text 2"]
    assert (answer["next"], answer["more"], answer["dropped"]) == (3, False, 0)
    raw = (await client.get("/api/loopback/messages", params={"raw": "true"})).json()["messages"]
    assert [each["duplicate"] for each in raw] == [False, True, False]
    assert [each["readable"] for each in raw] == [True, True, True]
    query: dict[str, str | int] = {"accountId": "anna", "after": 1, "limit": 1}
    page = (await client.get("/api/loopback/messages", params=query)).json()
    assert [each["sequence"] for each in page["messages"]] == [3]
    other = (await client.get("/api/loopback/messages", params={"accountId": "bert"})).json()
    assert other["messages"] == []


async def test_commands_over_http(
    connector: LoopbackConnector, world: LoopbackWorld, client: httpx.AsyncClient
) -> None:
    told = {"accountId": "anna", "ackRefused": 463, "ackTimes": 1, "notOnWhatsapp": ["49000"]}
    answer = (await client.post("/api/loopback/behaviour", json=told)).json()
    assert {name: answer[name] for name in told} == told
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            with pytest.raises(SendRefused):
                await connection.send_text(message_id(1), TO, "x")
            answer = (await client.get("/api/loopback/behaviour?accountId=anna")).json()
            assert (answer["ackRefused"], answer["notOnWhatsapp"]) == (None, ["49000"])
            cut = await client.post("/api/loopback/cut/anna", json={"code": 402, "expireS": 5})
            assert cut.json() == {"success": True, "count": 1}
            assert (await expect_closed(connection)).expire_s == 5
        async with logged_in(bridge, keys) as connection:
            assert (await client.post("/api/loopback/unlink/anna")).json()["count"] == 1
            with trio.fail_after(1):
                assert (await expect_closed(connection)).code == 401
    await client.post("/api/loopback/behaviour", json={"accountId": "anna"})
    answer = (await client.get("/api/loopback/behaviour?accountId=anna")).json()
    assert answer["notOnWhatsapp"] == []
    assert (await client.get("/api/loopback/evictions")).json() == {"count": 0, "evictions": []}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("scan/anna", {"phone": "+49"}),
        ("scan/a%20b", {}),
        ("cut/anna", {"code": 999}),
        ("behaviour", {"ackRefused": 500}),
        ("behaviour", {"ackDelayS": -1}),
        ("behaviour", {"ackDelayS": False}),
        ("behaviour", {"ackTimes": "1"}),
        ("behaviour", {"ackDelay": 1}),
        ("behaviour", {"ackLost": True, "ackRefused": 463}),
    ],
)
async def test_a_wrong_field_is_refused(
    client: httpx.AsyncClient, path: str, body: dict[str, object]
) -> None:
    answer = await client.post(f"/api/loopback/{path}", json=body)
    assert answer.status_code == 422


async def test_every_route_is_documented(app: FastAPI) -> None:
    paths = app.openapi()["paths"]
    assert len(paths) == 9
    for operations in paths.values():
        for operation in operations.values():
            assert operation["description"]
