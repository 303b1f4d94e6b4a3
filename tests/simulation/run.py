"""One world from a seed, and many of them side by side."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import trio
from trio.testing import MockClock

from tests.simulation.checks import Checks
from tests.simulation.faults import Faults
from tests.simulation.gate import GateKeeper, seed_scheduler
from tests.simulation.group import Group
from tests.simulation.mutants import MUTANTS, Mutant

RIGHT = Mutant("the machine as it is")


@dataclass(frozen=True)
class Outcome:
    """How one world went. `simulated_s` and `took_s`: its time and ours."""

    seed: int
    trace_hash: str
    violations: tuple[str, ...]
    counts: dict[str, int]
    healed_in_s: tuple[float, ...]
    simulated_s: float
    took_s: float
    trace: tuple[str, ...]


async def _simulate(
    seed: int, minutes: float, checks: Checks, mutant: Mutant
) -> tuple[tuple[float, ...], float]:
    async with trio.open_nursery() as nursery:
        group = Group(seed, checks, nursery, mutant.state())
        faults = Faults(group, seed)
        with trio.CancelScope() as scope:
            checks.on_violation = scope.cancel
            async with trio.open_nursery() as clients:
                clients.start_soon(group.keep_sending)
                await faults.run(minutes)
                clients.cancel_scope.cancel()
            await faults.wait_arrived()
            group.check_end()
        # What follows is only tidying up: also the dead have to leave the event loop.
        simulated_s = trio.current_time()
        checks.close()
        group.end()
        nursery.cancel_scope.cancel()
    return tuple(faults.healed_in_s), simulated_s


def simulate(
    seed: int, *, minutes: float, mutant: str | None = None, keep_trace: bool = False
) -> Outcome:
    """Run the world of `seed`; the first violation ends it."""
    seed_scheduler(seed)
    checks = Checks(keep_trace=keep_trace)
    chosen = RIGHT if mutant is None else MUTANTS[mutant]
    began = time.perf_counter()
    with chosen.made():
        healed_in_s, simulated_s = trio.run(
            _simulate,
            seed,
            minutes,
            checks,
            chosen,
            clock=MockClock(autojump_threshold=0),
            instruments=[GateKeeper()],
        )
    return Outcome(
        seed=seed,
        trace_hash=checks.trace_hash,
        violations=tuple(checks.violations),
        counts=dict(checks.counts),
        healed_in_s=healed_in_s,
        simulated_s=simulated_s,
        took_s=time.perf_counter() - began,
        trace=tuple(checks.trace),
    )


def _simulate_one(job: tuple[int, float, str | None]) -> Outcome:
    seed, minutes, mutant = job
    return simulate(seed, minutes=minutes, mutant=mutant)


def simulate_all(
    seeds: Iterable[int], *, minutes: float, mutant: str | None = None, processes: int = 2
) -> Iterator[Outcome]:
    """Run many worlds, `processes` at a time, in the order of their seeds."""
    jobs = [(seed, minutes, mutant) for seed in seeds]
    # Fresh interpreters: a test run has threads, and a fork would copy them half.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_simulate_one, jobs)
