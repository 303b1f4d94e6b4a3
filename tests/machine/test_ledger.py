"""One account's commits: grouped, in order, once, fenced; and its copy on this disk."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from machine.arrivals import Arrivals
from machine.ledger import AccountVanished, Ledger
from machine.limits import Durability
from machine.outbox import AccountOutbox, moved
from machine.places import Places
from machine.ports import (
    AuthTooLarge,
    AuthUnreadable,
    MessageExists,
    MessageProgressed,
    StaleWrite,
)
from machine.records import (
    COMMIT_BYTES_MAX,
    COMMIT_WRITES_MAX,
    MAIN_PART,
    AccountCommit,
    AccountCopy,
    AccountStatus,
    Grant,
    KeyChange,
    KeyName,
    LeaseWrite,
    Message,
    MessageId,
    MessageState,
    PartName,
    Stamp,
    Version,
)
from machine.refusals import NotActive
from tests.fakes.local_store import FakeLocalStore
from tests.fakes.shared_store import CALM, LOST_REPLY, Passage
from tests.machine.lab import ANN, LIMITS, Host, Lab, open_lab

CREDS = KeyName("creds")
MARK = KeyName("mark")
SESSION = KeyName("session-49170.0")


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class Guard:
    """A term of epoch 7 that is not over until `lose`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.grant = Grant(7, "a", "a-1", Stamp(""))
        self.reading = Places(16)
        self.lost: str | None = None
        self._nursery = nursery

    def check(self) -> None:
        if self.lost is not None:
            raise NotActive("lost")

    def lose(self, reason: str, *, epoch_seen: int = 0) -> None:
        self.lost = reason

    def spawn(self, work: Callable[[], Awaitable[object]]) -> None:
        self._nursery.start_soon(work)


@dataclass
class Bench:
    """One ledger on fakes."""

    lab: Lab
    host: Host
    term: Guard
    ledger: Ledger

    def stored(self) -> AccountCopy:
        copy = self.lab.state.fetch_account(ANN)
        assert copy is not None
        return copy

    def keys(self, copy: AccountCopy) -> dict[KeyName, bytes]:
        return self.lab.codec.unpack(ANN, copy.parts)

    @property
    def commits(self) -> int:
        return self.host.store.calls.get("commit", 0)


@asynccontextmanager
async def open_bench(
    *,
    durability: Durability = Durability.REMOTE,
    disk: AccountCopy | None = None,
    shared: bool = True,
    push: bool = False,
    sealed: bool = True,
) -> AsyncIterator[Bench]:
    async with open_lab() as lab, trio.open_nursery() as nursery:
        local = FakeLocalStore()
        if disk is not None:
            local.copies[ANN] = disk
        if shared:
            await lab.add_accounts(ANN)
        host = lab.make("a", local=local, durability=durability)
        term = Guard(nursery)
        take_lease(lab, 7)
        copy = next(iter(lab.state.list_accounts().copies), None)
        saved = disk is not None and (copy is None or copy.version == disk.version or push)
        if disk is not None and (push or copy is None):
            copy = replace(disk, stamp=copy.stamp if copy else None)
        assert copy is not None
        ledger = Ledger(
            copy,
            term=term,
            ports=host.ports,
            limits=LIMITS,
            durability=durability,
            push=push,
            saved=saved,
        )
        if sealed:
            await ledger.ensure_sealed()
            await ledger.ensure_complete()
        yield Bench(lab, host, term, ledger)
        nursery.cancel_scope.cancel()


def take_lease(lab: Lab, epoch: int) -> None:
    view = lab.state.read_lease()
    lab.state.write_lease(
        LeaseWrite(
            lease=replace(view.lease, holder="a", incarnation="a-1", epoch=epoch),
            fence=replace(view.fence, holder="a", incarnation="a-1", epoch=epoch),
        )
    )


def message(text: str, state: MessageState = MessageState.QUEUED) -> Message:
    return Message(
        message_id=MessageId(f"id-{text}"),
        account_id=ANN,
        to="49170",
        text=text,
        state=state,
        epoch=7,
        created_at=1.0,
        updated_at=1.0,
    )


def mark(value: bytes) -> KeyChange:
    return KeyChange({MARK: value})


def late_commit(bench: Bench, **parts: bytes) -> None:
    """The old holder's last write, applied after our listing."""
    stored = bench.stored()
    version = Version(stored.version.epoch, stored.version.revision + 1)
    change = KeyChange({KeyName(name): value for name, value in parts.items()})
    bench.lab.state.commit(
        AccountCommit(
            grant=bench.term.grant,
            # Where the account is sealed, of this term: an earlier try of its own, applied late.
            commit_id=f"{version.epoch}-{bench.term.grant.incarnation}-late",
            account=replace(stored.account, phone="49160", last_error="seen by the old holder"),
            version=version,
            stamp=stored.stamp or Stamp(""),
            parts=bench.lab.codec.change(ANN, stored.parts, change, version),
            new_messages=(message("late"),),
        )
    )


# --- grouping, order, once


async def test_what_arrives_during_a_commit_goes_with_the_next(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        bench.host.store.delay(0.1, 0.1)
        before = bench.commits
        async with trio.open_nursery() as nursery:
            for n in range(50):
                nursery.start_soon(
                    lambda n=n: bench.ledger.write(keys=mark(b"%d" % n))  # type: ignore[misc]
                )
                if n == 0:
                    await wait_all_tasks_blocked()
        assert bench.commits - before == 2
        assert trio.current_time() == pytest.approx(0.4)


async def test_changes_are_applied_in_the_order_they_were_posted(
    autojump_clock: MockClock,
) -> None:
    async with open_bench() as bench:
        done: list[int] = []
        for n in range(250):
            bench.ledger.post(
                keys=mark(b"%d" % n),
                messages=(message(f"m{n}"),),
                applied=lambda n=n: done.append(n),  # type: ignore[misc]
            )
        await bench.ledger.flush()
        assert done == list(range(250))
        assert bench.keys(bench.stored())[MARK] == b"249"
        assert len(bench.lab.state.messages) == 250
        # commit_messages_max is 100.
        assert bench.commits == 1 + 3


@pytest.mark.parametrize("fault", ["not sent", "applied", "no answer"])
async def test_a_commit_without_an_answer_is_applied_exactly_once(
    autojump_clock: MockClock, fault: str
) -> None:
    async with open_bench() as bench:
        store = bench.host.store
        if fault == "not sent":
            store.fail_next("commit", 3)
        elif fault == "applied":
            store.apply_then_fail("commit", 3)
        else:
            store.schedule("commit", LOST_REPLY, LOST_REPLY)
        revision, writes = bench.stored().version.revision, bench.lab.state.writes
        await bench.ledger.write(keys=mark(b"once"), new_message=message("once"))
        stored = bench.stored()
        assert bench.lab.state.writes == writes + 1
        assert stored.version == Version(7, revision + 1)
        assert bench.keys(stored)[MARK] == b"once"
        assert bench.host.journal.of("commit.retried")
        await bench.ledger.write(keys=mark(b"twice"))
        assert bench.stored().version == Version(7, revision + 2)


async def test_a_message_that_exists_fails_its_own_entry_only(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        await bench.ledger.write(new_message=message("taken"))
        failed: list[Exception] = []
        bench.ledger.post(keys=mark(b"kept"))
        bench.ledger.post(new_message=message("before"))
        bench.ledger.post(new_message=message("taken"), failed=failed.append)
        bench.ledger.post(new_message=message("after"))
        await bench.ledger.flush()
        assert [type(error) for error in failed] == [MessageExists]
        assert set(bench.lab.state.messages) == {"id-taken", "id-before", "id-after"}
        assert bench.keys(bench.stored())[MARK] == b"kept"


async def test_a_new_message_posted_twice_at_once_is_written_once(
    autojump_clock: MockClock,
) -> None:
    async with open_bench() as bench:
        first = message("same")
        failed: list[Exception] = []
        bench.ledger.post(new_message=first)
        bench.ledger.post(new_message=replace(first, text="another"), failed=failed.append)
        await bench.ledger.flush()
        assert bench.lab.state.messages[first.message_id] == first
        (exists,) = failed
        assert isinstance(exists, MessageExists)
        assert exists.message == first


async def test_a_change_that_cannot_be_packed_fails_its_caller_and_nothing_is_written(
    autojump_clock: MockClock,
) -> None:
    async with open_bench() as bench:
        version = bench.stored().version
        bench.lab.codec.unreadable.add(ANN)
        with pytest.raises(AuthUnreadable):
            await bench.ledger.write(keys=mark(b"x"))
        bench.lab.codec.unreadable.clear()
        assert bench.stored().version == version
        await bench.ledger.write(keys=mark(b"y"))


async def test_what_is_queued_behind_a_change_that_came_to_nothing_is_not_written(
    autojump_clock: MockClock,
) -> None:
    async with open_bench() as bench:
        accounts = bench.lab.state.accounts
        gone = accounts.pop(ANN)
        told: list[Exception] = []

        def failed(error: Exception) -> None:
            told.append(error)
            accounts[ANN] = gone  # From a backup, in time for what comes next.

        bench.host.store.delay(0.1, 0.1)
        bench.ledger.post(keys=mark(b"x"), failed=failed)
        await trio.sleep(0.05)  # Its commit has begun: what comes now is behind it.
        bench.ledger.post(messages=(message("received"),), failed=told.append)
        await trio.sleep(1)
        assert [type(error) for error in told] == [AccountVanished, AccountVanished]
        assert bench.lab.state.messages == {}
        await bench.ledger.write(messages=(message("later"),))


async def test_a_cancelled_writer_s_change_is_written_and_told(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        bench.host.store.delay(0.5)
        told: list[str] = []
        with trio.move_on_after(0.1):
            await bench.ledger.write(keys=mark(b"kept"), applied=lambda: told.append("applied"))
        assert told == []
        await bench.ledger.flush()
        assert told == ["applied"]
        assert bench.keys(bench.stored())[MARK] == b"kept"


async def test_noted_fields_go_with_the_next_commit_and_survive_one_that_failed(
    autojump_clock: MockClock,
) -> None:
    async with open_bench() as bench:
        bench.ledger.note(status=AccountStatus.BACKING_OFF)
        bench.lab.codec.unreadable.add(ANN)
        with pytest.raises(AuthUnreadable):
            await bench.ledger.write(keys=mark(b"x"))
        bench.lab.codec.unreadable.clear()
        assert bench.stored().account.status is AccountStatus.CONNECTED
        await bench.ledger.write(keys=mark(b"y"))
        assert bench.stored().account.status is AccountStatus.BACKING_OFF


# --- fenced


async def test_a_higher_epoch_in_the_account_ends_the_term(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        stored = bench.lab.state.accounts[ANN]
        stored.version, stored.stamp = Version(8, 0), bench.lab.state.stamp()
        with pytest.raises(NotActive):
            await bench.ledger.write(keys=mark(b"x"))
        assert bench.term.lost is not None
        assert "epoch 8" in bench.term.lost
        with pytest.raises(NotActive):
            await bench.ledger.write(keys=mark(b"y"))
        assert bench.keys(bench.stored())[MARK] == b"-"


async def test_our_own_epoch_in_anothers_name_ends_the_term(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        stored = bench.lab.state.accounts[ANN]
        epoch = bench.term.grant.epoch
        stored.version, stored.stamp = Version(epoch, 9), bench.lab.state.stamp()
        stored.commit_id = f"{epoch}-another-0123456789abcdef"
        with pytest.raises(NotActive):
            await bench.ledger.write(keys=mark(b"x"))
        assert bench.term.lost is not None
        assert "of another" in bench.term.lost
        assert bench.keys(bench.stored())[MARK] == b"-"


async def test_nothing_is_sent_once_the_term_is_over(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        before = bench.commits
        bench.term.lose("test")
        with pytest.raises(NotActive):
            await bench.ledger.write(keys=mark(b"x"))
        assert bench.commits == before


async def test_an_account_removed_behind_ones_back_is_vanished(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        del bench.lab.state.accounts[ANN]
        with pytest.raises(AccountVanished):
            await bench.ledger.write(keys=mark(b"x"))
        assert bench.term.lost is None


# --- sealing


async def test_a_seal_carries_the_epoch_and_the_revision_as_it_was(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(sealed=False) as bench:
        assert not bench.ledger.sealed
        commit = bench.ledger.begin_seal()
        assert commit is not None
        # What is written meanwhile waits for the seal.
        bench.ledger.post(keys=mark(b"after"))
        await wait_all_tasks_blocked()
        assert bench.commits == 0
        (stamp,) = bench.lab.state.seal([commit])
        assert bench.ledger.end_seal(commit, stamp)
        assert bench.stored().version == Version(7, 1)
        await bench.ledger.flush()
        assert bench.stored().version == Version(7, 2)


async def test_a_late_commit_of_the_old_holder_wins_and_nothing_of_it_is_lost(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(sealed=False) as bench:
        late_commit(bench, mark=b"late", creds=b"late creds")
        commit = bench.ledger.begin_seal()
        assert commit is not None
        (stamp,) = bench.lab.state.seal([commit])
        assert stamp is None
        assert not bench.ledger.end_seal(commit, stamp)
        bench.ledger.note(status=AccountStatus.RESTORING)
        await bench.ledger.ensure_sealed()
        stored = bench.stored()
        assert stored.version.epoch == 7
        assert bench.keys(stored) == {CREDS: b"late creds", MARK: b"late"}
        assert bench.ledger.keys() == bench.keys(stored)
        assert stored.account.phone == "49160"
        assert stored.account.last_error == "seen by the old holder"
        assert bench.ledger.account.status is AccountStatus.RESTORING
        # From here on the old holder's writes are refused.
        with pytest.raises(StaleWrite):
            bench.lab.state.commit(replace(commit, commit_id="later"))


async def test_keys_made_from_older_ones_are_refused_to_their_maker(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(sealed=False) as bench:
        await bench.ledger.ensure_complete()
        late_commit(bench, mark=b"late")
        with pytest.raises(Exception, match="changed in the store"):
            await bench.ledger.write(keys=mark(b"from older keys"))
        assert bench.ledger.keys()[MARK] == b"late"
        await bench.ledger.write(keys=mark(b"from the new ones"))
        assert bench.keys(bench.stored())[MARK] == b"from the new ones"


async def test_an_abandoned_seal_is_found_out_by_the_next_commit(
    autojump_clock: MockClock,
) -> None:
    for applied in (True, False):
        async with open_bench(sealed=False) as bench:
            commit = bench.ledger.begin_seal()
            assert commit is not None
            if applied:
                bench.lab.state.seal([commit])
            bench.ledger.abandon_seal()
            await bench.ledger.write(keys=mark(b"after"))
            assert bench.stored().version == Version(7, 2)
            assert bench.keys(bench.stored())[MARK] == b"after"


# --- what only the disk has


def disk_copy(lab: Lab, version: Version, **keys: bytes) -> AccountCopy:
    change = KeyChange({CREDS: b"disk", **{KeyName(n): v for n, v in keys.items()}})
    parts = {
        name: part
        for name, part in lab.codec.change(ANN, {}, change, version).items()
        if part is not None
    }
    return replace(lab.copy(ANN, version), parts=parts, stamp=None)


@asynccontextmanager
async def with_newer_disk(*, push: bool, shared: bool = True) -> AsyncIterator[Bench]:
    async with trio.open_nursery() as nursery:
        newer = disk_copy(Lab(nursery), Version(6, 9), mark=b"newer")
        async with open_bench(disk=newer, push=push, shared=shared, sealed=False) as bench:
            yield bench


@pytest.mark.parametrize("push", [True, False])
async def test_a_newer_disk_copy_is_written_whole_before_anything_else(
    autojump_clock: MockClock, push: bool
) -> None:
    async with with_newer_disk(push=push) as bench:
        if not push:
            # The shared store could not be listed: the disk's copy is all we know.
            bench.ledger = Ledger(
                bench.host.local.copies[ANN],
                term=bench.term,
                ports=bench.host.ports,
                limits=LIMITS,
                durability=Durability.REMOTE,
                saved=True,
            )
        # A part that the newer copy does not have any more must not stay behind.
        bench.lab.state.accounts[ANN].parts[PartName("sessions")] = b"of the older copy"
        await bench.ledger.ensure_sealed()
        stored = bench.stored()
        assert stored.version == Version(7, 9)
        assert dict(stored.parts) == dict(bench.host.local.copies[ANN].parts)
        assert bench.keys(stored) == {CREDS: b"disk", MARK: b"newer"}


@pytest.mark.parametrize("answered", [True, False])
async def test_an_account_that_only_the_disk_has_is_created_in_the_shared_store(
    autojump_clock: MockClock, answered: bool
) -> None:
    async with with_newer_disk(push=True, shared=False) as bench:
        if not answered:
            bench.host.store.apply_then_fail("create_account")
            with pytest.raises(Exception, match="ask again"):
                await bench.ledger.ensure_sealed()
        await bench.ledger.ensure_sealed()
        stored = bench.stored()
        assert stored.version == Version(7, 9)
        assert bench.keys(stored) == {CREDS: b"disk", MARK: b"newer"}
        await bench.ledger.write(keys=mark(b"goes on"))
        assert bench.keys(bench.stored())[MARK] == b"goes on"


async def test_a_disk_copy_whose_parts_cannot_be_read_is_not_pushed(
    autojump_clock: MockClock,
) -> None:
    async with with_newer_disk(push=True) as bench:
        bench.ledger.complete, bench.ledger.parts = False, {}
        bench.host.local.damage_account(ANN)
        version = bench.stored().version
        with pytest.raises(AccountVanished, match="cannot be read"):
            await bench.ledger.ensure_sealed()
        assert bench.stored().version == version


# --- the disk, brought along


async def test_the_disk_follows_every_shared_commit(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        for n in range(3):
            await bench.ledger.write(keys=mark(b"%d" % n))
        await bench.ledger.flush()
        local = bench.host.local.copies[ANN]
        assert local.version == bench.stored().version
        assert dict(local.parts) == dict(bench.stored().parts)


@pytest.mark.parametrize("durability", Durability)
@pytest.mark.parametrize("fault", ["fails", "hangs"])
async def test_a_disk_that_does_not_take_it_is_told_once_and_the_shared_store_goes_on(
    autojump_clock: MockClock, durability: Durability, fault: str
) -> None:
    async with open_bench(durability=durability) as bench:
        await bench.ledger.write(keys=mark(b"before"))
        await bench.ledger.flush()
        for operation in ("apply", "save_account"):
            if fault == "fails":
                bench.host.local.fail_next(operation, 1000)
            else:
                bench.host.local.hanging.add(operation)
        for n in range(5):
            await bench.ledger.write(keys=mark(b"%d" % n))
        await bench.ledger.flush()
        assert bench.keys(bench.stored())[MARK] == b"4"
        assert len(bench.host.journal.of("disk.failed")) == 1


async def test_a_newer_shared_copy_that_cannot_be_read_is_not_written_over_at_the_second_try(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(sealed=False) as bench:
        stored = bench.lab.state.accounts[ANN]
        stored.version = Version(6, 59)
        bench.lab.state.damage_account(ANN)
        # As after a restore from the disk alone: an older copy, and nothing known of the shared.
        bench.ledger.stamp = None
        bench.ledger.complete = True
        for _ in range(2):
            with pytest.raises(AccountVanished, match="cannot be read"):
                await bench.ledger.write(keys=mark(b"older"))
        assert stored.version == Version(6, 59)


async def test_local_durability_answers_when_the_disk_has_it_and_replicates_in_time(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(durability=Durability.LOCAL) as bench:
        await bench.ledger.write(keys=mark(b"on both"))
        await bench.ledger.flush()
        bench.host.store.delay(0.2)
        before = bench.commits
        began = trio.current_time()
        for n in range(10):
            sent = moved(message(f"m{n}"), MessageState.SERVER_ACK, at=2.0, epoch=7)
            await bench.ledger.write(keys=mark(b"%d" % n), messages=(sent,))
        assert trio.current_time() == began
        local = bench.host.local.copies[ANN]
        assert bench.keys(local)[MARK] == b"9"
        assert bench.keys(bench.stored())[MARK] == b"on both"
        await trio.sleep(LIMITS.replicate_within_s + 0.25)
        assert dict(bench.stored().parts) == dict(local.parts)
        assert bench.stored().version == local.version
        assert len(bench.lab.state.messages) == 10
        assert bench.commits - before == 1


async def test_local_durability_stores_a_new_message_where_every_instance_finds_it(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(durability=Durability.LOCAL) as bench:
        await bench.ledger.write(new_message=message("found"))
        assert message("found").message_id in bench.lab.state.messages


async def test_local_durability_marks_a_message_as_sending_where_the_mark_outlives_the_disk(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(durability=Durability.LOCAL) as bench:
        await bench.ledger.write(new_message=message("on the wire"))
        sending = moved(message("on the wire"), MessageState.SENDING, at=2.0, epoch=7)
        await bench.ledger.write(messages=(sending,))
        assert bench.lab.state.messages[sending.message_id].state is MessageState.SENDING


async def test_a_flush_waits_for_the_local_commit_that_is_in_flight_too(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(durability=Durability.LOCAL) as bench:
        await bench.ledger.write(keys=mark(b"before"))
        await bench.ledger.flush()
        bench.host.local.delays["apply"] = 0.3
        bench.ledger.post(keys=mark(b"in flight"))
        await bench.ledger.flush()
        assert bench.keys(bench.stored())[MARK] == b"in flight"


async def fall_behind(bench: Bench, count: int) -> None:
    """Let only the disk have the acks of `count` messages, and keys that changed with each."""
    await bench.ledger.write(keys=mark(b"before"))
    await bench.ledger.flush()
    bench.host.store.weather = lambda _operation: Passage(delivered=False)
    for n in range(count):
        acked = moved(message(f"m{n}"), MessageState.SERVER_ACK, at=2.0, epoch=7)
        await bench.ledger.write(keys=mark(b"%d" % n), messages=(acked,))


async def test_after_a_long_outage_what_is_behind_follows_in_several_commits(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(durability=Durability.LOCAL) as bench:
        count = 2 * COMMIT_WRITES_MAX + 100
        await fall_behind(bench, count)
        before = bench.commits
        bench.host.store.weather = lambda _operation: CALM
        await bench.ledger.flush()
        assert len(bench.lab.state.messages) == count
        assert bench.keys(bench.stored())[MARK] == b"%d" % (count - 1)
        local = bench.host.local.copies[ANN]
        assert (bench.stored().version, dict(bench.stored().parts)) == (
            local.version,
            dict(local.parts),
        )
        # Those that went without an answer during the outage, and the three that were needed.
        assert bench.commits - before <= 4
        await bench.ledger.write(keys=mark(b"goes on"))
        await bench.ledger.flush()
        assert bench.keys(bench.stored())[MARK] == b"goes on"


async def test_keys_are_ahead_of_acks_between_the_commits_that_catch_up(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(durability=Durability.LOCAL) as bench:
        count = 2 * COMMIT_WRITES_MAX
        await fall_behind(bench, count)
        await trio.sleep(LIMITS.replicate_within_s)
        # The first that arrives is the last one too: a crash between them.
        arrived = [Passage(), *[Passage(delivered=False)] * 20]
        bench.host.store.weather = lambda _operation: arrived.pop(0)
        with trio.move_on_after(20):
            await bench.ledger.flush()
        acked = len(bench.lab.state.messages)
        assert 0 < acked < COMMIT_WRITES_MAX
        assert bench.keys(bench.stored())[MARK] == b"%d" % (count - 1)
        assert bench.stored().version == bench.host.local.copies[ANN].version
        assert not bench.ledger.flushed


async def test_large_messages_share_commits_that_fit(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        bench.host.store.delay(0.1)
        large = "x" * 250_000
        async with trio.open_nursery() as nursery:
            for n in range(60):
                new = replace(message(f"m{n}"), text=large)
                nursery.start_soon(partial(bench.ledger.write, new_message=new))
        assert len(bench.lab.state.messages) == 60


async def test_keys_too_large_for_one_commit_are_told_and_stay_on_this_disk(
    autojump_clock: MockClock,
) -> None:
    async with open_bench(durability=Durability.LOCAL) as bench:
        await bench.ledger.write(keys=mark(b"before"))
        await bench.ledger.flush()
        bench.lab.codec.part_bytes_max = 4 * COMMIT_BYTES_MAX
        huge = bytes(COMMIT_BYTES_MAX)
        await bench.ledger.write(keys=KeyChange({SESSION: huge}))
        with pytest.raises(AuthTooLarge, match="ann"):
            await bench.ledger.flush()
        assert bench.host.journal.of("commit.refused")
        assert not bench.ledger.flushed
        assert bench.keys(bench.host.local.copies[ANN])[SESSION] == huge


# --- the keys as a whole


async def test_rotation_writes_every_part_anew_and_only_when_needed(
    autojump_clock: MockClock,
) -> None:
    async with open_bench() as bench:
        assert not await bench.ledger.rotate()
        keys, parts = bench.ledger.keys(), dict(bench.ledger.parts)
        bench.lab.codec.rotating = True
        assert await bench.ledger.rotate()
        bench.lab.codec.rotating = False
        stored = bench.stored()
        assert bench.keys(stored) == keys
        assert {name for name in parts if stored.parts[name] != parts[name]} == set(parts)


async def test_cleared_keys_leave_no_part_and_what_was_queued_before_does_not_come_back(
    autojump_clock: MockClock,
) -> None:
    async with open_bench() as bench:
        bench.host.store.delay(0.1)
        bench.ledger.post(keys=mark(b"in flight"))
        await wait_all_tasks_blocked()
        bench.ledger.post(keys=KeyChange({SESSION: b"queued before"}))
        await bench.ledger.clear_keys(status=AccountStatus.AWAITING_SCAN)
        assert dict(bench.stored().parts) == {}
        assert bench.ledger.parts == {}
        assert bench.stored().account.status is AccountStatus.AWAITING_SCAN
        await bench.ledger.write(keys=KeyChange({CREDS: b"a new identity"}))
        assert bench.keys(bench.stored()) == {CREDS: b"a new identity"}
        assert set(bench.stored().parts) == {MAIN_PART}


async def test_a_commit_waits_out_an_outage_of_the_store(autojump_clock: MockClock) -> None:
    async with open_bench() as bench:
        calm = bench.host.store.weather
        bench.host.store.weather = lambda _operation: Passage(delivered=False)

        async def heal() -> None:
            await trio.sleep(600)
            bench.host.store.weather = calm

        async with trio.open_nursery() as nursery:
            nursery.start_soon(heal)
            await bench.ledger.write(keys=mark(b"patient"))
        assert 600 <= trio.current_time() <= 600 + 2 + LIMITS.store_try_s
        # Five seconds a try, two seconds at most between: not in a hurry, and not asleep.
        assert 600 / 7.5 <= len(bench.host.journal.of("commit.retried")) <= 600 / 5


# --- receipts


@pytest.mark.parametrize("away", [False, True])
async def test_a_receipt_for_what_an_earlier_term_sent_ends_the_doubt_once_it_is_stored(
    autojump_clock: MockClock, away: bool
) -> None:
    async with open_bench() as bench:
        sent = message("sent", MessageState.SENDING)
        await bench.ledger.write(new_message=sent)
        outbox = AccountOutbox(ANN, pending_max=10, settled_kept=10)
        outbox.load([sent])
        arrivals = Arrivals(
            bench.ledger, outbox, term=bench.term, ports=bench.host.ports, limits=LIMITS
        )
        if away:
            del bench.lab.state.accounts[ANN]
        # Dropped for the doubt, which may come to nothing.
        bench.ledger.post(keys=KeyChange({SESSION: None}))
        for state in (MessageState.DELIVERED, MessageState.READ):
            arrivals.progress(MessageProgressed(sent.message_id, state))
        assert outbox.doubtful_recipients() == {sent.to}
        await trio.sleep(1)
        assert outbox.doubtful_recipients() == ({sent.to} if away else frozenset())
        assert bench.lab.state.messages[sent.message_id].state is (
            MessageState.SENDING if away else MessageState.READ
        )
