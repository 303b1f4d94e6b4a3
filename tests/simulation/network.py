"""What is on its way: between hosts and the store, and between hosts.

Everything travels through one queue and is delivered in the world's own time, whether or not
whoever sent it still waits for it. Lives here: how long things take and what becomes of them on
the way. Never lives here: what they mean.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
import trio

from daemon.firestore.errors import Refused, error_for
from machine.ports import LeaseMissing, LeaseRefused, StoreUnavailable
from tests.fakes.shared_store import Passage
from tests.simulation.clock import WorldClock

CALM_S = (0.002, 0.03)
SLOW_REQUEST_S = (0.01, 0.5)
SLOW_REPLY_S = (0.4, 2.4)
LATE_MAX_S = 25.0
SNAPSHOT_LATE_MAX_S = 4.0
STATUSES = [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK]


class Network:
    """The queue. `run` delivers; it must run in the world, behind no gate."""

    def __init__(self, clock: WorldClock) -> None:
        self._clock = clock
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._posted = 0
        self._stirred = trio.Event()

    def post(self, after_s: float, deliver: Callable[[], None]) -> None:
        """Have `deliver` called `after_s` from now, in the world."""
        self._posted += 1
        due = self._clock.now + after_s
        heapq.heappush(self._queue, (due, self._posted, deliver))
        if self._queue[0][1] == self._posted:
            self._stirred.set()

    async def run(self) -> None:
        while True:
            while self._queue and self._queue[0][0] <= self._clock.now:
                heapq.heappop(self._queue)[2]()
            self._stirred = trio.Event()
            until = self._queue[0][0] if self._queue else float("inf")
            with trio.move_on_at(until):
                await self._stirred.wait()

    def deliver_all(self) -> None:
        """Let everything that is on its way arrive now, in its order."""
        while self._queue:
            heapq.heappop(self._queue)[2]()


@dataclass(eq=False)
class Link:
    """One host's way to the store and to the others. Counts, because faults may overlap."""

    rng: random.Random
    cut: int = 0
    """Off from the store altogether."""
    alone: int = 0
    """Off from the other hosts."""
    deaf: int = 0
    """Nothing of the listener comes through."""
    requests_lost: int = 0
    replies_lost: int = 0
    slow: int = 0
    """Requests arrive soon, and the answers take their time."""
    disordered: int = 0
    """The listener's snapshots come late, overtake each other, and old ones come again."""
    rough: float = 0.0
    """The chance that a call meets one of the small faults."""
    told: dict[str, int] = field(default_factory=dict)
    """How often each small fault happened."""

    def hop_s(self) -> float:
        """How long anything takes one way in good weather."""
        return self.rng.uniform(*CALM_S)

    def weather(self, operation: str) -> Passage:
        """How the next call to the store travels."""
        rng = self.rng
        request_s = rng.uniform(*(SLOW_REQUEST_S if self.slow else CALM_S))
        reply_s = rng.uniform(*(SLOW_REPLY_S if self.slow else CALM_S))
        passage = Passage(
            request_s,
            reply_s,
            delivered=not (self.requests_lost or self.cut),
            answered=not self.replies_lost,
        )
        if self.rough and rng.random() < self.rough:
            return self._rough(passage, operation)
        return passage

    def _rough(self, usual: Passage, operation: str) -> Passage:
        rng = self.rng
        kinds = ("lost", "unanswered", "refused", "applied, refused", "twice", "late", "slow")
        kind = rng.choice(kinds)
        self.told[kind] = self.told.get(kind, 0) + 1
        there_s, back_s = usual.request_s, usual.reply_s
        match kind:
            case "lost":
                return Passage(there_s, back_s, delivered=False)
            case "unanswered":
                return Passage(there_s, back_s, usual.delivered, answered=False)
            case "refused":
                return Passage(there_s, back_s, error_before=some_error(rng, operation))
            case "applied, refused":
                error = some_error(rng, operation)
                return Passage(there_s, back_s, usual.delivered, usual.answered, error_after=error)
            case "twice":
                again_s = rng.uniform(0.0, 20.0)
                return Passage(
                    there_s, back_s, usual.delivered, usual.answered, again_after_s=again_s
                )
            case "late":
                return Passage(
                    rng.uniform(1.0, LATE_MAX_S), back_s, usual.delivered, usual.answered
                )
            case _:
                return Passage(there_s, rng.uniform(1.0, 4.0), usual.delivered, usual.answered)


def some_error(rng: random.Random, operation: str) -> Exception:
    """What the adapter makes of one of gRPC's codes, whichever."""
    status = rng.choice(STATUSES)
    error = error_for(operation, status, "injected")
    if not isinstance(error, Refused):
        return error
    if operation != "write":
        # Of any other call the adapter asks the document itself before it says that.
        return StoreUnavailable(f"injected: {error.code}", code=error.code)
    if error.code == "not_found":
        return LeaseMissing("injected: not_found")
    return LeaseRefused(f"injected: {error.code}")
