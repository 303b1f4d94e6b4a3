"""Graceful handoff: how long nobody accepts sends when the holder is asked to end.

As a redeploy does it: the standby is up and warm, the holder gets SIGTERM, drains and ends, and
comes back as the standby of the next round. Sends go to both processes all the while; a message
counts as accepted when it is answered 202, durable. Compared to the same redeploy without a
standby: stop, then start.

Sends go out every 20 ms. During the gap they wait at the instances and are answered the moment one
accepts, so the gap's end is exact and its start early by one spacing at most, which is taken off.
More of them would measure how two daemons, a store and a load generator share the cores.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from bench.places import Group, Log, bring_up, open_group, start_holder, start_standby
from bench.probe import Prober, gap_s
from bench.rows import Figure, Row, main, median, progress, seconds
from tests.system.cluster import TOKEN, Node

BEFORE_S = 1.0
AFTER_S = 1.5
AIM_S = 0.5
ACCOUNTS_PROBED = 50


@dataclass(frozen=True, slots=True)
class Size:
    """How many accounts, rounds on SQLite and on Firestore, and rounds without a standby; seconds
    between two sends."""

    accounts: int
    rounds: int
    rounds_firestore: int
    restarts: int
    every_s: float = 0.02

    def rounds_on(self, store: str) -> int:
        """Firestore's emulator takes three times as long, and says no more with more rounds."""
        return self.rounds_firestore if store == "firestore" else self.rounds


@dataclass
class Rounds:
    """What all rounds on one store came to."""

    gaps_s: list[float] = field(default_factory=list)
    slowest_s: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    sent: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, prober: Prober, gap: float) -> None:
        """Take in one round."""
        self.gaps_s.append(gap)
        waits = [probe.answered_at - probe.asked_at for probe in prober.probes if probe.accepted]
        self.slowest_s.append(max(waits, default=0.0))
        self.sent += len(prober.probes)
        self.faults += prober.faults


async def measure(size: Size, stores: Sequence[str], rows: list[Row]) -> None:
    """Measure on each store."""
    for store in stores:
        # A send is answered as soon as it is durable: the question is who accepts, not how long
        # the rest of its way takes.
        async with open_group(store, size.accounts, WATCHKEEPER_SEND_WAIT_S="0") as group:
            rows.append(await _measure_one(size, store, group))


async def _measure_one(size: Size, store: str, group: Group) -> Row:
    cluster = group.cluster
    holder = await start_holder(cluster, "a", size.accounts)
    standby = await start_standby(cluster, "b")
    done = Rounds()
    rounds = size.rounds_on(store)
    for number in range(rounds):
        await _hand_over(size, group, holder, standby, done)
        progress(f"{store}: handoff {number + 1}: {seconds(done.gaps_s[-1])}")
        holder, standby = standby, holder
        await bring_up(cluster, standby, "warm.finished")
    await standby.stop()
    restarts = [await _restart(size, group, holder) for _ in range(size.restarts)]
    middle = median(done.gaps_s)
    phases = {name: median(values) for name, values in done.phases.items()}
    split = ", ".join(f"{name} {seconds(value)}" for name, value in phases.items())
    failed = f"{len(done.faults)} of {done.sent} requests failed"
    return Row(
        "handoff",
        f"nobody accepts, {size.accounts:,} accounts, {store}",
        f"p50 {seconds(middle)}, max {seconds(max(done.gaps_s))} of {rounds}; {failed}; "
        f"p50 of {split}",
        f"stop and start without a standby: {seconds(median(restarts))}" if restarts else "",
        f"p50 <= {AIM_S} s, none failed",
        middle <= AIM_S and not done.faults,
        {
            "gaps_s": done.gaps_s,
            "slowest_answer_s": done.slowest_s,
            "phases_s": done.phases,
            "restart_gaps_s": restarts,
            "sent": done.sent,
            "failed": len(done.faults),
            "faults": done.faults[:10],
        },
    )


async def _hand_over(size: Size, group: Group, holder: Node, standby: Node, done: Rounds) -> None:
    """One round: SIGTERM to the holder, under sends to both."""
    logs = Log(holder), Log(standby)
    async with _probing(size, group, [holder.port, standby.port], len(done.gaps_s)) as prober:
        await trio.sleep(BEFORE_S)
        since, wall = trio.current_time(), time.time()
        holder.signal(signal.SIGTERM)
        await group.cluster.wait_state(standby, "ACTIVE")
        await trio.sleep(AFTER_S)
        gap = gap_s(prober.probes, since, trio.current_time())
    done.add(prober, gap)
    assert await holder.wait_ended() == 0, holder.log()[-2000:]
    await logs[1].wait("restore.finished", wall)
    for name, took_s in _phases(*logs, wall).items():
        done.phases.setdefault(name, []).append(took_s)


def _phases(old: Log, new: Log, since: float) -> dict[str, float]:
    """Where the time went, from both logs (milliseconds, one wall clock)."""
    old.read()
    settled, released = old.at("drain.settled", since), old.at("lease.released", since)
    acquired, found = new.at("lease.acquired", since), new.at("restore.found", since)
    return {
        "drain": settled - old.at("drain.asked", since),
        "release": released - settled,
        "acquire": acquired - released,
        "read": found - acquired,
        "open": new.at("restore.finished", since) - found,
    }


class _probing:  # noqa: N801 - reads as a word in `async with _probing(…)`
    """Sends for the length of a block; all are answered when it is over."""

    def __init__(self, size: Size, group: Group, ports: list[int], number: int) -> None:
        self._prober = Prober(
            ports, group.account_ids[-ACCOUNTS_PROBED:], TOKEN, size.every_s, f"round-{number}"
        )
        self._nursery = trio.open_nursery()

    async def __aenter__(self) -> Prober:
        nursery = await self._nursery.__aenter__()
        nursery.start_soon(self._prober.run)
        return self._prober

    async def __aexit__(self, *raised: object) -> bool | None:
        self._prober.stop()
        return await self._nursery.__aexit__(*raised)  # type: ignore[arg-type]  # passed on


async def _restart(size: Size, group: Group, node: Node) -> float:
    """The same redeploy without a standby: how long nobody accepts."""
    log = Log(node)
    async with _probing(size, group, [node.port], 1000 + node.starts) as prober:
        await trio.sleep(BEFORE_S)
        since, wall = trio.current_time(), time.time()
        await node.stop()
        await group.cluster.restart(node)
        await log.wait("restore.finished", wall)
        await trio.sleep(AFTER_S)
        gap = gap_s(prober.probes, since, trio.current_time())
    progress(f"without a standby: {seconds(gap)}")
    return gap


FIGURE = Figure(
    "handoff",
    {"full": Size(1000, 20, 5, 2), "quick": Size(200, 2, 2, 0), "tiny": Size(5, 1, 1, 0)},
    measure,
)

if __name__ == "__main__":
    main(FIGURE)
