"""The server on real sockets: limits, slow and broken callers, and the end."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from daemon.http.app import serve_api, serve_metrics
from daemon.http.closing import Closing
from daemon.http.server import (
    LAST_CALL_S,
    BindFailed,
    ConnectionLimits,
    Server,
    affordable_connections,
    bind_http,
    raise_files_limit,
)
from machine.states import State
from machine.views import Holder
from tests.http.asking import HOLD_CONNECTIONS, served, talking_to
from tests.http.fakes import (
    TOKEN,
    FakeInstance,
    Notes,
    World,
    an_account,
    make_message_id,
    settings,
)

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

GET = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
H2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@pytest.fixture
def instance() -> FakeInstance:
    return FakeInstance(World())


async def connect(url: str) -> trio.SocketStream:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return await trio.open_tcp_stream(host, int(port))


async def read_all(stream: trio.SocketStream) -> bytes:
    parts = []
    while part := await stream.receive_some(65536):
        parts.append(part)
    return b"".join(parts)


async def read_answer(stream: trio.SocketStream) -> bytes:
    """One answer with a Content-Length, as far as it comes."""
    head, found = b"", b""
    length: int | None = None
    while length is None or len(found) < length:
        part = await stream.receive_some(65536)
        assert part, f"the connection ended after {head + found!r}"
        found += part
        if length is None and b"\r\n\r\n" in found:
            head, _, found = found.partition(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            length = next(int(x.split(b":")[1]) for x in lines if x.startswith(b"content-length"))
    return head + b"\r\n\r\n" + found


# --- binding


async def test_busy_port_is_a_clear_error() -> None:
    taken = bind_http("127.0.0.1:0")
    with pytest.raises(BindFailed, match=rf"127.0.0.1:{taken.port} is in use.*HTTP_BIND"):
        bind_http(f"127.0.0.1:{taken.port}")
    taken.close()


@pytest.mark.parametrize("bind", ["", "8080", ":8080", "127.0.0.1:http", "127.0.0.1:70000"])
async def test_unusable_address_is_a_clear_error(bind: str) -> None:
    with pytest.raises(BindFailed, match="host:port"):
        bind_http(bind)


async def test_unknown_host_is_a_clear_error() -> None:
    with pytest.raises(BindFailed, match="cannot be resolved"):
        bind_http("no-such-host.invalid:8080")


async def test_port_zero_takes_a_free_one_and_says_which() -> None:
    listening = bind_http("127.0.0.1:0")
    assert listening.address == f"http://127.0.0.1:{listening.port}"
    assert listening.port > 0
    listening.close()
    listening.close()


def test_connections_leave_open_files_for_the_rest() -> None:
    assert affordable_connections(12_000, 20_000) == 12_000
    assert affordable_connections(12_000, 1024) == 512
    assert affordable_connections(12_000, 256) == 1
    assert affordable_connections(12_000, resource.RLIM_INFINITY) == 12_000


def test_open_files_limit_is_raised_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1000), hard))
        assert raise_files_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# --- callers


async def test_http2_with_prior_knowledge_is_spoken(instance: FakeInstance) -> None:
    async with served(instance) as api, await connect(api.url) as stream:
        await stream.send_all(H2_PREFACE)
        frame = await stream.receive_some(9)
    assert frame[3] == 4  # the server's SETTINGS frame


async def test_many_idle_connections_do_not_keep_others_out(instance: FakeInstance) -> None:
    await _hold_connections(instance, 1000)


@pytest.mark.long
async def test_ten_thousand_idle_connections(instance: FakeInstance) -> None:
    files = raise_files_limit()
    if files < 11_000:
        pytest.skip(f"needs 11,000 open files, {files} are allowed")
    await _hold_connections(instance, 10_000)


async def _hold_connections(instance: FakeInstance, count: int) -> None:
    """Let another process open `count` connections and hold them, while we ask for something."""
    given = settings(keep_alive_s=120, stop_s=0.3, connections_max=12_000)
    async with served(instance, given) as api, trio.open_nursery() as nursery:
        port = api.url.rpartition(":")[2]
        command = [sys.executable, "-c", HOLD_CONNECTIONS, port, str(count)]
        start = partial(
            trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False
        )
        holder: trio.Process = await nursery.start(start)
        assert holder.stdout is not None
        assert holder.stdin is not None
        with trio.fail_after(60):
            assert await holder.stdout.receive_some(100) == f"{count}\n".encode()
        async with talking_to(api.url) as client:
            with trio.fail_after(10):
                assert (await client.get("/livez")).status_code == 200
        await holder.stdin.aclose()
        assert api.notes.names() == ["http.opened"]


async def test_connections_over_the_limit_are_told_so(instance: FakeInstance) -> None:
    given = settings(connections_max=3, stop_s=0.3)
    async with served(instance, given) as api:
        held = [await connect(api.url) for _ in range(3)]
        for stream in held:
            await stream.send_all(GET)
            assert (await read_answer(stream)).startswith(b"HTTP/1.1 200")
        for _ in range(5):
            async with await connect(api.url) as stream:
                await stream.send_all(GET)
                head, _, body = (await read_all(stream)).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 503")
            assert b"retry-after: 5" in head
            assert json.loads(body)["error"] == "too_many_connections"
        assert api.notes.names().count("http.connections_full") == 1
        for stream in held:
            await stream.aclose()
        with trio.fail_after(5):
            while True:
                async with await connect(api.url) as stream:
                    await stream.send_all(GET)
                    if (await read_answer(stream)).startswith(b"HTTP/1.1 200"):
                        break


async def test_caller_without_a_request_is_closed_in_time(instance: FakeInstance) -> None:
    async with served(instance, settings(keep_alive_s=0.3, stop_s=0.3)) as api:
        for begun in (b"", b"GET /livez HTTP/1.1\r\nhost"):
            async with await connect(api.url) as stream:
                await stream.send_all(begun)
                with trio.fail_after(3):
                    assert await read_all(stream) == b""


async def test_oversized_headers_are_refused(instance: FakeInstance) -> None:
    async with served(instance) as api, await connect(api.url) as stream:
        await stream.send_all(b"GET /livez HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 40_000)
        answer = await stream.receive_some(1000)
    assert answer.startswith(b"HTTP/1.1 431")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET \xff\xfe HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 500,
        b"GET /livez HTTP/1.1\r\nhost: x\r\ncontent-length: -5\r\n\r\n",
        (
            b"GET /ws HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
        ),
        b"\r\n" * 5000,
    ],
)
async def test_garbage_ends_its_own_connection_only(instance: FakeInstance, garbage: bytes) -> None:
    async with served(instance, settings(keep_alive_s=0.3, stop_s=0.3)) as api:
        async with await connect(api.url) as stream:
            await stream.send_all(garbage)
            with trio.fail_after(5):
                with suppress(trio.BrokenResourceError):
                    await read_all(stream)
        async with talking_to(api.url) as client:
            assert (await client.get("/livez")).status_code == 200


async def test_body_over_the_limit_is_refused_unread_and_seen(instance: FakeInstance) -> None:
    head = (
        b"POST /api/whatsapp/send-message HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
        + TOKEN.encode()
    )
    async with served(instance) as api:
        # Said beforehand: answered before a byte of it came.
        async with await connect(api.url) as stream:
            await stream.send_all(head + b"\r\ncontent-length: 900000000\r\n\r\n")
            with trio.fail_after(3):
                assert (await read_answer(stream)).startswith(b"HTTP/1.1 413")
        # Not said: answered once it is too much, and the caller who goes on sending sees it.
        async with await connect(api.url) as stream:
            await stream.send_all(head + b"\r\ntransfer-encoding: chunked\r\n\r\n")
            for _ in range(30):
                await stream.send_all(b"10000\r\n" + b"x" * 65536 + b"\r\n")
            with trio.fail_after(3):
                assert (await read_answer(stream)).startswith(b"HTTP/1.1 413")


# --- one server without the API


@asynccontextmanager
async def serving(
    app: Callable[[Any, Receive, Send], Awaitable[None]], **limits: float
) -> AsyncIterator[tuple[str, Notes, trio.Event]]:
    notes, shutdown = Notes(), trio.Event()
    given = ConnectionLimits(
        connections_max=100,
        keep_alive_s=limits.get("keep_alive_s", 5),
        send_s=limits.get("send_s", 5),
        stop_s=limits.get("stop_s", 2),
    )
    listening = bind_http("127.0.0.1:0")
    server = Server(app, given, notes)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(server.serve, listening, shutdown=shutdown, closing=Closing()))
        yield listening.address, notes, shutdown
        shutdown.set()


def answering(body: bytes, wait: trio.Event | None = None, begun: trio.Event | None = None) -> Any:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        if begun is not None:
            begun.set()
        if wait is not None:
            await wait.wait()
        length = (b"content-length", str(len(body)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [length]})
        await send({"type": "http.response.body", "body": body})

    return app


async def test_caller_who_takes_no_bytes_does_not_keep_the_server_from_ending() -> None:
    # Hypercorn's sends are shielded: without our deadline this would never end.
    with trio.fail_after(4):
        async with serving(answering(b"x" * 50_000_000), send_s=0.3, stop_s=1) as (url, _, _):
            stream = await connect(url)
            await stream.send_all(GET)
            await stream.receive_some(100)
    await stream.aclose()


async def test_http2_caller_without_a_request_is_closed_in_time(instance: FakeInstance) -> None:
    given = settings(keep_alive_s=0.3, stop_s=0.3)
    async with served(instance, given) as api, await connect(api.url) as stream:
        await stream.send_all(H2_PREFACE)
        with trio.fail_after(3):
            await read_all(stream)


async def test_caller_who_hangs_up_amid_an_answer_is_no_error_of_ours(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(200):
            await send({"type": "http.response.body", "body": b"x", "more_body": True})

    post = b"POST /livez HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\n"
    async with serving(app) as (url, notes, _):
        for _ in range(20):
            async with await connect(url) as stream:
                await stream.send_all(post)
                await stream.receive_some(10)
                await stream.send_eof()
                with suppress(trio.BrokenResourceError):
                    await read_all(stream)
    assert "http.connection_failed" not in notes.names()
    assert caplog.messages == []


async def test_slow_reader_who_goes_on_reading_gets_everything() -> None:
    size = 3_000_000
    async with serving(answering(b"x" * size), send_s=0.5) as (url, _, _):
        stream = await connect(url)
        await stream.send_all(GET)
        got = 0
        while got < size:
            got += len(await stream.receive_some(100_000))
            await trio.sleep(0.01)
        await stream.aclose()


async def test_request_in_flight_finishes_at_shutdown_and_new_callers_are_refused() -> None:
    go, begun = trio.Event(), trio.Event()
    async with serving(answering(b"done", go, begun)) as (url, notes, shutdown):
        stream = await connect(url)
        await stream.send_all(GET)
        await begun.wait()
        shutdown.set()
        with trio.fail_after(3):
            while True:
                try:
                    await (await connect(url)).aclose()
                except OSError:
                    break
                await trio.sleep(0.01)
        go.set()
        assert (await read_answer(stream)).endswith(b"done")
        await stream.aclose()
    assert notes.names() == []


async def test_stuck_request_is_cut_off_after_its_time() -> None:
    begun = trio.Event()
    async with serving(answering(b"", trio.Event(), begun), stop_s=0.2) as (url, notes, shutdown):
        stream = await connect(url)
        await stream.send_all(GET)
        await begun.wait()
        shutdown.set()
        with trio.fail_after(3):
            assert await stream.receive_some(100) == b""
        await stream.aclose()
    assert notes.said == [("http.closed", {"in_flight": 1})]


async def test_callers_in_the_backlog_are_served_at_shutdown() -> None:
    async with serving(answering(b"served")) as (url, _, shutdown):
        await trio.testing.wait_all_tasks_blocked()
        # All in one instant: the server learns of the shutdown before it can accept them all.
        shutdown.set()
        host, _, port = url.removeprefix("http://").rpartition(":")
        callers = [socket.create_connection((host, int(port))) for _ in range(20)]
        streams = [trio.SocketStream(trio.socket.from_stdlib_socket(one)) for one in callers]
        for stream in streams:
            await stream.send_all(GET)
        for stream in streams:
            assert (await read_answer(stream)).endswith(b"served")
            await stream.aclose()


async def test_caller_who_has_connected_may_take_a_moment_to_ask_at_shutdown() -> None:
    async with serving(answering(b"served"), stop_s=6) as (url, notes, shutdown):
        stream = await connect(url)
        # Taken in, and not merely in the backlog.
        other = await connect(url)
        await other.send_all(GET)
        await read_answer(other)
        shutdown.set()
        await trio.sleep(3 * LAST_CALL_S)
        await stream.send_all(GET)
        assert (await read_answer(stream)).endswith(b"served")
        for one in (stream, other):
            await one.aclose()
    assert notes.names() == []


async def test_caller_who_never_asks_does_not_keep_the_server_from_ending() -> None:
    with trio.fail_after(4):
        async with serving(answering(b"served"), stop_s=0.4) as (url, notes, shutdown):
            stream = await connect(url)
            await trio.testing.wait_all_tasks_blocked(0.05)
            shutdown.set()
            assert await stream.receive_some(100) == b""
            await stream.aclose()
    # It was closed as idle: nothing was cut off.
    assert notes.names() == []


async def test_request_that_a_holder_never_answers_is_answered_before_the_end(
    instance: FakeInstance,
) -> None:
    asked = trio.Event()

    async def take_and_keep(stream: trio.SocketStream) -> None:
        while await stream.receive_some(65536):
            asked.set()

    given = settings(stop_s=4.0, handoff_wait_s=60, holder_answer_s=60)
    async with trio.open_nursery() as holding:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        holding.start_soon(trio.serve_listeners, take_and_keep, listeners)
        async with served(instance, given) as api, talking_to(api.url) as client:
            instance.holder = Holder("b", "b-1", f"http://127.0.0.1:{port}", 2)

            async def end() -> None:
                await asked.wait()
                instance.state = State.DRAINING
                api.shutdown.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(end)
                with trio.fail_after(30):
                    answer = await client.post(
                        "/api/whatsapp/send-message",
                        json={"accountId": "x", "to": "49151", "message": "on its way"},
                    )
            assert answer.json()["error"] == "holder_unreachable"
            with trio.fail_after(30):
                await api.ended.wait()
        holding.cancel_scope.cancel()


async def test_bug_in_the_application_ends_its_own_request_only() -> None:
    calls = 0

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise ExceptionGroup("several", [ValueError("secret"), KeyError("x")])
        await answering(b"fine")(scope, receive, send)

    async with serving(app) as (url, _, _):
        for expected in (b"HTTP/1.1 500", b"HTTP/1.1 200"):
            stream = await connect(url)
            await stream.send_all(GET)
            assert (await read_answer(stream)).startswith(expected)
            await stream.aclose()


# --- the whole API


async def test_cancelled_api_finishes_requests_and_frees_its_port(instance: FakeInstance) -> None:
    instance.world.activate(instance)
    assert instance.desk is not None
    instance.desk.acks = False
    given = settings(send_wait_s=0.5, stop_s=3)
    listening = bind_http("127.0.0.1:0")
    serve = partial(
        serve_api, instance, given, make_message_id=make_message_id, listening=listening
    )
    statuses: list[int] = []

    async def send_one() -> None:
        async with talking_to(listening.address) as client:
            content = {"accountId": "x", "to": "12345", "message": "x"}
            statuses.append(
                (await client.post("/api/whatsapp/send-message", json=content)).status_code
            )

    instance.world.add(an_account("x"))
    async with trio.open_nursery() as callers, trio.open_nursery() as nursery:
        assert await nursery.start(serve) == listening.address
        callers.start_soon(send_one)
        with trio.fail_after(3):
            while "accept" not in instance.desk.calls:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert statuses == [202]
    bind_http(f"127.0.0.1:{listening.port}").close()


async def test_waiting_requests_are_answered_when_the_api_ends(instance: FakeInstance) -> None:
    async with served(instance, settings(stop_s=2, handoff_wait_s=60)) as api:
        async with trio.open_nursery() as nursery, talking_to(api.url) as client:

            async def end() -> None:
                await trio.sleep(0.2)
                instance.state = State.DRAINING
                api.shutdown.set()

            nursery.start_soon(end)
            with trio.fail_after(5):
                answer = await client.get("/api/whatsapp/accounts/x")
        assert (answer.status_code, answer.json()["error"]) == (503, "no_active_instance")
        assert answer.headers["connection"] == "close"
        with trio.fail_after(5):
            await api.ended.wait()


async def test_metrics_listener_needs_no_token() -> None:
    listening = bind_http("127.0.0.1:0")
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(serve_metrics, settings(stop_s=0.1), lambda: b"up 1\n", listening=listening)
        )
        async with httpx.AsyncClient(base_url=listening.address, trust_env=False) as client:
            assert (await client.get("/metrics")).text == "up 1\n"
            assert (await client.get("/api/status/dashboard")).status_code == 404
        nursery.cancel_scope.cancel()
