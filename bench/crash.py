"""Crash failover: from kill -9 of the holder to the next accepted send, at two lease times.

The restore that a failover has to add to the ttl ends here with the seal: from then on a send can
be accepted. Opening the accounts goes on beside it.

The smallest ttl that we defend is 4 s: renew 1 s, for Firestore takes one sustained write a second
for a document; attempt 0.6 s, ten times what a commit usually takes; margin 1 s, several times the
longest hold-up of the event loop that the figure `restore` sees with 1,000 accounts (with 10,000 it
is longer than the margin: such a group keeps the default). The sum is 3.2 s, and the term of
2.996 s has room for a renewal that is asked at 1 s and hangs (0.6 s), a look-up that hangs as well
(0.6 s), a pause (0.3 s), and a further try that is answered within 0.496 s. At 3.5 s that further
try would have no time left: one hiccup of the store would cost a failover.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from bench.places import Group, Log, bring_up, open_group, start_holder, start_standby
from bench.probe import Prober
from bench.rows import Figure, Row, main, median, progress, seconds
from machine.lease import LeaseTiming
from tests.system.cluster import TOKEN, Node

SLACK_S = 0.2
EVERY_S = 0.02
AFTER_S = 1.0
ACCOUNTS_PROBED = 50

DEFAULT = LeaseTiming()
SMALLEST = LeaseTiming(ttl_s=4.0, renew_s=1.0, attempt_s=0.6, margin_s=1.0)
PAUSE_S = SMALLEST.attempt_s / 2
assert SMALLEST.renew_s + 2 * SMALLEST.attempt_s + PAUSE_S + 0.4 < SMALLEST.term_s


@dataclass(frozen=True, slots=True)
class Size:
    """How many accounts and rounds, and at which lease times."""

    accounts: int
    rounds: int
    timings: tuple[LeaseTiming, ...]


@dataclass
class Rounds:
    """What all rounds at one ttl came to; all lists have one entry a round."""

    gaps_s: list[float] = field(default_factory=list)
    bounds_s: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=dict)
    broken: int = 0
    refused: list[str] = field(default_factory=list)


async def measure(size: Size, stores: Sequence[str]) -> list[Row]:
    """Measure on each store, at each ttl."""
    rows = []
    for store in stores:
        for timing in size.timings:
            settings = {
                "WATCHKEEPER_SEND_WAIT_S": "0",
                "WATCHKEEPER_LEASE_TTL_S": str(timing.ttl_s),
                "WATCHKEEPER_LEASE_RENEW_S": str(timing.renew_s),
                "WATCHKEEPER_LEASE_ATTEMPT_S": str(timing.attempt_s),
                "WATCHKEEPER_LEASE_MARGIN_S": str(timing.margin_s),
                "WATCHKEEPER_HANDOFF_WAIT_S": str(timing.ttl_s + 5),
                # The last renewal before the kill is read from the log, where it is a detail.
                "WATCHKEEPER_LOG_LEVEL": "debug",
            }
            async with open_group(store, size.accounts, **settings) as group:
                rows.append(await _measure_one(size, store, timing, group))
    return rows


async def _measure_one(size: Size, store: str, timing: LeaseTiming, group: Group) -> Row:
    holder = await start_holder(group.cluster, "a", size.accounts)
    standby = await start_standby(group.cluster, "b")
    done = Rounds()
    for number in range(size.rounds):
        await _crash(timing, group, holder, standby, done)
        progress(f"{store}, ttl {timing.ttl_s:g}: crash {number + 1}: {done.gaps_s[-1]:.2f} s")
        holder, standby = standby, holder
        await bring_up(group.cluster, standby, "warm.finished")
    middle, bound = median(done.gaps_s), median(done.bounds_s)
    split = ", ".join(f"{name} {seconds(median(took))}" for name, took in done.phases.items())
    met = all(gap <= most for gap, most in zip(done.gaps_s, done.bounds_s, strict=True))
    return Row(
        "crash",
        f"nobody accepts, ttl {timing.ttl_s:g} s, {size.accounts:,} accounts, {store}",
        f"median {seconds(middle)}, max {seconds(max(done.gaps_s))} of {size.rounds}; "
        f"medians of {split}",
        f"ttl + {SLACK_S} s + restore: {seconds(bound)}",
        "each <= ttl + 0.2 s + its restore",
        met,
        {
            "gaps_s": done.gaps_s,
            "bounds_s": done.bounds_s,
            "phases_s": done.phases,
            "broken_by_the_kill": done.broken,
            "refused": done.refused[:10],
            "ttl_s": timing.ttl_s,
            "renew_s": timing.renew_s,
            "attempt_s": timing.attempt_s,
            "margin_s": timing.margin_s,
        },
    )


async def _crash(
    timing: LeaseTiming, group: Group, holder: Node, standby: Node, done: Rounds
) -> None:
    """One round: SIGKILL at any moment between two renewals."""
    old, new = Log(holder), Log(standby)
    prober = Prober(
        [standby.port, holder.port],
        group.account_ids[-ACCOUNTS_PROBED:],
        TOKEN,
        EVERY_S,
        f"crash-{len(done.gaps_s)}",
    )
    await old.wait("lease.renewed")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prober.run)
        await trio.sleep(random.uniform(0, timing.renew_s))
        since, wall = trio.current_time(), time.time()
        await holder.kill()
        await new.wait("restore.found", wall)
        await trio.sleep(AFTER_S)
        prober.stop()
    await new.wait("restore.finished", wall)
    old.read()
    accepted = [p.answered_at for p in prober.probes if p.accepted and p.asked_at > since]
    assert accepted, (prober.faults[:5], standby.log()[-2000:])
    gap = min(accepted) - since
    acquired, found = new.at("lease.acquired", wall), new.at("restore.found", wall)
    expired = old.last("lease.renewed") + timing.ttl_s
    dashboard = await group.cluster.json(standby, "GET", "/api/status/dashboard")
    seal_s = float(dashboard["restore"]["durations"]["seal"])
    phases = {
        "expiry": expired - wall,
        "acquire": acquired - expired,
        "read": found - acquired,
        "seal": seal_s,
        "first answer": wall + gap - found - seal_s,
        "open": new.at("restore.finished", wall) - found,
    }
    for name, took_s in phases.items():
        done.phases.setdefault(name, []).append(took_s)
    done.gaps_s.append(gap)
    done.bounds_s.append(timing.ttl_s + SLACK_S + phases["read"] + seal_s)
    done.broken += sum(probe.broke for probe in prober.probes)
    done.refused += [p.fault for p in prober.probes if p.fault is not None and not p.broke]


FIGURE = Figure(
    "crash",
    {
        "full": Size(1000, 5, (DEFAULT, SMALLEST)),
        "quick": Size(200, 1, (SMALLEST,)),
        "tiny": Size(5, 1, (SMALLEST,)),
    },
    measure,
)

if __name__ == "__main__":
    main(FIGURE)
