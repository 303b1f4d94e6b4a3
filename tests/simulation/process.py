"""One life of an instance, from start to crash or drain, as the world sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from machine.instance import Instance
from machine.lease import LeaseTiming
from tests.fakes.local_store import FakeLocalStore
from tests.simulation.gate import Gate


@dataclass(eq=False)
class Process:
    """A host's process. `pauses` counts how often it was stopped; `thawed_at` when it went on."""

    name: str
    incarnation: str
    gate: Gate
    timing: LeaseTiming
    disk: FakeLocalStore
    instance: Instance = field(init=False)
    pauses: int = 0
    thawed_at: float = -1.0
    dead: bool = False
    """Crashed: it never takes a step again."""
