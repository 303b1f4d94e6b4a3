"""Stopping a process between two of its steps, and a scheduler that a seed replays.

Lives here: all that touches Trio's inside. Never lives here: who is stopped, when and why.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar, copy_context
from typing import Any

import trio
import trio._core._run as trio_run


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

    def __init__(self, name: str) -> None:
        self.name = name
        self.closed = False
        self.tasks: set[trio.lowlevel.Task] = set()
        self._parked: list[trio.lowlevel.Task] = []

    def close(self) -> None:
        self.closed = True

    def open(self) -> None:
        self.closed = False
        parked, self._parked = self._parked, []
        for task in parked:
            trio.lowlevel.reschedule(task)

    def spawn(self, nursery: trio.Nursery, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start `work` behind this gate; every task it starts is behind it too."""

        def start() -> None:
            _gate.set(self)
            nursery.start_soon(work)

        copy_context().run(start)

    def drive(self, coro: Coroutine[Any, Any, Any]) -> Generator[Any, Any, Any]:
        """Run a task's coroutine, one step at a time, as long as the gate is open."""
        answer: Any = None
        while True:
            while self.closed:
                self._parked.append(trio.lowlevel.current_task())
                waiting = trio.lowlevel.wait_task_rescheduled
                yield from waiting(_keep_waiting).__await__()
            try:
                asked = coro.send(answer)
            except StopIteration as stop:
                return stop.value
            answer = yield asked

    def names(self) -> list[str]:
        """The names of the tasks that live behind this gate."""
        return sorted(task.name for task in self.tasks)


_gate: ContextVar[Gate | None] = ContextVar("gate", default=None)


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
