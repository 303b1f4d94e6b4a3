"""One world from a seed, and many of them side by side."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import trio

from machine.limits import Durability
from tests.simulation.checks import Checks
from tests.simulation.clock import WorldClock
from tests.simulation.disasters import Disasters
from tests.simulation.faults import Fault, Faults
from tests.simulation.gate import GateKeeper, seed_scheduler
from tests.simulation.mutants import MUTANTS, RIGHT, Mutant
from tests.simulation.world import Kind, World


def kind_of(seed: int) -> Kind:
    """What the world of a seed is made of: every kind in every few seeds."""
    if seed % 8 == 0:
        return Kind(hosts=1, durability=Durability.LOCAL)
    return Kind(mixed=seed % 2 == 1, warden=seed % 3 != 0)


def has_disasters(seed: int) -> bool:
    """Whether data is deleted or restored behind the group's back in the world of a seed."""
    return seed % 8 in {2, 3, 5}


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
    trace: tuple[str, ...] = field(repr=False)


async def _simulate(
    seed: int, minutes: float, checks: Checks, mutant: Mutant
) -> tuple[tuple[float, ...], float]:
    async with trio.open_nursery() as nursery:
        world = World(
            seed,
            kind_of(seed),
            checks,
            checks.clock,
            nursery,
            state=mutant.state(),
            wire=mutant.wire,
        )
        disasters = Disasters(world)
        nothing: Callable[[Faults], dict[str, Fault]] = lambda _faults: {}  # noqa: E731
        faults = Faults(world, seed, disasters.kinds if has_disasters(seed) else nothing)
        disasters.rng = faults.rng
        with trio.CancelScope() as scope:
            checks.on_violation = scope.cancel
            async with trio.open_nursery() as clients:
                clients.start_soon(world.clients.run)
                clients.start_soon(world.contacts.run)
                clients.start_soon(disasters.keep_backups)
                await faults.run(minutes)
                clients.cancel_scope.cancel()
            await faults.wait_arrived()
            world.check_end()
        # What follows is only tidying up: also the dead have to leave the event loop.
        simulated_s = checks.clock.now
        for host in world.hosts:
            for name, count in host.link.told.items():
                checks.counts[f"call {name}"] += count
        checks.close()
        world.end()
        nursery.cancel_scope.cancel()
    return tuple(faults.healed_in_s), simulated_s


def simulate(
    seed: int, *, minutes: float, mutant: str | None = None, keep_trace: bool = False
) -> Outcome:
    """Run the world of `seed`; the first violation ends it."""
    seed_scheduler(seed)
    clock = WorldClock()
    checks = Checks(clock, keep_trace=keep_trace)
    chosen = RIGHT if mutant is None else MUTANTS[mutant]
    began = time.process_time()
    with chosen.made():
        healed_in_s, simulated_s = trio.run(
            _simulate, seed, minutes, checks, chosen, clock=clock, instruments=[GateKeeper()]
        )
    return Outcome(
        seed=seed,
        trace_hash=checks.trace_hash,
        violations=tuple(checks.violations),
        counts=dict(checks.counts),
        healed_in_s=healed_in_s,
        simulated_s=simulated_s,
        took_s=time.process_time() - began,
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
    if processes == 1:
        # Nobody is left behind when this one is killed.
        yield from map(_simulate_one, jobs)
        return
    # Fresh interpreters: a test run has threads, and a fork would copy them half.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(_simulate_one, jobs)
