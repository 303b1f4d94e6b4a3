"""Acquiring, keeping and giving back the lease, over a store that loses, delays and lies."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field, replace

import pytest
import trio
from trio.testing import MockClock

from machine.instance import PAUSED_LOOK_S
from machine.lease import (
    HeldLease,
    LeaseLost,
    LeaseTiming,
    Sighting,
    cause_of,
    keep_lease,
    release,
    renew_once,
    try_acquire,
    with_heartbeat,
)
from machine.ports import LeaseMissing, LeaseRefused, StoreMisconfigured, StoreUnavailable
from machine.records import (
    FENCE_HISTORY_MAX,
    Heartbeat,
    Identity,
    Lease,
    LeaseState,
    LeaseView,
    LeaseWrite,
    Stamp,
    Version,
)
from machine.states import State
from machine.term import BOOTTIME_LOOK_S
from tests.fakes.clocks import FakeClocks
from tests.fakes.journal import RecordingJournal
from tests.fakes.local_store import FakeLocalStore
from tests.fakes.shared_store import LOST_REPLY, LOST_REQUEST, FakeSharedStore, Passage
from tests.machine.lab import ANN, Host, Lab, open_lab

ME = Identity("me", "me-1", "http://me")
OTHER = Identity("other", "other-1", "http://other")
TIMING = LeaseTiming()
GRACE_S = 3.0


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@dataclass
class Tenure:
    """What `keep_lease` did to the term."""

    extended: list[float] = field(default_factory=list)
    reason: str | None = None

    def extend(self, held: HeldLease) -> None:
        self.extended.append(held.deadline)

    def lose(self, reason: str) -> None:
        self.reason = reason


class Claimant:
    """One candidate or holder of a group that is initialised and free."""

    def __init__(self, store: FakeSharedStore | None = None, me: Identity = ME) -> None:
        self.store = store or FakeSharedStore()
        self.store.state.initialise(0)
        self.me = me
        self.clocks = FakeClocks()
        self.rng = random.Random(me.name)
        self.journal = RecordingJournal()
        self.tenure = Tenure()

    def view(self) -> LeaseView:
        return self.store.state.read_lease()

    async def acquire(self, *, epoch_floor: int = 0) -> HeldLease | None:
        return await try_acquire(
            self.store, self.view(), self.me, TIMING, self.clocks, self.rng, epoch_floor=epoch_floor
        )

    async def hold(self) -> HeldLease:
        held = await self.acquire()
        assert held is not None
        return held

    async def renew(self, held: HeldLease) -> bool:
        return await renew_once(held, self.store, TIMING, self.clocks, self.rng)

    async def keep(self, held: HeldLease) -> None:
        await keep_lease(held, self.store, TIMING, self.clocks, self.rng, self.journal, self.tenure)

    async def release(self, held: HeldLease, *, handoff_to: str | None = None) -> bool:
        return await release(
            held,
            self.store,
            TIMING,
            self.clocks,
            self.rng,
            self.journal,
            reason="test",
            handoff_to=handoff_to,
        )

    def other(self) -> Claimant:
        return Claimant(self.store.client(), OTHER)

    def rewrite(self, **fence: object) -> None:
        """Change the fence as an operator does."""
        view = self.view()
        self.store.state.write_lease(
            LeaseWrite(fence=replace(view.fence, **fence))  # type: ignore[arg-type]
        )


# --- the times


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ({"ttl_s": 10.0}, "ttl 10 s must be at least renew 5 + 2 x attempt 2 + margin 1.5 = 10.5"),
        ({"renew_s": 7.0, "attempt_s": 3.5}, "renew 7 + 2 x attempt 3.5 + margin 1.5 = 15.5"),
        ({"margin_s": 6.5}, "margin 6.5 = 15.5"),
        ({"renew_s": 0.5}, "renew 0.5 s is too often"),
        ({"attempt_s": 0.05}, "attempt 0.05 s and margin 1.5 s must each be at least 0.1"),
        ({"margin_s": 0.0}, "margin 0 s must each be at least 0.1"),
        ({"drift": 0.01}, "drift 0.01 must be a rate between 0 and 0.01"),
        ({"drift": -0.1}, "drift -0.1"),
    ],
)
def test_contradictory_times_are_refused_with_the_sum(times: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        LeaseTiming(**times)


def test_the_term_is_shorter_than_the_promise_by_margin_and_drift() -> None:
    assert LeaseTiming(ttl_s=10.5).term_s == pytest.approx(10.5 * 0.999 - 1.5)


# --- the deadline


async def test_a_slow_grant_counts_from_before_the_question(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    claimant.store.delay(0.5, 1.0)
    began = trio.current_time()
    held = await claimant.hold()
    assert trio.current_time() == began + 1.5
    assert held.deadline == began + TIMING.term_s
    assert held.boot_deadline == began + TIMING.term_s


async def test_a_slow_renewal_counts_from_before_the_question(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    await trio.sleep(5)
    claimant.store.delay(0.5, 1.0)
    began = trio.current_time()
    assert await claimant.renew(held)
    assert held.deadline == began + TIMING.term_s
    assert held.asked_at == began


@pytest.mark.parametrize("slow_s", [0.0, 1.5])
async def test_a_renewal_without_an_answer_is_recognised_by_its_nonce(
    autojump_clock: MockClock, slow_s: float
) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    await trio.sleep(5)
    claimant.store.schedule("write", LOST_REPLY)
    claimant.store.schedule("read", Passage(reply_s=slow_s))
    began = trio.current_time()
    assert await claimant.renew(held)
    # Two seconds for the attempt, the read on top: the deadline is that attempt's all the same.
    assert trio.current_time() == began + TIMING.attempt_s + slow_s
    assert held.deadline == began + TIMING.term_s
    assert held.lease_stamp == claimant.view().lease_stamp
    assert await claimant.renew(held)


async def test_mine_with_an_older_nonce_extends_nothing_and_is_asked_again(
    autojump_clock: MockClock,
) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    deadline = held.deadline
    await trio.sleep(5)
    claimant.store.schedule("write", LOST_REQUEST)
    assert not await claimant.renew(held)
    assert held.deadline == deadline
    assert await claimant.renew(held)


async def test_an_attempt_that_arrives_late_costs_a_try_and_not_the_lease(
    autojump_clock: MockClock,
) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    await trio.sleep(5)
    # Applied 2.5 s after it was sent: after the read that found it not applied.
    claimant.store.schedule("write", Passage(request_s=2.5))
    assert not await claimant.renew(held)
    deadline = held.deadline
    await trio.sleep(1)
    assert not await claimant.renew(held)
    assert held.deadline == deadline
    assert await claimant.renew(held)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (trio.TooSlowError(), "timeout"),
        (StoreUnavailable("away", code="deadline_exceeded"), "deadline_exceeded"),
        (StoreMisconfigured("no permission"), "misconfigured"),
        (LeaseRefused("it has changed"), "refused"),
        (LeaseMissing("gone"), "missing"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failed_renewal_has_a_cause_of_one_word(error: Exception, cause: str) -> None:
    assert cause_of(error) == cause


async def test_a_renewal_that_fails_is_told_with_its_cause(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    for operation in ("write", "read"):
        claimant.store.schedule(operation, LOST_REQUEST)
    assert not await claimant.renew(held)
    assert held.failure == "timeout"


async def test_a_renewal_that_finds_another_is_a_lost_lease(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    await claimant.other().hold()
    with pytest.raises(LeaseLost, match="other"):
        await claimant.renew(held)


async def test_a_higher_epoch_in_the_fence_alone_is_a_lost_lease(
    autojump_clock: MockClock,
) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    claimant.rewrite(epoch=7)
    claimant.store.schedule("write", LOST_REQUEST)
    with pytest.raises(LeaseLost, match="epoch 7"):
        await claimant.renew(held)


async def test_ones_own_lease_released_behind_ones_back_is_lost(autojump_clock: MockClock) -> None:
    # The warden does so in the name of a daemon that it takes for dead.
    claimant = Claimant()
    held = await claimant.hold()
    claimant.store.state.write_lease(
        LeaseWrite(lease=replace(held.lease, state=LeaseState.RELEASED, nonce="warden"))
    )
    with pytest.raises(LeaseLost):
        await claimant.renew(held)


# --- keeping it


async def test_renewals_come_every_third_of_the_ttl(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    began = trio.current_time()
    with trio.move_on_after(60.5):
        await claimant.keep(held)
    asked = [deadline - TIMING.term_s - began for deadline in claimant.tenure.extended]
    assert asked == pytest.approx([5.0 * n for n in range(1, 13)])
    assert held.renewals == 12


@pytest.mark.parametrize("operation", ["write", "read"])
async def test_a_store_that_refuses_at_once_is_asked_at_most_once_a_second(
    autojump_clock: MockClock, operation: str
) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    claimant.store.fail_next("write", 1000)
    if operation == "read":
        claimant.store.fail_next("read", 1000)
    before = claimant.store.calls["write"]
    with trio.move_on_after(25.5):
        await claimant.keep(held)
    assert claimant.store.calls["write"] - before <= 21
    assert claimant.tenure.extended == []
    assert claimant.tenure.reason is None


async def test_keeping_a_lease_that_another_has_ends_the_term(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    await claimant.other().hold()
    with trio.fail_after(5.1):
        await claimant.keep(held)
    assert claimant.tenure.reason is not None
    assert "other" in claimant.tenure.reason


# --- acquiring


async def test_of_sixteen_contenders_one_wins(autojump_clock: MockClock) -> None:
    store = FakeSharedStore()
    claimants = [
        Claimant(store.client(), Identity(f"c{n}", f"c{n}-1", f"http://c{n}")) for n in range(16)
    ]
    won: list[HeldLease] = []

    async def contend(claimant: Claimant, view: LeaseView) -> None:
        claimant.store.delay(claimant.rng.uniform(0, 0.1), 0.1)
        held = await try_acquire(
            claimant.store, view, claimant.me, TIMING, claimant.clocks, claimant.rng
        )
        if held is not None:
            won.append(held)

    async with trio.open_nursery() as nursery:
        for claimant in claimants:
            nursery.start_soon(contend, claimant, claimant.view())
    (held,) = won
    assert claimants[0].view().lease == held.lease


async def test_an_acquire_whose_reply_is_lost_is_found_applied(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    claimant.store.schedule("write", LOST_REPLY)
    began = trio.current_time()
    held = await claimant.hold()
    assert held.deadline == began + TIMING.term_s
    assert held.grant.fence_stamp == claimant.view().fence_stamp
    assert await claimant.renew(held)


async def test_an_acquire_without_any_answer_is_not_held(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    claimant.store.schedule("write", LOST_REPLY)
    claimant.store.schedule("read", LOST_REQUEST)
    with pytest.raises(trio.TooSlowError):
        await claimant.acquire()
    # The next look finds our own incarnation: free for us at once, under the next epoch.
    assert Sighting().free_in(claimant.view(), ME, trio.current_time(), GRACE_S) == 0
    held = await claimant.hold()
    assert held.grant.epoch == 2


async def test_the_epoch_is_above_documents_and_disk(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    claimant.rewrite(epoch=4)
    held = await claimant.acquire(epoch_floor=2)
    assert held is not None
    assert held.grant.epoch == 5
    assert await claimant.release(held)
    held = await claimant.acquire(epoch_floor=40)
    assert held is not None
    assert held.grant.epoch == 41


async def test_the_history_is_bounded(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    for _ in range(FENCE_HISTORY_MAX):
        assert await claimant.release(await claimant.hold())
    history = claimant.view().fence.history
    assert len(history) == FENCE_HISTORY_MAX
    assert history[-1].epoch == FENCE_HISTORY_MAX


# --- when it is free


def sighted(view: LeaseView, *, at: float = 100.0) -> Sighting:
    sighting = Sighting()
    sighting.see(view, at)
    return sighting


async def held_view() -> LeaseView:
    claimant = Claimant()
    await claimant.hold()
    return replace(claimant.view(), age_s=4.0)


async def test_a_held_lease_is_free_when_the_store_says_so_or_ones_own_clock() -> None:
    view = await held_view()
    sighting = sighted(view)
    assert sighting.free_in(view, OTHER, 100.0, GRACE_S) == 11.0
    assert sighting.free_in(replace(view, age_s=15.0), OTHER, 101.0, GRACE_S) == 0
    # A store whose clock stands still: unchanged for a ttl by our own clock counts.
    assert sighting.free_in(view, OTHER, 114.0, GRACE_S) == 1.0
    assert sighting.free_in(view, OTHER, 115.0, GRACE_S) == 0
    # A store that knows that the holder is dead says infinity.
    assert sighting.free_in(replace(view, age_s=float("inf")), OTHER, 100.0, GRACE_S) == 0


async def test_a_renewal_starts_ones_own_clock_again() -> None:
    view = await held_view()
    sighting = sighted(view)
    renewed = replace(view, lease_stamp=view.fence_stamp, age_s=0.0)
    sighting.see(renewed, 114.9)
    assert sighting.free_in(renewed, OTHER, 115.0, GRACE_S) == pytest.approx(14.9)


async def test_a_released_lease_is_free_and_ones_own_too() -> None:
    claimant = Claimant()
    free = claimant.view()
    assert sighted(free).free_in(free, OTHER, 100.0, GRACE_S) == 0
    view = await held_view()
    assert sighted(view).free_in(view, ME, 100.0, GRACE_S) == 0


async def test_a_paused_group_is_free_for_nobody() -> None:
    claimant = Claimant()
    claimant.rewrite(paused=True)
    view = claimant.view()
    assert sighted(view).free_in(view, ME, 1e9, GRACE_S) == float("inf")


async def test_a_handoff_is_for_the_one_it_names_and_after_a_grace_for_all() -> None:
    claimant = Claimant()
    assert await claimant.release(await claimant.hold(), handoff_to="chosen")
    view = claimant.view()
    assert view.lease.state is LeaseState.RELEASED
    chosen = Identity("chosen", "chosen-1", "")
    sighting = sighted(view)
    assert sighting.free_in(view, chosen, 100.0, GRACE_S) == 0
    assert sighting.free_in(view, OTHER, 101.0, GRACE_S) == 2.0
    assert sighting.free_in(view, OTHER, 103.0, GRACE_S) == 0


async def test_a_heartbeat_alone_says_no_more_than_that_the_same_term_goes_on() -> None:
    view = await held_view()
    later = replace(view.lease, nonce="later")
    beat = Heartbeat(later, Stamp("later"), 0.5)
    seen = with_heartbeat(view, beat)
    assert seen == replace(view, lease=later, lease_stamp=Stamp("later"), age_s=0.5)
    for changed in (
        replace(later, state=LeaseState.RELEASED),
        replace(later, holder="other"),
        replace(later, incarnation="me-2"),
        replace(later, epoch=later.epoch + 1),
    ):
        assert with_heartbeat(view, replace(beat, lease=changed)) is None
    forced = replace(view, fence=replace(view.fence, epoch=view.fence.epoch + 1))
    assert with_heartbeat(forced, beat) is None


# --- giving it back


async def test_a_release_frees_both_documents_and_keeps_what_the_operator_said(
    autojump_clock: MockClock,
) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    claimant.rewrite(paused=True)
    assert await claimant.release(held)
    view = claimant.view()
    assert view.lease.state is LeaseState.RELEASED
    assert view.fence.state is LeaseState.RELEASED
    assert view.fence.paused


async def test_a_release_without_an_answer_is_found_done(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    claimant.store.schedule("write", LOST_REPLY)
    assert await claimant.release(held)
    assert claimant.view().lease.state is LeaseState.RELEASED


async def test_a_release_that_was_lost_is_sent_again(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    claimant.store.schedule("write", LOST_REQUEST)
    assert await claimant.release(held)
    assert claimant.view().lease.state is LeaseState.RELEASED
    assert claimant.store.calls["write"] == 3


@pytest.mark.parametrize("readable", [True, False])
async def test_a_release_that_is_not_heard_gives_up_in_time(
    autojump_clock: MockClock, readable: bool
) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    claimant.store.fail_next("write", 10_000)
    if not readable:
        claimant.store.fail_next("read", 10_000)
    began = trio.current_time()
    # Cancelled from outside all the while: it is a short last word.
    with trio.CancelScope() as outside:
        outside.cancel()
        assert not await claimant.release(held)
    assert trio.current_time() - began == pytest.approx(4 * TIMING.attempt_s)
    assert claimant.store.calls["write"] <= 20


async def test_a_lease_that_another_has_is_not_released(autojump_clock: MockClock) -> None:
    claimant = Claimant()
    held = await claimant.hold()
    theirs = await claimant.other().hold()
    assert await claimant.release(held)
    assert claimant.view().lease == theirs.lease


# --- whole instances


async def wait_active(host: Host) -> None:
    await host.journal.wait_for("restore.finished")


async def test_an_unreachable_store_ends_the_term_at_its_deadline_and_never_later(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.start(lab.make("a"))
        await wait_active(a)
        await a.journal.wait_for("lease.renewed", 2)
        deadline = a.term.held.deadline
        a.store.partitioned = True
        await trio.sleep_until(deadline - 0.01)
        assert not a.term.over
        assert lab.whatsapp.connections == 1
        await trio.sleep_until(deadline)
        await trio.testing.wait_all_tasks_blocked()
        assert a.instance.term is None
        assert lab.whatsapp.connections == 0
        assert lab.whatsapp.bridges == 0
        assert a.instance.state is State.PASSIVE
        assert a.journal.of("lease.lost")[0]["reason"] == "its deadline has passed"
        assert a.journal.of("lease.released") == []


async def test_time_that_trio_does_not_see_ends_the_term_before_its_next_effect(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.make("a")
        lab.start(a)
        await wait_active(a)
        term = a.term
        a.clocks.suspend(TIMING.term_s)
        assert term.over
        assert a.instance.term is None
        wire = len(lab.whatsapp.raw)
        with pytest.raises(Exception, match="does not hold the lease"):
            term.check()
        await a.wait(State.PASSIVE)
        assert len(lab.whatsapp.raw) == wire
        assert lab.whatsapp.connections == 0


async def test_after_a_suspend_past_the_deadline_no_connection_stays_open(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.start(lab.make("a"))
        await wait_active(a)
        assert lab.whatsapp.connections == 1
        a.store.partitioned = True
        a.clocks.suspend(TIMING.term_s)
        await trio.sleep(BOOTTIME_LOOK_S + 0.01)
        await trio.testing.wait_all_tasks_blocked()
        assert lab.whatsapp.connections == 0
        assert a.journal.of("lease.lost")[0]["reason"] == "its deadline has passed"


async def test_a_renewal_during_a_candidates_slow_read_is_not_counted_from_before_it(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.start(lab.make("a"))
        await wait_active(a)
        await a.journal.wait_for("lease.renewed")
        renewed_at = trio.current_time() + 5
        await trio.sleep_until(renewed_at - 1.8)
        b = lab.make("b")
        # On its way when the renewal comes, and slow back: the stamp is new, the question old.
        b.store.schedule("read", Passage(request_s=1.9))
        lab.start(b)
        await a.journal.wait_for("lease.renewed", 2)
        assert trio.current_time() == renewed_at
        term = a.term
        a.store.partitioned = True
        await b.journal.wait_for("lease.acquired")
        assert trio.current_time() >= term.held.deadline
        assert a.instance.term is None


async def test_a_renewal_during_a_slow_look_at_the_heartbeat_is_not_counted_from_before_it(
    autojump_clock: MockClock,
) -> None:
    timing = LeaseTiming(ttl_s=9.5, renew_s=2.825)
    async with open_lab() as lab:
        a = lab.start(lab.make("a", timing=timing))
        await wait_active(a)
        # Its first look at the heartbeat begins at 9.6 s, 1.7 s before the fourth renewal.
        b = lab.make("b", timing=timing)
        b.store.schedule("read_heartbeat", Passage(request_s=1.9))
        lab.start(b)
        await a.journal.wait_for("lease.renewed", 4)
        term = a.term
        a.store.partitioned = True
        await b.journal.wait_for("lease.acquired")
        assert trio.current_time() >= term.held.deadline
        assert a.instance.term is None


async def test_missing_documents_are_never_free(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        lab.state.lease = lab.state.fence = None
        a = lab.start(lab.make("a"))
        await trio.sleep(600)
        assert a.instance.state is State.PASSIVE
        assert lab.state.writes == 2
        assert len(a.journal.of("lease.missing")) > 100
        assert a.journal.of("lease.acquired") == []
        lab.state.initialise(0)
        await wait_active(a)


async def test_documents_that_vanish_during_a_term_end_it_at_its_deadline(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.start(lab.make("a"))
        await wait_active(a)
        deadline = a.term.held.deadline
        lab.state.lease = lab.state.fence = None
        await a.wait(State.PASSIVE)
        assert trio.current_time() == deadline
        assert lab.state.lease is None


async def test_an_older_lease_restored_from_a_backup_does_not_bring_an_old_epoch_back(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        disk = FakeLocalStore()
        disk.epoch = 41
        a = lab.start(lab.make("a", local=disk))
        await wait_active(a)
        assert a.instance.epoch == 42
        assert a.journal.of("epoch.fell")[0]["found"] == 41
        assert disk.epoch == 42


async def test_accounts_with_a_higher_epoch_make_the_next_term_start_above_them(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        stored = lab.state.accounts[ANN]
        stored.version = Version(500, 3)
        a = lab.make("a")
        a.store.fail_next("list_accounts")  # so that it does not know while it stands by
        lab.start(a)
        await wait_active(a)
        assert a.instance.epoch == 501
        assert [fell["found"] for fell in a.journal.of("epoch.fell")] == [500, 500]
        # Whoever wrote under that epoch may still act, and has stopped after a ttl.
        assert trio.current_time() >= TIMING.ttl_s
        assert lab.state.accounts[ANN].version == Version(501, 3)
        assert lab.whatsapp.opened == 1


async def test_a_standby_learns_from_the_accounts_that_the_lease_is_a_backups(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        lab.state.accounts[ANN].version = Version(500, 3)
        a = lab.start(lab.make("a"))
        await wait_active(a)
        assert a.instance.epoch == 501
        assert trio.current_time() >= TIMING.ttl_s
        assert len(a.journal.of("lease.acquired")) == 1


async def test_accounts_that_carry_our_own_new_epoch_were_written_by_another(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        lab.state.accounts[ANN].version = Version(1, 3)
        a = lab.make("a")
        a.store.fail_next("list_accounts")
        lab.start(a)
        await wait_active(a)
        assert a.instance.epoch == 2
        assert lab.state.accounts[ANN].version == Version(2, 3)
        assert trio.current_time() >= TIMING.ttl_s


def put_back(lab: Lab, backup: LeaseView) -> None:
    """Let the lease documents be those of a backup: new to whoever looks, and their age begins."""
    lab.state.lease = (backup.lease, lab.state.stamp(), trio.current_time())
    lab.state.fence = (backup.fence, lab.state.stamp())


async def test_a_lease_that_a_backup_shows_as_free_is_left_until_its_holder_has_stopped(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        backup = lab.state.read_lease()
        a = lab.start(lab.make("a"))
        await wait_active(a)
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("restore.skipped")
        await a.journal.wait_for("lease.renewed", 2)
        term = a.term
        a.store.partitioned = True
        put_back(lab, backup)
        await wait_active(b)
        assert trio.current_time() >= term.held.deadline
        assert a.instance.term is None
        assert b.instance.epoch == term.epoch + 1


async def test_a_second_backup_of_the_lease_is_waited_for_like_the_first(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        backup = lab.state.read_lease()
        disk = FakeLocalStore()
        await disk.raise_epoch(500)
        b = lab.make("b", local=disk)
        a = lab.start(lab.make("a"))
        await wait_active(a)
        # It knows of a higher epoch than the documents show: they are a backup's already.
        lab.start(b)
        await a.journal.wait_for("lease.renewed", 5)
        term = a.term
        a.store.partitioned = True
        put_back(lab, backup)
        await wait_active(b)
        assert trio.current_time() >= term.held.deadline
        assert b.instance.epoch == 501


async def test_a_backup_is_waited_for_by_the_longest_ttl_that_was_ever_seen(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        backup = lab.state.read_lease()
        slow = replace(TIMING, ttl_s=3 * TIMING.ttl_s)
        b = lab.make("b")
        c = lab.start(lab.make("c", timing=slow))
        await wait_active(c)
        lab.start(b)
        await b.journal.wait_for("restore.skipped")
        c.instance.request_drain("redeploy")
        await wait_active(b)
        # Another term of a long ttl, which b does not see: it is cut off until it is forgotten.
        b.store.partitioned = True
        c = lab.start(lab.make("c", timing=slow))
        await wait_active(c)
        term = c.term
        await b.wait(State.PASSIVE)
        c.store.partitioned = True
        put_back(lab, backup)
        b.store.partitioned = False
        await b.journal.wait_for("restore.finished", 2)
        assert trio.current_time() >= term.held.deadline
        assert b.instance.epoch == term.epoch + 1


async def test_a_backup_that_gives_an_instance_its_own_lease_back_is_waited_for(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        # No accounts, which would tell that their epoch was acted under.
        before = lab.state.read_lease()
        a = lab.start(lab.make("a"))
        await wait_active(a)
        own = lab.state.read_lease()
        # A backup of before it all: another is granted the epoch that this one had.
        a.store.partitioned = True
        put_back(lab, before)
        b = lab.start(lab.make("b"))
        await wait_active(b)
        a.store.partitioned = False
        await a.journal.wait_for("restore.skipped")
        assert a.instance.epoch == 0
        assert b.instance.epoch == 1
        await b.journal.wait_for("lease.renewed")
        term = b.term
        b.store.partitioned = True
        put_back(lab, own)
        await a.journal.wait_for("lease.acquired", 2)
        assert trio.current_time() >= term.held.deadline


@pytest.mark.parametrize("fault", ["failing", "hanging"])
async def test_an_epoch_that_the_disk_cannot_note_is_remembered_in_memory(
    autojump_clock: MockClock, fault: str
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        lab.state.accounts[ANN].version = Version(500, 3)
        disk = FakeLocalStore()
        if fault == "failing":
            disk.fail_next("raise_epoch", 100)
        else:
            disk.hanging.add("raise_epoch")
        a = lab.start(lab.make("a", local=disk))
        await wait_active(a)
        assert a.instance.epoch == 501


async def test_a_pause_ends_the_term_in_good_order_and_keeps_everyone_from_acquiring(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a, b = lab.start(lab.make("a")), lab.make("b")
        await wait_active(a)
        lab.start(b)
        await b.journal.wait_for("restore.skipped")
        operate(lab, paused=True, reason="maintenance")
        await a.wait(State.PASSIVE)
        assert lab.state.read_lease().lease.state is LeaseState.RELEASED
        await trio.sleep(100)
        assert {a.instance.state, b.instance.state} == {State.PASSIVE}
        operate(lab, paused=False)
        await trio.sleep(0.2)
        assert a.instance.epoch + b.instance.epoch == 2


async def test_a_wish_in_the_store_steps_its_holder_down_once(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = lab.start(lab.make("a"))
        await wait_active(a)
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("restore.skipped")
        operate(lab, step_down_of=1, reason="rack 4 is hot")
        await wait_active(b)
        assert b.instance.epoch == 2
        assert "rack 4 is hot" in a.instance.transitions[-1].reason
        await trio.sleep(30)
        assert b.instance.epoch == 2


@pytest.mark.parametrize("wish", [{"paused": True}, {"step_down_of": 1}])
async def test_a_wish_that_comes_while_the_bridge_starts_is_heeded(
    autojump_clock: MockClock, wish: dict[str, object]
) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        a.connector.start_s = 3.0
        lab.start(a)
        await a.journal.wait_for("lease.acquired")
        await trio.sleep(1)
        operate(lab, **wish)
        await a.journal.wait_for("lease.released")
        assert trio.current_time() < 4


async def test_a_forced_epoch_ends_the_term_at_once_and_nothing_is_released(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.start(lab.make("a"))
        await wait_active(a)
        view = lab.state.read_lease()
        forced = Lease("", "", 9, "forced", 15.0, LeaseState.RELEASED)
        lab.state.write_lease(
            LeaseWrite(lease=forced, fence=replace(view.fence, epoch=9, holder="", paused=True))
        )
        await trio.testing.wait_all_tasks_blocked()
        assert a.instance.state is State.PASSIVE
        assert lab.state.read_lease().lease == forced
        operate(lab, paused=False)
        await a.journal.wait_for("restore.finished", 2)
        assert a.instance.epoch == 10


async def test_a_release_comes_only_after_everything_of_the_term_has_ended(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.start(lab.make("a"))
        await wait_active(a)
        seen: list[tuple[int, int]] = []
        write_lease = a.store.weather

        def weather(operation: str) -> Passage:
            if operation == "write" and a.instance.state is State.DRAINING:
                seen.append((lab.whatsapp.connections, lab.whatsapp.bridges))
            return write_lease(operation)

        a.store.weather = weather
        a.instance.request_drain("SIGTERM")
        await a.ended.wait()
        assert seen == [(0, 0)]


async def test_a_dead_holders_lease_is_taken_when_its_ttl_is_over(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.start(lab.make("a"))
        await wait_active(a)
        b = lab.start(lab.make("b"))
        await a.journal.wait_for("lease.renewed", 3)
        renewed_at = trio.current_time()
        a.store.partitioned = True
        before = dict(b.store.calls)
        await b.journal.wait_for("lease.acquired")
        assert TIMING.ttl_s <= trio.current_time() - renewed_at <= TIMING.ttl_s + 0.2
        # It wakes at the expected expiry instead of polling.
        assert b.store.calls["read_heartbeat"] - before.get("read_heartbeat", 0) <= 2
        assert b.store.calls["read"] - before["read"] == 1


async def test_a_standby_reads_one_document_in_each_ttl(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        rng = random.Random("a network")

        def weather(_operation: str) -> Passage:
            return Passage(rng.uniform(0.005, 0.05), rng.uniform(0.005, 0.05))

        a.store.weather = weather
        lab.start(a)
        await wait_active(a)
        b = lab.make("b")
        b.store.weather = weather
        lab.start(b)
        await b.journal.wait_for("restore.skipped")
        await trio.sleep(60)
        before = dict(b.store.calls)
        await trio.sleep(3600)
        looks = b.store.calls["read_heartbeat"] - before["read_heartbeat"]
        assert 3600 / TIMING.ttl_s - 2 <= looks <= 3600 / TIMING.ttl_s
        assert b.store.calls["read"] == before["read"]


async def test_a_standby_that_hears_nothing_sees_the_next_holder(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = lab.start(lab.make("a"))
        await wait_active(a)
        b = lab.make("b")
        b.store.deaf = True
        lab.start(b)
        await b.journal.wait_for("restore.skipped")
        c = lab.start(lab.make("c"))
        await c.journal.wait_for("restore.skipped")
        a.instance.request_drain("SIGTERM")
        await wait_active(c)
        await trio.sleep(TIMING.ttl_s + 1)
        assert b.instance.holder is not None
        assert (b.instance.holder.name, b.instance.holder.epoch) == ("c", 2)
        # And takes over when that one dies.
        c.store.partitioned = True
        await wait_active(b)
        assert b.instance.epoch == 3


async def test_a_pause_is_shown_by_a_standby_while_the_lease_is_still_held(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        a.store.deaf = True
        lab.start(a)
        await wait_active(a)
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("restore.skipped")
        await trio.sleep(1)
        operate(lab, paused=True)
        await trio.sleep(1)
        assert b.instance.lease_status is not None
        assert b.instance.lease_status.paused


async def test_a_pause_whose_end_is_not_heard_ends_all_the_same(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        operate(lab, paused=True)
        a = lab.make("a")
        a.store.deaf = True
        lab.start(a)
        await trio.sleep(100)
        assert a.instance.state is State.PASSIVE
        assert a.store.calls["read"] <= 100 / PAUSED_LOOK_S + 2
        operate(lab, paused=False)
        with trio.fail_after(PAUSED_LOOK_S + 1):
            await wait_active(a)


async def test_an_unreadable_lease_is_asked_for_with_backoff(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        a.store.fail_next("read", 200)
        lab.start(a)
        await trio.sleep(60)
        assert 12 <= len(a.journal.of("lease.unreadable")) <= 30
        assert a.instance.state is State.PASSIVE


def operate(lab: Lab, **changes: object) -> None:
    """Change the fence as an operator does."""
    fence = lab.state.read_lease().fence
    lab.state.write_lease(
        LeaseWrite(fence=replace(fence, **changes))  # type: ignore[arg-type]
    )
