"""What a close code means for other accounts, other instances and the operator."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from machine.closes import BAN_S_MAX, REACTIONS
from machine.events import EVENTS
from machine.outbox import make_message_id
from machine.ports import ConnectionClosed, Level, MessageProgressed, SendRefused
from machine.records import (
    AccountId,
    AccountStatus,
    MessageState,
)
from machine.refusals import NotAwaitingScan
from tests.fakes.shared_store import Passage, failing
from tests.machine.lab import ANN, BEN, TIMING, Host, Lab, open_lab

CARL = AccountId("carl")


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def serving(host: Host) -> Host:
    await host.journal.wait_for("restore.finished")
    return host


async def standby(lab: Lab, name: str) -> Host:
    host = lab.start(lab.make(name))
    await host.journal.wait_for("restore.skipped")
    return host


def alerts(host: Host) -> list[str]:
    """What an operator is woken by, each with what to do about it."""
    return [name for name in host.journal.names() if EVENTS[name].level is Level.ERROR]


# --- 405


async def test_405_stops_every_account_that_is_not_open_with_one_alert(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN, CARL)
        lab.whatsapp.script(ANN).login_delay_s = 5.0
        lab.whatsapp.script(BEN).login_delay_s = 5.0
        lab.whatsapp.script(BEN).refuse_login.append(ConnectionClosed(428))
        lab.whatsapp.script(ANN).refuse_login.append(ConnectionClosed(405, "too old"))
        a = await serving(lab.start(lab.make("a")))
        await trio.sleep(600.0)
        # Carl was open before, and goes on; Ben was about to be opened again, and is not.
        views = {view.account.account_id: view.account for view in await a.desk.list_accounts()}
        assert views[CARL].status is AccountStatus.CONNECTED
        for account_id in (ANN, BEN):
            assert views[account_id].status is AccountStatus.STOPPED
            assert "client version refused" in str(views[account_id].last_error)
        assert lab.whatsapp.opened == 1
        assert alerts(a) == ["client.refused"]
        lab.whatsapp.cut(CARL)
        await trio.sleep(600.0)
        assert lab.whatsapp.opened == 1
        assert alerts(a) == ["client.refused"]
        # Nothing of it is stored: the next instance may be a newer one.
        b = await standby(lab, "b")
        a.instance.request_drain("upgrade")
        await serving(b)
        assert lab.whatsapp.opened == 4


async def test_after_a_405_an_operator_may_try_one_account(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        lab.whatsapp.script(ANN).refuse_login.append(ConnectionClosed(405))
        lab.whatsapp.script(BEN).login_delay_s = 1.0
        lab.whatsapp.script(BEN).refuse_login.append(ConnectionClosed(405))
        a = await serving(lab.start(lab.make("a")))
        await a.desk.reconnect(ANN)
        await a.journal.wait_for("session.connected")
        await trio.sleep(600.0)
        assert (await a.desk.account(BEN)).account.status is AccountStatus.STOPPED
        # The one that was tried is held back again once it closes.
        lab.whatsapp.cut(ANN)
        await trio.sleep(600.0)
        assert lab.whatsapp.opened == 1


# --- 402


async def test_a_ban_outlives_a_failover_and_a_handoff(autojump_clock: MockClock) -> None:
    async with open_lab(limit_s=50_000) as lab:
        await lab.add_accounts(ANN, BEN)
        a = await serving(lab.start(lab.make("a")))
        lab.whatsapp.cut(ANN, 402, expire_s=20_000.0)
        await trio.sleep(1.0)
        assert alerts(a) == ["session.banned"]
        stored = lab.state.accounts[ANN].account
        assert stored.status is AccountStatus.BACKING_OFF
        assert "temporary ban" in str(stored.last_error)
        a.store.partitioned = True
        b = await serving(lab.start(lab.make("b")))
        c = await standby(lab, "c")
        b.instance.request_drain("redeploy")
        await serving(c)
        # The ban keeps nobody waiting, and the list tells why the account is not open.
        assert trio.current_time() < 100.0
        view = await c.desk.account(ANN)
        assert view.account.status is AccountStatus.BACKING_OFF
        assert "temporary ban" in str(view.account.last_error)
        assert ANN in {failure.account_id for failure in c.term.restore_report.failures}
        await trio.sleep_until(19_999.0)
        assert ANN not in lab.whatsapp.open
        await trio.sleep(10.0)
        assert ANN in lab.whatsapp.open
        stored = lab.state.accounts[ANN].account
        assert (stored.banned_until, stored.status) == (None, AccountStatus.CONNECTED)


async def test_what_is_paired_again_does_not_inherit_the_ban(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        lab.whatsapp.cut(ANN, 402, expire_s=3600.0)
        await a.journal.wait_for("session.banned")
        await a.desk.repair(ANN)
        assert lab.state.accounts[ANN].account.banned_until is None
        b = await standby(lab, "b")
        a.instance.request_drain("redeploy")
        await serving(b)
        lab.whatsapp.scan(ANN)
        await b.journal.wait_for("session.connected")


async def test_an_operator_may_ask_before_a_ban_is_over(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        lab.whatsapp.cut(ANN, 402, expire_s=3600.0)
        await a.journal.wait_for("session.banned")
        b = await standby(lab, "b")
        a.instance.request_drain("redeploy")
        await serving(b)
        await b.desk.reconnect(ANN)
        await b.journal.wait_for("session.connected")


async def test_a_reconnect_of_an_open_account_does_not_spend_a_later_wait(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        await a.desk.reconnect(ANN)
        lab.whatsapp.cut(ANN, 402, expire_s=3600.0)
        await trio.sleep(3500.0)
        assert lab.whatsapp.opened == 1


async def test_an_absurd_ban_is_asked_about_again_in_time(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        lab.whatsapp.cut(ANN, 402, expire_s=1e12)
        await a.journal.wait_for("session.closed")
        await trio.sleep(1.0)
        until = lab.state.accounts[ANN].account.banned_until
        assert until == pytest.approx(a.clocks.wall() + BAN_S_MAX, abs=2.0)
        assert float(str(a.journal.of("session.closed")[0]["retry_s"])) == BAN_S_MAX


# --- 440


async def test_440_of_who_is_not_the_holder_any_more_closes_for_good(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        # Its renewals fail, and another has the lease by force: nobody has told it so.
        a.store.weather = lambda operation: failing() if operation == "write" else Passage()
        view = lab.state.read_lease()
        lab.state.age_lease(TIMING.ttl_s)
        b = await serving(lab.start(lab.make("b")))
        assert b.instance.epoch == view.fence.epoch + 1
        began = trio.current_time()
        lab.whatsapp.evictions.clear()
        await a.journal.wait_for("lease.lost")
        assert trio.current_time() - began < 1.0
        await trio.sleep(100.0)
        assert lab.whatsapp.evictions == []
        assert lab.whatsapp.opened == 2


async def test_440_of_the_holder_asks_the_lease_and_waits(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        reads = a.store.calls.get("read", 0)
        lab.whatsapp.cut(ANN, 440)
        await a.journal.wait_for("session.closed")
        assert a.store.calls["read"] == reads + 1
        assert a.instance.epoch == 1
        assert alerts(a) == ["session.doubled"]
        await trio.sleep(TIMING.ttl_s + 1.0)
        assert lab.whatsapp.opened == 2


# --- 401


async def test_a_logout_by_whatsapp_archives_the_state_and_keeps_it_with_the_account(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        await trio.sleep(60.0)
        a.store.fail_next("archive_parts", 2)
        lab.whatsapp.cut(ANN, 401)
        await trio.sleep(5.0)
        kept = [(one.account_id, one.reason, dict(one.parts)) for one in lab.state.archive]
        assert kept == [(ANN, "logged out by WhatsApp", lab.state.accounts[ANN].parts)]
        assert alerts(a) == ["session.stopped"]


async def test_a_logout_that_cannot_be_archived_is_told_and_loses_nothing(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        await trio.sleep(60.0)
        a.store.fail_next("archive_parts", 100)
        lab.whatsapp.cut(ANN, 401)
        await a.journal.wait_for("account.not_archived")
        assert lab.state.accounts[ANN].parts
        assert (await a.desk.account(ANN)).account.status is AccountStatus.LOGGED_OUT


async def test_401_right_after_a_restore_is_verified_also_when_the_login_had_worked(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        await trio.sleep(5.0)
        lab.whatsapp.cut(ANN, 401)
        await a.journal.wait_for("session.connected", 2)
        assert alerts(a) == []


# --- alerts


@pytest.mark.parametrize("code", [401, 402, 403, 405, 406, 411, 440])
async def test_what_a_person_must_see_to_is_an_alert_that_says_what_to_do(
    autojump_clock: MockClock, code: int
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        await trio.sleep(60.0)
        lab.whatsapp.cut(ANN, code)
        await trio.sleep(1.0)
        (alert,) = alerts(a)
        advice = REACTIONS[code].advice
        told = str(a.journal.of(alert)[0].get("advice", EVENTS[alert].text))
        assert advice == told or ";" in told or "act" in told


@pytest.mark.parametrize("code", [408, 428, 500, 501, 503, 515, 599])
async def test_what_mends_itself_is_no_alert(autojump_clock: MockClock, code: int) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        lab.whatsapp.cut(ANN, code)
        await a.journal.wait_for("session.connected", 2)
        assert alerts(a) == []


async def test_a_restricted_account_is_one_alert_and_its_messages_are_not_sent_again(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        lab.whatsapp.script(ANN).refuse_send.extend(SendRefused(463, "restricted") for _ in "ab")
        sent = [await a.send(ANN, text) for text in ("one", "two")]
        for message in sent:
            failed = await a.desk.wait_progress(message.message_id)
            assert (failed.state, failed.error) == (MessageState.FAILED, "refused_463: restricted")
        await a.journal.wait_for("message.failed", 2)
        assert alerts(a) == ["account.restricted"]
        assert lab.whatsapp.raw == []


async def test_a_malformed_message_is_told_and_no_alert(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        lab.whatsapp.script(ANN).refuse_send.append(SendRefused(479, "malformed"))
        message = await a.send(ANN, "one")
        failed = await a.desk.wait_progress(message.message_id)
        assert (failed.state, failed.error) == (MessageState.FAILED, "refused_479: malformed")
        assert alerts(a) == []
        assert lab.whatsapp.raw == []


async def test_a_refusal_that_comes_late_is_told_as_well(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = await serving(lab.start(lab.make("a")))
        message = await a.send(ANN, "one")
        await a.desk.wait_progress(message.message_id)
        late = MessageProgressed(message.message_id, MessageState.FAILED, "refused_463")
        lab.whatsapp.open[ANN].push(late)
        await a.journal.wait_for("account.restricted")
        assert (await a.desk.message(message.message_id)).error == "refused_463"
        # What is none of ours is nobody's alert.
        other = make_message_id(ANN, None, random.Random(1))
        lab.whatsapp.open[ANN].push(MessageProgressed(other, MessageState.FAILED, "refused_463"))
        await trio.sleep(1.0)
        assert len(a.journal.of("message.failed")) == 1


# --- QR codes


async def test_each_qr_code_is_shown_until_the_next_and_none_after_the_last(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        lab.whatsapp.script(ANN).qr_refs = 3
        a = await serving(lab.start(lab.make("a")))
        began = trio.current_time()
        await a.desk.add_account(ANN, "Ann")
        shown = []
        for age_s in (0.0, 59.0, 61.0, 79.0, 81.0, 99.0):
            await trio.sleep_until(began + age_s + 0.5)
            code = await a.desk.qr(ANN)
            assert code.expires_at > a.clocks.wall()
            shown.append(code)
        assert [code.qr for code in shown[::2]] == [code.qr for code in shown[1::2]]
        lengths = [code.expires_at - shown[0].expires_at for code in shown[::2]]
        assert lengths == pytest.approx([0.0, 20.0, 40.0])
        await a.journal.wait_for("pairing.expired")
        assert trio.current_time() == pytest.approx(began + 100.0, abs=0.1)
        with pytest.raises(NotAwaitingScan):
            await a.desk.qr(ANN)
        assert (await a.desk.account(ANN)).account.status is AccountStatus.STOPPED
        assert lab.state.accounts[ANN].parts == {}
        # Asked for again, the pairing begins with a code of its own.
        await a.desk.repair(ANN)
        assert (await a.desk.qr(ANN)).expires_at == pytest.approx(a.clocks.wall() + 60.0)
        lab.whatsapp.scan(ANN)
        await a.journal.wait_for("session.connected")


async def test_a_pairing_goes_on_at_the_next_instance_when_the_restart_was_never_answered(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        a = await serving(lab.start(lab.make("a")))
        await a.desk.add_account(ANN, "Ann")
        b = await standby(lab, "b")
        # The keys are stored and the phone is linked; this instance never opens the account.
        lab.whatsapp.script(ANN).open_delay_s = 1e6
        lab.whatsapp.scan(ANN)
        await trio.sleep(5.0)
        assert lab.state.accounts[ANN].parts
        a.store.partitioned = True
        await a.journal.wait_for("lease.lost")
        lab.whatsapp.script(ANN).open_delay_s = 0.0
        await serving(b)
        assert (await b.desk.account(ANN)).account.status is AccountStatus.CONNECTED
        assert lab.whatsapp.opened == 1


async def test_a_qr_code_is_not_shown_after_its_time(autojump_clock: MockClock) -> None:
    async with open_lab() as lab:
        a = await serving(lab.start(lab.make("a")))
        await a.desk.add_account(ANN, "Ann")
        shown = await a.desk.qr(ANN)
        assert shown.expires_at == pytest.approx(a.clocks.wall() + 60.0)
        await trio.sleep(59.0)
        assert await a.desk.qr(ANN) == shown
        await trio.sleep(2.0)
        with pytest.raises(NotAwaitingScan) as expired:
            await a.desk.qr(ANN)
        assert expired.value.retry_after_s == 1
