"""One task moves the machine: `Instance.run()`. Anybody else who tries fails, loudly."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

import machine
from machine.engine import NotTheOwner, TriggerRefused
from machine.instance import Instance
from machine.states import State, Trigger
from machine.term import Term
from tests.machine.lab import ANN, LIMITS, TIMING, Lab, open_lab


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class FiringInstance(Instance):
    """An instance whose callback for ACTIVE fires a trigger itself."""

    async def on_enter_ACTIVE(self, reason: str, term: Term) -> None:  # noqa: N802 - as the library
        await self._engine.fire(Trigger.STEP_DOWN, reason="from a callback")


class SpawningInstance(Instance):
    """An instance whose callback for ACTIVE lets a task of its own fire."""

    refused: Exception | None = None

    async def on_enter_ACTIVE(self, reason: str, term: Term) -> None:  # noqa: N802 - as the library
        async def fire() -> None:
            try:
                await self._engine.fire(Trigger.DRAIN, reason="from a task of a callback")
            except TriggerRefused as refused:
                self.refused = refused

        async with trio.open_nursery() as nursery:
            nursery.start_soon(fire)


def make(lab: Lab, kind: type[Instance]) -> Instance:
    host = lab.make("a")
    return kind(host.instance.identity, ports=host.ports, timing=TIMING, limits=LIMITS)


@pytest.mark.parametrize("trigger", Trigger)
async def test_another_task_cannot_fire_any_trigger(
    autojump_clock: MockClock, trigger: Trigger
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.start(lab.make("a"))
        await a.journal.wait_for("restore.finished")
        made = len(a.instance.transitions)
        with pytest.raises(NotTheOwner):
            await a.instance._engine.fire(trigger, reason="not mine to fire")
        assert a.instance.state is State.ACTIVE
        assert len(a.instance.transitions) == made


async def test_nobody_can_fire_before_run_or_after_it(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        with pytest.raises(NotTheOwner):
            await a.instance._engine.fire(Trigger.BOOTED, reason="early")
        lab.start(a)
        await a.journal.wait_for("restore.finished")
        a.instance.request_drain("done")
        await a.ended.wait()
        with pytest.raises(NotTheOwner):
            await a.instance._engine.fire(Trigger.DRAIN, reason="late")


async def test_a_second_run_is_refused(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = lab.start(lab.make("a"))
        await a.journal.wait_for("restore.finished")
        with pytest.raises(RuntimeError, match="already"):
            await a.instance.run()
        assert a.instance.state is State.ACTIVE


async def test_a_callback_that_fires_raises_and_the_lease_is_given_back(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        instance = make(lab, FiringInstance)
        with pytest.RaisesGroup(TriggerRefused, flatten_subgroups=True):
            await instance.run()
        assert lab.state.read_lease().lease.state == "released"
        assert lab.whatsapp.bridges == 0


async def test_a_task_of_a_callback_cannot_fire_and_the_machine_is_not_wedged(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        instance = make(lab, SpawningInstance)
        assert isinstance(instance, SpawningInstance)
        lab.nursery.start_soon(instance.run)
        while instance.refused is None:
            await instance.wait_changed()
        assert isinstance(instance.refused, NotTheOwner)
        assert instance.state is State.ACTIVE
        instance.request_drain("goes on")
        while instance.alive:
            await instance.wait_changed()
        assert [t.dest for t in instance.transitions] == ["PASSIVE", "ACTIVE", "DRAINING"]


def test_only_instance_py_mentions_fire() -> None:
    folder = Path(machine.__file__).parent
    firing = {
        path.name
        for path in folder.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "fire"
    }
    assert firing == {"instance.py"}
