"""Three instances of one group as real processes, each behind a proxy to a real emulator.

Whatever ends is started again, as systemd or Kubernetes would do it. Callers send through whichever
instance takes the connection. Nothing is judged here (`history`) and nothing is broken (`nemesis`).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import httpx
import trio

from tests.emulator import Emulator, start_emulator
from tests.fault_proxy import FaultProxy, open_fault_proxy
from tests.system.cluster import Cluster, Node, alive, firestore_env, open_cluster
from tests.system.test_s3_store_hangs import TIMES, TTL_S

GROUP = "tortured"
NAMES = ("a", "b", "c")
ACCOUNTS = ("ann", "ben", "cem")
SEND_EVERY_S = 0.25
RESTART_S = (0.2, 3.0)
"""How long a supervisor takes to start again what has ended."""
ASKED_S = 25.0
"""How long a caller tries before it gives up: with the same key, so that nothing is sent twice."""
ANSWER_S = 8.0
STARTED_S = 60.0


@dataclass
class Seat:
    """One instance's place: its process, its way to the store, its disk."""

    node: Node
    proxy: FaultProxy
    clock: Path
    """The file that shifts its wall clock; tests/torture/instance.py reads it."""
    kept_down: bool = False
    ended: Counter[int] = field(default_factory=Counter)
    """How often its process ended with which exit code."""
    daemon_seen: int = 0

    @property
    def name(self) -> str:
        return self.node.name

    def pids(self) -> list[int]:
        """Warden and daemon, as far as they are there."""
        process = self.node.process
        if process is None or process.poll() is not None:
            return []
        with suppress(LookupError):
            return [process.pid, self.node.daemon_pid]
        return [process.pid]


@dataclass
class Sent:
    """What callers were told. `failed`: final refusals, which none of the faults explains."""

    asked: int = 0
    accepted: dict[str, str] = field(default_factory=dict)
    """Message id → text."""
    unanswered: Counter[str] = field(default_factory=Counter)
    """Why calls were not accepted, tried again or not: they may or may not have happened."""
    failed: list[str] = field(default_factory=list)
    last_accepted_at: float = 0.0


class World:
    """The group under torture."""

    def __init__(
        self, cluster: Cluster, emulator: Emulator, seats: list[Seat], rng: random.Random
    ) -> None:
        self.cluster = cluster
        self.emulator = emulator
        self.seats = seats
        self.rng = rng
        self.sent = Sent()
        self.stopping = False

    @property
    def ttl_s(self) -> float:
        """The lease's."""
        return float(self.cluster.env["WATCHKEEPER_LEASE_TTL_S"])

    @property
    def project(self) -> str:
        return self.cluster.env["WATCHKEEPER_FIRESTORE_PROJECT"]

    def dismiss_wardens(self) -> None:
        """Run every daemon alone; what stops or kills a warden then hits the daemon."""
        for seat in self.seats:
            seat.node.command = ("daemon", "run", "--no-warden")

    # --- a supervisor for each

    async def keep_running(self, seat: Seat) -> None:
        """Start the seat's process, and again whenever it has ended."""
        while True:
            if not seat.kept_down:
                seat.node.spawn()
                seat.ended[await self._wait_ended(seat)] += 1
            await trio.sleep(self.rng.uniform(*RESTART_S))

    async def _wait_ended(self, seat: Seat) -> int:
        process = seat.node.process
        assert process is not None
        while process.poll() is None:
            for pid in seat.pids()[1:]:
                seat.daemon_seen = pid
            await trio.sleep(0.05)
        # A warden that was killed takes its daemon with it, a moment later.
        while seat.daemon_seen and alive(seat.daemon_seen):
            await trio.sleep(0.01)
        seat.node.process = None
        return process.returncode

    # --- callers

    async def keep_sending(self) -> None:
        """A message every `SEND_EVERY_S`, each on its own; returns when stopped and all ended."""
        async with trio.open_nursery() as nursery:
            for number in count():
                if self.stopping:
                    return
                nursery.start_soon(self._send, number)
                await trio.sleep(SEND_EVERY_S)

    async def _send(self, number: int) -> None:
        """Ask the instances in turn, always with the same key, until one accepts."""
        self.sent.asked += 1
        text, account_id = f"message {number}", ACCOUNTS[number % len(ACCOUNTS)]
        with trio.move_on_after(ASKED_S):
            for turn in count(number):
                node = self.seats[turn % len(self.seats)].node
                try:
                    with trio.fail_after(ANSWER_S):
                        answer = await self.cluster.send(node, account_id, text, key=f"k{number}")
                except (httpx.TransportError, trio.TooSlowError) as error:
                    self.sent.unanswered[type(error).__name__] += 1
                else:
                    if self._take(answer, text):
                        return
                await trio.sleep(0.2)
        self.sent.unanswered["given up"] += 1

    def _take(self, answer: httpx.Response, text: str) -> bool:
        """Note an answer; whether it was the last word."""
        if answer.status_code in (200, 202):
            self.sent.accepted[answer.json()["messageId"]] = text
            self.sent.last_accepted_at = trio.current_time()
            return True
        code = str(answer.json().get("error"))
        if answer.status_code in (503, 504):
            self.sent.unanswered[code] += 1
            return False
        self.sent.failed.append(f"{text}: {answer.status_code} {code}: {answer.text[:300]}")
        return True

    # --- asking about

    async def active_seat(self) -> Seat | None:
        """A seat whose instance says that it is ACTIVE."""
        for seat in self.seats:
            with suppress(httpx.TransportError), trio.move_on_after(1.0):
                if await self.cluster.answers(seat.node, "/active"):
                    return seat
        return None

    async def wait_active(self, within_s: float) -> Seat:
        """Raises `trio.TooSlowError`."""
        with trio.fail_after(within_s):
            while (seat := await self.active_seat()) is None:
                await trio.sleep(0.05)
        return seat

    async def wait_all_up(self) -> None:
        """Until every instance answers."""
        with trio.fail_after(STARTED_S):
            for seat in self.seats:
                while not await self.cluster.answers(seat.node, "/readyz"):
                    await trio.sleep(0.05)


@asynccontextmanager
async def open_world(
    directory: Path, seed: int, disks: dict[str, Path], times: Mapping[str, str] = TIMES
) -> AsyncIterator[World]:
    """The group, initialised and not yet running. `disks` are state directories on own disks.

    `times` are the lease's.
    """
    with start_emulator() as emulator:
        env = firestore_env(directory, emulator.host) | dict(times)
        # JSON lines are what the history reads; every detail is kept for whoever looks at it later.
        env |= {"WATCHKEEPER_LOG_FORMAT": "json", "WATCHKEEPER_DRAIN_LINGER_S": "3"}
        env["WATCHKEEPER_GROUP"] = GROUP
        async with open_cluster(directory, env) as cluster, AsyncExitStack() as stack:
            seats = []
            for name in NAMES:
                proxy = await stack.enter_async_context(open_fault_proxy(emulator.host))
                clock = directory / f"clock-{name}"
                clock.write_text("+0")
                extra = {"FIRESTORE_EMULATOR_HOST": proxy.host, "TORTURE_CLOCK": str(clock)}
                if name in disks:
                    extra["WATCHKEEPER_STATE_DIR"] = str(disks[name] / "state")
                node = cluster.make(name, **extra)
                node.command = ("tests.torture.instance", "run")
                seats.append(Seat(node, proxy, clock))
            yield World(cluster, emulator, seats, random.Random(f"{seed} world"))


LEASE_TTL_S = TTL_S
