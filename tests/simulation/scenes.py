"""Worlds with one story each, where storms would tell too much at once.

A quiet day, a hundred terms one after the other, and a crash before a chosen step.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from machine.desk import Desk
from machine.lease import HeldLease
from machine.ledger import Ledger
from machine.outbox import AccountOutbox
from machine.restore import Restore
from machine.session import Session
from machine.states import State
from machine.term import Term
from tests.simulation.checks import Checks
from tests.simulation.clock import WorldClock
from tests.simulation.gate import GateKeeper, seed_scheduler
from tests.simulation.stores import Call, SimulatedState
from tests.simulation.world import TTL_MAX_S, Kind, World

COME_BACK_S = TTL_MAX_S + 40.0


@dataclass
class Told:
    """What a scene has found."""

    violations: tuple[str, ...] = ()
    counts: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    """Operations asked of the store, of all processes."""
    left: list[Counter[str]] = field(default_factory=list)
    """What exists, at moments that should be alike."""


Story = Callable[[World, Told], Awaitable[None]]


def play(story: Story, kind: Kind, *, seed: int = 1) -> Told:
    """Play a story in a world without faults."""
    told = Told()
    clock = WorldClock()
    checks = Checks(clock, keep_trace=False)
    seed_scheduler(seed)

    async def run() -> None:
        async with trio.open_nursery() as nursery:
            state = SimulatedState()
            world = World(seed, kind, checks, clock, nursery, state=state)
            with trio.CancelScope() as scope:
                checks.on_violation = scope.cancel
                await story(world, told)
            for host in world.hosts:
                if host.store is not None:
                    told.calls.update(host.store.calls)
            checks.close()
            world.end()
            nursery.cancel_scope.cancel()

    trio.run(run, clock=clock, instruments=[GateKeeper()])
    told.violations = tuple(checks.violations)
    told.counts = checks.counts
    return told


async def _people(world: World, for_s: float) -> None:
    """Callers and contacts for a while, and then time for what they sent to arrive."""
    with trio.move_on_after(for_s):
        async with trio.open_nursery() as people:
            people.start_soon(world.clients.run)
            people.start_soon(world.contacts.run)
    with trio.move_on_after(COME_BACK_S):
        while world.undelivered() or world.unconnected() or world.unreceived():
            await trio.sleep(0.5)


def quiet_day(hours: float) -> Told:
    """Claim 9: nothing happens, so nothing happens."""

    async def story(world: World, _told: Told) -> None:
        for host in world.hosts:
            world.start(host)
        await _people(world, hours * 3600.0)
        world.check_end()

    return play(story, Kind(message_every_s=600.0))


# --- claim 10 -------------------------------------------------------------------------------------


OF_A_TERM = (Term, Desk, Session, Ledger, Restore, HeldLease, AccountOutbox, Call)


def many_terms(count: int, *, look_every: int) -> Told:
    """Claim 10: `left` has what exists after each `look_every` terms, with all accounts back."""

    async def story(world: World, told: Told) -> None:
        for host in world.hosts:
            world.start(host)
        for number in range(1, count + 1):
            while world.acting() is None:
                await trio.sleep(0.1)
            acting = world.acting()
            assert acting is not None
            acting.request_step_down("one of many")
            while acting.state is not State.PASSIVE:
                await trio.sleep(0.01)
            if number % look_every == 0:
                await trio.sleep(5.0)
                told.left.append(_what_exists(world))

    tracemalloc.start()
    try:
        return play(story, Kind())
    finally:
        tracemalloc.stop()


def _what_exists(world: World) -> Counter[str]:
    gc.collect()
    objects = gc.get_objects()
    found = Counter(type(one).__qualname__ for one in objects if isinstance(one, OF_A_TERM))
    processes = [host.process for host in world.hosts if host.process is not None]
    found["tasks"] = sum(len(process.gate.tasks) for process in processes)
    found["descriptors"] = len(list(Path("/proc/self/fd").iterdir()))
    found["connections"] = world.whatsapp.connections
    found["bridges"] = world.whatsapp.bridges
    found["listeners"] = len(world.state._watchers)
    ours = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/machine/*")])
    found["bytes"] = sum(trace.size for trace in ours.traces)
    return found


# --- crashes --------------------------------------------------------------------------------------


def crash_before_step(step: int) -> Told:
    """One life from boot through a term, a handoff and a drain, with a crash before `step`.

    `counts["steps"]` says how many steps that process took. Whatever was accepted arrives.
    """

    async def story(world: World, told: Told) -> None:
        first, second = world.hosts
        world.restart_s = (0.5, 0.5)
        world.start(first)
        process = first.process
        assert process is not None

        def crash() -> None:
            if first.process is process:
                world.crash(first)

        process.gate.at_step(step, crash)

        async def live() -> None:
            await trio.sleep(3.0)
            world.start(second)
            await trio.sleep(5.0)
            process.instance.request_step_down("halfway", handoff_to=second.name)
            await trio.sleep(6.0)
            if second.process is not None:
                second.process.instance.request_step_down("and back", handoff_to=first.name)
            await trio.sleep(4.0)
            process.instance.request_drain("SIGTERM")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(live)
            await _people(world, 22.0)
        world.checks.counts["steps"] = process.gate.steps
        world.checks.counts["crashed"] = process.dead
        world.check_end()

    return play(story, Kind(hosts=2, message_every_s=0.7))
