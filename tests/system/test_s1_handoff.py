"""S1: A drains, B becomes ACTIVE and every account is back."""

from __future__ import annotations

import httpx
import pytest
import trio

from tests.system.cluster import Cluster, Node
from tests.system.steps import wait_logged

pytestmark = pytest.mark.system


async def _ask_on_and_on(
    cluster: Cluster, nodes: list[Node], answers: list[httpx.Response], stop: trio.Event
) -> None:
    """A client of both instances: every answer it got is kept."""
    turn = 0
    while not stop.is_set():
        turn += 1
        for node in nodes:
            try:
                answers.append(await cluster.send(node, "ann", f"probe {turn} at {node.name}"))
            except httpx.ConnectError:
                # A client that is refused asks the other one, as a load balancer does.
                continue
        await trio.sleep(0.02)


async def test_sigterm_hands_both_accounts_to_the_standby(cluster: Cluster) -> None:
    a = await cluster.start("a", state="ACTIVE")
    await cluster.add_paired(a, "ann", "ben")
    b = await cluster.start("b", state="PASSIVE")
    await wait_logged(b, "account restore skipped, lease held by a")
    answers: list[httpx.Response] = []
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_ask_on_and_on, cluster, [a, b], answers, stop)
        await trio.sleep(0.3)
        assert await a.stop() == 0
        await cluster.wait_state(b, "ACTIVE")
        await cluster.wait_connected(b, "ann", "ben")
        stop.set()
    codes = {r.status_code for r in answers}
    assert codes <= {200, 202}, [r.text for r in answers if r.status_code >= 300]
    assert not any("account_not_found" in r.text for r in answers)
    dashboard = await cluster.json(b, "GET", "/api/status/dashboard")
    assert dashboard["instance"]["state"] == "ACTIVE"
    assert [(x["accountId"], x["inMemory"]) for x in dashboard["accounts"]] == [
        ("ann", True),
        ("ben", True),
    ]
    sent = await cluster.send(b, "ben", "hello through b")
    assert sent.status_code == 200, sent.text
    assert sent.json()["messageId"]
    accepted = {r.json()["messageId"] for r in (*answers, sent)}
    with trio.fail_after(10):
        while accepted - {m["messageId"] for m in await cluster.received(b)}:
            await trio.sleep(0.05)
    assert "qr_ready" not in {x["status"] for x in dashboard["accounts"]}
