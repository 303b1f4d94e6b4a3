"""Messages accepted: once, in order, within limits, and never lost by who asked for them."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from machine.outbox import (
    AccountOutbox,
    is_progress,
    make_message_id,
    moved,
    require_same,
    same_message,
)
from machine.ports import ConnectionClosed
from machine.records import AccountId, Message, MessageId, MessageState
from machine.refusals import IdempotencyKeyReused, MessageNotFound, OutboxFull
from tests.machine.lab import ANN, BEN, LIMITS, Host, open_lab

TO = "4915112345678"


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def message(name: str, state: MessageState = MessageState.QUEUED, **fields: object) -> Message:
    made = Message(
        message_id=MessageId(name),
        account_id=ANN,
        to=TO,
        text=name,
        state=state,
        epoch=1,
        created_at=1.0,
        updated_at=1.0,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def an_outbox(*, pending_max: int = 10, settled_kept: int = 3) -> AccountOutbox:
    return AccountOutbox(ANN, pending_max=pending_max, settled_kept=settled_kept)


# --- ids


def test_the_oldest_pending_message_says_how_long_anybody_waits() -> None:
    assert an_outbox().oldest_at is None
    outbox = an_outbox()
    for name, at in (("first", 10.0), ("second", 20.0)):
        outbox.put(message(name, created_at=at))
    assert outbox.oldest_at == 10.0
    outbox.put(message("first", MessageState.SERVER_ACK, created_at=10.0))
    assert outbox.oldest_at == 20.0


def test_a_message_id_follows_from_account_and_key() -> None:
    one = make_message_id(ANN, "key", random.Random(1))
    assert one == make_message_id(ANN, "key", random.Random(2))
    assert one.startswith("3EB0")
    assert len(one) == 22
    assert int(one, 16)
    assert one == one.upper()


def test_other_accounts_other_keys_and_no_key_give_other_ids() -> None:
    rng = random.Random(1)
    ids = [
        make_message_id(ANN, "key", rng),
        make_message_id(BEN, "key", rng),
        make_message_id(ANN, "key2", rng),
        # The separator keeps (ann, "x") and (annx, "") apart.
        make_message_id(AccountId("annk"), "ey", rng),
        make_message_id(ANN, None, rng),
        make_message_id(ANN, None, rng),
    ]
    assert len(set(ids)) == len(ids)


# --- the account's outbox


def test_the_limit_counts_what_is_being_accepted_too() -> None:
    outbox = an_outbox(pending_max=2)
    outbox.put(message("one"))
    outbox.reserve()
    assert outbox.depth == 2
    with pytest.raises(OutboxFull, match="2 messages waiting") as full:
        outbox.reserve()
    assert full.value.retry_after_s == 5
    outbox.unreserve()
    outbox.reserve()


async def test_pending_messages_come_in_order_those_of_earlier_terms_first() -> None:
    outbox = an_outbox()
    outbox.put(message("new"))
    outbox.load([message("old 1"), message("old 2"), message("new")])
    for expected in ("old 1", "old 2", "new"):
        next_one = await outbox.next_pending()
        assert next_one.message_id == expected
        outbox.put(moved(next_one, MessageState.SERVER_ACK, at=2.0, epoch=1))
    assert outbox.idle


async def test_a_message_whose_ack_is_being_recorded_is_pending_and_not_sent_again() -> None:
    outbox = an_outbox()
    outbox.put(message("one", MessageState.SENDING))
    outbox.put(message("two", MessageState.SENDING))
    outbox.note_acked(MessageId("one"))
    assert (await outbox.next_pending()).message_id == "two"
    assert outbox.depth == 2
    outbox.note_unrecorded(MessageId("one"))
    assert (await outbox.next_pending()).message_id == "one"


def test_a_message_that_settled_meanwhile_is_not_loaded_again() -> None:
    outbox = an_outbox()
    outbox.put(message("done", MessageState.SERVER_ACK))
    outbox.load([message("done")])
    assert outbox.idle


def test_only_the_last_settled_ones_are_remembered() -> None:
    outbox = an_outbox(settled_kept=3)
    for n in range(5):
        outbox.put(message(f"m{n}", MessageState.SERVER_ACK))
    kept = [n for n in range(5) if outbox.find(MessageId(f"m{n}")) is not None]
    assert kept == [2, 3, 4]


async def test_whoever_waits_hears_of_the_end_and_not_of_the_steps(
    autojump_clock: MockClock,
) -> None:
    outbox = an_outbox()
    outbox.put(message("m"))
    states: list[MessageState] = []

    async def wait() -> None:
        settled = await outbox.wait_settled(MessageId("m"))
        assert settled is not None
        states.append(settled.state)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        await trio.sleep(1)
        outbox.put(message("m", MessageState.SENDING))
        await trio.sleep(1)
        assert states == []
        outbox.put(message("m", MessageState.SERVER_ACK))
    assert states == [MessageState.SERVER_ACK] * 2
    assert await outbox.wait_settled(MessageId("unknown")) is None


def test_doubtful_are_the_recipients_of_what_may_be_on_the_wire() -> None:
    outbox = an_outbox()
    outbox.put(message("a", MessageState.SENDING, to="1"))
    outbox.put(message("b", MessageState.QUEUED, to="2"))
    outbox.put(message("c", MessageState.SERVER_ACK, to="3"))
    assert outbox.doubtful_recipients() == {"1"}


def test_a_receipt_ends_no_doubt_before_the_keys_are_durable() -> None:
    outbox = an_outbox()
    one, two = (message(name, MessageState.SENDING, to="1") for name in ("one", "two"))
    for each in (one, two):
        outbox.try_now(each)
    for each in (one, two):
        outbox.note_acked(each.message_id)
        outbox.put(moved(each, MessageState.DELIVERED, at=2.0, epoch=1))
    outbox.note_recorded(one.message_id)
    # The ack of the second, with the keys that it changed, may still come to nothing.
    assert outbox.doubtful_recipients() == {"1"}
    outbox.note_recorded(two.message_id)
    assert outbox.doubtful_recipients() == frozenset()


def test_what_is_recorded_later_speaks_for_what_was_sent_before_it() -> None:
    outbox = an_outbox()
    one, two = (message(name, MessageState.SENDING, to="1") for name in ("one", "two"))
    for each in (one, two):
        outbox.try_now(each)
    # Its ack came to nothing, and a receipt said all the same that its recipient has it.
    received = moved(one, MessageState.DELIVERED, at=2.0, epoch=1)
    outbox.put(received)
    assert outbox.in_doubt(one.message_id)
    # Its receipt was not stored until now.
    assert outbox.note_recorded(two.message_id) == (received,)
    outbox.put(moved(two, MessageState.SERVER_ACK, at=2.0, epoch=1))
    assert outbox.doubtful_recipients() == frozenset()


states = st.sampled_from(list(MessageState))


@given(st.lists(states, min_size=1))
def test_a_message_only_moves_forward_and_keeps_when_it_first_reached_each_state(
    steps: list[MessageState],
) -> None:
    outbox = an_outbox()
    first = message("m")
    outbox.put(first)
    shown = [first.state]
    for at, state in enumerate(steps, start=2):
        known = outbox.find(first.message_id)
        assert known is not None
        outbox.put(moved(known, state, at=float(at), epoch=1))
        after = outbox.find(first.message_id)
        assert after is not None
        assert not is_progress(after.state, known.state)
        assert known.state_at.items() <= after.state_at.items()
        shown.append(after.state)
    assert (outbox.depth == 1) == (shown[-1] in (MessageState.QUEUED, MessageState.SENDING))


def test_the_same_message_is_account_recipient_and_text() -> None:
    one = message("m")
    assert same_message(one, account_id=ANN, to=TO, text="m")
    for other in (
        {"account_id": BEN, "to": TO, "text": "m"},
        {"account_id": ANN, "to": "1", "text": "m"},
        {"account_id": ANN, "to": TO, "text": "n"},
    ):
        with pytest.raises(IdempotencyKeyReused):
            require_same(one, **other)  # type: ignore[arg-type]


# --- accepting, in an instance


async def serving(host: Host) -> Host:
    await host.journal.wait_for("restore.finished")
    return host


async def test_the_same_key_and_body_are_one_message(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        first = await a.send(ANN, "hello", key="k")
        done = await a.desk.wait_progress(first.message_id)
        again = await a.send(ANN, "hello", key="k")
        assert again == done
        with pytest.raises(IdempotencyKeyReused):
            await a.send(ANN, "something else", key="k")
        assert len(lab.whatsapp.raw) == 1


@pytest.mark.parametrize("body", ["hello", "something else"])
async def test_the_same_key_twice_at_once_is_one_message(
    autojump_clock: MockClock, body: str
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        a.store.delay(0.1, 0.1)
        answers: list[str] = []

        async def send(text: str) -> None:
            try:
                accepted = await a.send(ANN, text, key="k")
            except IdempotencyKeyReused:
                answers.append("reused")
            else:
                answers.append(accepted.text)

        # The first waits for a commit in flight, so that both others go with the next one.
        a.term.sessions[ANN].ledger.post(fields={"name": "busy"})  # type: ignore[union-attr]
        await trio.sleep(0.01)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, "hello")
            nursery.start_soon(send, body)
        await trio.sleep(2)
        (sent,) = lab.whatsapp.raw
        if body == "hello":
            assert answers == ["hello", "hello"]
        else:
            assert sorted(answers) == sorted(["reused", sent.text])
        assert a.desk.outbox_depth == 0


async def test_the_same_key_is_known_at_another_instance_after_a_failover(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        first = await a.send(ANN, "hello", key="k")
        await a.desk.wait_progress(first.message_id)
        a.store.partitioned = True
        b = await serving(lab.start(lab.make("b")))
        again = await b.send(ANN, "hello", key="k")
        assert again.message_id == first.message_id
        assert again.state is MessageState.SERVER_ACK
        with pytest.raises(IdempotencyKeyReused):
            await b.send(ANN, "something else", key="k")
        assert b.desk.outbox_depth == 0
        assert len(lab.whatsapp.raw) == 1


async def test_a_full_outbox_refuses_and_has_room_again_when_it_drains(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        limits = replace(LIMITS, outbox_per_account_max=3)
        a = await serving(lab.start(lab.make("a", limits=limits)))
        lab.whatsapp.script(ANN).refuse_login.append(ConnectionClosed(402, expire_s=600))
        lab.whatsapp.cut(ANN, 428)
        await a.journal.wait_for("session.closed", 2)
        kept = [await a.send(ANN, f"m{n}", key=f"k{n}") for n in range(3)]
        with pytest.raises(OutboxFull):
            await a.send(ANN, "one too many")
        # What was accepted before is answered, not refused.
        assert (await a.send(ANN, "m1", key="k1")).message_id == kept[1].message_id
        for one in kept:
            await a.desk.wait_progress(one.message_id)
        await a.send(ANN, "room again")


async def test_a_caller_who_leaves_does_not_take_the_message_along(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        limits = replace(LIMITS, outbox_per_account_max=1)
        a = await serving(lab.start(lab.make("a", limits=limits)))
        a.store.delay(0.5, 0.5)
        with trio.move_on_after(0.1) as left:
            await a.send(ANN, "left alone")
        assert left.cancelled_caught
        # Its place is taken as long as nobody knows.
        with pytest.raises(OutboxFull):
            await a.send(ANN, "no place")
        await trio.sleep(5)
        assert [one.text for one in lab.whatsapp.inbox()] == ["left alone"]
        assert a.desk.outbox_depth == 0
        await a.send(ANN, "a place again")


async def test_a_message_that_was_not_written_leaves_its_place(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        del lab.state.accounts[ANN]
        with pytest.raises(Exception, match="not in the shared store"):
            await a.send(ANN, "nowhere to write")
        assert a.desk.outbox_depth == 0


async def test_a_message_is_found_in_memory_and_in_the_store_and_unknown_ones_are_not(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        limits = replace(LIMITS, outbox_settled_kept=1)
        a = await serving(lab.start(lab.make("a", limits=limits)))
        sent = [await a.send(ANN, f"m{n}", key=f"k{n}") for n in range(3)]
        for one in sent:
            await a.desk.wait_progress(one.message_id)
        reads = a.store.calls.get("fetch_message", 0)
        assert (await a.desk.message(sent[2].message_id)).state is MessageState.SERVER_ACK
        assert a.store.calls.get("fetch_message", 0) == reads
        assert (await a.desk.message(sent[0].message_id)).state is MessageState.SERVER_ACK
        assert (await a.desk.wait_progress(sent[0].message_id)).state is MessageState.SERVER_ACK
        with pytest.raises(MessageNotFound):
            await a.desk.message(MessageId("unknown"))


async def test_settled_messages_over_their_retention_are_deleted_and_pending_ones_never(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        limits = replace(LIMITS, message_retention_s=600.0, purge_every_s=500.0)
        lab.whatsapp.script(BEN).refuse_login.append(ConnectionClosed(402, expire_s=5000))
        a = await serving(lab.start(lab.make("a", limits=limits)))
        old = await a.send(ANN, "old")
        await a.desk.wait_progress(old.message_id)
        pending = await a.send(BEN, "still waiting")
        await trio.sleep(1400)
        recent = await a.send(ANN, "recent")
        await trio.sleep(300)
        assert set(lab.state.messages) == {pending.message_id, recent.message_id}
