"""What is done to the group, when and to whom: storms of overlapping faults, and calms in between.

Every choice comes from the seed; what the machine makes of it depends on real time as well. Every
fault heals itself when it is over or cancelled, but for stepped wall clocks: those never do.
"""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import trio

from tests.fault_proxy import Fault
from tests.torture.history import History
from tests.torture.world import ACCOUNTS, LEASE_TTL_S, Seat, World

STORM_S = 35.0
FAULT_EVERY_S = 1.5
AT_ONCE_MAX = 3
LONG_S = LEASE_TTL_S + 3.0
WIRE = (
    Fault.DROP_REQUESTS,
    Fault.DROP_REPLIES,
    Fault.LOSE_REPLIES,
    Fault.FREEZE,
    Fault.RESET,
    Fault.REFUSE,
)
BLOCK = b"\0" * 65536
DISK_BYTES = 64 * 2**20


class Nemesis:
    """Breaks a world. `done` counts what was done, by name."""

    def __init__(
        self, world: World, history: History, seed: int, disks: dict[str, Path], tell: bool
    ) -> None:
        self.world = world
        self.history = history
        self.rng = random.Random(f"{seed} nemesis")
        self.done: Counter[str] = Counter()
        self._disks = disks
        self._tell = tell
        self._stopped: set[str] = set()
        self._places = trio.CapacityLimiter(AT_ONCE_MAX)
        self._kinds: list[tuple[int, Callable[[Seat], Awaitable[None]]]] = [
            (3, self._kill_daemon),
            (2, self._kill_warden),
            (2, self._redeploy),
            (3, self._stop_daemon),
            (1, self._stop_warden),
            (1, self._stop_host),
            (4, self._break_wire),
            (2, self._slow_wire),
            (1, self._break_every_wire),
            (1, self._stop_store),
            (2, self._step_clock),
            (1, self._step_down),
            (1, self._drop_connection),
        ]
        if disks:
            self._kinds.append((2, self._fill_disk))

    async def storm(self) -> None:
        """Faults for `STORM_S`, some at once; all are healed when it returns."""
        with trio.move_on_after(STORM_S):
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.sleep(self.rng.expovariate(1 / FAULT_EVERY_S))
                    (kind,) = self.rng.choices(
                        [kind for _, kind in self._kinds], [weight for weight, _ in self._kinds]
                    )
                    nursery.start_soon(self._do, kind, await self._victim())

    async def _victim(self) -> Seat:
        """The holder more often than not: that is where it hurts."""
        holder_wanted, anyone = self.rng.random() < 0.6, self.rng.choice(self.world.seats)
        holder = await self.world.active_seat() if holder_wanted else None
        return holder or anyone

    async def _do(self, kind: Callable[[Seat], Awaitable[None]], seat: Seat) -> None:
        async with self._places:
            self._note(f"{kind.__name__.strip('_')} {seat.name}")
            self.done[kind.__name__.strip("_")] += 1
            with suppress(httpx.TransportError, ProcessLookupError):
                await kind(seat)

    def _note(self, what: str) -> None:
        if self._tell:
            print(f"{trio.current_time():9.2f} {what}", flush=True)

    async def _while_it_lasts(self, longest_s: float) -> None:
        await trio.sleep(self.rng.uniform(0.2, longest_s))

    # --- processes

    async def _kill_daemon(self, seat: Seat) -> None:
        for pid in seat.pids()[1:]:
            os.kill(pid, signal.SIGKILL)

    async def _kill_warden(self, seat: Seat) -> None:
        for pid in seat.pids()[:1]:
            os.kill(pid, signal.SIGKILL)

    async def _redeploy(self, seat: Seat) -> None:
        for pid in seat.pids()[:1]:
            os.kill(pid, signal.SIGTERM)

    async def _stop_daemon(self, seat: Seat) -> None:
        await self._stop(seat, seat.pids()[1:])

    async def _stop_warden(self, seat: Seat) -> None:
        await self._stop(seat, seat.pids()[:1])

    async def _stop_host(self, seat: Seat) -> None:
        """As a paused virtual machine: nobody on it is there to kill anybody."""
        pids = seat.pids()
        # Without a warden it is one more stopped process, and nobody's excuse.
        if seat.name not in self._stopped and len(pids) > 1:
            self.history.frozen_hosts += 1
        await self._stop(seat, pids)

    async def _stop(self, seat: Seat, pids: list[int]) -> None:
        """SIGSTOP, and after a while SIGCONT; one at a time for each seat."""
        if seat.name in self._stopped:
            return
        self._stopped.add(seat.name)
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            await self._while_it_lasts(LONG_S)
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
            self._stopped.discard(seat.name)

    # --- the way to the store, and the store

    async def _break_wire(self, seat: Seat) -> None:
        async with self._broken(seat, self.rng.choice(WIRE)):
            await self._while_it_lasts(LONG_S)

    @asynccontextmanager
    async def _broken(self, seat: Seat, fault: Fault) -> AsyncIterator[None]:
        self.done[fault.name.lower()] += 1
        await seat.proxy.set_fault(fault)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await seat.proxy.set_fault(Fault.PASS)

    async def _slow_wire(self, seat: Seat) -> None:
        seat.proxy.delay_s = self.rng.uniform(0.02, 0.8)
        try:
            await self._while_it_lasts(LONG_S)
        finally:
            seat.proxy.delay_s = 0.0

    async def _break_every_wire(self, seat: Seat) -> None:
        fault = self.rng.choice(WIRE)
        a, b, c = self.world.seats
        async with self._broken(a, fault), self._broken(b, fault), self._broken(c, fault):
            await self._while_it_lasts(LONG_S)

    async def _stop_store(self, seat: Seat) -> None:
        self.world.emulator.pause()
        try:
            await self._while_it_lasts(LONG_S)
        finally:
            self.world.emulator.resume()

    # --- clocks, disks, people

    async def _step_clock(self, seat: Seat) -> None:
        # Replaced as a whole: half a file would be another time.
        new = seat.clock.with_suffix(".new")
        new.write_text(f"{self.rng.uniform(-7200, 7200):+.0f}")
        new.replace(seat.clock)

    async def _fill_disk(self, seat: Seat) -> None:
        filler = self._disks[seat.name] / "filler"
        try:
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                for _ in range(DISK_BYTES // len(BLOCK)):
                    file.write(BLOCK)
                    await trio.lowlevel.checkpoint()
            await self._while_it_lasts(LONG_S)
        finally:
            filler.unlink(missing_ok=True)

    async def _step_down(self, seat: Seat) -> None:
        with trio.move_on_after(5):
            await self.world.cluster.ask(
                seat.node, "POST", "/api/admin/step-down", json={"reason": "torture", "force": True}
            )

    async def _drop_connection(self, seat: Seat) -> None:
        account_id = self.rng.choice(ACCOUNTS)
        with trio.move_on_after(5):
            await self.world.cluster.ask(seat.node, "POST", f"/api/loopback/cut/{account_id}")
