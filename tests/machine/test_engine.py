"""The machine on Trio: what the library's own asyncio variant does wrong, and ours does not."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from transitions.extensions.asyncio import AsyncMachine
from trio.testing import MockClock

from machine.engine import Engine, Fired, NotTheOwner, TriggerRefused, TrioMachine
from machine.states import State, Trigger, lawful

WAYS: dict[State, tuple[Trigger, ...]] = {
    State.BOOTING: (),
    State.PASSIVE: (Trigger.BOOTED,),
    State.ACTIVE: (Trigger.BOOTED, Trigger.ACTIVATE),
    State.DRAINING: (Trigger.DRAIN,),
}
"""How a new machine gets to each state."""


class Model:
    """A model with a callback for each state, which tests replace as they need."""

    def __init__(self) -> None:
        self.entered: list[tuple[State, dict[str, Any]]] = []
        self.on_active: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.fired: list[Fired] = []
        self.engine = Engine(self, fired=self.fired.append)

    async def on_enter_PASSIVE(self, **given: Any) -> None:  # noqa: N802 - the library's spelling
        self.entered.append((self.engine.state, given))

    async def on_enter_ACTIVE(self, **given: Any) -> None:  # noqa: N802 - the library's spelling
        self.entered.append((self.engine.state, given))
        await self.on_active()

    async def on_enter_DRAINING(self, **given: Any) -> None:  # noqa: N802 - the library's spelling
        self.entered.append((self.engine.state, given))

    def state(self) -> State:
        return self.engine.state

    async def go(self, state: State) -> Engine:
        for trigger in WAYS[state]:
            await self.engine.fire(trigger, reason="test")
        assert self.engine.state is state
        return self.engine


# --- what the table says ---------------------------------------------------------------------


@pytest.mark.parametrize("trigger", Trigger)
@pytest.mark.parametrize("state", State)
async def test_every_pair_moves_as_the_table_says_or_is_refused(
    state: State, trigger: Trigger
) -> None:
    model = Model()
    with model.engine.claim():
        engine = await model.go(state)
        model.fired.clear()
        dest = lawful(state, trigger)
        if dest is None:
            with pytest.raises(TriggerRefused) as refused:
                await engine.fire(trigger, reason="test")
            assert (refused.value.state, refused.value.trigger) == (state, trigger)
            assert engine.state is state
            assert model.fired == []
        else:
            await engine.fire(trigger, reason="test")
            assert engine.state is dest
            assert [(one.source, one.dest, one.trigger) for one in model.fired] == [
                (state, dest, trigger)
            ]


async def test_one_record_for_each_transition_with_its_reason_and_duration(
    autojump_clock: MockClock,
) -> None:
    model = Model()

    async def restore() -> None:
        await trio.sleep(7)

    model.on_active = restore
    with model.engine.claim():
        await model.engine.fire(Trigger.BOOTED, reason="ready")
        await model.engine.fire(Trigger.ACTIVATE, reason="lease acquired", epoch=3)
    assert model.fired == [
        Fired(State.BOOTING, State.PASSIVE, Trigger.BOOTED, "ready", 0.0),
        Fired(State.PASSIVE, State.ACTIVE, Trigger.ACTIVATE, "lease acquired", 7.0),
    ]


async def test_the_callback_gets_what_was_given_to_fire_after_the_state_is_set() -> None:
    model = Model()
    with model.engine.claim():
        await model.engine.fire(Trigger.BOOTED, reason="ready")
        await model.engine.fire(Trigger.ACTIVATE, reason="lease acquired", epoch=3)
    assert model.entered == [
        (State.PASSIVE, {"reason": "ready"}),
        (State.ACTIVE, {"reason": "lease acquired", "epoch": 3}),
    ]


async def test_a_model_without_callbacks_moves_all_the_same() -> None:
    class Plain:
        pass

    engine = Engine(Plain(), fired=lambda fired: None)
    with engine.claim():
        await engine.fire(Trigger.BOOTED, reason="test")
    assert engine.state is State.PASSIVE


def test_a_callback_that_would_never_be_called_is_refused() -> None:
    class Misspelt:
        async def on_enter_Active(self, **given: Any) -> None:  # noqa: N802 - the point
            raise AssertionError

    class Leaving:
        async def on_exit_ACTIVE(self, **given: Any) -> None:  # noqa: N802 - the point
            raise AssertionError

    with pytest.raises(TypeError, match="on_enter_Active"):
        Engine(Misspelt(), fired=lambda fired: None)
    with pytest.raises(TypeError, match="on_exit_ACTIVE"):
        Engine(Leaving(), fired=lambda fired: None)


# --- how a callback can end ------------------------------------------------------------------


async def test_an_error_in_a_callback_is_raised_unchanged_and_recorded() -> None:
    model = Model()
    error = LookupError("restore is broken")

    async def fail() -> None:
        raise error

    model.on_active = fail
    with model.engine.claim():
        await model.go(State.PASSIVE)
        with pytest.raises(LookupError) as raised:
            await model.engine.fire(Trigger.ACTIVATE, reason="test")
        assert raised.value is error
        assert model.fired[-1].dest is State.ACTIVE
        assert model.fired[-1].error is error
        assert model.state() is State.ACTIVE
        await model.engine.fire(Trigger.STEP_DOWN, reason="restore is broken")
    assert model.state() is State.PASSIVE


async def test_a_cancelled_restore_leaves_the_machine_active_and_able_to_step_down(
    autojump_clock: MockClock,
) -> None:
    model = Model()
    model.on_active = trio.sleep_forever
    with model.engine.claim():
        await model.go(State.PASSIVE)
        with trio.move_on_after(5) as term:
            await model.engine.fire(Trigger.ACTIVATE, reason="test")
        assert term.cancelled_caught
        assert model.state() is State.ACTIVE
        assert isinstance(model.fired[-1].error, trio.Cancelled)
        assert model.fired[-1].duration_s == 5
        await model.engine.fire(Trigger.STEP_DOWN, reason="lease lost")
    assert model.state() is State.PASSIVE


async def test_a_failed_child_of_the_restore_reaches_the_caller_as_its_group() -> None:
    model = Model()

    async def crash() -> None:
        raise ZeroDivisionError

    async def restore() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(crash)
            nursery.start_soon(trio.sleep_forever)

    model.on_active = restore
    with model.engine.claim():
        await model.go(State.PASSIVE)
        with pytest.RaisesGroup(ZeroDivisionError):
            await model.engine.fire(Trigger.ACTIVATE, reason="test")


# --- who may fire ----------------------------------------------------------------------------


async def test_nobody_may_fire_a_machine_that_nobody_has_claimed() -> None:
    model = Model()
    with pytest.raises(NotTheOwner, match="nobody has claimed"):
        await model.engine.fire(Trigger.BOOTED, reason="test")
    with model.engine.claim():
        await model.engine.fire(Trigger.BOOTED, reason="test")
    with pytest.raises(NotTheOwner):
        await model.engine.fire(Trigger.ACTIVATE, reason="test")
    assert model.state() is State.PASSIVE


async def test_another_task_may_not_fire_even_between_transitions() -> None:
    model = Model()

    async def meddle() -> None:
        with pytest.raises(NotTheOwner, match="meddle"):
            await model.engine.fire(Trigger.ACTIVATE, reason="test")

    with model.engine.claim():
        await model.go(State.PASSIVE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(meddle)
    assert model.state() is State.PASSIVE
    assert len(model.fired) == 1


async def test_a_claimed_machine_is_not_claimed_twice() -> None:
    model = Model()
    with model.engine.claim():
        with pytest.raises(RuntimeError, match="already"), model.engine.claim():
            pass
        await model.engine.fire(Trigger.BOOTED, reason="the first claim still holds")


async def test_the_model_gets_no_trigger_methods() -> None:
    model = Model()
    names = [trigger.value for trigger in Trigger]
    names += ["trigger", "may_trigger", "to_ACTIVE", "may_activate", "is_ACTIVE"]
    assert [name for name in names if hasattr(model, name)] == []


async def test_a_trigger_from_a_callback_is_refused_at_once_and_the_rest_goes_on() -> None:
    model = Model()

    async def reenter() -> None:
        with pytest.raises(TriggerRefused, match="not over yet"):
            await model.engine.fire(Trigger.STEP_DOWN, reason="from inside")

    model.on_active = reenter
    with model.engine.claim():
        await model.go(State.ACTIVE)
        assert [one.dest for one in model.fired] == [State.PASSIVE, State.ACTIVE]
        await model.engine.fire(Trigger.STEP_DOWN, reason="from outside")
    assert model.state() is State.PASSIVE


async def test_a_trigger_from_a_callbacks_own_nursery_is_refused_instead_of_wedging(
    autojump_clock: MockClock,
) -> None:
    model = Model()
    refused: list[TriggerRefused] = []

    async def renew() -> None:
        try:
            await model.engine.fire(Trigger.STEP_DOWN, reason="lease lost")
        except TriggerRefused as error:
            refused.append(error)

    async def restore() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(renew)

    model.on_active = restore
    with trio.fail_after(1), model.engine.claim():
        await model.go(State.ACTIVE)
    assert [type(error) for error in refused] == [NotTheOwner]
    assert model.state() is State.ACTIVE


# --- the traps of the library, each shown in it and absent here ----------------------------------


class NaivePort(AsyncMachine):
    """What one writes first: only the two places replaced that need an asyncio loop."""

    @staticmethod
    async def await_all(callables: Any) -> list[Any]:
        return [await call() for call in callables]

    async def process_context(self, func: Any, model: object) -> bool:
        return await self._process_async(func, model)


class Light:
    """A model of the library's own kind."""

    state: str

    def __init__(self) -> None:
        self.on_green: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint

    async def on_enter_green(self) -> None:
        await self.on_green()


def naive(model: Light, **options: Any) -> NaivePort:
    return NaivePort(
        model,
        states=["red", "green"],
        initial="red",
        transitions=[{"trigger": "go", "source": "red", "dest": "green"}],
        **options,
    )


def test_trap_the_library_answers_false_for_a_cancelled_transition() -> None:
    async def scenario() -> tuple[bool, str]:
        light = Light()
        light.on_green = asyncio.Event().wait  # type: ignore[assignment]
        AsyncMachine(
            light, states=["red", "green"], initial="red", transitions=[["go", "red", "green"]]
        )
        task = asyncio.create_task(light.go())  # type: ignore[attr-defined]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        return await task, light.state

    # Cancelled, yet nobody is told; and the machine is in the new state.
    assert asyncio.run(scenario()) == (False, "green")


async def test_trap_on_exception_swallows_a_cancellation(autojump_clock: MockClock) -> None:
    light = Light()
    light.on_green = trio.sleep_forever
    seen: list[bool] = []
    naive(light, on_exception=lambda: seen.append(True))
    with trio.move_on_after(1) as scope:
        await light.go()  # type: ignore[attr-defined]
        seen.append(False)
    assert seen == [True, False]
    assert not scope.cancelled_caught


async def test_trap_an_async_finalize_event_swallows_a_cancellation(
    autojump_clock: MockClock,
) -> None:
    light = Light()

    async def finish() -> None:
        await trio.sleep(10)

    naive(light, finalize_event=finish)
    after: list[float] = []
    with trio.move_on_after(1) as scope:
        await light.go()  # type: ignore[attr-defined]
        after.append(trio.current_time())
    assert after == [1]
    assert not scope.cancelled_caught


def test_the_hooks_that_swallow_cannot_be_given_to_ours() -> None:
    taken = inspect.signature(TrioMachine).parameters
    assert set(taken) == {"model", "states", "initial", "transitions", "model_attribute"}


async def test_trap_queued_says_done_before_anything_is() -> None:
    light = Light()
    seen: list[tuple[bool, str]] = []

    async def nested() -> None:
        seen.append((await light.back(), light.state))  # type: ignore[attr-defined]

    light.on_green = nested
    naive(light, queued=True).add_transition("back", "green", "red")
    await light.go()  # type: ignore[attr-defined]
    assert seen == [(True, "green")]


def test_trap_the_library_lets_anything_lead_anywhere() -> None:
    light = Light()
    naive(light)
    assert hasattr(light, "to_green")


def test_no_trigger_of_ours_is_outside_the_table() -> None:
    model = Model()
    assert set(model.engine._machine.events) == {trigger.value for trigger in Trigger}


def test_trap_the_library_shares_its_bookkeeping_between_machines() -> None:
    one, two = naive(Light()), naive(Light())
    assert one.async_tasks is two.async_tasks
    assert one.current_context is two.current_context


async def test_two_machines_of_ours_share_nothing(autojump_clock: MockClock) -> None:
    one, two = Model(), Model()
    machines = one.engine._machine, two.engine._machine
    for shared in ("async_tasks", "protected_tasks", "current_context"):
        assert getattr(machines[0], shared) is not getattr(machines[1], shared)

    async def run_the_other() -> None:
        with two.engine.claim():
            await two.go(State.ACTIVE)
            await two.engine.fire(Trigger.DRAIN, reason="test")

    # One machine's callback moves another machine, half-way through its own transition.
    one.on_active = run_the_other
    with one.engine.claim():
        await one.go(State.ACTIVE)
    assert (one.state(), two.state()) == (State.ACTIVE, State.DRAINING)


async def test_trap_a_naive_port_lets_two_transitions_overlap(autojump_clock: MockClock) -> None:
    light = Light()
    light.on_green = trio.sleep_forever
    naive(light).add_transition("back", "green", "red")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(light.go)  # type: ignore[attr-defined]
        await trio.testing.wait_all_tasks_blocked()
        # `red`, while the callback of `green` is still running.
        await light.back()  # type: ignore[attr-defined]
        assert light.state == "red"
        nursery.cancel_scope.cancel()


# --- the rest of what the library calls ----------------------------------------------------------


def toy(model: Light, **row: Any) -> TrioMachine:
    machine = TrioMachine(
        model,
        states=State,
        initial=State.PASSIVE,
        transitions=[{"trigger": "activate", "source": "PASSIVE", "dest": "ACTIVE", **row}],  # type: ignore[typeddict-item]
        model_attribute="state",
    )
    machine.owner = trio.lowlevel.current_task()
    return machine


async def test_the_librarys_conditions_work_and_are_asked_in_order() -> None:
    asked: list[str] = []

    async def first() -> bool:
        await trio.lowlevel.checkpoint()
        asked.append("first")
        return True

    def second() -> bool:
        asked.append("second")
        return False

    light = Light()
    machine = toy(light, conditions=[first, second])
    assert not await machine.events["activate"].trigger(light)
    assert asked == ["first", "second"]
    assert light.state == "PASSIVE"


async def test_callbacks_run_one_after_the_other_in_the_callers_task() -> None:
    tasks: list[tuple[str, trio.lowlevel.Task]] = []

    def callback(name: str) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            tasks.append((name, trio.lowlevel.current_task()))
            await trio.lowlevel.checkpoint()
            tasks.append((name, trio.lowlevel.current_task()))

        return run

    light = Light()
    machine = toy(light, before=[callback("a"), callback("b")], after=callback("c"))
    assert await machine.events["activate"].trigger(light)
    assert [name for name, _ in tasks] == ["a", "a", "b", "b", "c", "c"]
    assert {task for _, task in tasks} == {trio.lowlevel.current_task()}


async def test_a_transition_beside_the_machines_own_is_refused_loudly() -> None:
    light = Light()
    with pytest.raises(RuntimeError, match="beside"):
        await toy(light).cancel_running_transitions(light, "activate")


async def test_an_error_in_a_callback_is_not_logged_by_the_library(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model()
    model.on_active = trio.sleep_forever
    caplog.set_level("WARNING")
    with model.engine.claim():
        await model.go(State.PASSIVE)
        with trio.CancelScope() as term:
            term.cancel()
            await model.engine.fire(Trigger.ACTIVATE, reason="test")
    assert term.cancelled_caught
    assert caplog.records == []
