"""The clocks besides Trio's, derived from Trio's."""

from __future__ import annotations

import trio

WALL_AT_START = 1_700_000_000.0


class FakeClocks:
    """`Clocks` on Trio's clock: `wall_offset_s` is this host's error, `suspend` its sleep."""

    def __init__(self, *, wall_offset_s: float = 0.0) -> None:
        self.wall_offset_s = wall_offset_s
        self.suspended_s = 0.0

    def wall(self) -> float:
        return WALL_AT_START + self.boottime() + self.wall_offset_s

    def boottime(self) -> float:
        return trio.current_time() + self.suspended_s

    def suspend(self, seconds: float) -> None:
        """Let time pass that Trio's clock does not see."""
        self.suspended_s += seconds
