"""Sends at a steady rate to every instance in turn, to see when none of them accepts any.

Lives here: the probes and what they say of a gap. Never lives here: what causes the gap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import trio

from bench.client import ConnectionBroke, Line, NobodyListens, send_request
from bench.rows import median

PASS_ON_S = 0.002
"""Before the next instance is asked when one does not listen."""
GIVE_UP_S = 30.0
IN_FLIGHT_MAX = 4_000


@dataclass(slots=True)
class Probe:
    """One send. Moments are on Trio's clock; `fault` is set when it was not accepted."""

    asked_at: float
    answered_at: float = math.inf
    fault: str | None = None
    broke: bool = False
    """The connection ended under the request: what a crash does to its callers."""

    @property
    def accepted(self) -> bool:
        """Whether an instance took the message over: a 200 or 202."""
        return self.fault is None and self.answered_at < math.inf


@dataclass
class Prober:
    """Asks `ports` in turn, every `every_s`, whether or not earlier ones were answered."""

    ports: Sequence[int]
    account_ids: Sequence[str]
    bearer: str
    every_s: float
    name: str = "probe"
    probes: list[Probe] = field(default_factory=list)
    _idle: dict[int, list[Line]] = field(default_factory=dict)
    _stopping: bool = False

    def stop(self) -> None:
        """Start no further send; `run` returns when all are answered."""
        self._stopping = True

    async def run(self) -> None:
        """Send until stopped."""
        began = trio.current_time()
        limiter = trio.CapacityLimiter(IN_FLIGHT_MAX)
        try:
            async with trio.open_nursery() as nursery:
                number = 0
                while not self._stopping:
                    nursery.start_soon(self._send, number, limiter)
                    number += 1
                    await trio.sleep_until(began + number * self.every_s)
        finally:
            for line in (line for lines in self._idle.values() for line in lines):
                line.close()

    async def _send(self, number: int, limiter: trio.CapacityLimiter) -> None:
        account_id = self.account_ids[number % len(self.account_ids)]
        key = f"{self.name}-{number}"
        request = send_request(self.bearer, account_id, f"{self.name} {number}", key)
        probe = Probe(trio.current_time())
        self.probes.append(probe)
        async with limiter:
            for turn in range(number, number + int(GIVE_UP_S / PASS_ON_S)):
                port = self.ports[turn % len(self.ports)]
                try:
                    await self._ask(port, request, probe)
                except NobodyListens:
                    await trio.sleep(PASS_ON_S)
                    continue
                return
            probe.fault = "nobody listens"

    async def _ask(self, port: int, request: bytes, probe: Probe) -> None:
        idle = self._idle.setdefault(port, [])
        line = idle.pop() if idle else Line(port)
        try:
            answer = await line.ask(request)
        except ConnectionBroke as error:
            probe.fault, probe.broke = f"broke on {error}", True
            return
        probe.answered_at = trio.current_time()
        idle.append(line)
        if answer.status not in (200, 202):
            probe.fault = f"{answer.status} {answer.body[:200].decode(errors='replace')}"

    @property
    def faults(self) -> list[str]:
        """Every send that was not accepted, and why."""
        return [probe.fault for probe in self.probes if probe.fault is not None]


def gap_s(probes: Sequence[Probe], since: float, until: float) -> float:
    """The longest time between two accepted answers in a span, beyond their usual spacing.

    The usual spacing is the median one of the answers before `since`. The span's own end counts
    as an answer: who stops accepting for good has a gap that lasts until then.
    """
    answered = sorted(probe.answered_at for probe in probes if probe.accepted)
    before = [moment for moment in answered if moment < since]
    inside = [before[-1] if before else since]
    inside += [moment for moment in answered if since <= moment <= until]
    usual = median([b - a for a, b in pairwise(before)]) if len(before) > 1 else 0.0
    longest = max(b - a for a, b in pairwise([*inside, until]))
    return max(0.0, longest - usual)
