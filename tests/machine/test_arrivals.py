"""What comes in: messages stored before they are acknowledged, receipts and bodies found again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from machine.arrivals import UNSTORED_MAX
from machine.inbox import (
    NAME_CHARS_MAX,
    TEXT_CHARS_MAX,
    bounded,
    make_cursor,
    make_page,
    read_cursor,
)
from machine.limits import Durability
from machine.old_messages import WAITING_MAX
from machine.outbox import make_message_id
from machine.ports import (
    BodyAsked,
    KeysChanged,
    MessageProgressed,
    MessageReceived,
    StoreUnavailable,
)
from machine.records import (
    COMMIT_BYTES_MAX,
    AccountId,
    InboundMessage,
    InboxPlace,
    KeyChange,
    KeyName,
    MessageId,
    MessageState,
)
from machine.refusals import AccountNotFound, CursorUnknown
from tests.fakes.connector import FakeConnection
from tests.fakes.shared_store import Passage
from tests.machine.lab import ANN, BEN, LIMITS, Host, Lab, open_lab

READ_KEY = KeyName("session-4917012345.read")


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def serving(host: Host) -> Host:
    await host.journal.wait_for("restore.finished")
    return host


def stored(lab: Lab, account_id: AccountId = ANN) -> list[tuple[str, str]]:
    """What the account received, as readers see it: (id, text)."""
    entries = lab.state.list_inbox(account_id, None, 10**6)
    return [(entry.message.message_id, entry.message.text) for entry in entries]


def stored_keys(lab: Lab, account_id: AccountId = ANN) -> dict[KeyName, bytes]:
    return lab.codec.unpack(account_id, lab.state.accounts[account_id].parts)


def connection(lab: Lab, account_id: AccountId = ANN) -> FakeConnection:
    return lab.whatsapp.open[account_id]


def an_id(seed: object) -> MessageId:
    return make_message_id(ANN, None, random.Random(str(seed)))


# --- received messages


async def test_a_message_and_the_keys_it_changed_are_stored_in_one_commit_before_the_receipt(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        a.store.delay(2.0, 2.0)
        before = lab.state.writes
        lab.whatsapp.post(ANN, "m1")
        await trio.sleep(3.0)
        # The store has it, and nobody knows so yet.
        assert lab.state.writes == before + 1
        assert stored(lab) == [("m1", "hello")]
        assert stored_keys(lab)[READ_KEY] == b"1"
        assert lab.whatsapp.waiting(ANN) == ["m1"]
        await trio.sleep(2.0)
        assert lab.whatsapp.waiting(ANN) == []


async def test_messages_are_read_in_the_order_of_their_arrival_and_many_go_in_one_commit(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        a.store.delay(0.1, 0.1)
        before = lab.state.writes
        for number in range(150):
            lab.whatsapp.post(ANN, f"m{number}")
        await trio.sleep(2.0)
        assert [message_id for message_id, _ in stored(lab)] == [f"m{n}" for n in range(150)]
        assert lab.state.writes - before <= 4
        assert lab.whatsapp.waiting(ANN) == []


async def test_a_backlog_that_a_crash_left_unacknowledged_is_stored_once(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        lab.whatsapp.post(ANN, "m1", "first")
        await a.journal.wait_for("message.received")
        # The commit is applied, and its answer never comes: the receipt is not sent.
        a.store.hang_next("commit", applied=True)
        lab.whatsapp.post(ANN, "m2", "second")
        await trio.sleep(0.5)
        assert [message_id for message_id, _ in stored(lab)] == ["m1", "m2"]
        a.store.partitioned = True
        b = await serving(lab.start(lab.make("b")))
        lab.whatsapp.post(ANN, "m3", "third")
        await b.journal.wait_for("message.received", 2)
        assert lab.whatsapp.mail_delivered.count(MessageId("m2")) == 2
        assert stored(lab) == [("m1", "first"), ("m2", "second"), ("m3", "third")]
        assert lab.whatsapp.waiting(ANN) == []


async def test_the_same_message_again_is_acknowledged_keeps_its_keys_and_the_first_text(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        await serving(lab.start(lab.make("a")))
        lab.whatsapp.post(ANN, "m1", "first", twice=True)
        await trio.sleep(1.0)
        assert stored_keys(lab)[READ_KEY] == b"2"
        event = MessageReceived(
            replace(lab.state.list_inbox(ANN, None, 1)[0].message, text="another"),
            KeyChange({READ_KEY: b"3"}),
            trio.Event(),
        )
        connection(lab).push(event)
        with trio.fail_after(1.0):
            await event.stored.wait()
        assert stored_keys(lab)[READ_KEY] == b"3"
        assert stored(lab) == [("m1", "first")]


async def test_messages_that_change_no_key_have_places_of_their_own_and_the_first_text_stays(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))

        def push(message_id: str, text: str) -> None:
            message = InboundMessage(ANN, MessageId(message_id), "49170", "49170", None, text, 1, 2)
            connection(lab).push(MessageReceived(message, None, trio.Event()))

        # While one is being written the others gather, and go in one commit.
        a.store.delay(0.1)
        push("m0", "alone")
        await trio.sleep(0.05)
        push("m1", "first")
        push("m1", "second, in the same commit")
        await a.journal.wait_for("message.received", 3)
        push("m2", "another commit")
        await a.journal.wait_for("message.received", 4)
        assert stored(lab) == [("m0", "alone"), ("m1", "first"), ("m2", "another commit")]
        places = [entry.place for entry in lab.state.list_inbox(ANN, None, 9)]
        assert places[0] < places[1] < places[2]


async def test_mail_that_came_while_nobody_held_the_lease_arrives_after_the_restore(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        for number in range(3):
            lab.whatsapp.post(ANN, f"m{number}")
        await serving(lab.start(lab.make("a")))
        await trio.sleep(1.0)
        assert [message_id for message_id, _ in stored(lab)] == ["m0", "m1", "m2"]


async def test_a_message_that_cannot_be_stored_ends_the_connection_and_comes_again(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        # Another process has changed the account: what was built on the old keys is refused.
        lab.state.accounts[ANN].stamp = lab.state.stamp()
        lab.state.accounts[ANN].version = replace(lab.state.accounts[ANN].version, revision=50)
        lab.whatsapp.post(ANN, "m1")
        await a.journal.wait_for("session.closed")
        assert lab.whatsapp.waiting(ANN) == ["m1"]
        await a.journal.wait_for("message.received")
        assert stored(lab) == [("m1", "hello")]
        assert lab.whatsapp.waiting(ANN) == []


async def test_with_durability_local_a_message_still_counts_when_the_shared_store_has_it(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a", durability=Durability.LOCAL)))
        a.store.weather = lambda operation: Passage(
            error_before=StoreUnavailable("away") if operation == "commit" else None
        )
        lab.whatsapp.post(ANN, "m1")
        await trio.sleep(3.0)
        assert lab.whatsapp.waiting(ANN) == ["m1"]
        a.store.weather = lambda operation: Passage()
        await a.journal.wait_for("message.received")
        assert stored(lab) == [("m1", "hello")]


async def test_a_connection_is_not_read_on_while_too_many_messages_wait_for_the_store(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        a.store.hang_next("commit")
        for number in range(UNSTORED_MAX + 5):
            lab.whatsapp.post(ANN, f"m{number}")
        with trio.move_on_after(0.1):
            await trio.sleep_forever()
        # One is in hand, and waits for room.
        assert len(connection(lab)._events) == 4
        await trio.sleep(30.0)
        assert len(stored(lab)) == UNSTORED_MAX + 5


async def test_a_commit_never_outgrows_what_a_store_takes(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        a.store.delay(0.1)
        for number in range(100):
            lab.whatsapp.post(ANN, f"m{number}", "🙂" * TEXT_CHARS_MAX)
        await trio.sleep(10.0)
        assert len(stored(lab)) == 100
        sizes: Counter[int] = Counter()
        for entry in lab.state.list_inbox(ANN, None, 100):
            sizes[entry.place.revision] += len(entry.message.text.encode())
        assert len(sizes) > 5
        assert max(sizes.values()) <= COMMIT_BYTES_MAX


async def test_a_drain_stores_what_has_arrived(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        a.store.delay(0.5, 0.5)
        lab.whatsapp.post(ANN, "m1")
        await wait_all_tasks_blocked()
        a.instance.request_drain("redeploy")
        await a.ended.wait()
        assert stored(lab) == [("m1", "hello")]


async def test_any_instance_reads_the_inbox_and_a_cursor_outlives_a_failover(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = await serving(lab.start(lab.make("a")))
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("restore.skipped")
        for number in range(3):
            lab.whatsapp.post(ANN, f"m{number}")
        lab.whatsapp.post(BEN, "for ben")
        await a.journal.wait_for("message.received", 4)
        page = await b.instance.list_inbox(ANN, cursor="", count_max=2)
        assert [message.message_id for message in page.messages] == ["m0", "m1"]
        assert page.more
        a.store.partitioned = True
        await serving(b)
        lab.whatsapp.post(ANN, "m3")
        await b.journal.wait_for("message.received")
        page = await b.instance.list_inbox(ANN, cursor=page.cursor, count_max=2)
        assert [message.message_id for message in page.messages] == ["m2", "m3"]
        assert not page.more
        end = await b.instance.list_inbox(ANN, cursor=page.cursor, count_max=2)
        assert (end.messages, end.cursor, end.more) == ((), page.cursor, False)


async def test_an_account_that_nobody_knows_has_no_inbox_and_a_silent_one_has_an_empty_one(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        standby = lab.make("b")
        for host in (a, standby):
            assert (await host.instance.list_inbox(ANN, cursor="", count_max=9)).messages == ()
            with pytest.raises(AccountNotFound):
                await host.instance.list_inbox(BEN, cursor="", count_max=9)


async def test_received_messages_over_their_retention_are_deleted_however_many_they_are(
    autojump_clock: MockClock,
) -> None:
    limits = replace(LIMITS, message_retention_s=7200.0, purge_count_max=10)
    async with open_lab(limit_s=50_000) as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a", limits=limits)))
        for number in range(35):
            lab.whatsapp.post(ANN, f"m{number}")
        await trio.sleep(7000.0)
        lab.whatsapp.post(ANN, "young")
        await trio.sleep(7200.0)
        assert [message_id for message_id, _ in stored(lab)] == ["young"]
        assert a.instance.epoch == 1


# --- cursors and limits


@pytest.mark.parametrize(
    "cursor", ["x", "!", "MS4y", "MS4yLng", make_cursor(InboxPlace(1, 2, 3))[:-1] + "\n", "é"]
)
def test_a_cursor_of_nobodys_is_refused(cursor: str) -> None:
    with pytest.raises(CursorUnknown):
        read_cursor(cursor)


def test_a_cursor_comes_back_as_its_place_and_none_is_the_beginning() -> None:
    for place in (InboxPlace(0, 0, 0), InboxPlace(10**12 - 1, 10**12 - 1, 9999)):
        assert read_cursor(make_cursor(place)) == place
    assert read_cursor("") is None


def test_an_empty_page_keeps_the_cursor() -> None:
    page = make_page([], cursor="abc", count_max=3)
    assert (page.messages, page.cursor, page.more) == ((), "abc", False)


def test_what_strangers_send_is_cut_to_its_limits() -> None:
    huge = InboundMessage(
        ANN, MessageId("i" * 9999), "c" * 9999, "s" * 9999, "n" * 9999, "t" * 99999, 1, 2
    )
    small = bounded(huge)
    assert len(small.text) == TEXT_CHARS_MAX
    assert {len(small.message_id), len(small.chat), len(small.sender)} == {NAME_CHARS_MAX}
    assert bounded(small) == small


@pytest.mark.parametrize("sent_at", [-1.0, 1e300, float("inf"), float("nan")])
def test_what_no_store_takes_is_replaced(sent_at: float) -> None:
    strange = InboundMessage(
        ANN, MessageId("m\udfff"), "c\ud800", "s", "n\udc00", "half \ud83d of one", sent_at, 2
    )
    whole = bounded(strange)
    assert whole.sent_at == 0.0
    assert (whole.message_id, whole.chat, whole.sender_name) == ("m?", "c?", "n?")
    assert whole.text == "half ? of one"


# --- receipts and bodies of messages that are not in memory


async def acked_then_failed_over(lab: Lab, count: int = 1) -> tuple[Host, Sequence[MessageId]]:
    """Messages that one instance has sent, and the next one, which has them in the store only."""
    await lab.add_accounts(ANN)
    a = await serving(lab.start(lab.make("a")))
    ids = []
    for number in range(count):
        message = await a.send(ANN, f"text {number}")
        await a.desk.wait_progress(message.message_id)
        ids.append(message.message_id)
    b = lab.start(lab.make("b"))
    await b.journal.wait_for("restore.skipped")
    a.instance.request_drain("redeploy")
    return await serving(b), ids


async def test_a_receipt_after_a_failover_moves_the_stored_message_on(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        b, (message_id,) = await acked_then_failed_over(lab)
        for state in (MessageState.DELIVERED, MessageState.READ, MessageState.DELIVERED):
            connection(lab).push(MessageProgressed(message_id, state))
        await trio.sleep(1.0)
        assert lab.state.messages[message_id].state is MessageState.READ
        assert b.store.calls["fetch_message"] == 1
        assert (await b.desk.message(message_id)).state is MessageState.READ


async def test_a_storm_of_receipts_asks_the_store_once_for_each_id_one_after_the_other(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        b, ids = await acked_then_failed_over(lab, 3)
        b.store.delay(0.1, 0.1)
        unknown = [an_id(number) for number in range(5)]
        for _ in range(WAITING_MAX):
            for message_id in (*ids, *unknown, MessageId("from the phone")):
                connection(lab).push(MessageProgressed(message_id, MessageState.DELIVERED))
        await trio.sleep(60.0)
        assert b.store.calls["fetch_message"] == len(ids) + len(unknown)
        states = {lab.state.messages[message_id].state for message_id in ids}
        assert states == {MessageState.DELIVERED}
        # What did not fit was dropped and told, and the connection stood.
        assert "message.look_dropped" in b.journal.names()
        assert lab.whatsapp.opened == 2


async def test_a_body_is_given_from_memory_and_from_the_store_and_no_other_account_gets_it(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        b, (message_id,) = await acked_then_failed_over(lab)
        fresh = await b.send(ANN, "in memory")
        await b.desk.wait_progress(fresh.message_id)
        await b.desk.add_account(BEN, "Ben")
        lab.whatsapp.scan(BEN)
        await b.journal.wait_for("session.connected", 2)
        answers: list[tuple[str, str | None]] = []

        def ask(account_id: AccountId, asked: MessageId) -> None:
            event = BodyAsked(asked, lambda text: answers.append((account_id, text)))
            connection(lab, account_id).push(event)

        for account_id in (ANN, BEN):
            ask(account_id, message_id)
        ask(ANN, fresh.message_id)
        ask(ANN, an_id("nobody's"))
        await trio.sleep(1.0)
        assert sorted(answers, key=str) == sorted(
            [(ANN, "text 0"), (BEN, None), (ANN, "in memory"), (ANN, None)], key=str
        )


async def test_a_body_is_refused_in_time_when_the_store_does_not_answer(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        b, (message_id,) = await acked_then_failed_over(lab)
        b.store.hang_next("fetch_message")
        answers: list[str | None] = []
        connection(lab).push(BodyAsked(message_id, answers.append))
        await trio.sleep(LIMITS.store_try_s + 0.1)
        assert answers == [None]
        connection(lab).push(BodyAsked(message_id, answers.append))
        await trio.sleep(1.0)
        assert answers == [None, "text 0"]


# --- the keys of a pairing


async def test_an_interrupted_pairing_leaves_no_half_account(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = await serving(lab.start(lab.make("a")))
        await a.desk.add_account(ANN, "Ann")
        early = KeysChanged(KeyChange({KeyName("creds"): b"no phone yet"}), trio.Event())
        pairing = lab.whatsapp._pairing[ANN]
        pairing.push(early)
        with trio.fail_after(1.0):
            await early.stored.wait()
        assert lab.state.accounts[ANN].parts == {}
        a.instance.request_drain("redeploy")
        await a.ended.wait()
        b = await serving(lab.start(lab.make("b")))
        assert lab.state.accounts[ANN].parts == {}
        view = await b.desk.account(ANN)
        assert view.account.status == "qr_ready"
        lab.whatsapp.scan(ANN)
        await b.journal.wait_for("session.connected")
        assert stored_keys(lab)[KeyName("creds")] == b"creds of ann"


async def test_what_a_pairing_made_before_the_scan_is_stored_with_the_rest_at_once(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = await serving(lab.start(lab.make("a")))
        await a.desk.add_account(ANN, "Ann")
        values = {KeyName("creds"): b"no phone yet", KeyName("pre-key-9"): b"early"}
        lab.whatsapp._pairing[ANN].push(KeysChanged(KeyChange(values), trio.Event()))
        await wait_all_tasks_blocked()
        a.store.fail_next("commit", 3)
        lab.whatsapp.scan(ANN)
        await a.journal.wait_for("session.connected")
        keys = stored_keys(lab)
        assert keys[KeyName("creds")] == b"creds of ann"
        assert keys[KeyName("pre-key-9")] == b"early"
