"""How long a change of holder takes, by what caused it: `python -m tests.torture.failovers`.

One fault at a time, at the default lease times, as callers see it: from the fault to the next send
that is accepted. *Detect*: until the lease is free to take, by release or by its ttl. *Acquire*:
until another has it. *Restore*: until a send is accepted.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import trio

from machine.lease import LeaseTiming
from tests.fault_proxy import Fault
from tests.torture.history import Change, History
from tests.torture.run import running
from tests.torture.world import ACCOUNTS, Seat, World, open_world

TIMING = LeaseTiming()
OUTAGE_S = TIMING.ttl_s + 3.0
OVER_S = TIMING.ttl_s + 20.0


@dataclass(frozen=True)
class Took:
    """One failover, in seconds."""

    detect_s: float
    acquire_s: float
    restore_s: float

    @property
    def total_s(self) -> float:
        return self.detect_s + self.acquire_s + self.restore_s


FaultOf = Callable[[World, Seat], AbstractAsyncContextManager[float]]
"""Does something to the holder, and mends it at the block's end; since when it was missing."""


def _signalled(number: int, whom: Callable[[Seat], int]) -> FaultOf:
    @asynccontextmanager
    async def act(world: World, holder: Seat) -> AsyncIterator[float]:
        os.kill(whom(holder), number)
        yield trio.current_time()

    return act


@asynccontextmanager
async def _cut_off(world: World, holder: Seat) -> AsyncIterator[float]:
    await holder.proxy.set_fault(Fault.FREEZE)
    try:
        yield trio.current_time()
    finally:
        await holder.proxy.set_fault(Fault.PASS)


@asynccontextmanager
async def _no_store(world: World, holder: Seat) -> AsyncIterator[float]:
    world.emulator.pause()
    try:
        await trio.sleep(OUTAGE_S)
    finally:
        world.emulator.resume()
    yield trio.current_time()


def _warden(seat: Seat) -> int:
    return seat.pids()[0]


def _daemon(seat: Seat) -> int:
    return seat.pids()[1]


CAUSES: dict[str, FaultOf] = {
    "graceful: SIGTERM": _signalled(signal.SIGTERM, _warden),
    "the process crashes: kill -9 of the daemon": _signalled(signal.SIGKILL, _daemon),
    "the process hangs: SIGSTOP": _signalled(signal.SIGSTOP, _daemon),
    "the host crashes: kill -9 of warden and daemon": _signalled(signal.SIGKILL, _warden),
    "the holder is cut off from the store": _cut_off,
    "the store is away for a ttl and 3 s: from its return": _no_store,
}


async def _accepted(world: World, number: int) -> float:
    """When the first send is accepted, asked of all instances in turn, all the time."""
    while True:
        for seat in world.seats:
            with suppress(httpx.TransportError), trio.move_on_after(1.0):
                answer = await world.cluster.send(
                    seat.node, ACCOUNTS[0], f"failover {number}", key=f"failover-{number}"
                )
                if answer.status_code in (200, 202):
                    return trio.current_time()
        await trio.sleep(0.005)


async def _one(world: World, history: History, cause: FaultOf, number: int) -> Took:
    await world.wait_all_up()
    holder = await world.wait_active(OVER_S)
    await world.cluster.wait_connected(holder.node, *ACCOUNTS)
    await trio.sleep(random.uniform(1, 1 + TIMING.renew_s))
    before = len(history.changes)
    with trio.fail_after(OVER_S + OUTAGE_S):
        async with cause(world, holder) as since:
            while len(history.changes) == before:
                await trio.sleep(0.005)
            change: Change = history.changes[before]
            accepted_at = await _accepted(world, number)
    freed_at = min(max(change.freed_at, since), change.acquired_at)
    return Took(
        freed_at - since, change.acquired_at - freed_at, max(0, accepted_at - change.acquired_at)
    )


async def measure(rounds: int, directory: Path) -> dict[str, list[Took]]:
    """Every cause, `rounds` times."""
    times = {
        "WATCHKEEPER_LEASE_TTL_S": str(TIMING.ttl_s),
        "WATCHKEEPER_LEASE_RENEW_S": str(TIMING.renew_s),
        "WATCHKEEPER_LEASE_ATTEMPT_S": str(TIMING.attempt_s),
        "WATCHKEEPER_LEASE_MARGIN_S": str(TIMING.margin_s),
        # A send is to be accepted, not waited for.
        "WATCHKEEPER_SEND_WAIT_S": "0",
        "WATCHKEEPER_LOG_LEVEL": "info",
    }
    took: dict[str, list[Took]] = {name: [] for name in CAUSES}
    async with open_world(directory, 0, {}, times) as world:
        history = History(world)
        async with running(world, history):
            for number in range(rounds * len(CAUSES)):
                name = list(CAUSES)[number % len(CAUSES)]
                took[name].append(await _one(world, history, CAUSES[name], number))
                print(f"{name}: {took[name][-1].total_s:.2f} s", file=sys.stderr, flush=True)
    assert not history.violations, history.violations
    return took


def table(took: dict[str, list[Took]]) -> str:
    """For the documentation."""
    lines = [
        "| cause | p50 | p99 | max | detect | acquire | restore |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, each in took.items():
        totals = sorted(one.total_s for one in each)
        p99 = totals[math.ceil(0.99 * len(totals)) - 1]
        split = (
            median(one.detect_s for one in each),
            median(one.acquire_s for one in each),
            median(one.restore_s for one in each),
        )
        cells = [f"{seconds:.2f} s" for seconds in (median(totals), p99, totals[-1], *split)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="tests.torture.failovers")
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    directory = Path(tempfile.mkdtemp(prefix="watchkeeper-failovers-"))
    took = trio.run(measure, rounds, directory)
    shutil.rmtree(directory)
    print(table(took))


if __name__ == "__main__":
    main()
