"""Trying again, in the one place where that is done: `Backoff` and `retry()`.

Adapters never retry; their libraries' own retries are off. What is retried here must be safe to
do twice, and only on the errors that the caller names.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import TypeVar

import trio

T = TypeVar("T")


class TryTimedOut(Exception):
    """One try ran out of its own time. What it asked for may have happened."""

    def __init__(self, try_s: float) -> None:
        super().__init__(f"no answer within {try_s:g} s")
        self.try_s = try_s


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait between tries: `first_s`, then `factor` times more each, up to `cap_s`.

    `jitter` is the share of a wait that is left to chance, 0 (none) to 1 (any wait from nothing
    to the full one), so that those who failed together do not come back together. A wait is
    never longer than `cap_s`.

    Raises `ValueError` at construction for numbers that contradict each other.
    """

    first_s: float
    factor: float
    cap_s: float
    jitter: float

    def __post_init__(self) -> None:
        if not 0 < self.first_s <= self.cap_s < math.inf:
            raise ValueError(f"0 < first_s {self.first_s:g} <= cap_s {self.cap_s:g} < infinity?")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor {self.factor:g} would shorten the waits; it is 1 or more")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter {self.jitter:g} is a share, from 0 to 1")

    def wait_s(self, tries: int, rng: Random) -> float:
        """How long to wait after `tries` failed tries (1 or more)."""
        full_s = self.cap_s
        # Compared as logarithms: `factor ** tries` of an outage that lasts for days overflows.
        if (tries - 1) * math.log(self.factor) < math.log(self.cap_s / self.first_s):
            full_s = self.first_s * self.factor ** (tries - 1)
        return full_s * (1 - self.jitter * rng.random())


async def retry(
    attempt: Callable[[], Awaitable[T]],
    *,
    on: tuple[type[Exception], ...],
    backoff: Backoff,
    try_s: float,
    rng: Random,
    tries_max: int | None = None,
    noted: Callable[[int, Exception, float], None] | None = None,
) -> T:
    """Await `attempt()`, again after each failure named in `on`, until it succeeds.

    Each try has `try_s` seconds; one that takes longer is cancelled and counts as a failure,
    `TryTimedOut`. Deadlines that `attempt` or the caller set themselves are left alone: the
    caller bounds the whole with a scope of its own.

    `noted` is told of each failure that is followed by another try: how many tries have failed,
    the last error, and the wait in seconds.

    Gives up after `tries_max` tries (`None`: never): raises the last error.
    Any other error: passes through at once.
    Cancelled, by whatever scope around it: stops at once.
    """
    if try_s <= 0 or (tries_max is not None and tries_max < 1):
        raise ValueError(f"at least one try is needed, and time for it: {try_s=} {tries_max=}")
    retried: tuple[type[Exception], ...] = (TryTimedOut, *on)
    tries = 0
    while True:
        tries += 1
        try:
            return await _try_once(attempt, try_s)
        except retried as error:
            if tries == tries_max:
                raise
            wait_s = backoff.wait_s(tries, rng)
            if noted is not None:
                noted(tries, error, wait_s)
        await trio.sleep(wait_s)


async def _try_once(attempt: Callable[[], Awaitable[T]], try_s: float) -> T:
    with trio.move_on_after(try_s):
        return await attempt()
    # Only this scope's own cancellation leads here; any other went past it.
    raise TryTimedOut(try_s)
