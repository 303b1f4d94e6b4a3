"""`transitions` on Trio: one machine, one model, one task that moves it.

Here: what the library leaves to whoever brings another event loop, and `Engine`, which the
instance fires its triggers through. Never here: what a state means or does (`machine.instance`),
and which transitions are lawful (`machine.states`).

The library imports asyncio; no asyncio loop is ever started.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import trio
from transitions import State as Node
from transitions.extensions.asyncio import AsyncEvent, AsyncEventData, AsyncMachine

from machine.states import INITIAL, TRANSITIONS, State, Trigger

if TYPE_CHECKING:
    # It is in the library's stubs only.
    from transitions.extensions.asyncio import AsyncTransitionConfigDict


class TriggerRefused(Exception):
    """The trigger may not be fired now: from this state, or while another one is running."""

    def __init__(self, state: str, trigger: str, why: str) -> None:
        super().__init__(f"{trigger} refused in {state}: {why}")
        self.state = state
        self.trigger = trigger
        self.why = why


class NotTheOwner(TriggerRefused):
    """The trigger was fired by a task other than the one that has claimed the machine."""


@dataclass(frozen=True, slots=True)
class Fired:
    """One transition that took place. `duration_s` is how long its callbacks took.

    `error` is what a callback ended with, a cancellation included; it was raised to the caller.
    The machine is in `dest` all the same.
    """

    source: State
    dest: State
    trigger: Trigger
    reason: str
    duration_s: float
    error: BaseException | None = None


class TrioEvent(AsyncEvent):
    """A trigger that is admitted first, and whose callbacks' exceptions reach the caller as is.

    The library's own `_trigger` catches every exception, `trio.Cancelled` too, to log it as an
    error and to offer it to `on_exception` and `finalize_event`. Both may swallow it.
    """

    # The ignored overrides: the library's stubs make an `async def` out of a plain one likewise.
    machine: TrioMachine

    async def trigger(self, model: object, *args: Any, **kwargs: Any) -> bool:  # type: ignore[override]
        """Run the trigger; whether a transition took place. Raises `TriggerRefused`."""
        self.machine.admit(model, self.name)
        return await super().trigger(model, *args, **kwargs)

    async def _trigger(self, event_data: AsyncEventData) -> bool:  # type: ignore[override]
        event_data.state = self.machine.get_model_state(event_data.model)
        if self._is_valid_source(event_data.state):
            await self._process(event_data)
        return bool(event_data.result)

    def _is_valid_source(self, state: Node) -> bool:
        # Not the library's `MachineError`: a callback may raise one of those for its own reasons.
        if state.name not in self.transitions:
            raise TriggerRefused(state.name, self.name, "the table has no such transition")
        return True


class TrioMachine(AsyncMachine):
    """`AsyncMachine` without asyncio: callbacks run in order, in the task that fired.

    Between two triggers nothing is under way. A trigger that meets another one half-way is
    refused with `TriggerRefused`: nothing is cancelled, queued or waited for. A machine that
    nobody has claimed does not move.

    The model gets no trigger methods: triggers go through `machine.events`, or `Engine.fire()`.
    """

    event_cls = TrioEvent

    def __init__(
        self,
        model: object,
        *,
        states: type[Enum],
        initial: Enum,
        transitions: Sequence[AsyncTransitionConfigDict],
        model_attribute: str,
    ) -> None:
        self.owner: trio.lowlevel.Task | None = None
        self._firing: trio.lowlevel.Task | None = None
        # The library keeps these three on the class: every machine of a process would share
        # them, and a transition of one would look like part of another's.
        self.async_tasks = {}
        self.protected_tasks = []
        self.current_context = ContextVar("current_context", default=None)
        super().__init__(
            model=model,
            states=states,
            initial=initial,
            transitions=transitions,
            model_attribute=model_attribute,
            # A queued trigger says "done" before it has run.
            queued=False,
            # `to_ACTIVE` would lead from anywhere to anywhere, past the table.
            auto_transitions=False,
            ignore_invalid_triggers=False,
            send_event=False,
        )

    def admit(self, model: object, trigger: str) -> None:
        """Raise `TriggerRefused` unless the calling task may fire `trigger` now."""
        task = trio.lowlevel.current_task()
        state = getattr(model, self.model_attribute)
        if self.owner is None:
            raise NotTheOwner(state, trigger, "nobody has claimed the machine")
        if self.owner is not task:
            raise NotTheOwner(
                state, trigger, f"{task.name} asks; the machine is {self.owner.name}'s"
            )
        if self._firing is not None:
            raise TriggerRefused(state, trigger, "another transition is not over yet")

    @staticmethod
    async def await_all(
        callables: Sequence[Callable[[], Awaitable[Any]]],
    ) -> list[Any]:
        """Run the callables one after the other in the caller's task; their results, in order.

        The first that raises, or is cancelled, ends it: those after it do not run.
        """
        return [await call() for call in callables]

    async def process_context(self, func: Callable[[], Awaitable[Any]], model: object) -> bool:
        """Run one admitted trigger, remembering that it is under way.

        Cancelled: passes through, and the next trigger finds the machine free.
        """
        self._firing = trio.lowlevel.current_task()
        try:
            return await self._process_async(func, model)
        finally:
            self._firing = None

    async def cancel_running_transitions(self, model: object, msg: str | None = None) -> None:
        """Cancel nothing: the one transition under way is the one that asks.

        The library calls this when a transition is about to happen, to end an overtaken one.
        """
        if self._firing is not trio.lowlevel.current_task():
            raise RuntimeError(f"the transition {msg} runs beside the machine's own")

    def _checked_assignment(self, model: object, name: str, func: Callable[..., Any]) -> None:
        """Give the model nothing: a method like `instance.activate()` invites everyone to fire."""


MODEL_ATTRIBUTE = "machine_state"
"""Where the library keeps the model's state. Read it as `Engine.state`."""


class Engine:
    """The machine of `machine.states`, moving one model.

    `model`'s methods `on_enter_<STATE>`, where it has them, are awaited after the state is set,
    with `reason` and whatever else was given to `fire()` as keyword arguments.

    `fired` is called once for each transition, when its callbacks are over, however they ended.
    It does not wait, and must not raise.

    Raises `TypeError` at construction when `model` has an `on_enter_…` that would never be
    called, or an `on_exit_…`: leaving a state has nothing that can fail.
    """

    def __init__(self, model: object, *, fired: Callable[[Fired], None]) -> None:
        self._model = model
        self._fired = fired
        self._machine = TrioMachine(
            model,
            states=State,
            initial=INITIAL,
            transitions=[
                {"trigger": rule.trigger.value, "source": rule.source, "dest": rule.dest}
                for rule in TRANSITIONS
            ],
            model_attribute=MODEL_ATTRIBUTE,
        )
        self._check_callbacks()

    def _check_callbacks(self) -> None:
        # The library finds callbacks by their names, and passes over a misspelt one in silence.
        wired = {name for node in self._machine.states.values() for name in node.on_enter}
        for name in dir(type(self._model)):
            if name.startswith("on_enter_") and name not in wired:
                raise TypeError(f"{name} would never be called: there is no such state")
            if name.startswith("on_exit_"):
                raise TypeError(f"{name}: leaving a state has no callbacks")

    @property
    def state(self) -> State:
        """Where the machine stands."""
        state: State = getattr(self._model, MODEL_ATTRIBUTE)
        return state

    @contextmanager
    def claim(self) -> Iterator[None]:
        """Make the calling task the only one that may fire, until the block ends.

        Raises `RuntimeError` when the machine is claimed already.
        """
        if self._machine.owner is not None:
            raise RuntimeError(f"the machine is {self._machine.owner.name}'s already")
        self._machine.owner = trio.lowlevel.current_task()
        try:
            yield
        finally:
            self._machine.owner = None

    async def fire(self, trigger: Trigger, *, reason: str, **given: object) -> None:
        """Move the machine, and wait for the new state's callback.

        The state is set before the callback runs and stays set however the callback ends: what
        is lawful after a failure or a cancellation is what is lawful from the new state.

        Refused: raises `TriggerRefused`, or `NotTheOwner` in a task that has not claimed the
        machine. The machine has not moved.
        A callback raises, or is cancelled: passes through. The machine has moved.
        """
        event = self._machine.events[trigger.value]
        source = self.state
        started_at = trio.current_time()
        error: BaseException | None = None
        try:
            if not await event.trigger(self._model, reason=reason, **given):
                raise TriggerRefused(source, trigger, "a condition of the table says no")
        except BaseException as raised:
            error = raised
            raise
        finally:
            # A refused trigger meets no change here, not even one fired from a callback: the
            # transition that is under way set its state before the callback ran.
            if self.state is not source:
                duration_s = trio.current_time() - started_at
                self._fired(Fired(source, self.state, trigger, reason, duration_s, error))
