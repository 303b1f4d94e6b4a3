"""A guard that takes note and kills nobody."""

from __future__ import annotations

from dataclasses import dataclass, field

from machine.records import Grant


@dataclass
class RecordingGuard:
    """A `Guard`: `kill_at` and `releasable` are what it would act on now."""

    kill_at: float | None = None
    releasable: Grant | None = None
    told: list[float | str] = field(default_factory=list)
    """Every deadline, and the other words, in order."""

    def deadline_moved(self, grant: Grant, kill_at: float) -> None:
        self.kill_at, self.releasable = kill_at, grant
        self.told.append(kill_at)

    def term_over(self) -> None:
        self.kill_at = None
        self.told.append("over")

    def lease_released(self) -> None:
        self.releasable = None
        self.told.append("released")
