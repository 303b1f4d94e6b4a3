"""A bounded number of places, given to the most recently used account first.

Lives here: who goes next when accounts cannot all be read, or opened, at once.
"""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from machine.records import Account


def last_used_at(account: Account) -> float:
    """By what accounts are ordered when they cannot all be served at once."""
    return account.last_connected_at or account.created_at


class Places:
    """So many places; whoever was in use last gets the next one that is free."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._asked = 0
        self._waiting: list[tuple[float, int, trio.Event]] = []

    @asynccontextmanager
    async def hold(self, used_at: float) -> AsyncIterator[None]:
        """Wait for a place, and have it for the block."""
        await self.take(used_at)
        try:
            yield
        finally:
            self.give_back()

    async def take(self, used_at: float) -> None:
        """Wait for a place; `used_at` is when the account was last in use."""
        self._asked += 1
        given = trio.Event()
        place = (-used_at, self._asked, given)
        heapq.heappush(self._waiting, place)
        taken = False
        try:
            # All that ask in one instant are compared before the first place is given.
            await trio.lowlevel.checkpoint()
            self._give()
            await given.wait()
            taken = True
        finally:
            if not taken and given.is_set():
                self.give_back()
            elif not taken:
                self._waiting.remove(place)
                heapq.heapify(self._waiting)

    def give_back(self) -> None:
        """Give the place to the next one."""
        self._free += 1
        self._give()

    def _give(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            heapq.heappop(self._waiting)[2].set()
