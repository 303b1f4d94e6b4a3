"""Crash failover: from kill -9 of the holder to the next accepted send, at two lease times.

A host's crash takes the warden too, and the standby waits for the ttl. After a process's crash the
warden gives the lease back; how long that takes does not depend on the lease's times.

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
from enum import Enum

import trio

from bench.places import Group, Log, bring_up, open_group, start_holder, start_standby
from bench.probe import Prober
from bench.rows import Figure, Row, main, median, progress, seconds
from machine.lease import LeaseTiming
from tests.system.cluster import TOKEN, Node

SLACK_S = 0.2
PROCESS_CRASH_S = 2.0
EVERY_S = 0.02
AFTER_S = 1.0
ACCOUNTS_PROBED = 50

DEFAULT = LeaseTiming()
SMALLEST = LeaseTiming(ttl_s=4.0, renew_s=1.0, attempt_s=0.6, margin_s=1.0)
PAUSE_S = SMALLEST.attempt_s / 2
assert SMALLEST.renew_s + 2 * SMALLEST.attempt_s + PAUSE_S + 0.4 < SMALLEST.term_s


class Crash(Enum):
    """What dies."""

    HOST = "host"
    PROCESS = "process"


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


async def measure(size: Size, stores: Sequence[str], rows: list[Row]) -> None:
    """Measure on each store, at each ttl."""
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
                holder = await start_holder(group.cluster, "a", size.accounts)
                standby = await start_standby(group.cluster, "b")
                crashes = tuple(Crash) if timing is size.timings[0] else (Crash.HOST,)
                for crash in crashes:
                    row, holder, standby = await _measure_one(
                        size, store, timing, crash, group, holder, standby
                    )
                    rows.append(row)


async def _measure_one(
    size: Size,
    store: str,
    timing: LeaseTiming,
    crash: Crash,
    group: Group,
    holder: Node,
    standby: Node,
) -> tuple[Row, Node, Node]:
    """The row of one kind of crash, and who is holder and standby now."""
    done = Rounds()
    for number in range(size.rounds):
        await _crash(timing, crash, group, holder, standby, done)
        told = f"{crash.value} crash {number + 1}: {done.gaps_s[-1]:.2f} s"
        progress(f"{store}, ttl {timing.ttl_s:g}: {told}")
        holder, standby = standby, holder
        await bring_up(group.cluster, standby, "warm.finished")
    return _row(size, store, timing, crash, done), holder, standby


def _row(size: Size, store: str, timing: LeaseTiming, crash: Crash, done: Rounds) -> Row:
    middle, bound = median(done.gaps_s), median(done.bounds_s)
    split = ", ".join(f"{name} {seconds(median(took))}" for name, took in done.phases.items())
    what = f"ttl + {SLACK_S} s" if crash is Crash.HOST else f"{PROCESS_CRASH_S:g} s"
    met = all(gap <= most for gap, most in zip(done.gaps_s, done.bounds_s, strict=True))
    return Row(
        "crash",
        f"nobody accepts, {crash.value} crash, ttl {timing.ttl_s:g} s, {size.accounts:,} accounts, "
        f"{store}",
        f"median {seconds(middle)}, max {seconds(max(done.gaps_s))} of {size.rounds}; "
        f"medians of {split}",
        f"{what} + restore: {seconds(bound)}",
        f"each <= {what} + its restore",
        met,
        {
            "crash": crash.value,
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
    timing: LeaseTiming, crash: Crash, group: Group, holder: Node, standby: Node, done: Rounds
) -> None:
    """One round: SIGKILL at any moment between two renewals."""
    old, new = Log(holder), Log(standby)
    prober = Prober(
        [standby.port, holder.port],
        group.account_ids[-ACCOUNTS_PROBED:],
        TOKEN,
        EVERY_S,
        f"{crash.value}-crash-{len(done.gaps_s)}",
    )
    await old.wait("lease.renewed")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(prober.run)
        await trio.sleep(random.uniform(0, timing.renew_s))
        since, wall = trio.current_time(), time.time()
        await (holder.kill() if crash is Crash.HOST else holder.crash())
        await new.wait("restore.found", wall)
        await trio.sleep(AFTER_S)
        prober.stop()
    await new.wait("restore.finished", wall)
    old.read()
    accepted = [p.answered_at for p in prober.probes if p.accepted and p.asked_at > since]
    assert accepted, (prober.faults[:5], standby.log()[-2000:])
    gap = min(accepted) - since
    acquired, found = new.at("lease.acquired", wall), new.at("restore.found", wall)
    dashboard = await group.cluster.json(standby, "GET", "/api/status/dashboard")
    seal_s = float(dashboard["restore"]["durations"]["seal"])
    if crash is Crash.HOST:
        free = old.last("lease.renewed") + timing.ttl_s
    else:
        free = old.at("warden.released", wall)
    phases = {
        "expiry" if crash is Crash.HOST else "release": free - wall,
        "acquire": acquired - free,
        "read": found - acquired,
        "seal": seal_s,
        "first answer": wall + gap - found - seal_s,
        "open": new.at("restore.finished", wall) - found,
    }
    for name, took_s in phases.items():
        done.phases.setdefault(name, []).append(took_s)
    done.gaps_s.append(gap)
    bound_s = timing.ttl_s + SLACK_S if crash is Crash.HOST else PROCESS_CRASH_S
    done.bounds_s.append(bound_s + phases["read"] + seal_s)
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
