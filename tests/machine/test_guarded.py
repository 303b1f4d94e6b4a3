"""What a guard outside the process is told of a term, and that its kill comes in time."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from machine.lease import LeaseTiming
from machine.states import State
from tests.fakes.shared_store import Passage
from tests.machine.lab import ANN, TIMING, open_lab


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@pytest.mark.parametrize(
    "timing",
    [
        LeaseTiming(),
        LeaseTiming(ttl_s=4.0, renew_s=1.0, attempt_s=0.6, margin_s=1.0),
        LeaseTiming(ttl_s=1.3, renew_s=1.0, attempt_s=0.1, margin_s=0.1, drift=0.0),
        LeaseTiming(ttl_s=3600.0, drift=0.009),
    ],
)
def test_a_kill_lies_between_the_deadline_and_the_expiry(timing: LeaseTiming) -> None:
    assert timing.term_s < timing.term_s + timing.kill_grace_s
    assert timing.ttl_s - (timing.term_s + timing.kill_grace_s) >= timing.margin_s / 2 - 1e-9


async def test_the_guard_is_told_before_anything_of_the_term_runs(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        a.connector.start_s = 2.0
        lab.start(a)
        await a.journal.wait_for("lease.acquired")
        await trio.sleep(1)
        assert lab.whatsapp.bridges == 0
        assert a.guard.kill_at == pytest.approx(TIMING.term_s + TIMING.kill_grace_s, abs=0.06)


async def test_each_renewal_tells_the_deadline_of_the_moment_it_was_asked(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        slow = Passage(request_s=0.5, reply_s=1.0)
        lab.start(a)
        await a.journal.wait_for("lease.acquired")
        a.store.schedule("write", slow, slow)
        await a.journal.wait_for("lease.renewed", 2)
        term = a.term
        first, second, third = (moment for moment in a.guard.told if isinstance(moment, float))
        assert second - first == pytest.approx(TIMING.renew_s)
        assert third - second == pytest.approx(TIMING.renew_s)
        assert third == term.held.boot_deadline + TIMING.kill_grace_s
        assert third == pytest.approx(term.held.asked_at + TIMING.term_s + TIMING.kill_grace_s)


async def test_a_term_that_ends_by_itself_is_over_before_its_kill(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.start(lab.make("a"))
        await a.journal.wait_for("restore.finished")
        a.store.partitioned = True
        await a.wait(State.PASSIVE)
        kill_at = max(moment for moment in a.guard.told if isinstance(moment, float))
        assert a.guard.told[-1] == "over"
        assert trio.current_time() < kill_at
        # Nobody knows whether the lease is still in its name: a crash now would look.
        assert a.guard.releasable is not None


async def test_a_term_that_a_suspend_has_eaten_before_it_began_is_not_told(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        a.local.hanging.add("raise_epoch")
        lab.start(a)
        await a.journal.wait_for("lease.acquired")
        a.clocks.suspend(TIMING.ttl_s)
        a.local.hanging.clear()
        await a.journal.wait_for("lease.lost")
        assert a.guard.told == []
        # Its own lease has expired by then, and is taken anew.
        await a.wait(State.ACTIVE)
        assert a.instance.epoch == 2


async def test_the_kill_of_a_holder_that_cannot_renew_comes_before_the_next_term(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.start(lab.make("a"))
        await a.journal.wait_for("lease.renewed")
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("restore.skipped")
        renewals = len(a.journal.of("lease.renewed"))
        renewal = await a.journal.wait_for("lease.renewed", renewals + 1)
        assert renewal["epoch"] == 1
        # From here on the store has nothing of it: its last deadline is all that there is.
        a.store.partitioned = True
        kill_at = a.guard.kill_at
        await b.journal.wait_for("lease.acquired")
        assert kill_at is not None
        assert kill_at + TIMING.margin_s / 2 < trio.current_time() < kill_at + TIMING.margin_s


async def test_an_answered_release_leaves_nothing_to_release(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = lab.start(lab.make("a"))
        await a.journal.wait_for("restore.finished")
        a.instance.request_drain("deploy")
        await a.ended.wait()
        assert a.guard.told[-2:] == ["over", "released"]
        assert a.guard.releasable is None


async def test_an_unanswered_release_is_left_to_be_made_good(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = lab.start(lab.make("a"))
        await a.journal.wait_for("restore.finished")
        a.instance.request_step_down("try")
        a.store.partitioned = True
        await a.wait(State.PASSIVE)
        assert a.guard.told[-1] == "over"
        assert a.guard.releasable is not None
        assert a.guard.releasable.epoch == 1


async def test_a_term_whose_bridge_does_not_start_is_over_for_the_guard_too(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        a.connector.start_s = 1000.0
        lab.start(a)
        await a.journal.wait_for("lease.released")
        assert "over" in a.guard.told
        assert a.guard.kill_at is None
