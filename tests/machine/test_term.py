"""A term: what exists only under one epoch, and that nothing of it outlives it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from machine.limits import Durability
from machine.records import LeaseState, LeaseWrite, MessageId, MessageState
from machine.refusals import NotActive, Refusal, StoreAway, TermEnded
from machine.session import ON_WIRE_MAX
from machine.states import State
from machine.term import EndAsked
from tests.fakes.shared_store import LOST_REPLY, Passage
from tests.machine.lab import ANN, BEN, LIMITS, TIMING, Host, Lab, open_lab

HANGS = Passage(delivered=False)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def take_away(lab: Lab) -> None:
    """Another instance is granted the next epoch, behind the holder's back."""
    view = lab.state.read_lease()
    epoch = view.fence.epoch + 1
    held = LeaseState.HELD
    lab.state.write_lease(
        LeaseWrite(
            lease=replace(
                view.lease, holder="x", incarnation="x", epoch=epoch, state=held, ttl_s=15.0
            ),
            fence=replace(view.fence, holder="x", incarnation="x", epoch=epoch, state=held),
        )
    )


async def serving(host: Host) -> Host:
    await host.journal.wait_for("restore.finished")
    return host


async def answer_of(ask: Callable[[], Awaitable[object]]) -> object:
    try:
        return await ask()
    except Refusal as refusal:
        return type(refusal)


# --- visitors


ASKS: dict[str, Callable[[Host], Awaitable[object]]] = {
    "accept": lambda host: host.send(ANN, "hello"),
    "add": lambda host: host.desk.add_account(BEN, "Ben"),
    "message": lambda host: host.desk.message(MessageId("somewhere")),
    "log_out": lambda host: host.desk.log_out(ANN),
    "repair": lambda host: host.desk.repair(ANN),
    "remove": lambda host: host.desk.remove_account(ANN, purge=False),
    "import": lambda host: host.desk.import_accounts("/sessions"),
}


@pytest.mark.parametrize("name", [name for name in ASKS if name != "import"])
@pytest.mark.parametrize("how", ["fenced", "deadline", "suspended"])
async def test_a_request_ends_with_the_term_wherever_it_is(
    autojump_clock: MockClock, name: str, how: str
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        await trio.sleep(1)
        term = a.term
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await answer_of(lambda: ASKS[name](a)))

        a.store.partitioned = True
        asked_at = trio.current_time()
        lab.nursery.start_soon(ask)
        await trio.sleep(0.1)
        assert answers == []
        if how == "fenced":
            take_away(lab)
            a.store.partitioned = False
        elif how == "suspended":
            a.clocks.suspend(TIMING.ttl_s)
        await a.wait(State.PASSIVE)
        await wait_all_tasks_blocked()
        assert answers in ([TermEnded], [StoreAway])
        assert trio.current_time() <= term.held.deadline
        # Told of a higher epoch, it does not stay until the deadline.
        assert how != "fenced" or trio.current_time() - asked_at < 0.2
        assert answers == [TermEnded] or how == "deadline" or name == "message"


async def test_a_request_at_a_term_that_is_over_is_refused_at_once(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        term = a.term
        take_away(lab)
        await a.wait(State.PASSIVE)
        writes = lab.state.writes
        for ask in (
            term.desk.list_accounts,
            lambda: term.desk.account(ANN),
            lambda: term.desk.repair(ANN),
        ):
            with pytest.raises(NotActive):
                await ask()
        assert lab.state.writes == writes


async def test_a_request_during_the_restore_waits_for_the_listing_only(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        lab.whatsapp.script(ANN).login_delay_s = 20.0
        a = lab.make("a")
        # The first listing is the warm-up's or the restore's: both take a second.
        a.store.weather = lambda op: Passage(request_s=1.0 if op == "list_accounts" else 0.0)
        lab.start(a)
        await a.wait_serving()
        began = trio.current_time()
        message = await a.send(ANN, "early")
        assert trio.current_time() - began <= 1.0
        assert message.state is MessageState.QUEUED
        await a.desk.wait_progress(message.message_id)
        assert trio.current_time() - began >= 20


async def test_a_step_down_during_the_listing_refuses_those_who_wait_for_it(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        a.store.weather = lambda op: HANGS if op == "list_accounts" else Passage()
        a.local.hanging.add("list_accounts")
        lab.start(a)
        term = await a.wait_serving()
        answers: list[object] = []

        async def ask() -> None:
            answers.append(await answer_of(term.desk.list_accounts))

        lab.nursery.start_soon(ask)
        await trio.sleep(0.1)
        a.instance.request_step_down("operator")
        await a.wait(State.PASSIVE)
        await wait_all_tasks_blocked()
        assert answers == [TermEnded]


async def test_while_a_term_settles_messages_are_kept_for_the_next_holder_and_nothing_begins(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        lab.whatsapp.script(ANN).ack_delay_s = 2.0
        await a.send(ANN, "in flight")
        await trio.sleep(0.1)
        term = a.term
        a.instance.request_drain("SIGTERM")
        await trio.sleep(0.1)
        for ask in (
            lambda: term.desk.add_account(BEN, "Ben"),
            lambda: term.desk.repair(ANN),
            lambda: term.desk.import_accounts("/sessions"),
        ):
            with pytest.raises(NotActive, match="handing the lease over"):
                await ask()
        late = await a.send(ANN, "kept")
        assert late.state is MessageState.QUEUED
        await a.journal.wait_for("drain.settled")
        assert a.instance.term is None
        with pytest.raises(NotActive):
            await term.desk.accept(
                message_id=MessageId("3EB0FF"),
                account_id=ANN,
                to="4915112345678",
                text="too late",
                idempotency_key=None,
            )
        await a.ended.wait()
        assert [m.text for m in lab.whatsapp.inbox()] == ["in flight"]
        b = await serving(lab.start(lab.make("b")))
        assert (await b.desk.wait_progress(late.message_id)).state is MessageState.SERVER_ACK
        assert [m.text for m in lab.whatsapp.inbox()] == ["in flight", "kept"]


# --- the end in good order


async def test_a_settle_waits_for_what_is_in_flight_and_hands_the_rest_on(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        lab.whatsapp.script(ANN).ack_delay_s = 2.0
        *first, rest = [await a.send(ANN, f"m{n}") for n in range(ON_WIRE_MAX + 1)]
        await trio.sleep(0.5)
        a.instance.request_drain("SIGTERM")
        await a.journal.wait_for("lease.released")
        assert trio.current_time() == pytest.approx(2.0, abs=0.2)
        stored = [lab.state.messages[message.message_id].state for message in first]
        assert stored == [MessageState.SERVER_ACK] * ON_WIRE_MAX
        assert lab.state.messages[rest.message_id].state is MessageState.QUEUED
        b = await serving(lab.start(lab.make("b")))
        await b.desk.wait_progress(rest.message_id)
        assert [one.text for one in lab.whatsapp.raw] == [f"m{n}" for n in range(ON_WIRE_MAX + 1)]


async def test_a_settle_is_bounded_and_the_next_holder_sends_it_again(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        limits = replace(LIMITS, ack_s=500.0, settle_s=10.0)
        a = await serving(lab.start(lab.make("a", limits=limits)))
        lab.whatsapp.script(ANN).acks_lost = 1
        stuck = await a.send(ANN, "no ack")
        await trio.sleep(0.5)
        began = trio.current_time()
        a.instance.request_drain("SIGTERM")
        await a.journal.wait_for("lease.released")
        assert trio.current_time() - began == pytest.approx(limits.settle_s, abs=0.1)
        assert a.journal.of("drain.unsettled")[0]["in_flight"] == 1
        b = await serving(lab.start(lab.make("b")))
        await b.desk.wait_progress(stuck.message_id)
        assert [one.text for one in lab.whatsapp.inbox()] == ["no ack"]
        assert lab.whatsapp.unreadable() == []


async def test_a_settle_with_a_store_that_does_not_answer_is_bounded_too(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        ledger = a.term.sessions[ANN].ledger
        assert ledger is not None
        a.store.weather = lambda op: HANGS if op == "commit" else Passage()
        ledger.post(fields={"name": "never stored"})
        await trio.sleep(0.5)
        began = trio.current_time()
        a.instance.request_drain("SIGTERM")
        await a.ended.wait()
        assert trio.current_time() - began <= 2 * LIMITS.settle_s + LIMITS.linger_s


async def test_an_account_that_vanished_does_not_stop_a_drain(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = await serving(lab.start(lab.make("a", durability=Durability.LOCAL)))
        for account_id in (ANN, BEN):
            message = await a.send(account_id, f"hello from {account_id}")
            await a.desk.wait_progress(message.message_id)
        del lab.state.accounts[ANN]
        a.instance.request_drain("SIGTERM")
        await a.ended.wait()
        assert lab.state.read_lease().lease.state is LeaseState.RELEASED
        ben = lab.state.fetch_account(BEN)
        assert ben is not None
        assert ben.version == a.local.copies[BEN].version


async def test_local_durability_is_replicated_completely_before_the_lease_is_released(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a", durability=Durability.LOCAL)))
        for n in range(5):
            message = await a.send(ANN, f"m{n}", key=f"k{n}")
            await a.desk.wait_progress(message.message_id)
        a.instance.request_drain("SIGTERM")
        await a.journal.wait_for("lease.released")
        stored = lab.state.fetch_account(ANN)
        assert stored is not None
        assert stored.version == a.local.copies[ANN].version
        assert dict(stored.parts) == dict(a.local.copies[ANN].parts)
        states = {one.state for one in lab.state.messages.values()}
        assert states == {MessageState.SERVER_ACK}


async def test_who_asks_for_the_end_first_is_the_one_who_is_named(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = await serving(lab.start(lab.make("a")))
        a.term.ask_end(EndAsked("first"))
        a.term.ask_end(EndAsked("second"))
        await a.wait(State.PASSIVE)
        assert a.instance.transitions[-1].reason == "first"


async def test_a_switchover_goes_to_the_one_it_names(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = await serving(lab.start(lab.make("a")))
        others = [lab.start(lab.make(name)) for name in ("b", "c", "d")]
        for other in others:
            await other.journal.wait_for("restore.skipped")
        asked_at = trio.current_time()
        a.instance.request_step_down("operator", handoff_to="c")
        await others[1].journal.wait_for("restore.finished")
        assert trio.current_time() - asked_at < 0.1
        assert [other.instance.epoch for other in others] == [0, 2, 0]


# --- housekeeping


async def test_a_purge_that_is_fenced_out_ends_the_term_and_not_the_instance(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        limits = replace(LIMITS, purge_every_s=7.0)
        a = await serving(lab.start(lab.make("a", limits=limits)))
        await trio.sleep(6)
        # Nobody tells, and the next renewal is due later than the purge.
        fence, stamp = lab.state.fence or (None, None)
        assert fence is not None
        assert stamp is not None
        lab.state.fence = (replace(fence, epoch=2, incarnation="x"), stamp)
        await a.wait(State.PASSIVE)
        assert trio.current_time() < 9
        assert "deleting old messages was refused" in str(a.journal.of("lease.lost")[0]["reason"])


@pytest.mark.parametrize("fault", [LOST_REPLY, HANGS])
async def test_a_purge_without_an_answer_is_tried_in_the_next_round(
    autojump_clock: MockClock, fault: Passage
) -> None:
    async with open_lab() as lab:
        a = lab.make("a", limits=replace(LIMITS, purge_every_s=100.0))
        a.store.schedule("purge_messages", fault, fault, fault)
        await serving(lab.start(a))
        await a.journal.wait_for("outbox.purged")
        assert 200 <= trio.current_time() <= 250
        assert a.instance.epoch == 1


# --- nothing left


async def test_nothing_is_left_running_after_a_hundred_terms(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.start(lab.make("a", limits=replace(LIMITS, stand_back_s=0.0)))
        living: list[int] = []
        for n in range(1, 101):
            await a.journal.wait_for("restore.finished", n)
            message = await a.send(ANN, f"m{n}", key=f"k{n}")
            await wait_all_tasks_blocked()
            living.append(trio.lowlevel.current_statistics().tasks_living)
            assert (lab.whatsapp.connections, lab.whatsapp.bridges) == (2, 1)
            if n % 2:
                await a.desk.wait_progress(message.message_id)
                a.instance.request_step_down("again")
            else:
                a.term.lose("for the test")
        assert a.instance.epoch == 100
        assert len(set(living)) == 1
        inbox = [one.text for one in lab.whatsapp.inbox()]
        assert inbox == [f"m{n}" for n in range(1, 101)]
