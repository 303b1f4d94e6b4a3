"""Which sessions are dropped since they may be old, and which are kept."""

from __future__ import annotations

import itertools

import pytest
import trio
from trio.testing import MockClock

from machine.doubt import (
    NOT_SETTLED,
    ONLY_DISK,
    LastTerm,
    SharedCopy,
    Source,
    doubt_sessions,
)
from machine.limits import Durability
from machine.records import KeyName, MessageId
from tests.fakes.shared_store import CALM, failing
from tests.machine.lab import ANN, BEN, Host, Lab, open_lab

LOCAL, REMOTE = Durability.LOCAL, Durability.REMOTE
SETTLED = LastTerm(settled=True, here=False)
LOST_HERE = LastTerm(settled=False, here=True)
LOST_ELSEWHERE = LastTerm(settled=False, here=False)
_numbers = itertools.count(1)
SESSION = KeyName("session-4915112345678.0")


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


# --- the decision

CASES = [
    # What only the disk has, since the shared store lost it: whatever else is known.
    (Source.DISK, SharedCopy.MISSING, True, REMOTE, SETTLED, ONLY_DISK),
    (Source.DISK, SharedCopy.MISSING, True, LOCAL, LOST_HERE, ONLY_DISK),
    # With durability remote the shared store has all that counted.
    (Source.SHARED, SharedCopy.LISTED, False, REMOTE, LOST_ELSEWHERE, None),
    (Source.EQUAL, SharedCopy.LISTED, True, REMOTE, LOST_ELSEWHERE, None),
    (Source.DISK, SharedCopy.LISTED, True, REMOTE, LOST_ELSEWHERE, None),
    (Source.DISK, SharedCopy.UNKNOWN, True, REMOTE, LOST_ELSEWHERE, None),
    # With durability local it has after a term that was settled.
    (Source.SHARED, SharedCopy.LISTED, False, LOCAL, SETTLED, None),
    (Source.EQUAL, SharedCopy.LISTED, True, LOCAL, SETTLED, None),
    # After one that was not, the disk of its holder may be ahead: another one than this.
    (Source.SHARED, SharedCopy.LISTED, False, LOCAL, LOST_ELSEWHERE, NOT_SETTLED),
    (Source.SHARED, SharedCopy.LISTED, True, LOCAL, LOST_ELSEWHERE, NOT_SETTLED),
    (Source.EQUAL, SharedCopy.LISTED, True, LOCAL, LOST_ELSEWHERE, NOT_SETTLED),
    (Source.DISK, SharedCopy.UNKNOWN, True, LOCAL, LOST_ELSEWHERE, NOT_SETTLED),
    # Who is ahead of the shared store is that disk.
    (Source.DISK, SharedCopy.LISTED, True, LOCAL, LOST_ELSEWHERE, None),
    # This disk was the holder's: it has everything, if it can be read.
    (Source.EQUAL, SharedCopy.LISTED, True, LOCAL, LOST_HERE, None),
    (Source.SHARED, SharedCopy.LISTED, True, LOCAL, LOST_HERE, None),
    (Source.DISK, SharedCopy.UNKNOWN, True, LOCAL, LOST_HERE, None),
    (Source.SHARED, SharedCopy.LISTED, False, LOCAL, LOST_HERE, NOT_SETTLED),
]


@pytest.mark.parametrize(("source", "shared", "on_disk", "durability", "last", "cause"), CASES)
def test_sessions_are_doubted_where_newer_ones_may_be(
    source: Source,
    shared: SharedCopy,
    on_disk: bool,
    durability: Durability,
    last: LastTerm,
    cause: str | None,
) -> None:
    found = doubt_sessions(source, shared=shared, on_disk=on_disk, durability=durability, last=last)
    assert found == cause


def test_what_is_quarantined_is_not_opened_and_so_not_doubted() -> None:
    for shared, durability, settled, here, on_disk in itertools.product(
        SharedCopy, Durability, (True, False), (True, False), (True, False)
    ):
        last = LastTerm(settled=settled, here=here)
        assert (
            doubt_sessions(
                Source.NEITHER, shared=shared, on_disk=on_disk, durability=durability, last=last
            )
            is None
        )


# --- what becomes of it


async def serving(host: Host) -> Host:
    await host.journal.wait_for("restore.finished")
    return host


async def used(lab: Lab, host: Host, count: int = 2) -> None:
    """Send from Ann's account, so that there is a session."""
    for _ in range(count):
        # A text makes an id: never the same one twice, or nothing is sent.
        message = await host.send(ANN, f"text {next(_numbers)}")
        await host.desk.wait_progress(message.message_id)


def stored_doubt(lab: Lab) -> bool:
    return lab.state.accounts[ANN].account.sessions_doubtful


async def test_after_a_crash_with_durability_local_another_disk_begins_all_sessions_anew(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a", durability=LOCAL)))
        await used(lab, a)
        await trio.sleep(2.0)
        # From here on only its own disk has what is sent; then the host is gone with it.
        a.store.partitioned = True
        session = a.term.sessions[ANN]
        assert session.connection is not None
        ack = await session.connection.send_text(
            MessageId("3EB0000000000000000001"), "4915112345678", "never in the shared store"
        )
        assert session.ledger is not None
        await session.ledger.write(keys=ack.keys)
        b = await serving(lab.start(lab.make("b", durability=LOCAL)))
        assert [one["account_id"] for one in b.journal.of("account.doubted")] == [ANN]
        assert b.term.restore_report.doubted == 1
        await used(lab, b)
        assert lab.whatsapp.unreadable() == []
        await trio.sleep(5.0)
        assert not stored_doubt(lab)
        # Trusted from now on: a handoff keeps them.
        c = lab.start(lab.make("c", durability=LOCAL))
        await c.journal.wait_for("restore.skipped")
        b.instance.request_drain("redeploy")
        await serving(c)
        assert c.journal.of("account.doubted") == []
        assert c.term.restore_report.doubted == 0


async def test_after_a_crash_the_same_disk_keeps_its_sessions(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a", durability=LOCAL)))
        await used(lab, a)
        a.store.partitioned = True
        await a.journal.wait_for("lease.lost")
        again = await serving(lab.start(lab.make("a", durability=LOCAL, local=a.local)))
        assert again.journal.of("account.doubted") == []
        await used(lab, again)
        assert lab.whatsapp.unreadable() == []


async def test_a_handoff_is_no_reason_for_doubt_and_a_drain_that_left_something_behind_is(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a", durability=LOCAL)))
        await used(lab, a)
        b = lab.start(lab.make("b", durability=LOCAL))
        await b.journal.wait_for("restore.skipped")
        a.instance.request_drain("redeploy")
        await serving(b)
        assert b.journal.of("account.doubted") == []
        assert lab.state.read_lease().fence.settled is False
        await used(lab, b)
        # The lease can be given back, what only the disk has cannot be written.
        b.store.weather = lambda operation: failing() if operation == "commit" else CALM
        await used(lab, b, 0)
        session = b.term.sessions[ANN]
        assert session.ledger is not None
        await session.ledger.write(fields={"last_error": "only here"})
        c = lab.start(lab.make("c", durability=LOCAL))
        await c.journal.wait_for("restore.skipped")
        b.instance.request_drain("redeploy")
        await serving(c)
        assert "drain.unflushed" in b.journal.names()
        assert len(c.journal.of("account.doubted")) == 1


async def test_with_durability_remote_a_crash_leaves_no_doubt(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        await used(lab, a)
        a.store.partitioned = True
        b = await serving(lab.start(lab.make("b")))
        assert b.journal.of("account.doubted") == []
        await used(lab, b)
        assert lab.whatsapp.unreadable() == []


async def test_an_account_that_the_shared_store_lost_is_opened_without_its_sessions(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = await serving(lab.start(lab.make("a")))
        await used(lab, a)
        a.instance.request_drain("stop")
        await a.ended.wait()
        del lab.state.accounts[ANN]
        again = await serving(lab.start(lab.make("a", local=a.local)))
        assert [one["cause"] for one in again.journal.of("account.doubted")] == [ONLY_DISK]
        assert again.term.restore_report.doubted == 1
        await used(lab, again)
        assert lab.whatsapp.unreadable() == []
        await trio.sleep(1.0)
        assert not stored_doubt(lab)


async def test_an_account_found_lost_only_when_the_store_is_back_is_doubted_all_the_same(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = await serving(lab.start(lab.make("a")))
        await used(lab, a)
        a.instance.request_drain("stop")
        await a.ended.wait()
        del lab.state.accounts[ANN]
        again = lab.make("a", local=a.local)
        again.store.fail_next("list_accounts", 100)
        again.store.fail_next("fetch_account", 20)
        await serving(lab.start(again))
        assert again.term.restore_report.found_shared is None
        await again.journal.wait_for("session.connected", 2)
        assert [one["cause"] for one in again.journal.of("account.doubted")] == [ONLY_DISK]
        await used(lab, again)
        assert lab.whatsapp.unreadable() == []
        assert SESSION in lab.codec.unpack(ANN, lab.state.accounts[ANN].parts)


async def test_a_doubt_outlives_a_crash_before_the_sessions_were_dropped(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a", durability=LOCAL)))
        await used(lab, a)
        await trio.sleep(2.0)
        a.store.partitioned = True
        # Who takes over cannot log in, and gives the lease back in good order.
        lab.whatsapp.script(ANN).login_delay_s = 1e6
        b = await serving(lab.start(lab.make("b", durability=LOCAL)))
        assert stored_doubt(lab)
        b.instance.request_drain("redeploy")
        await b.ended.wait()
        assert lab.state.read_lease().fence.settled
        assert stored_doubt(lab)
        lab.whatsapp.script(ANN).login_delay_s = 0.0
        c = await serving(lab.start(lab.make("c", durability=LOCAL)))
        assert c.term.restore_report.doubted == 1
        await trio.sleep(5.0)
        assert not stored_doubt(lab)
        keys = lab.codec.unpack(ANN, lab.state.accounts[ANN].parts)
        assert SESSION not in keys


async def test_a_doubt_ends_only_when_the_dropping_is_stored(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        await used(lab, a)
        a.instance.request_drain("stop")
        await a.ended.wait()
        del lab.state.accounts[ANN]
        again = lab.make("a", local=a.local)
        lab.whatsapp.script(ANN).login_delay_s = 1.0
        lab.start(again)
        await again.journal.wait_for("account.doubted")
        await trio.sleep(0.5)
        assert stored_doubt(lab)
        again.store.delay(0.5, 0.5)
        await again.journal.wait_for("session.connected")
        assert stored_doubt(lab)
        await trio.sleep(5.0)
        assert not stored_doubt(lab)
        assert SESSION not in lab.codec.unpack(ANN, lab.state.accounts[ANN].parts)
