"""Bringing every account back, in any scenario, and the lines an operator follows it by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from machine.limits import Durability
from machine.ports import LegacyAccount, LegacyFault, StoreMisconfigured
from machine.records import (
    AccountCommit,
    AccountId,
    AccountStatus,
    Grant,
    KeyChange,
    KeyName,
    Message,
    MessageId,
    MessageState,
    Stamp,
    Version,
)
from machine.refusals import AccountNotFound, AccountQuarantined, StoreAway
from machine.restore import READ_BACKOFF
from machine.states import State
from machine.views import RestoreReport
from tests.fakes.local_store import FakeLocalStore
from tests.fakes.shared_store import CALM, Passage
from tests.machine.lab import ANN, BEN, LIMITS, Host, Lab, open_lab

CEM = AccountId("cem")
HANGS = Passage(delivered=False)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def report(host: Host) -> RestoreReport:
    found = host.instance.restore_report
    assert found is not None
    return found


async def status(host: Host, account_id: AccountId) -> AccountStatus:
    return (await host.desk.account(account_id)).account.status


async def restored(host: Host, lab: Lab) -> Host:
    lab.start(host)
    await host.journal.wait_for("restore.finished")
    return host


def disk_of(lab: Lab, *account_ids: AccountId) -> FakeLocalStore:
    disk = FakeLocalStore()
    for account_id in account_ids:
        disk.copies[account_id] = replace(lab.copy(account_id, Version(0, 1)), stamp=None)
    return disk


def fail_listing(host: Host, *, for_good: bool = True, count: int = 0) -> None:
    """Let listings of the shared store fail at once, the first `count` or all."""
    weather = host.store.weather
    calls = 0

    def failing(operation: str) -> Passage:
        nonlocal calls
        if operation != "list_accounts":
            return weather(operation)
        calls += 1
        if for_good or calls <= count:
            return Passage(error_before=StoreMisconfigured("injected: no permission to list"))
        return weather(operation)

    host.store.weather = failing


# --- reading


async def test_failing_first_tries_are_told_and_tried_again(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.make("a", local=disk_of(lab, ANN))
        # The warm-up of a PASSIVE instance lists once too.
        fail_listing(a, for_good=False, count=4)
        a.local.fail_next("list_accounts", 2)
        await restored(a, lab)
        sources = [one["source"] for one in a.journal.of("restore.source_retried")]
        assert sources.count("the shared store") >= 3
        assert sources.count("this disk") == 2
        assert trio.current_time() < 5
        assert report(a).restored == 2
        assert report(a).failures == ()


async def test_without_the_shared_listing_the_disk_counts(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.make("a", local=disk_of(lab, ANN))
        fail_listing(a)
        await restored(a, lab)
        # The disk answered at once: the store had one more try's time, not all of the two minutes.
        assert trio.current_time() <= LIMITS.restore_try_s + 1
        assert await status(a, ANN) is AccountStatus.CONNECTED
        assert report(a).found_shared is None
        assert report(a).found_disk == 1
        (source,) = [f for f in report(a).failures if f.account_id is None]
        assert "no permission to list" in source.cause
        # An account that is not in memory may well exist.
        with pytest.raises(StoreAway):
            await a.desk.account(BEN)


async def test_what_only_the_shared_store_knows_comes_when_it_can_be_listed(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.make("a", local=disk_of(lab, ANN))
        calm = a.store.weather
        fail_listing(a)
        await restored(a, lab)
        a.store.weather = calm
        await a.journal.wait_for("session.connected", 2)
        assert await status(a, BEN) is AccountStatus.CONNECTED
        with pytest.raises(AccountNotFound):
            await a.desk.account(CEM)


async def test_from_the_disk_alone_each_account_reads_its_own_shared_copy_first(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        newer = lab.copy(BEN, Version(0, 7), mark=b"newer on disk")
        disk = disk_of(lab, ANN, BEN)
        disk.copies[BEN] = replace(newer, stamp=None)
        stored = lab.state.accounts[ANN]
        shared = lab.copy(ANN, Version(0, 9), mark=b"newer in the store")
        stored.version, stored.parts = shared.version, dict(shared.parts)
        a = lab.make("a", local=disk)
        fail_listing(a)
        await restored(a, lab)
        await wait_all_tasks_blocked()
        for account_id, mark in ((ANN, b"newer in the store"), (BEN, b"newer on disk")):
            copy = lab.state.fetch_account(account_id)
            assert copy is not None
            assert lab.codec.unpack(account_id, copy.parts)[KeyName("mark")] == mark
            assert copy.version.epoch == 1


async def test_one_account_that_the_store_does_not_give_keeps_no_other_waiting(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.make("a", local=disk_of(lab, ANN, BEN))
        fail_listing(a)
        a.store.schedule("fetch_account", HANGS)
        lab.start(a)
        await a.journal.wait_for("session.connected")
        assert trio.current_time() <= LIMITS.restore_try_s + 1
        await a.journal.wait_for("session.connected", 2)
        assert trio.current_time() >= LIMITS.restore_try_s + LIMITS.store_try_s


@pytest.mark.parametrize("fault", ["failing", "hanging"])
async def test_an_unreadable_disk_costs_nothing_that_the_store_has(
    autojump_clock: MockClock, fault: str
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.make("a")
        if fault == "failing":
            a.local.fail_next("list_accounts", 10_000)
        else:
            a.local.hanging.add("list_accounts")
        await restored(a, lab)
        assert trio.current_time() <= LIMITS.restore_try_s + 1
        assert report(a).restored == 2
        assert report(a).found_disk is None
        assert [f.account_id for f in report(a).failures] == [None]


async def test_both_unreadable_step_down_and_leave_it_to_another(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.make("a")
        fail_listing(a)
        a.local.fail_next("list_accounts", 10_000)
        lab.start(a)
        await a.journal.wait_for("restore.started")
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("restore.finished")
        gave_up_s = trio.current_time()
        assert LIMITS.restore_give_up_s <= gave_up_s <= LIMITS.restore_give_up_s + 1
        assert a.instance.state is State.PASSIVE
        assert "restore impossible" in a.instance.transitions[-1].reason
        assert await status(b, ANN) is AccountStatus.CONNECTED


async def test_alone_an_instance_tries_the_restore_again_after_standing_back(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.make("a")
        calm = a.store.weather
        fail_listing(a)
        a.local.fail_next("list_accounts", 10_000)
        lab.start(a)
        await a.journal.wait_for("lease.released")
        released_at = trio.current_time()
        a.store.weather = calm
        await a.journal.wait_for("lease.acquired", 2)
        assert trio.current_time() >= released_at + LIMITS.stand_back_s
        await a.journal.wait_for("session.connected")


# --- choosing


async def test_a_wrong_key_quarantines_and_loses_nothing(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        before = lab.state.fetch_account(ANN)
        lab.codec.unreadable.add(ANN)
        a = await restored(lab.make("a"), lab)
        assert await status(a, ANN) is AccountStatus.QUARANTINED
        assert await status(a, BEN) is AccountStatus.CONNECTED
        assert lab.state.fetch_account(ANN) == before
        with pytest.raises(AccountQuarantined):
            await a.send(ANN, "refused")
        with pytest.raises(AccountQuarantined, match="still cannot be read"):
            await a.desk.reconnect(ANN)
        with pytest.raises(AccountQuarantined):
            await a.desk.log_out(ANN)
        lab.codec.unreadable.clear()
        await a.desk.reconnect(ANN)
        await a.journal.wait_for("session.connected", 2)
        message = await a.send(ANN, "back")
        assert (await a.desk.wait_progress(message.message_id)).state is MessageState.SERVER_ACK


async def test_an_account_the_store_cannot_read_is_listed_with_the_reason(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        lab.state.damage_account(ANN, "cut short")
        a = await restored(lab.make("a"), lab)
        view = await a.desk.account(ANN)
        assert view.account.status is AccountStatus.QUARANTINED
        assert view.account.last_error == "cut short"
        (failure,) = report(a).failures
        assert (failure.account_id, failure.cause) == (ANN, "cut short")


@pytest.mark.parametrize(
    "kept",
    [
        AccountStatus.LOGGED_OUT,
        AccountStatus.BANNED,
        AccountStatus.STOPPED,
        AccountStatus.QUARANTINED,
    ],
)
async def test_accounts_in_a_final_status_are_listed_and_not_opened(
    autojump_clock: MockClock, kept: AccountStatus
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, status=kept)
        await lab.add_accounts(BEN)
        a = await restored(lab.make("a"), lab)
        await trio.sleep(600)
        assert list(lab.whatsapp.open) == [BEN]
        assert await status(a, ANN) is kept
        assert (report(a).listed, report(a).restored, report(a).failures) == (1, 1, ())


@pytest.mark.parametrize(
    "opened",
    [
        AccountStatus.CONNECTED,
        AccountStatus.CONNECTING,
        AccountStatus.RESTORING,
        AccountStatus.BACKING_OFF,
        AccountStatus.QR_READY,
        AccountStatus.AWAITING_SCAN,
    ],
)
async def test_accounts_in_every_other_status_are_opened(
    autojump_clock: MockClock, opened: AccountStatus
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, status=opened)
        a = await restored(lab.make("a"), lab)
        assert await status(a, ANN) is AccountStatus.CONNECTED


async def test_an_account_that_was_never_paired_shows_its_qr_code_again(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = await restored(lab.make("a"), lab)
        await a.desk.add_account(ANN, "Ann")
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("restore.skipped")
        a.instance.request_drain("redeploy")
        await b.journal.wait_for("restore.finished")
        assert (report(b).pairing, report(b).restored) == (1, 0)
        assert (await b.desk.qr(ANN)).qr


async def test_a_removed_account_stays_removed_whatever_the_disk_has(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = await restored(lab.make("a"), lab)
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("warm.finished")
        assert ANN in b.local.copies
        await a.desk.remove_account(ANN, purge=False)
        b.legacy.found.append(LegacyAccount(ANN, "Ann", None, {KeyName("creds"): b"paired"}))
        a.instance.request_drain("redeploy")
        await b.journal.wait_for("restore.finished")
        assert [v.account.account_id for v in await b.desk.list_accounts()] == [BEN]
        await wait_all_tasks_blocked()
        assert ANN not in b.local.copies


async def test_an_account_that_came_back_under_its_old_id_is_the_new_one_everywhere(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await restored(lab.make("a"), lab)
        for n in range(20):
            message = await a.send(ANN, f"m{n}", key=f"k{n}")
            await a.desk.wait_progress(message.message_id)
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("warm.finished")
        await a.desk.remove_account(ANN, purge=False)
        await a.desk.add_account(ANN, "Ann again")
        lab.whatsapp.scan(ANN)
        await a.journal.wait_for("session.connected", 2)
        a.instance.request_drain("redeploy")
        await b.journal.wait_for("restore.finished")
        copy = lab.state.fetch_account(ANN)
        assert copy is not None
        assert lab.codec.unpack(ANN, copy.parts)[KeyName("creds")] == b"creds of ann"
        assert (await b.desk.account(ANN)).account.name == "Ann again"


# --- sealing


def late_write(lab: Lab, account_id: AccountId) -> None:
    """The old holder's last commit: new keys, and a message it had accepted."""
    stored = lab.state.accounts[account_id]
    version = Version(stored.version.epoch, stored.version.revision + 1)
    change = KeyChange({KeyName("mark"): b"late"})
    view = lab.state.read_lease()
    lab.state.commit(
        AccountCommit(
            grant=Grant(view.fence.epoch, "old", view.fence.incarnation, Stamp("")),
            commit_id="late",
            account=stored.account,
            version=version,
            stamp=stored.stamp,
            parts=lab.codec.change(account_id, stored.parts, change, version),
            new_messages=(
                Message(
                    message_id=MessageId("late"),
                    account_id=account_id,
                    to="4915112345678",
                    text="accepted by the old holder",
                    state=MessageState.QUEUED,
                    epoch=0,
                    created_at=1.0,
                    updated_at=1.0,
                ),
            ),
        )
    )


async def test_a_late_write_of_the_old_holder_is_restored_with_its_message(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.make("a")
        # Between the listing and the seal.
        a.store.schedule("seal", Passage(request_s=1.0))
        lab.start(a)
        await a.journal.wait_for("restore.found")
        late_write(lab, ANN)
        await a.journal.wait_for("restore.finished")
        await a.desk.wait_progress(MessageId("late"))
        assert [one.text for one in lab.whatsapp.inbox()] == ["accepted by the old holder"]
        copy = lab.state.fetch_account(ANN)
        assert copy is not None
        assert lab.codec.unpack(ANN, copy.parts)[KeyName("mark")] == b"late"


@pytest.mark.parametrize("applied", [True, False])
async def test_a_seal_without_an_answer_is_found_out_account_by_account(
    autojump_clock: MockClock, applied: bool
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.make("a")
        if applied:
            a.store.apply_then_fail("seal")
        else:
            a.store.fail_next("seal")
        await restored(a, lab)
        assert report(a).restored == 2
        assert {one.version.epoch for one in lab.state.accounts.values()} == {1}
        message = await a.send(ANN, "goes on")
        assert (await a.desk.wait_progress(message.message_id)).state is MessageState.SERVER_ACK


async def test_a_drain_during_the_seal_does_not_wait_for_it(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.make("a")
        a.store.schedule("seal", HANGS)
        lab.start(a)
        await a.journal.wait_for("restore.found")
        await trio.sleep(0.5)
        began = trio.current_time()
        a.instance.request_drain("SIGTERM")
        await a.journal.wait_for("lease.released")
        assert trio.current_time() - began < 0.1


# --- opening


async def test_accounts_open_in_waves_most_recently_used_first(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        names = [AccountId(f"acc{n:02}") for n in range(20)]
        await lab.add_accounts(*names)
        for n, account_id in enumerate(names):
            stored = lab.state.accounts[account_id]
            stored.account = replace(stored.account, last_connected_at=float(n * 7 % 20))
            lab.whatsapp.script(account_id).login_delay_s = 1.0
        a = lab.make("a", limits=replace(LIMITS, open_concurrency=4))
        lab.start(a)
        for wave in range(1, 6):
            await a.journal.wait_for("session.connected", 4 * wave)
            assert lab.whatsapp.connections <= 4 * wave + 4
        assert trio.current_time() == pytest.approx(5.0, abs=0.2)
        order = [
            float(n * 7 % 20)
            for connected in a.journal.of("session.connected")
            for n in [names.index(AccountId(str(connected["account_id"])))]
        ]
        waves = [sorted(order[start : start + 4], reverse=True) for start in range(0, 20, 4)]
        assert [one for wave in waves for one in wave] == sorted(order, reverse=True)


async def test_an_account_that_fails_is_reported_and_tried_on_a_slow_clock(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        lab.whatsapp.script(ANN).login_delay_s = 1e6
        a = await restored(lab.make("a"), lab)
        assert LIMITS.restore_first_pass_s <= trio.current_time() < LIMITS.restore_first_pass_s + 10
        assert report(a).restored == 1
        (failure,) = report(a).failures
        assert failure.account_id == ANN
        lab.whatsapp.script(ANN).login_delay_s = 0.0
        await a.journal.wait_for("session.connected", 2)
        assert await status(a, ANN) is AccountStatus.CONNECTED


async def test_the_report_counts_what_was_found_and_what_became_of_it(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        await lab.add_accounts(CEM, status=AccountStatus.LOGGED_OUT)
        broken = AccountId("dag")
        await lab.add_accounts(broken)
        lab.codec.unreadable.add(broken)
        a = await restored(lab.make("a", local=disk_of(lab, ANN)), lab)
        made = report(a)
        # The disk copy may have been brought up to date while the instance stood by.
        assert made.found_disk in (1, 4)
        assert (made.found_shared, made.total) == (4, 4)
        assert (made.restored, made.listed, made.pairing) == (2, 1, 0)
        assert [failure.account_id for failure in made.failures] == [broken]
        assert {"reconcile", "seal", "open"} < set(made.durations)
        assert made.finished_at is not None
        a.instance.request_drain("done")
        await a.ended.wait()
        assert a.local.reports[-1]["restored"] == 2


async def test_an_operator_can_follow_the_handover_line_by_line(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = await restored(lab.make("a"), lab)
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("restore.skipped")
        assert b.journal.of("restore.skipped") == [{"holder": "a", "epoch": 1}]
        a.instance.request_drain("redeploy")
        await b.journal.wait_for("transition.made", 2)
        told = [
            name
            for name in b.journal.names()
            if name.startswith(("restore.", "account.found", "session.restored", "transition."))
        ]
        assert told == [
            "transition.made",
            "restore.skipped",
            "restore.started",
            "restore.source_read",
            "restore.source_read",
            "account.found",
            "account.found",
            "restore.found",
            "session.restored",
            "session.restored",
            "restore.finished",
            "transition.made",
        ]
        found = {
            one["account_id"]: (one["name"], one["status"]) for one in b.journal.of("account.found")
        }
        assert found == {ANN: ("ann's", "connected"), BEN: ("ben's", "connected")}
        finished = b.journal.of("restore.finished")[0]
        assert (finished["restored"], finished["failed"], finished["total"]) == (2, 0, 2)


async def test_a_standby_lists_accounts_as_they_are_and_not_as_being_restored(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        await restored(lab.make("a"), lab)
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("restore.skipped")
        (view,) = await b.instance.list_accounts()
        assert (view.account.status, view.in_memory) == (AccountStatus.CONNECTED, False)


async def test_of_a_thousand_accounts_the_first_send_goes_while_others_are_opened(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        names = [AccountId(f"acc{n:04}") for n in range(1000)]
        await lab.add_accounts(*names)
        for account_id in names:
            lab.whatsapp.script(account_id).login_delay_s = 1.0
        a = lab.start(lab.make("a"))
        term = await a.wait_serving()
        assert len(await term.desk.list_accounts()) == 1000
        listed_at = trio.current_time()
        message = await a.send(names[-1], "early")
        assert trio.current_time() == listed_at < 0.1
        assert message.state is MessageState.QUEUED
        assert lab.whatsapp.opened == 0
        await term.desk.wait_progress(message.message_id)
        await a.journal.wait_for("restore.finished")
        assert trio.current_time() == pytest.approx(20, abs=0.5)
        assert (report(a).restored, report(a).failures) == (1000, ())
        assert lab.whatsapp.opened_at_once_max == 1000
        # A thousand accounts are a handful of calls; besides, only the message was written.
        assert a.store.calls["seal"] == 5
        assert a.store.calls["commit"] <= 3


# --- importing


async def test_legacy_accounts_are_created_opened_and_not_imported_again(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.make("a")
        legacy: Sequence[LegacyAccount | LegacyFault] = (
            LegacyAccount(ANN, "not this one", None, {KeyName("creds"): b"foreign"}),
            LegacyAccount(
                BEN, "Ben", "4917", {KeyName("creds"): b"paired"}, notes=(("odd file", "look"),)
            ),
            LegacyFault("/sessions/cem", CEM, "creds.json is cut short", "restore the file"),
        )
        a.legacy.found.extend(legacy)
        await restored(a, lab)
        assert await status(a, BEN) is AccountStatus.CONNECTED
        assert await status(a, CEM) is AccountStatus.QUARANTINED
        assert (await a.desk.account(ANN)).account.name == "ann's"
        copy = lab.state.fetch_account(BEN)
        assert copy is not None
        assert lab.codec.unpack(BEN, copy.parts) == {KeyName("creds"): b"paired"}
        assert CEM not in lab.state.accounts
        assert report(a).restored == 2
        assert [f.account_id for f in report(a).failures] == [CEM]
        b = lab.make("b")
        b.legacy.found.extend(legacy)
        lab.start(b)
        await b.journal.wait_for("restore.skipped")
        a.instance.request_drain("redeploy")
        await b.journal.wait_for("restore.finished")
        assert b.journal.of("account.imported") == []


async def test_a_legacy_account_that_cannot_be_written_fails_alone(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.make("a")
        a.legacy.found.append(LegacyAccount(BEN, "Ben", None, {KeyName("creds"): b"paired"}))
        a.store.fail_next("create_account")
        await restored(a, lab)
        assert [failure.account_id for failure in report(a).failures] == [BEN]
        assert report(a).restored == 1
        answer = await a.desk.import_accounts("/sessions")
        assert answer == {"imported": [BEN], "failed": []}
        assert await status(a, BEN) in (AccountStatus.CONNECTING, AccountStatus.CONNECTED)


async def test_a_broken_directory_that_was_mended_is_imported_when_asked_again(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = lab.make("a")
        fault = LegacyFault("/sessions/ben", BEN, "creds.json is cut short", "restore the file")
        a.legacy.found.append(fault)
        await restored(a, lab)
        answer = await a.desk.import_accounts("/sessions")
        assert answer["imported"] == []
        assert answer["failed"] == [
            {"accountId": BEN, "cause": "creds.json is cut short", "advice": "restore the file"}
        ]
        assert await status(a, BEN) is AccountStatus.QUARANTINED
        a.legacy.found[:] = [LegacyAccount(BEN, "Ben", None, {KeyName("creds"): b"paired"})]
        assert await a.desk.import_accounts("/sessions") == {"imported": [BEN], "failed": []}
        await a.journal.wait_for("session.connected")
        # Once is enough, and a directory that breaks later changes nothing.
        a.legacy.found[:] = [fault]
        assert await a.desk.import_accounts("/sessions") == {"imported": [], "failed": []}
        assert await status(a, BEN) is AccountStatus.CONNECTED


# --- an outbox that cannot be listed


def fail_outbox(host: Host, *, until: float) -> None:
    """Let listings of the outbox fail until a moment of the test's clock."""
    weather = host.store.weather

    def failing(operation: str) -> Passage:
        if operation == "list_pending" and trio.current_time() < until:
            return Passage(error_before=StoreMisconfigured("injected: no permission to list"))
        return weather(operation)

    host.store.weather = failing


async def test_an_outbox_that_cannot_be_listed_keeps_no_account_away_for_good(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = await restored(lab.make("a"), lab)
        first = await a.send(ANN, "first")
        await a.desk.wait_progress(first.message_id)
        # On the wire, and its ack never seen: the recipient is further than the stored keys.
        lab.whatsapp.script(ANN).acks_lost += 1
        before = await a.send(ANN, "before")
        await trio.sleep(1)
        a.store.partitioned = True
        b = lab.make("b")
        fail_outbox(b, until=1000.0)
        lab.start(b)
        await b.journal.wait_for("restore.started")
        began = trio.current_time()
        await b.journal.wait_for("restore.finished")
        assert trio.current_time() - began == pytest.approx(LIMITS.restore_give_up_s, abs=1)
        assert await status(b, ANN) is AccountStatus.CONNECTED
        assert await status(b, BEN) is AccountStatus.CONNECTED
        assert [failure.cause for failure in report(b).failures] == ["the outbox could not be read"]
        assert len(b.journal.of("restore.source_failed")) == 1
        after = await b.send(ANN, "after")
        assert (await b.desk.wait_progress(after.message_id)).state is MessageState.SERVER_ACK
        assert lab.whatsapp.unreadable() == []
        # It waits in the outbox, and goes on as soon as that can be read.
        assert (await b.desk.message(before.message_id)).state is MessageState.SENDING
        await trio.sleep_until(1000.0 + READ_BACKOFF.cap_s + 1)
        assert (await b.desk.message(before.message_id)).state is MessageState.SERVER_ACK
        assert [one.text for one in lab.whatsapp.inbox()] == ["first", "before", "after"]


async def test_an_outbox_that_can_be_listed_in_time_is_waited_for(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.make("a")
        fail_outbox(a, until=LIMITS.restore_give_up_s - 10.0)
        await restored(a, lab)
        assert trio.current_time() <= LIMITS.restore_give_up_s
        assert report(a).failures == ()
        assert report(a).restored == 1


async def test_accounts_sealed_late_do_not_wait_again_for_an_outbox_that_was_given_up(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.make("a")
        fail_outbox(a, until=1000.0)
        # Nothing is sealed in the batch: each account does it by itself, one later than the other.
        a.store.fail_next("seal")
        a.store.schedule("commit", Passage(), Passage(request_s=4.0))
        await restored(a, lab)
        await a.journal.wait_for("session.connected", 2)
        assert trio.current_time() <= LIMITS.restore_give_up_s + 2
        assert len(a.journal.of("restore.source_failed")) == 1


# --- the whole way


@pytest.mark.parametrize("durability", Durability)
async def test_ten_handovers_lose_nothing_and_show_no_qr_code(
    autojump_clock: MockClock, durability: Durability
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        holder = await restored(lab.make("h0", durability=durability), lab)
        for n in range(1, 11):
            message = await holder.send(ANN, f"m{n}", key=f"k{n}")
            heir = lab.start(lab.make(f"h{n}", durability=durability))
            await heir.journal.wait_for("restore.skipped")
            holder.instance.request_drain("redeploy")
            await heir.journal.wait_for("restore.finished")
            await heir.desk.message(message.message_id)
            await holder.ended.wait()
            holder = heir
        await trio.sleep(1)
        assert [one.text for one in lab.whatsapp.inbox()] == [f"m{n}" for n in range(1, 11)]
        assert lab.whatsapp.unreadable() == []
        assert lab.whatsapp.evictions == []
        assert holder.instance.epoch == 11


async def test_a_cold_start_reads_a_bounded_number_of_accounts_at_once(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        names = [AccountId(f"acc{n:02}") for n in range(48)]
        await lab.add_accounts(*names)
        a = lab.make("a", limits=replace(LIMITS, read_concurrency=16, warm_concurrency=1))
        slow = Passage(reply_s=1.0)
        a.store.weather = lambda operation: slow if operation == "fetch_account" else CALM
        lab.start(a)
        await a.journal.wait_for("restore.found")
        began = trio.current_time()
        await a.journal.wait_for("session.connected", 48)
        assert trio.current_time() - began == pytest.approx(3.0, abs=0.3)


async def test_the_outbox_is_read_when_every_account_is_sealed(autojump_clock: MockClock) -> None:
    # Before that an old holder may still accept a message, which nobody would know of.
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.make("a")
        weather, sealed = a.store.weather, []

        def watching(operation: str) -> Passage:
            if operation == "list_pending":
                sealed.append([copy.version.epoch for copy in lab.state.accounts.values()])
            return weather(operation)

        a.store.weather = watching
        await restored(a, lab)
        assert sealed == [[a.term.epoch] * 2]
