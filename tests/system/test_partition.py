"""A partition of the network: packets between an instance and the store are really dropped.

The loopback WhatsApp is a file, and stays in reach of everybody: an instance that is cut off from
the store could still log in, send, and throw the other one out.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
import trio

from tests.bridge.node.install import skip_or_fail
from tests.emulator import Emulator, start_emulator
from tests.system.cluster import Cluster, Node, firestore_env, open_cluster
from tests.system.network import (
    Network,
    deaf,
    missing,
    missing_filter,
    open_doors,
    open_network,
)
from tests.system.steps import arrived_readable_once, dashboard, lines_of, send_all
from tests.system.test_s3_store_hangs import TIMES, TTL_S

pytestmark = [pytest.mark.system, pytest.mark.long, pytest.mark.emulator]

MARGIN_S = float(TIMES["WATCHKEEPER_LEASE_MARGIN_S"])
TERM_S = TTL_S - MARGIN_S
"""How long after the last renewal that it has an answer to a holder acts, at most."""
TAKE_S = 2.0
"""What the other needs to see that the lease is free, and to take it, on a busy machine."""
HEALED_S = 20.0
TRANSITION = r"\| (PASSIVE|ACTIVE) -> "

Cut = Callable[[Network], AbstractContextManager[None]]


def unplugged(network: Network) -> AbstractContextManager[None]:
    return network.unplugged(network.hosts["a"])


def requests_dropped(network: Network) -> AbstractContextManager[None]:
    return deaf(network.store, network.hosts["a"])


def answers_dropped(network: Network) -> AbstractContextManager[None]:
    return deaf(network.hosts["a"], network.store)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    lacking = missing()
    if lacking is not None:
        skip_or_fail(lacking)
    with open_network("a", "b") as network:
        yield network


@pytest.fixture(scope="module")
def emulator(network: Network) -> Iterator[Emulator]:
    with start_emulator(place=network.store) as emulator:
        yield emulator


@dataclass
class Looks:
    """When each instance said of itself that it is ACTIVE: asked in turn, all the time."""

    cluster: Cluster
    active: dict[str, list[float]] = field(default_factory=dict)
    latest: dict[str, bool] = field(default_factory=dict)

    async def keep_looking(self) -> None:
        while True:
            for node in self.cluster.nodes:
                self.latest[node.name] = await self.cluster.answers(node, "/active")
                if self.latest[node.name]:
                    self.active.setdefault(node.name, []).append(trio.current_time())
            await trio.sleep(0.01)

    async def wait_ended(self, node: Node, within_s: float) -> float:
        """The last moment at which the node was ACTIVE."""
        with trio.fail_after(within_s):
            while self.latest.get(node.name, True):
                await trio.sleep(0.01)
        return self.active[node.name][-1]

    async def wait_taken(self, node: Node, within_s: float) -> float:
        """The first moment at which the node was ACTIVE."""
        with trio.fail_after(within_s):
            while node.name not in self.active:
                await trio.sleep(0.01)
        return self.active[node.name][0]


@asynccontextmanager
async def _group(
    network: Network, emulator: Emulator, directory: Path
) -> AsyncIterator[tuple[Cluster, Node, Node]]:
    """`a` is ACTIVE with two accounts, `b` PASSIVE, each on its host of the network."""
    port = int(emulator.host.rpartition(":")[2])
    async with open_doors({port: network.store}):
        env = firestore_env(directory, f"127.0.0.1:{port}") | TIMES
        async with open_cluster(directory, env) as cluster:
            a, b = (_node(cluster, network, emulator, name) for name in ("a", "b"))
            async with open_doors({node.port: network.hosts[node.name] for node in (a, b)}):
                await cluster.restart(a, state="ACTIVE")
                await cluster.add_paired(a, "ann", "ben")
                await cluster.restart(b, state="PASSIVE")
                yield cluster, a, b


def _node(cluster: Cluster, network: Network, emulator: Emulator, name: str) -> Node:
    host = network.hosts[name]
    node = cluster.make(name, FIRESTORE_EMULATOR_HOST=emulator.host)
    # Also what it tells the others: they forward to this address.
    node.env["WATCHKEEPER_HTTP_BIND"] = f"{host.address}:{node.port}"
    node.within = host.within
    return node


async def _wait_renewed(node: Node) -> None:
    """Until the next renewal was answered: a term that is cut now is as long as they get."""
    renewed = len(lines_of(node, "lease renewed"))
    with trio.fail_after(TERM_S):
        while len(lines_of(node, "lease renewed")) == renewed:
            await trio.sleep(0.01)


async def _send_until_accepted(cluster: Cluster, node: Node, text: str) -> str:
    """Send with the text as key, and again with it after a 503 or 504; the message's id."""
    with trio.fail_after(HEALED_S):
        while True:
            answer = await cluster.send(node, "ann", text, key=text)
            if answer.status_code in (200, 202):
                return str(answer.json()["messageId"])
            assert answer.status_code in (503, 504), answer.text
            await trio.sleep(0.1)


@pytest.mark.parametrize("cut", [unplugged, requests_dropped, answers_dropped])
async def test_a_holder_cut_off_from_the_store_ends_its_term_before_the_other_begins_one(
    network: Network, emulator: Emulator, tmp_path: Path, cut: Cut
) -> None:
    lacking = missing_filter() if cut is not unplugged else None
    if lacking is not None:
        skip_or_fail(lacking)
    async with _group(network, emulator, tmp_path) as (cluster, a, b), trio.open_nursery() as tasks:
        looks = Looks(cluster)
        tasks.start_soon(looks.keep_looking)
        epoch = (await dashboard(cluster, a))["instance"]["epoch"]
        accepted = await send_all(cluster, a, "ann", "before")
        async with trio.open_nursery() as callers:
            await _wait_renewed(a)
            cut_at = trio.current_time()
            with cut(network):
                callers.start_soon(_send_anyway, cluster, a, "into the cut")
                ended_at = await looks.wait_ended(a, TTL_S)
                # What the store still hears of a holder that hears nothing prolongs its lease.
                prolonged_s = TERM_S if cut is answers_dropped else 0.0
                taken_at = await looks.wait_taken(b, prolonged_s + TTL_S + TAKE_S)
                await cluster.wait_connected(b, "ann", "ben")
                accepted |= await send_all(cluster, b, "ann", "meanwhile")
                assert looks.active["a"][-1] == ended_at
            healed_at = trio.current_time()
            accepted[await _send_until_accepted(cluster, a, "after")] = "after"
            forwards_at = trio.current_time()
        accepted[await _send_until_accepted(cluster, a, "into the cut")] = "into the cut"
        print(
            f"\n{cut.__name__}: the holder's term was over {ended_at - cut_at:.2f} s after the "
            f"cut, the other ACTIVE {taken_at - cut_at:.2f} s after it (ttl {TTL_S:g} s); "
            f"forwards again {forwards_at - healed_at:.2f} s after the healing"
        )
        assert ended_at - cut_at < TTL_S
        assert ended_at < taken_at
        await cluster.wait_state(a, "PASSIVE", within_s=0.5)
        await arrived_readable_once(cluster, a, accepted)
        assert (await dashboard(cluster, b))["instance"]["epoch"] == epoch + 1
        assert (await cluster.json(b, "GET", "/api/loopback/evictions"))["count"] == 0
        assert len(lines_of(a, "lease lost")) == 1
        tasks.cancel_scope.cancel()


async def _send_anyway(cluster: Cluster, node: Node, text: str) -> None:
    """Send with the text as key, whatever the answer is, or if there is none."""
    with suppress(httpx.TransportError):
        await cluster.send(node, "ann", text, key=text)


async def test_a_standby_cut_off_from_everything_changes_nothing_for_the_holder(
    network: Network, emulator: Emulator, tmp_path: Path
) -> None:
    async with _group(network, emulator, tmp_path) as (cluster, a, b), trio.open_nursery() as tasks:
        looks = Looks(cluster)
        tasks.start_soon(looks.keep_looking)
        before = [lines_of(node, TRANSITION) for node in (a, b)]
        with network.unplugged(network.hosts["b"]):
            cut_at = trio.current_time()
            accepted: dict[str, str] = {}
            while trio.current_time() < cut_at + TTL_S + TAKE_S:
                text = f"message {len(accepted)}"
                accepted |= await send_all(cluster, a, "ann", text)
                await trio.sleep(0.2)
        healed_at = trio.current_time()
        accepted[await _send_until_accepted(cluster, b, "after")] = "after"
        print(f"\nstandby: forwards again {trio.current_time() - healed_at:.2f} s after healing")
        assert [lines_of(node, TRANSITION) for node in (a, b)] == before
        assert "b" not in looks.active
        await arrived_readable_once(cluster, b, accepted)
        assert (await cluster.json(a, "GET", "/api/loopback/evictions"))["count"] == 0
        assert lines_of(a, "lease lost|lease renewal .* failed") == []
        tasks.cancel_scope.cancel()
