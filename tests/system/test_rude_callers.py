"""Callers who mean no good, against a real instance: the lease is renewed as if nobody was there.

What is measured is the largest time between two renewals, as the instance's own log has them, and
the slowest answer that a polite caller got meanwhile. Everything stays on 127.0.0.1, bounded in
connections, bytes and seconds.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import time

import httpx
import pytest
import trio

from daemon.http.server import raise_files_limit
from tests.http.asking import HOLD_CONNECTIONS
from tests.system.cluster import TOKEN, Cluster, Node, sqlite_env
from tests.system.steps import ALONE, dashboard, lines_of

pytestmark = pytest.mark.system

RENEW_S, ATTEMPT_S, TTL_S = 1.0, 2.0, 6.0
LEASE = {
    "WATCHKEEPER_LEASE_RENEW_S": f"{RENEW_S:g}",
    "WATCHKEEPER_LEASE_ATTEMPT_S": f"{ATTEMPT_S:g}",
    "WATCHKEEPER_LEASE_MARGIN_S": "1",
    "WATCHKEEPER_LEASE_TTL_S": f"{TTL_S:g}",
}
GAP_S_MAX = RENEW_S + ATTEMPT_S
"""A renewal is due after `renew_s` and may take one attempt. Two in a row must fail before the
term is at risk; nobody's requests may bring it even near that."""

ANSWER_S_MAX = 5.0
KEEP_ALIVE_S = 15.0
"""`ApiSettings.keep_alive_s`: how long a connection may take to hand over a request's head."""

BEARER = f"authorization: Bearer {TOKEN}\r\n".encode()
LIVEZ = b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n"
DASHBOARD = b"GET /api/status/dashboard HTTP/1.1\r\nhost: x\r\n" + BEARER + b"\r\n"
GOOD = b"HTTP/1.1 200"
BROKEN = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)

Attack = Callable[[Node], Awaitable[None]]


@pytest.fixture
def store_env(tmp_path: Path) -> dict[str, str]:
    """SQLite: the lease's writes share this host's processors with the attack."""
    return {**sqlite_env(tmp_path), **LEASE, **ALONE}


# --- the attacks: each goes on until it is cancelled ----------------------------------------------


async def connect(node: Node) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", node.port)


async def many(count: int, one: Attack, node: Node) -> None:
    """`count` callers, each beginning again when it was thrown out."""

    async def again() -> None:
        while True:
            with suppress(*BROKEN):
                await one(node)
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(again)


async def drip_a_head(node: Node) -> None:
    """Slow-loris: a head that never ends, a few bytes at a time."""
    async with await connect(node) as stream:
        await stream.send_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n")
        while True:
            await stream.send_all(b"x: y\r\n")
            await trio.sleep(0.5)


async def drip_a_body(node: Node) -> None:
    """The same with a body, by somebody who has the token."""
    async with await connect(node) as stream:
        head = b"POST /api/whatsapp/send-message HTTP/1.1\r\nhost: x\r\ncontent-length: 9999\r\n"
        await stream.send_all(head + BEARER + b"\r\n")
        while True:
            await stream.send_all(b" ")
            await trio.sleep(0.2)


async def send_a_megabyte_of_headers(node: Node) -> None:
    async with await connect(node) as stream:
        await stream.send_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n")
        for number in range(1000):
            await stream.send_all(b"x-%d: " % number + b"y" * 1000 + b"\r\n")
        await stream.receive_some(1000)


async def send_a_huge_token(node: Node) -> None:
    async with await connect(node) as stream:
        head = b"GET /api/status/dashboard HTTP/1.1\r\nhost: x\r\nauthorization: Bearer "
        await stream.send_all(head + b"x" * 15_000 + b"\r\n\r\n")
        assert (await stream.receive_some(100)).startswith(b"HTTP/1.1 401")


async def pipeline(node: Node) -> None:
    """A thousand requests in one go, and all their answers, in order and complete."""
    async with await connect(node) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(stream.send_all, (DASHBOARD + LIVEZ) * 500)
        answered, tail = 0, b""
        while answered < 1000:
            part = await stream.receive_some(65536)
            assert part, f"closed after {answered} answers"
            seen = tail + part
            answered += seen.count(GOOD)
            # Never as long as what is looked for: nothing is counted twice.
            tail = seen[-len(GOOD) + 1 :]


async def ask_and_never_read(node: Node) -> None:
    async with await connect(node) as stream:
        while True:
            await stream.send_all(DASHBOARD * 100)


@asynccontextmanager
async def idle_connections(node: Node, count: int) -> AsyncIterator[None]:
    """Held open by another process, which has descriptors of its own."""
    async with trio.open_nursery() as nursery:
        command = [sys.executable, "-c", HOLD_CONNECTIONS, str(node.port), str(count)]
        start = partial(
            trio.run_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, check=False
        )
        holder: trio.Process = await nursery.start(start)
        assert holder.stdin is not None
        assert holder.stdout is not None
        with trio.fail_after(60):
            said = await holder.stdout.receive_some(100)
        assert int(said) == count
        yield
        await holder.stdin.aclose()


# --- what is measured -----------------------------------------------------------------------------


@dataclass
class Measured:
    """What an attack did to those who mean well. Seconds; memory in megabytes."""

    gap_s: float
    renewals: int
    answer_s: float
    answers: int
    memory_mb: float

    def __str__(self) -> str:
        return (
            f"largest renewal gap {self.gap_s:.2f} s of {self.renewals} renewals (due every "
            f"{RENEW_S:g} s), slowest of {self.answers} answers {self.answer_s:.2f} s, "
            f"{self.memory_mb:.0f} MB"
        )


def renewed_at(node: Node) -> list[float]:
    """The moments of every renewal, from the log at level debug."""
    stamps = [line.split(" ", 2)[:2] for line in lines_of(node, r"\| lease renewed")]
    return [datetime.fromisoformat(f"{day}T{at}").astimezone(UTC).timestamp() for day, at in stamps]


def memory_mb(node: Node) -> float:
    status = Path(f"/proc/{node.daemon_pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) / 1024


async def measure(node: Node, seconds: float) -> Measured:
    """Be a polite caller for `seconds`, and see how the lease fares."""
    began, slowest, answers = time(), 0.0, 0
    async with httpx.AsyncClient(base_url=node.url, timeout=30, trust_env=False) as client:
        while time() < began + seconds:
            for path in ("/livez", "/api/status/dashboard"):
                asked_at = time()
                answer = await client.get(path, headers={"authorization": f"Bearer {TOKEN}"})
                assert answer.status_code == 200, answer.text
                slowest = max(slowest, time() - asked_at)
                answers += 1
            await trio.sleep(0.1)
    # The gaps at both ends count too: no renewal at all would be the largest one.
    moments = [at for at in renewed_at(node) if began <= at <= began + seconds]
    gaps = [later - earlier for earlier, later in pairwise([began, *moments, began + seconds])]
    return Measured(max(gaps), len(moments), slowest, answers, memory_mb(node))


async def unharmed(cluster: Cluster, node: Node, measured: Measured) -> None:
    """In time, in the same term, without a failed renewal and without a bug."""
    assert measured.gap_s < GAP_S_MAX, measured
    assert measured.answer_s < ANSWER_S_MAX, measured
    # A connection of the cluster's client may be about to be closed for idleness.
    await cluster.client.aclose()
    async with httpx.AsyncClient(timeout=30, trust_env=False) as cluster.client:
        assert (await dashboard(cluster, node))["instance"]["epoch"] == 1
    assert lines_of(node, "renewal .* failed|lease lost|this is a bug|broke the server") == []


# --- the tests ------------------------------------------------------------------------------------


async def test_the_lease_is_renewed_in_time_whatever_callers_do(cluster: Cluster) -> None:
    node = await cluster.start("a", state="ACTIVE")
    async with idle_connections(node, 500), trio.open_nursery() as nursery:
        for count, attack in (
            (50, drip_a_head),
            (10, drip_a_body),
            (3, send_a_megabyte_of_headers),
            (3, send_a_huge_token),
            (1, pipeline),
            (2, ask_and_never_read),
        ):
            nursery.start_soon(many, count, attack, node)
        measured = await measure(node, 4)
        nursery.cancel_scope.cancel()
    print(f"\nall of it, a little: {measured}")
    await unharmed(cluster, node, measured)


@pytest.mark.long
async def test_ten_thousand_idle_connections_cost_no_renewal(cluster: Cluster) -> None:
    if raise_files_limit() < 11_000:
        pytest.skip("needs 11,000 open files")
    node = await cluster.start("a", state="ACTIVE")
    async with idle_connections(node, 10_000):
        measured = await measure(node, 10)
    print(f"\n10,000 idle connections: {measured}")
    await unharmed(cluster, node, measured)
    # Each is closed once it has been idle for too long.
    assert measured.memory_mb < 500


@pytest.mark.long
@pytest.mark.parametrize(
    ("count", "attack"),
    [
        (1000, drip_a_head),
        (200, drip_a_body),
        (20, send_a_megabyte_of_headers),
        (20, send_a_huge_token),
        (5, pipeline),
        (20, ask_and_never_read),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_no_attack_alone_costs_a_renewal(
    cluster: Cluster, count: int, attack: Attack
) -> None:
    node = await cluster.start("a", state="ACTIVE")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(many, count, attack, node)
        measured = await measure(node, 10)
        nursery.cancel_scope.cancel()
    print(f"\n{count} x {attack.__name__}: {measured}")
    await unharmed(cluster, node, measured)


@pytest.mark.long
async def test_a_head_that_never_ends_is_cut_off_in_time(cluster: Cluster) -> None:
    node = await cluster.start("a", state="ACTIVE")
    began = trio.current_time()
    with trio.fail_after(KEEP_ALIVE_S + 5), suppress(*BROKEN):
        await drip_a_head(node)
    assert trio.current_time() - began > KEEP_ALIVE_S - 1


async def test_a_token_in_the_wrong_place_is_refused_and_never_logged(cluster: Cluster) -> None:
    node = await cluster.start("a", state="ACTIVE")
    wrong, huge = "a-wrong-token-of-somebody", "h" * 9_000
    async with httpx.AsyncClient(base_url=node.url, trust_env=False) as client:
        for path, header in (
            (f"/api/status/dashboard?token={TOKEN}", None),
            (f"/api/status/dashboard?access_token={TOKEN}", f"Bearer {TOKEN}"),
            (f"/api/status/dashboard?x=1&Token={TOKEN}", f"Bearer {TOKEN}"),
            ("/api/status/dashboard", None),
            ("/api/status/dashboard", f"Bearer {wrong}"),
            ("/api/status/dashboard", f"Bearer {huge}"),
            ("/api/status/dashboard", TOKEN),
            ("/metrics", f"Basic {TOKEN}"),
        ):
            headers = {} if header is None else {"authorization": header}
            answer = await client.get(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]) == (401, "unauthorized"), path
            assert not any(secret in answer.text for secret in (TOKEN, wrong, huge))
    assert await node.stop() == 0
    log = node.log()
    assert "API listening" in log
    assert not any(secret in log for secret in (TOKEN, wrong, huge))
