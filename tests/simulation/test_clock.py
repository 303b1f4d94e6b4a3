"""Each host's clock: its own rate, its own beginning, and nothing in a suspend."""

from __future__ import annotations

from contextvars import copy_context

import pytest
import trio

from tests.simulation.clock import HostClock, SimulatedClocks, WorldClock, host_clock


def run_on(host: HostClock, seconds: float, clock: WorldClock) -> float:
    """How long the world takes while a task of `host` sleeps for `seconds`."""

    async def sleep() -> None:
        host_clock.set(host)
        await trio.sleep(seconds)

    copy_context().run(lambda: trio.run(sleep, clock=clock))
    return clock.now


@pytest.mark.parametrize("rate", [1 - 500e-6, 1.0, 1 + 500e-6])
def test_a_host_sleeps_by_its_own_clock(rate: float) -> None:
    host = HostClock(rate=rate, began_at=12345.678)
    assert run_on(host, 1000.0, WorldClock()) == pytest.approx(1000.0 / rate, abs=1e-6)


def test_nobody_is_woken_before_his_own_clock_says_so() -> None:
    host = HostClock(rate=1.000321, began_at=777.7)
    for tenths in range(1, 2000):
        local = host.at(0.0) + tenths / 10
        assert host.at(host.world_at(local)) >= local


def test_a_suspended_host_has_no_time_and_its_boottime_goes_on() -> None:
    world, host = WorldClock(), HostClock(began_at=50.0)
    clocks = SimulatedClocks(world, host)
    world.now = 10.0
    host.suspend(world.now)
    world.now = 40.0
    assert host.at(world.now) == 60.0
    host.resume(world.now)
    world.now = 45.0
    assert host.at(world.now) == 65.0
    assert clocks.boottime() == 95.0


def test_a_deadline_set_before_a_suspend_comes_that_much_later() -> None:
    clock, host = WorldClock(), HostClock()
    woken_at = 0.0

    async def sleep() -> None:
        nonlocal woken_at
        host_clock.set(host)
        await trio.sleep(10.0)
        woken_at = clock.now

    async def suspend() -> None:
        await trio.sleep(4.0)
        host.suspend(clock.now)
        await trio.sleep(100.0)
        host.resume(clock.now)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sleep)
            nursery.start_soon(suspend)

    trio.run(main, clock=clock)
    assert woken_at == 110.0
