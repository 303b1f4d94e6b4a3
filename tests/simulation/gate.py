"""Stopping a process between two of its steps, and a scheduler that a seed replays.

Lives here: which tasks are whose, and how they are stopped. Never lives here: who is stopped, when
and why.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar, copy_context
from typing import Any

import trio
import trio._core._run as trio_run

from tests.simulation.clock import HostClock, host_clock


def seed_scheduler(seed: int) -> None:
    """Make the order in which Trio runs its tasks follow from `seed` alone, in this process.

    Trio shuffles the runnable tasks of each round. It has no public way to seed that: this is the
    pair of names that its own Hypothesis plug-in sets (`_hypothesis_plugin_setup`), and asking for
    a documented one is Trio's issue 2675. Sorting before the shuffle makes the order independent
    of where tasks lie in memory.
    """
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio_run._r.seed(seed)


class Gate:
    """What every task of one process passes before each of its steps.

    While it is closed, time goes on and no task of the process takes a step: what wakes a task
    (an answer, a deadline, an event) is kept, and delivered when the gate opens. That is what a
    stopped process sees. A task is never stopped in the middle of a step, that is, between two
    statements with no `await` that waits in between.
    """

    def __init__(self, name: str, clock: HostClock) -> None:
        self.name = name
        self.clock = clock
        self.closed = False
        self.steps = 0
        """How many steps its tasks have taken."""
        self.tasks: set[trio.lowlevel.Task] = set()
        self._parked: list[trio.lowlevel.Task] = []
        self._at_step: tuple[int, Callable[[], None]] | None = None

    def close(self) -> None:
        self.closed = True

    def open(self) -> None:
        self.closed = False
        parked, self._parked = self._parked, []
        for task in parked:
            trio.lowlevel.reschedule(task)

    def open_for_good(self) -> None:
        """Open it, and forget what was to come before one of the steps from here on."""
        self.forget_step()
        self.open()

    def at_step(self, steps_more: int, act: Callable[[], None]) -> None:
        """Call `act` in the world right before the step that comes after `steps_more` others."""
        self._at_step = (self.steps + steps_more, act)

    def forget_step(self) -> None:
        """Nothing happens before a step any more."""
        self._at_step = None

    def spawn(self, nursery: trio.Nursery, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start `work` behind this gate; every task it starts is behind it too."""

        def start() -> None:
            _gate.set(self)
            host_clock.set(self.clock)
            nursery.start_soon(work)

        copy_context().run(start)

    def drive(self, coro: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Run a task's coroutine, one step at a time, as long as the gate is open."""
        answer: Any = None
        while True:
            if self._at_step is not None and self.steps >= self._at_step[0] and not self.closed:
                self._act()
            while self.closed:
                self._parked.append(trio.lowlevel.current_task())
                waiting = trio.lowlevel.wait_task_rescheduled
                yield from waiting(_keep_waiting).__await__()
            self.steps += 1
            try:
                asked = coro.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = yield asked

    def _act(self) -> None:
        assert self._at_step is not None
        act, self._at_step = self._at_step[1], None
        # In the world's context: what is started or timed there is not the process's own.
        _world.run(act)

    def names(self) -> list[str]:
        """The names of the tasks that live behind this gate."""
        return sorted(task.name for task in self.tasks)


_gate: ContextVar[Gate | None] = ContextVar("gate", default=None)
_world = copy_context()


def _keep_waiting(_raise_cancel: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED


class GateKeeper(trio.abc.Instrument):
    """Puts every new task of a gated process behind its gate, and counts them."""

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        gate = task.context.get(_gate)
        if gate is not None:
            gate.tasks.add(task)
            task.coro = gate.drive(task.coro)  # type: ignore[assignment]

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        gate = task.context.get(_gate)
        if gate is not None:
            gate.tasks.discard(task)
