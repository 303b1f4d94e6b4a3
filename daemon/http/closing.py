"""The end of an API: announced once, with the moment by which every answer must be on its way."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

T = TypeVar("T")


class Closing:
    """Whether the API has begun to end, and what is bounded by that.

    Between calls: `_bound` has the scope of each call of `in_time`, and of no other.
    """

    def __init__(self) -> None:
        self._begun = trio.Event()
        self._answer_by = math.inf
        self._bound: set[trio.CancelScope] = set()

    @property
    def begun(self) -> bool:
        """Whether no new connection is accepted any more."""
        return self._begun.is_set()

    async def wait_begun(self) -> None:
        """Wait until the API begins to end."""
        await self._begun.wait()

    def begin(self, answer_by: float = math.inf) -> None:
        """Announce the end; what is inside `in_time` is cancelled at `answer_by` (Trio's clock)."""
        self._answer_by = answer_by
        for scope in self._bound:
            scope.deadline = answer_by
        self._begun.set()

    async def in_time(self, answer: Callable[[], Awaitable[T]]) -> T | None:
        """What `answer` answers; `None` when the end came first, in time to say so instead."""
        with trio.CancelScope(deadline=self._answer_by) as scope:
            self._bound.add(scope)
            try:
                return await answer()
            finally:
                self._bound.discard(scope)
        return None
