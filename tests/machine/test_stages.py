"""A lease lost, a SIGTERM, an operator's step-down, at each stage of an instance's life.

Each stage is reached for real, on the virtual clock; then one of the three happens. Afterwards the
instance must be in the right state, and nothing of the term may be left: tasks, connections,
bridges. (Descriptors and memory: `tests/system/test_many_terms.py`.)
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import trio
from trio.testing import MockClock

from machine.records import LeaseState, LeaseWrite, MessageState
from machine.states import State
from tests.fakes.shared_store import Passage
from tests.machine.lab import ANN, BEN, Host, Lab, open_lab


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


HANGS = Passage(delivered=False)


async def acquiring(lab: Lab, host: Host) -> None:
    """The write that takes the lease is on its way, and slow."""
    host.store.schedule("write", Passage(request_s=0.5, reply_s=0.5))
    lab.start(host)
    await trio.sleep(0.2)


async def reading_shared(lab: Lab, host: Host) -> None:
    # The first listing is the warm-up of a PASSIVE instance; the restore's own comes after it.
    host.store.schedule("list_accounts", HANGS, HANGS, HANGS)
    lab.start(host)
    await host.journal.wait_for("restore.started")
    await trio.sleep(0.5)
    assert host.journal.of("restore.found") == []


async def reading_disk(lab: Lab, host: Host) -> None:
    host.local.hanging.add("list_accounts")
    lab.start(host)
    await host.journal.wait_for("restore.started")
    await trio.sleep(0.5)
    assert host.journal.of("restore.found") == []


async def opening(lab: Lab, host: Host) -> None:
    for account_id in (ANN, BEN):
        lab.whatsapp.script(account_id).login_delay_s = 5.0
    lab.start(host)
    await host.journal.wait_for("restore.found")
    await trio.sleep(1)
    assert lab.whatsapp.connections == 2


async def idle(lab: Lab, host: Host) -> None:
    lab.start(host)
    await host.journal.wait_for("restore.finished")
    await trio.sleep(7)
    assert "machine.lease.keep_lease" in left(lab).tasks
    assert any(name.startswith("machine.session") for name in left(lab).tasks)


async def sending(lab: Lab, host: Host) -> None:
    lab.whatsapp.script(ANN).ack_delay_s = 2.0
    await idle(lab, host)
    await host.send(ANN, "in flight", key="k1")
    await trio.sleep(0.5)
    assert host.instance.term is not None


async def draining(lab: Lab, host: Host) -> None:
    await sending(lab, host)
    host.instance.request_drain("a first reason")
    await trio.sleep(0.1)
    assert host.instance.state is State.DRAINING


STAGES: list[Callable[[Lab, Host], Awaitable[None]]] = [
    acquiring,
    reading_shared,
    reading_disk,
    opening,
    idle,
    sending,
    draining,
]


@dataclass
class Left:
    """What of a term is left: all empty, or the term leaks."""

    connections: int
    bridges: int
    tasks: tuple[str, ...]


def living_tasks(task: trio.lowlevel.Task | None = None) -> Iterator[str]:
    """The names of all tasks, whoever's child they are."""
    task = task or trio.lowlevel.current_root_task()
    assert task is not None
    yield task.name
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from living_tasks(child)


def left(lab: Lab) -> Left:
    # The instance's own tasks live as long as it does; all others of the machine are a term's.
    tasks = tuple(
        name
        for name in living_tasks()
        if name.startswith(("machine.", "tests.fakes.connector"))
        and not name.startswith("machine.instance.")
    )
    return Left(lab.whatsapp.connections, lab.whatsapp.bridges, tasks)


NOTHING = Left(0, 0, ())


def take_away(lab: Lab) -> None:
    """Another instance is granted the next epoch, behind the holder's back."""
    view = lab.state.read_lease()
    epoch = view.fence.epoch + 1
    lab.state.write_lease(
        LeaseWrite(
            lease=replace(
                view.lease,
                holder="thief",
                incarnation="thief",
                epoch=epoch,
                state=LeaseState.HELD,
                ttl_s=15.0,
            ),
            fence=replace(
                view.fence, holder="thief", incarnation="thief", epoch=epoch, state=LeaseState.HELD
            ),
        )
    )


def baseline_tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
async def test_lease_lost_at_any_stage_ends_the_term_before_another_acts(
    stage: Callable[[Lab, Host], Awaitable[None]], autojump_clock: MockClock
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        host = lab.make("a")
        await stage(lab, host)
        was_draining = host.instance.state is State.DRAINING
        take_away(lab)
        # The fence's listener tells at once; without it the next renewal would, within 5 s.
        await trio.sleep(3)
        assert left(lab) == NOTHING
        if was_draining:
            await host.ended.wait()
        else:
            assert host.instance.state is State.PASSIVE
            assert host.instance.term is None
        # The thief's documents are untouched: what was lost is not released.
        assert lab.state.read_lease().lease.holder == "thief"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
async def test_sigterm_at_any_stage_drains_and_releases(
    stage: Callable[[Lab, Host], Awaitable[None]], autojump_clock: MockClock
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        host = lab.make("a")
        tasks = baseline_tasks()
        await stage(lab, host)
        host.instance.request_drain("SIGTERM")
        with trio.fail_after(10):
            await host.ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert host.instance.state is State.DRAINING
        assert left(lab) == NOTHING
        assert baseline_tasks() == tasks
        view = lab.state.read_lease()
        assert view.lease.state is LeaseState.RELEASED
        assert view.fence.state is LeaseState.RELEASED
        pending = [m for m in await host.store.list_pending() if m.state is MessageState.SENDING]
        assert pending == []


@pytest.mark.parametrize(
    "stage", [s for s in STAGES if s is not draining], ids=lambda stage: stage.__name__
)
async def test_step_down_at_any_stage_returns_to_passive_and_another_takes_over(
    stage: Callable[[Lab, Host], Awaitable[None]], autojump_clock: MockClock
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        host = lab.make("a")
        await stage(lab, host)
        if host.instance.state is State.PASSIVE:
            # Nothing to step down from: the request is ignored, and the instance goes on.
            host.instance.request_step_down("operator")
            await host.wait_serving()
            return
        other = lab.start(lab.make("b"))
        await other.journal.wait_for("restore.skipped")
        host.instance.request_step_down("operator")
        for account_id in (ANN, BEN):
            lab.whatsapp.script(account_id).login_delay_s = 0.0
        await host.wait(State.PASSIVE)
        assert host.instance.term is None
        assert host.connector.bridges == []
        await other.journal.wait_for("restore.finished")
        assert lab.whatsapp.evictions == []
        assert other.instance.epoch == 2
        assert [t.reason for t in host.instance.transitions][-1] == "operator"
        assert lab.whatsapp.connections == 2
