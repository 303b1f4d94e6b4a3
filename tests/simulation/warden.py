"""The killer outside: what `watchkeeper run` is to a daemon, for a simulated process.

It is told deadlines as the real one is, kills at a moment of the host's CLOCK_BOOTTIME, and gives
the lease back for a process that died. Never lives here: its process, its pipe (`daemon.warden`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import trio

from daemon.crash_release import TIMING, held_by_dead, written_by
from machine.lease import release
from machine.ports import LeaseMissing, StoreUnavailable
from machine.records import Grant
from machine.term import BOOTTIME_LOOK_S
from tests.simulation.checks import Checks
from tests.simulation.clock import SimulatedClocks
from tests.simulation.network import Network
from tests.simulation.process import Process
from tests.simulation.stores import SimulatedStore


class SimulatedWarden:
    """A `Guard`. `kill` ends the process; one that was not stopped by us must never need it."""

    def __init__(
        self,
        process: Process,
        clocks: SimulatedClocks,
        network: Network,
        checks: Checks,
        kill: Callable[[], None],
    ) -> None:
        self._process = process
        self._clocks = clocks
        self._network = network
        self._checks = checks
        self._kill = kill
        self._kill_at: float | None = None
        self._grant: Grant | None = None

    def deadline_moved(self, grant: Grant, kill_at: float) -> None:
        self._grant, self._kill_at = grant, kill_at
        after_s = (kill_at - self._clocks.boottime()) / self._process.gate.clock.rate
        self._network.post(max(0.0, after_s), self.ring)

    def term_over(self) -> None:
        self._kill_at = None

    def lease_released(self) -> None:
        self._grant = None

    def ring(self) -> None:
        """Its timer; also when the host goes on after a suspend."""
        process = self._process
        if self._kill_at is None or process.dead or process.gate.clock.suspended:
            return
        if self._clocks.boottime() < self._kill_at:
            return
        self._checks.counts["killed by the warden"] += 1
        # A suspend may end right before the kill, and a term looks only so often.
        thawed = self._checks.clock.now - process.thawed_at <= BOOTTIME_LOOK_S
        if not process.gate.closed and not thawed:
            self._checks.violated(4, f"{process.name} had to be killed: it outlived its deadline")
        self._kill()

    async def release(self, store: SimulatedStore) -> None:
        """Give the lease back for a process that is dead, as `daemon.crash_release` does."""
        grant = self._grant
        if grant is None:
            return
        lease = {"incarnation": grant.incarnation, "epoch": grant.epoch}
        rng = random.Random(f"warden of {grant.incarnation}")
        with suppress(StoreUnavailable, LeaseMissing, trio.TooSlowError):
            with trio.fail_after(TIMING.attempt_s):
                view = await store.read()
            if not written_by(view, lease):
                return
            held = held_by_dead(view)
            reason = "its process died; released in its name"
            clocks, silence = self._clocks, _Silence()
            if await release(held, store, TIMING, clocks, rng, silence, reason=reason):
                self._checks.counts["released by the warden"] += 1


class _Silence:
    def note(self, event: str, /, **fields: object) -> None: ...
