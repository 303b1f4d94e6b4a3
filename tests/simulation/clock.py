"""The world's time, and what each host's own clocks make of it.

A host's clock runs at its own rate, stands still while the host is suspended, and began at its own
moment: nothing that a process reads can be compared with what another one reads, or with the
world's time. Lives here: time, and the part of Trio that keeps it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import count

import trio
import trio._core._run as trio_run

from tests.fakes.clocks import WALL_AT_START

HEAP_SLACK = 1000


class HostClock:
    """A host's monotonic clock as a function of the world's time; `rate` is its seconds a second.

    The wall clock and CLOCK_BOOTTIME of the host follow from it. `wall_offset_s` is the wall
    clock's error, and may jump.
    """

    def __init__(self, *, rate: float = 1.0, began_at: float = 0.0, wall_offset_s: float = 0.0):
        self.rate = rate
        self.wall_offset_s = wall_offset_s
        self.suspended = False
        self._world_at = 0.0
        self._local_at = began_at
        self._slept_s = 0.0

    def at(self, world: float) -> float:
        """What the monotonic clock says at a moment of the world."""
        if self.suspended:
            return self._local_at
        return self._local_at + (world - self._world_at) * self.rate

    def world_at(self, local: float) -> float:
        """When, in the world's time, the monotonic clock will say `local` at the earliest."""
        if self.suspended:
            return math.inf
        world = self._world_at + (local - self._local_at) / self.rate
        # Rounding must not wake anybody a hair too early: he would find his moment not come yet.
        while self.at(world) < local:
            world = math.nextafter(world, math.inf)
        return world

    def boottime_at(self, world: float) -> float:
        """CLOCK_BOOTTIME, which goes on in a suspend."""
        return self.at(world) + self._slept_s

    def wall_at(self, world: float) -> float:
        return WALL_AT_START + world + self.wall_offset_s

    def suspend(self, world: float) -> None:
        self._local_at, self._world_at = self.at(world), world
        self.suspended = True

    def resume(self, world: float) -> None:
        self._slept_s += (world - self._world_at) * self.rate
        self._world_at = world
        self.suspended = False


host_clock: ContextVar[HostClock | None] = ContextVar("host_clock", default=None)
"""The clock that the running task reads; `None` in the world itself."""


@contextmanager
def on_clock_of(host: HostClock) -> Iterator[None]:
    """Let the world look into a host: what is read there may ask what time it is."""
    before = host_clock.set(host)
    try:
        yield
    finally:
        host_clock.reset(before)


class WorldClock(trio.abc.Clock):
    """Trio's clock for a simulation: when nothing can run, the next moment is now.

    `now` is the world's time. Tasks of a host read the host's clock instead, and the deadlines
    that they set are on it.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def start_clock(self) -> None:
        # Trio has no public way to have several clocks in one run.
        trio_run.GLOBAL_RUN_CONTEXT.runner.deadlines = _Deadlines(self)  # type: ignore[assignment]

    def current_time(self) -> float:
        host = host_clock.get()
        return self.now if host is None else host.at(self.now)

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Called by Trio when no task can run, with the next deadline in the world's time."""
        if deadline == math.inf:
            return math.inf
        self.now = max(self.now, deadline)
        return 0.0


class _Deadlines:
    """Trio's deadlines, each on the clock of whoever set it. The interface is Trio's own.

    Deadlines of one moment pass in the order in which they were set, whatever their address.
    """

    def __init__(self, clock: WorldClock) -> None:
        self._clock = clock
        self._heaps: dict[HostClock | None, list[tuple[float, int, trio.CancelScope]]] = {None: []}
        self._active = 0
        self._numbers = count()
        self._looked_at = -1.0

    def add(self, deadline: float, scope: trio.CancelScope) -> None:
        heap = self._heaps.setdefault(host_clock.get(), [])
        heapq.heappush(heap, (deadline, next(self._numbers), scope))
        self._active += 1
        self._looked_at = -1.0

    def remove(self, _deadline: float, _scope: trio.CancelScope) -> None:
        self._active -= 1

    def next_deadline(self) -> float:
        """The next one, in the world's time."""
        soonest = math.inf
        for host, heap in self._heaps.items():
            while heap and heap[0][0] != heap[0][2]._registered_deadline:
                heapq.heappop(heap)
            if heap:
                first = heap[0][0]
                soonest = min(soonest, first if host is None else host.world_at(first))
        return soonest

    def expire(self, _now: float) -> bool:
        """Cancel every scope whose deadline has passed on its own clock."""
        if self._clock.now == self._looked_at:
            return False
        self._looked_at = self._clock.now
        passed = False
        for host, heap in self._heaps.items():
            local = self._clock.now if host is None else host.at(self._clock.now)
            while heap and heap[0][0] <= local:
                deadline, _, scope = heapq.heappop(heap)
                if deadline == scope._registered_deadline:
                    passed = True
                    scope._cancel(trio_run.CancelReason(source="deadline"))
        if sum(map(len, self._heaps.values())) > 2 * self._active + HEAP_SLACK:
            self._prune()
        return passed

    def _prune(self) -> None:
        for heap in self._heaps.values():
            heap[:] = [one for one in heap if one[0] == one[2]._registered_deadline]
            heapq.heapify(heap)


class SimulatedClocks:
    """`Clocks` of one host."""

    def __init__(self, world: WorldClock, host: HostClock) -> None:
        self._world = world
        self._host = host

    def wall(self) -> float:
        return self._host.wall_at(self._world.now)

    def boottime(self) -> float:
        return self._host.boottime_at(self._world.now)
