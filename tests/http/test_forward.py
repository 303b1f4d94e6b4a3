"""Forwarding between real servers on real sockets."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import httpx
import pytest
import trio

from daemon.http.edge import Answer, Inbound
from daemon.http.links import NOT_STARTED, UNKNOWN, HolderLink, Outcome, open_links
from daemon.http.ports import ApiSettings
from machine.refusals import OutboxFull
from machine.states import State
from machine.views import Holder
from tests.http.asking import Served, served, talking_to
from tests.http.fakes import TOKEN, FakeInstance, Notes, World, an_account, settings

QUICK = settings(stop_s=0.3, handoff_wait_s=5, hello_s=0.2, hello_first_s=0.1, peer_ttl_s=1)


@asynccontextmanager
async def group(
    *names: str, given: ApiSettings = QUICK
) -> AsyncIterator[tuple[World, list[FakeInstance], list[Served]]]:
    world = World()
    world.add(an_account("support"))
    instances = [FakeInstance(world, name) for name in names]
    async with AsyncExitStack() as stack:
        running = [await stack.enter_async_context(served(one, given)) for one in instances]
        yield world, instances, running


async def playing(
    play: Callable[[trio.SocketStream], Awaitable[None]], nursery: trio.Nursery
) -> str:
    """Listen, and let `play` treat each caller; where to reach it."""
    listeners = await nursery.start(partial(trio.serve_tcp, play, 0, host="127.0.0.1"))
    return f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"


async def send(client: httpx.AsyncClient, **changes: object) -> httpx.Response:
    content = {"accountId": "support", "to": "+49 151 2345", "message": "Hello", **changes}
    return await client.post("/api/whatsapp/send-message", json=content)


async def test_standby_forwards_and_says_who_answered() -> None:
    async with group("a", "b") as (world, (a, _), (_, b_api)), talking_to(b_api.url) as client:
        world.activate(a)
        answer = await send(client)
        assert answer.status_code == 200
        assert answer.headers["x-watchkeeper-instance"] == "b"
        assert answer.headers["x-watchkeeper-state"] == "PASSIVE"
        assert answer.headers["x-watchkeeper-served-by"] == "a"
        assert world.delivered == [answer.json()["messageId"]]


async def test_what_a_later_release_forwards_in_a_newer_format_is_refused_and_not_guessed_at() -> (
    None
):
    async with group("a") as (world, (a,), (a_api,)), talking_to(a_api.url) as client:
        world.activate(a)
        client.headers["x-watchkeeper-forwarded-by"] = "b"
        client.headers["x-watchkeeper-forwarded-format"] = "1"
        assert (await send(client)).status_code == 200
        for said in ("2", "two"):
            client.headers["x-watchkeeper-forwarded-format"] = said
            refused = await send(client)
            assert (refused.status_code, refused.json()["error"]) == (503, "not_active")
            assert "earlier release" in refused.json()["message"]
        assert len(world.delivered) == 1


async def test_what_a_later_standby_tells_in_addition_is_overlooked() -> None:
    async with group("a") as (world, (a,), (a_api,)), talking_to(a_api.url) as client:
        world.activate(a)
        hello = {"id": "b", "incarnation": "5f", "state": "PASSIVE", "address": "http://b:1"}
        told = {**hello, "version": "9.0", "capacity": 7}
        answer = await client.post("/api/internal/hello", json=told)
        assert [peer["version"] for peer in answer.json()["peers"]][-1:] == ["9.0"]


async def test_answers_come_through_unchanged() -> None:
    async with group("a", "b") as (world, (a, _), (a_api, b_api)):
        world.activate(a)
        assert a.desk is not None
        async with talking_to(a_api.url) as direct, talking_to(b_api.url) as forwarded:
            for path in (
                "/api/whatsapp/accounts",
                "/api/whatsapp/accounts/nobody",
                "/api/whatsapp/accounts/support/qr?format=png",
                "/api/whatsapp/messages/3EB0UNKNOWN",
            ):
                one, other = await direct.get(path), await forwarded.get(path)
                assert one.status_code == other.status_code
                assert one.headers["content-type"] == other.headers["content-type"]
                if one.status_code == 200:
                    assert one.content == other.content
            deleted = await forwarded.delete("/api/whatsapp/accounts/support")
            assert (deleted.status_code, deleted.content) == (204, b"")
            a.desk.refusal = OutboxFull("wait a little", retry_after_s=9)
            refused = await send(forwarded)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "9")
            assert refused.json()["requestId"] == refused.headers["x-request-id"]


async def test_holder_changes_under_load_and_no_request_fails() -> None:
    async with group("a", "b", "c") as (world, (a, b, c), apis):
        world.activate(a)
        statuses: list[int] = []
        sent: list[str] = []
        stop = trio.Event()

        async def keep_sending(url: str) -> None:
            async with talking_to(url) as client:
                while not stop.is_set():
                    answer = await send(client)
                    statuses.append(answer.status_code)
                    sent.append(answer.json()["messageId"])
                    await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            for api in apis:
                nursery.start_soon(keep_sending, api.url)
                nursery.start_soon(keep_sending, api.url)
            with trio.fail_after(60):
                for chosen in (b, None, c, a, None, b):
                    world.activate(chosen)
                    answered = len(statuses)
                    # Each holder answers some; without one, everyone comes to wait.
                    while chosen is not None and len(statuses) < answered + 6:
                        await trio.sleep(0.01)
                    await trio.sleep(0.1)
            stop.set()
        assert {message.epoch for message in world.messages.values()} >= {2, 4, 5, 7}
        assert set(statuses) <= {200, 202}
        assert len(set(sent)) == len(sent)
        # Accepted exactly once each, wherever it went: no retry made a second message.
        assert set(world.messages) == set(sent)


async def test_dead_address_is_left_for_the_next_holder() -> None:
    async with group("a", "b") as (world, (a, b), (_, b_api)), talking_to(b_api.url) as client:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        a.at(f"http://127.0.0.1:{port}")
        world.activate(a)
        async with trio.open_nursery() as nursery:

            async def take_over() -> None:
                await trio.sleep(0.4)
                world.activate(b)

            nursery.start_soon(take_over)
            answer = await send(client)
        assert answer.status_code == 200
        assert "x-watchkeeper-served-by" not in answer.headers


async def test_holder_that_cuts_the_connection_gets_no_second_mutation() -> None:
    asked: list[bytes] = []

    async def cut(stream: trio.SocketStream) -> None:
        asked.append(bytes(await stream.receive_some(65536)))
        await stream.aclose()

    async with (
        group("a", "b") as (world, (a, b), (_, b_api)),
        talking_to(b_api.url) as client,
        trio.open_nursery() as nursery,
    ):
        a.at(await playing(cut, nursery))
        world.activate(a)
        answer = await client.post("/api/whatsapp/accounts/support/repair")
        assert (answer.status_code, answer.json()["error"]) == (504, "holder_unreachable")
        assert len(asked) == 1

        async def take_over() -> None:
            await trio.sleep(0.6)
            world.activate(b)

        nursery.start_soon(take_over)
        assert (await send(client)).status_code == 200
        nursery.cancel_scope.cancel()
    # The send was tried again and again under one id, until the next holder took it.
    ids = {line for try_ in asked[1:] for line in try_.split(b"\r\n") if b"message-id" in line}
    assert len(asked) > 2
    assert len(ids) == 1
    assert [f"x-watchkeeper-message-id: {one}".encode() for one in world.delivered] == list(ids)


async def test_two_standbys_that_take_each_other_for_the_holder_do_not_loop() -> None:
    given = settings(stop_s=0.3, handoff_wait_s=2.5)
    async with group("a", "b", given=given) as (world, (a, b), (a_api, _)):
        a.holder = Holder("b", b.identity.incarnation, b.identity.address, 1)
        b.holder = Holder("a", a.identity.incarnation, a.identity.address, 1)
        async with talking_to(a_api.url) as client:
            answer = await client.get("/api/whatsapp/accounts/support")
        assert (answer.status_code, answer.json()["error"]) == (503, "no_active_instance")
        assert world.messages == {}


async def test_wrong_token_is_refused_before_it_is_forwarded() -> None:
    async with group("a", "b") as (world, (a, _), (_, b_api)), talking_to(b_api.url) as client:
        world.activate(a)
        client.headers["authorization"] = "Bearer not-the-token"
        assert (await send(client)).status_code == 401
        assert a.desk is not None
        assert a.desk.calls == []


async def test_standby_shows_the_holders_accounts_and_peers() -> None:
    async with group("a", "b", "c") as (world, (a, b, _), (a_api, b_api, _)):
        world.activate(a)
        async with talking_to(b_api.url) as at_b, talking_to(a_api.url) as at_a:
            shown = (await at_b.get("/api/status/dashboard")).json()
            assert (shown["instance"]["id"], shown["accountsFrom"]) == ("b", "holder")
            assert [account["inMemory"] for account in shown["accounts"]] == [True]
            with trio.fail_after(5):
                while [p["id"] for p in shown["peers"]] != ["a", "c"]:
                    await trio.sleep(0.05)
                    shown = (await at_b.get("/api/status/dashboard")).json()
            peers = (await at_a.get("/api/status/dashboard")).json()["peers"]
            assert [(p["id"], p["state"]) for p in peers] == [("b", "PASSIVE"), ("c", "PASSIVE")]
            # A standby on its way out says so, and is no standby any more.
            b.state = State.DRAINING
            b.changed()
            with trio.fail_after(5):
                while ("b", "DRAINING") not in [(p["id"], p["state"]) for p in peers]:
                    await trio.sleep(0.05)
                    peers = (await at_a.get("/api/status/dashboard")).json()["peers"]
            # When the holder goes, those left still know each other.
            world.activate(None)
            peers = (await at_b.get("/api/status/dashboard")).json()["peers"]
            assert "c" in [p["id"] for p in peers]


async def test_step_down_is_forwarded_to_the_holder() -> None:
    async with group("a", "b") as (world, (a, _), (_, b_api)), talking_to(b_api.url) as client:
        world.activate(a)
        answer = await client.post("/api/admin/step-down", json={"reason": "x", "force": True})
        assert answer.status_code == 202
        assert (answer.json()["instance"], a.step_downs) == ("a", [("x", None)])
        drained = await client.post("/api/admin/drain", json={"reason": "end b"})
        assert (drained.json()["instance"], a.drains) == ("b", [])


async def test_token_and_text_reach_no_log_between_instances(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    # Below WARNING the client libraries log every header they get, but none that they send.
    async with group("a", "b") as (world, (a, _), (a_api, b_api)), talking_to(b_api.url) as client:
        world.activate(a)
        await send(client, message="private words")
        told = f"{caplog.text}{a_api.notes.said}{b_api.notes.said}"
    assert TOKEN not in told
    assert "private words" not in told


# --- one try


def a_request(path: str = "/api/whatsapp/accounts/support", method: str = "GET") -> Inbound:
    return Inbound(request_id="r", method=method, path=path, query=b"", headers=[])


async def one_try(address: str, inbound: Inbound, **changes: object) -> Answer | Outcome:
    given = settings(**changes)
    async with open_links(given) as links:
        link = HolderLink(FakeInstance(World(), "a"), given, links, Notes())
        return await link.ask(inbound, Holder("b", "b-incarnation", address, 1))


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:1", "ftp://127.0.0.1", "http://[::1", "", "nonsense"]
)
async def test_unusable_address_means_not_started(address: str) -> None:
    assert await one_try(address, a_request()) is NOT_STARTED


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ncut", UNKNOWN),
        (b"no HTTP at all\r\n\r\n", UNKNOWN),
        (b"", UNKNOWN),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2000\r\n\r\n" + b"x" * 2000, UNKNOWN),
        (
            b'HTTP/1.1 503 No\r\ncontent-length: 33\r\n\r\n{"error":"not_active","x":"yyyy"}',
            NOT_STARTED,
        ),
        (
            b'HTTP/1.1 504 No\r\ncontent-length: 30\r\n\r\n{"error":"holder_unreachable"}',
            UNKNOWN,
        ),
        (
            b"HTTP/1.1 503 No\r\ncontent-length: 12\r\n\r\n<html></html",
            Answer(503, [(b"content-length", b"12")], b"<html></html"),
        ),
    ],
)
async def test_what_a_try_means(answer: bytes, outcome: Answer | Outcome) -> None:
    async def play(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        await stream.send_all(answer)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        found = await one_try(await playing(play, nursery), a_request(), answer_bytes_max=1000)
        nursery.cancel_scope.cancel()
    assert found == outcome


async def test_silent_holder_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        began = trio.current_time()
        found = await one_try(
            f"http://127.0.0.1:{port}", a_request(), holder_answer_s=0.2, answer_s=0.1
        )
    assert found is UNKNOWN
    assert trio.current_time() - began < 2
