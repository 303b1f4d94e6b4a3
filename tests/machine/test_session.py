"""One account: every close code of WHATSAPP.md §2, pairing, and what becomes of its messages."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from machine.closes import REACTIONS, Step
from machine.limits import Limits
from machine.ports import (
    ConnectionClosed,
    ConnectorDown,
    KeysChanged,
    MessageProgressed,
    SendRefused,
)
from machine.records import (
    Account,
    AccountStatus,
    KeyChange,
    KeyName,
    Message,
    MessageId,
    MessageState,
    Version,
)
from machine.refusals import (
    AccountBanned,
    AccountNotPaired,
    AccountQuarantined,
    NotAwaitingScan,
)
from machine.session import AHEAD_MAX, ON_WIRE_MAX
from machine.states import State
from tests.fakes.connector import Script
from tests.machine.lab import ANN, BEN, LIMITS, TIMING, Host, Lab, open_lab

TO = "4915112345678"


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


class World:
    """One ACTIVE instance with Ann's account, connected unless a script says otherwise."""

    def __init__(self, lab: Lab, host: Host) -> None:
        self.lab = lab
        self.host = host

    @property
    def script(self) -> Script:
        return self.lab.whatsapp.script(ANN)

    @property
    def opened(self) -> int:
        """Logins so far."""
        return self.lab.whatsapp.opened

    async def account(self) -> Account:
        return (await self.host.desk.account(ANN)).account

    async def status(self) -> AccountStatus:
        return (await self.account()).status

    def stored(self) -> Account:
        return self.lab.state.accounts[ANN].account

    def message(self, message_id: MessageId) -> Message:
        return self.lab.state.messages[message_id]

    def cut(self, code: int, *, expire_s: float | None = None) -> None:
        self.lab.whatsapp.cut(ANN, code, expire_s=expire_s)

    async def wait_connected(self, count: int) -> None:
        """Until the account has connected `count` times."""
        await self.host.journal.wait_for("session.connected", count)

    async def done(self, message: Message) -> Message:
        return await self.host.desk.wait_progress(message.message_id)

    async def next_term(self) -> Host:
        """Hand over to a new instance, which restores."""
        other = self.lab.start(self.lab.make("b"))
        await other.journal.wait_for("restore.skipped")
        self.host.instance.request_drain("redeploy")
        await other.journal.wait_for("restore.finished")
        return other


@asynccontextmanager
async def open_world(*, limits: Limits = LIMITS, start: bool = True) -> AsyncIterator[World]:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        host = lab.make("a", limits=limits)
        world = World(lab, host)
        if start:
            lab.start(host)
            await host.journal.wait_for("restore.finished")
        yield world


# --- the close codes


async def test_515_reopens_at_once_with_the_saved_keys(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        now = trio.current_time()
        world.cut(515)
        await world.wait_connected(2)
        assert trio.current_time() == now
        assert await world.status() is AccountStatus.CONNECTED


async def test_515_that_never_ends_is_not_answered_in_a_tight_loop(
    autojump_clock: MockClock,
) -> None:
    async with open_world(start=False) as world:
        world.script.refuse_login.extend(ConnectionClosed(515) for _ in range(1000))
        world.lab.start(world.host)
        await trio.sleep(600)
        assert len(world.host.journal.of("session.closed")) < 20


async def test_440_gets_one_more_try_after_a_lease_ttl(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        now = trio.current_time()
        world.cut(440)
        await trio.sleep(TIMING.ttl_s - 0.1)
        assert await world.status() is AccountStatus.BACKING_OFF
        assert world.opened == 1
        await world.wait_connected(2)
        assert trio.current_time() == now + TIMING.ttl_s
        assert world.host.journal.of("session.doubled") == [{"account_id": ANN, "epoch": 1}]


async def test_a_second_440_within_the_window_quarantines_for_good(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.cut(440)
        await world.wait_connected(2)
        await trio.sleep(5)
        world.cut(440)
        await trio.sleep(3600)
        assert world.opened == 2
        assert await world.status() is AccountStatus.QUARANTINED
        with pytest.raises(AccountQuarantined, match="another client"):
            await world.host.send(ANN, "refused")
        other = await world.next_term()
        assert world.opened == 2
        report = other.instance.restore_report
        assert report is not None
        assert (report.restored, report.listed) == (0, 1)
        # The operator has stopped the other client: from now on it is opened again.
        await other.desk.reconnect(ANN)
        await other.journal.wait_for("session.connected")
        await wait_all_tasks_blocked()
        assert world.stored().status is AccountStatus.CONNECTED


async def test_440s_far_apart_are_each_the_first(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        for n in range(4):
            world.cut(440)
            await world.wait_connected(n + 2)
            await trio.sleep(2 * TIMING.ttl_s)


async def test_401_at_login_is_verified_once_and_then_believed(
    autojump_clock: MockClock,
) -> None:
    async with open_world(start=False) as world:
        world.lab.whatsapp.unlinked.add(ANN)
        parts = dict(world.lab.state.accounts[ANN].parts)
        world.lab.start(world.host)
        await world.host.journal.wait_for("restore.finished")
        assert await world.status() is AccountStatus.LOGGED_OUT
        assert len(world.host.journal.of("session.closed")) == 1
        assert len(world.host.journal.of("session.stopped")) == 1
        await wait_all_tasks_blocked()
        # Listed, and its state is where it was.
        assert world.stored().status is AccountStatus.LOGGED_OUT
        assert dict(world.lab.state.accounts[ANN].parts) == parts
        with pytest.raises(AccountNotPaired):
            await world.host.desk.reconnect(ANN)


async def test_401_that_was_a_mistake_is_survived(autojump_clock: MockClock) -> None:
    async with open_world(start=False) as world:
        world.script.refuse_login.append(ConnectionClosed(401))
        world.lab.start(world.host)
        await world.host.journal.wait_for("restore.finished")
        assert await world.status() is AccountStatus.CONNECTED


async def test_401_of_a_connected_account_is_believed_at_once(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        await trio.sleep(60)
        world.cut(401)
        await world.host.journal.wait_for("session.stopped")
        assert world.opened == 1
        assert await world.status() is AccountStatus.LOGGED_OUT
        await world.next_term()
        assert world.opened == 1


async def test_401_soon_after_a_515_is_verified_first(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.cut(515)
        await world.wait_connected(2)
        await trio.sleep(20)
        world.cut(401)
        await world.wait_connected(3)
        assert world.host.journal.of("session.stopped") == []
        await trio.sleep(20)
        world.cut(401)
        await world.host.journal.wait_for("session.stopped")


@pytest.mark.parametrize(("expire_s", "waits_s"), [(3600.0, 3600.0), (10.0, 300.0), (None, 300.0)])
async def test_402_waits_until_the_ban_is_over(
    autojump_clock: MockClock, expire_s: float | None, waits_s: float
) -> None:
    async with open_world() as world:
        now = trio.current_time()
        world.cut(402, expire_s=expire_s)
        await trio.sleep(waits_s - 1)
        assert await world.status() is AccountStatus.BACKING_OFF
        await world.wait_connected(2)
        assert trio.current_time() == pytest.approx(now + waits_s)


async def test_402_at_a_restore_does_not_keep_the_others_waiting(
    autojump_clock: MockClock,
) -> None:
    async with open_world(start=False) as world:
        world.script.refuse_login.append(ConnectionClosed(402, expire_s=3600))
        world.lab.start(world.host)
        await world.host.journal.wait_for("restore.finished")
        assert trio.current_time() < 1
        await world.wait_connected(1)


@pytest.mark.parametrize("code", [403, 406])
async def test_403_and_406_are_bans_that_stay(autojump_clock: MockClock, code: int) -> None:
    async with open_world() as world:
        world.cut(code)
        await world.host.journal.wait_for("session.stopped")
        assert await world.status() is AccountStatus.BANNED
        with pytest.raises(AccountBanned):
            await world.host.send(ANN, "refused")
        await trio.sleep(1000)
        await world.next_term()
        assert world.opened == 1
        assert world.stored().status is AccountStatus.BANNED
        assert world.lab.state.accounts[ANN].parts


async def test_405_stops_for_this_term_and_the_next_one_tries_again(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.cut(405)
        await world.host.journal.wait_for("session.held_back")
        assert await world.status() is AccountStatus.STOPPED
        await trio.sleep(1000)
        assert world.opened == 1
        # Whatever is still written in this term must not make the stop a lasting one.
        session = world.host.term.sessions[ANN]
        assert session.ledger is not None
        await session.ledger.write(fields={"last_error": None})
        assert await world.status() is AccountStatus.STOPPED
        other = await world.next_term()
        assert world.opened == 2
        assert (await other.desk.account(ANN)).account.status is AccountStatus.CONNECTED


async def test_411_stops_for_good(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.cut(411)
        await world.host.journal.wait_for("session.stopped")
        assert await world.status() is AccountStatus.STOPPED
        other = await world.next_term()
        assert world.opened == 1
        assert "multi-device" in str((await other.desk.account(ANN)).account.last_error)


@pytest.mark.parametrize("code", [408, 428, 500, 501, 503, 599])
async def test_lost_connections_are_tried_again_later_and_later(
    autojump_clock: MockClock, code: int
) -> None:
    async with open_world() as world:
        world.script.refuse_login.extend(ConnectionClosed(code) for _ in range(11))
        world.cut(code)
        await world.wait_connected(2)
        waits = [float(str(one["retry_s"])) for one in world.host.journal.of("session.closed")]
        assert len(waits) == 12
        for n, wait_s in enumerate(waits):
            full_s = min(LIMITS.reconnect_first_s * 2**n, LIMITS.reconnect_cap_s)
            assert full_s / 2 - 0.01 <= wait_s <= full_s
        # Once it was connected, it begins again with the short ones.
        world.cut(code)
        await world.wait_connected(3)
        last = float(str(world.host.journal.of("session.closed")[-1]["retry_s"]))
        assert last <= LIMITS.reconnect_first_s
        assert world.host.journal.of("session.stopped") == []


def test_the_table_has_every_code_of_the_design_and_nothing_deletes_state() -> None:
    assert set(REACTIONS) == {401, 402, 403, 405, 406, 408, 411, 428, 440, 500, 501, 503, 515}
    for code, reaction in REACTIONS.items():
        passes = reaction.step in (Step.REOPEN, Step.BACK_OFF)
        assert bool(reaction.advice) is not passes, code


async def test_an_account_that_does_not_connect_in_time_backs_off(
    autojump_clock: MockClock,
) -> None:
    async with open_world(start=False) as world:
        world.script.login_delay_s = 1e6
        world.lab.start(world.host)
        await world.host.journal.wait_for("session.closed")
        assert trio.current_time() == pytest.approx(LIMITS.open_try_s, abs=0.1)
        assert "not connected within 30 s" in str((await world.account()).last_error)
        world.script.login_delay_s = 0
        await world.wait_connected(1)


async def test_a_reconnect_on_request_cuts_the_waiting_short(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.cut(402, expire_s=3600)
        await world.host.journal.wait_for("session.closed")
        await world.host.desk.reconnect(ANN)
        now = trio.current_time()
        await world.wait_connected(2)
        assert trio.current_time() == now


async def test_a_dead_connector_makes_the_instance_step_down_and_stand_back(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        other = world.lab.start(world.lab.make("b"))
        await other.journal.wait_for("restore.skipped")
        world.host.connector.bridges[0].kill()
        await other.journal.wait_for("restore.finished")
        assert world.host.instance.state is State.PASSIVE
        assert "connector down" in world.host.instance.transitions[-1].reason
        assert (await other.desk.account(ANN)).account.status is AccountStatus.CONNECTED


async def test_alone_an_instance_with_a_dead_connector_tries_again_with_a_new_one(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.host.connector.bridges[0].kill()
        await world.host.journal.wait_for("restore.finished", 2)
        assert world.host.instance.epoch == 2
        assert await world.status() is AccountStatus.CONNECTED


async def test_a_connector_that_does_not_start_leaves_the_lease_to_another(
    autojump_clock: MockClock,
) -> None:
    async with open_world(start=False) as world:
        world.host.connector.start_s = 1e6
        world.lab.start(world.host)
        await world.host.journal.wait_for("lease.acquired")
        other = world.lab.start(world.lab.make("b"))
        await other.journal.wait_for("restore.finished")
        assert trio.current_time() <= LIMITS.open_try_s + 0.2
        released = world.host.journal.of("lease.released")
        assert "did not start within 30 s" in str(released[0]["reason"])


async def test_a_connector_that_refuses_leaves_the_lease_to_another(
    autojump_clock: MockClock,
) -> None:
    async with open_world(start=False) as world:
        world.host.connector.refuse_bridge.extend(ConnectorDown("no node") for _ in range(100))
        world.lab.start(world.host)
        await trio.sleep(1)
        other = world.lab.start(world.lab.make("b"))
        await other.journal.wait_for("restore.finished")
        assert world.host.instance.state is State.PASSIVE


# --- pairing


async def test_a_pairing_goes_from_qr_code_to_connected(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        term = world.host.term
        view = await term.desk.add_account(BEN, "Ben")
        assert view.account.status is AccountStatus.QR_READY
        assert (await term.desk.qr(BEN)).qr == "fake-qr:ben"
        with pytest.raises(AccountNotPaired):
            await world.host.send(BEN, "too early")
        world.lab.whatsapp.scan(BEN, "491700")
        await world.wait_connected(2)
        await wait_all_tasks_blocked()
        account = (await term.desk.account(BEN)).account
        assert (account.status, account.phone) == (AccountStatus.CONNECTED, "491700")
        with pytest.raises(NotAwaitingScan):
            await term.desk.qr(BEN)
        codes = [one["code"] for one in world.host.journal.of("session.closed")]
        assert codes == [515]
        await wait_all_tasks_blocked()
        stored = world.lab.state.accounts[BEN]
        assert stored.account.phone == "491700"
        keys = world.lab.codec.unpack(BEN, stored.parts)
        assert keys[KeyName("creds")] == b"creds of ben"


async def test_a_pairing_code_is_given_while_pairing_only(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        term = world.host.term
        with pytest.raises(NotAwaitingScan):
            await term.desk.pairing_code(ANN, "491700")
        await term.desk.add_account(BEN, "Ben")
        assert (await term.desk.pairing_code(BEN, "491700")).code == "FAKECODE"


async def test_a_pairing_that_nobody_scans_is_stopped_and_says_so(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        term = world.host.term
        await term.desk.add_account(BEN, "Ben")
        world.lab.whatsapp._pairing[BEN].end(ConnectionClosed(408, "QR refs attempts ended"))
        await world.host.journal.wait_for("pairing.expired")
        account = (await term.desk.account(BEN)).account
        assert account.status is AccountStatus.STOPPED
        assert "no phone scanned in time" in str(account.last_error)
        with pytest.raises(AccountNotPaired, match="repair"):
            await term.desk.reconnect(BEN)
        assert (await term.desk.repair(BEN)).account.status is AccountStatus.QR_READY


async def test_a_pairing_whose_bridge_is_slow_is_tried_again(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.lab.whatsapp.script(BEN).open_delay_s = 40.0
        await world.host.desk.add_account(BEN, "Ben")
        await world.host.journal.wait_for("session.closed")
        assert world.host.journal.of("pairing.expired") == []
        world.lab.whatsapp.script(BEN).open_delay_s = 0.0
        await trio.sleep(2)
        assert (await world.host.desk.qr(BEN)).qr


async def test_keys_are_stored_before_the_connection_hears_of_it(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        await world.host.desk.add_account(BEN, "Ben")
        world.host.store.delay(0.5, 0.5)
        world.lab.whatsapp.scan(BEN)
        await trio.sleep(0.4)
        assert world.lab.state.accounts[BEN].parts == {}
        assert world.host.journal.of("session.closed") == []
        await world.wait_connected(2)
        assert world.lab.state.accounts[BEN].parts


async def test_a_repair_archives_the_old_state_and_pairs_anew(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        parts = dict(world.lab.state.accounts[ANN].parts)
        view = await world.host.desk.repair(ANN)
        assert view.account.status is AccountStatus.QR_READY
        (kept,) = world.lab.state.archive
        assert dict(kept.parts) == parts
        world.lab.whatsapp.scan(ANN)
        await world.wait_connected(2)
        await wait_all_tasks_blocked()
        keys = world.lab.codec.unpack(ANN, world.lab.state.accounts[ANN].parts)
        assert keys[KeyName("creds")] == b"creds of ann"


async def test_a_logout_unlinks_the_device_and_keeps_the_account_listed(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        view = await world.host.desk.log_out(ANN)
        assert view.account.status is AccountStatus.LOGGED_OUT
        assert world.lab.whatsapp.unlinked == {ANN}
        assert world.lab.whatsapp.connections == 0
        assert len(world.lab.state.archive) == 1
        assert world.stored().status is AccountStatus.LOGGED_OUT


async def test_an_account_added_twice_at_once_is_made_once(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.host.store.delay(0.1, 0.1)
        answers: list[str] = []

        async def add() -> None:
            try:
                await world.host.desk.add_account(BEN, "Ben")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is counted
                answers.append(type(error).__name__)
            else:
                answers.append("added")

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(add)
        assert sorted(answers) == ["AccountAlreadyExists", "AccountAlreadyExists", "added"]
        assert world.lab.whatsapp.connections == 2


# --- messages


async def test_messages_go_out_in_order_a_few_ahead_of_their_acks(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.script.ack_delay_s = 0.1
        now = trio.current_time()
        messages = [await world.host.send(ANN, f"m{n}", key=f"k{n}") for n in range(10)]
        done = [await world.done(message) for message in messages]
        assert {message.state for message in done} == {MessageState.SERVER_ACK}
        raw = world.lab.whatsapp.raw
        assert [one.text for one in raw] == [f"m{n}" for n in range(10)]
        on_wire = [sum(one.at - 0.1 < other.at <= one.at for other in raw) for one in raw]
        assert max(on_wire) == ON_WIRE_MAX
        assert trio.current_time() == pytest.approx(now + 0.1 * math.ceil(10 / ON_WIRE_MAX))


async def test_a_refused_message_costs_none_of_those_on_the_wire_with_it(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.script.refuse_send.append(SendRefused(404, "no such number"))
        world.script.ack_delay_s = 0.1
        messages = [await world.host.send(ANN, f"m{n}") for n in range(ON_WIRE_MAX)]
        done = [(await world.done(message)).state for message in messages]
        assert done == [MessageState.FAILED, *[MessageState.SERVER_ACK] * (ON_WIRE_MAX - 1)]
        assert world.lab.whatsapp.opened == 1


async def test_a_connection_that_ends_takes_all_that_is_on_the_wire_and_each_arrives_once(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        await world.done(await world.host.send(ANN, "makes the session"))
        world.script.ack_delay_s = 1.0
        messages = [await world.host.send(ANN, f"m{n}") for n in range(2 * ON_WIRE_MAX)]
        await trio.sleep(0.5)
        world.cut(428)
        for message in messages:
            assert (await world.done(message)).state is MessageState.SERVER_ACK
        assert world.lab.whatsapp.unreadable() == []
        texts = [one.text for one in world.lab.whatsapp.inbox()]
        assert texts == ["makes the session", *(f"m{n}" for n in range(2 * ON_WIRE_MAX))]


async def test_accounts_do_not_wait_for_each_other(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        await world.host.desk.add_account(BEN, "Ben")
        world.lab.whatsapp.scan(BEN)
        await world.wait_connected(2)
        world.script.ack_delay_s = 10.0
        slow = await world.host.send(ANN, "slow")
        quick = await world.host.send(BEN, "quick")
        now = trio.current_time()
        await world.done(quick)
        assert trio.current_time() == now
        await world.done(slow)


async def test_a_lost_ack_breaks_the_connection_and_the_same_id_goes_out_again(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.script.acks_lost = 1
        now = trio.current_time()
        message = await world.host.send(ANN, "hello")
        after = await world.host.send(ANN, "after")
        assert (await world.done(message)).state is MessageState.SERVER_ACK
        assert now + LIMITS.ack_s < trio.current_time() < now + LIMITS.ack_s + 2
        await world.done(after)
        raw = world.lab.whatsapp.raw
        assert [one.message_id for one in raw] == [
            message.message_id,
            after.message_id,
            message.message_id,
        ]
        assert all(one.readable for one in raw)
        assert [one.text for one in world.lab.whatsapp.inbox()] == ["hello", "after"]
        assert world.message(message.message_id).attempts == 2


async def test_after_a_crash_between_wire_and_record_the_recipient_can_read_on(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        await world.done(await world.host.send(ANN, "one"))
        world.script.ack_delay_s = 1.0
        two = await world.host.send(ANN, "two")
        await trio.sleep(0.5)
        assert len(world.lab.whatsapp.raw) == 2
        # Its network goes: the ack's keys are never stored, and another takes over.
        world.host.store.partitioned = True
        other = world.lab.start(world.lab.make("b"))
        await other.journal.wait_for("restore.finished")
        await other.desk.wait_progress(two.message_id)
        three = await other.send(ANN, "three")
        await other.desk.wait_progress(three.message_id)
        assert world.lab.whatsapp.unreadable() == []
        assert [one.text for one in world.lab.whatsapp.inbox()] == ["one", "two", "three"]


async def send_at_once(world: World, count: int) -> list[Message]:
    """Accept so many messages at once; in the order in which they were accepted."""
    accepted: list[Message] = []

    async def send(number: int) -> None:
        accepted.append(await world.host.send(ANN, f"m{number}", key=f"k{number}"))

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(send, number)
    return accepted


async def test_the_next_message_does_not_wait_for_the_record_of_the_one_before(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.script.ack_delay_s = 0.01
        world.host.store.delay(0.5, 0.5)
        now = trio.current_time()
        for message in await send_at_once(world, 8):
            assert (await world.done(message)).state is MessageState.SERVER_ACK
            assert world.message(message.message_id).state is MessageState.SERVER_ACK
        # One for the first, one for the others, one for their acks; not two for each.
        assert trio.current_time() < now + 4.5


async def test_after_a_crash_with_acks_on_their_way_to_the_store_the_recipient_reads_each_once(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        first = await world.done(await world.host.send(ANN, "first"))
        world.script.ack_delay_s = 0.2
        messages = await send_at_once(world, 5)
        # Its network goes, but for WhatsApp: none of the acks is stored.
        world.host.store.partitioned = True
        await trio.sleep(0.95)
        assert len(world.lab.whatsapp.raw) >= 5
        stored = {world.message(each.message_id).state for each in messages}
        assert stored == {MessageState.SENDING}
        other = world.lab.start(world.lab.make("b"))
        await other.journal.wait_for("restore.finished")
        for message in messages:
            await other.desk.wait_progress(message.message_id)
        assert world.lab.whatsapp.unreadable() == []
        inbox = [one.message_id for one in world.lab.whatsapp.inbox()]
        assert sorted(inbox) == sorted(each.message_id for each in [first, *messages])


async def test_no_more_than_a_few_messages_are_ahead_of_the_store(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.script.ack_delay_s = 0.1
        accepted = await send_at_once(world, 3 * AHEAD_MAX)
        ahead = [each for each in accepted if each.state is MessageState.SENDING]
        assert len(ahead) == AHEAD_MAX
        world.host.store.partitioned = True
        await trio.sleep(5)
        assert len(world.lab.whatsapp.raw) == AHEAD_MAX


async def test_what_has_waited_is_marked_together_before_it_goes_out(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.cut(402, expire_s=1000)
        await world.host.journal.wait_for("session.closed")
        messages = [await world.host.send(ANN, f"m{n}") for n in range(10)]
        world.script.ack_delay_s = 1.0
        await world.wait_connected(2)
        before = world.host.store.calls["commit"]
        await trio.sleep(0.5)
        assert len(world.lab.whatsapp.raw) == ON_WIRE_MAX
        stored = {world.message(each.message_id).state for each in messages}
        assert stored == {MessageState.SENDING}
        for message in messages:
            await world.done(message)
        assert world.host.store.calls["commit"] - before <= 12
        assert [one.text for one in world.lab.whatsapp.raw] == [f"m{n}" for n in range(10)]


async def test_messages_wait_for_an_account_that_is_away_and_then_go_out(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.cut(402, expire_s=1000)
        await world.host.journal.wait_for("session.closed")
        message = await world.host.send(ANN, "later")
        assert message.state is MessageState.QUEUED
        await world.done(message)
        assert trio.current_time() >= 1000


@pytest.mark.parametrize("code", [463, 479])
async def test_a_refused_message_fails_and_is_not_sent_again(
    autojump_clock: MockClock, code: int
) -> None:
    async with open_world() as world:
        world.script.refuse_send.append(SendRefused(code, "restricted"))
        refused = await world.host.send(ANN, "refused")
        fine = await world.host.send(ANN, "fine")
        failed = await world.done(refused)
        assert (failed.state, failed.error) == (MessageState.FAILED, f"refused_{code}: restricted")
        await world.done(fine)
        await world.next_term()
        assert [one.text for one in world.lab.whatsapp.raw] == ["fine"]


async def test_a_number_without_whatsapp_fails_the_message_only(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.script.not_on_whatsapp.add(TO)
        failed = await world.done(await world.host.send(ANN, "nobody"))
        assert (failed.state, failed.error) == (MessageState.FAILED, "not_on_whatsapp")
        world.script.not_on_whatsapp.clear()
        assert (await world.done(await world.host.send(ANN, "x"))).state is MessageState.SERVER_ACK


async def test_a_message_is_given_up_after_its_last_attempt(autojump_clock: MockClock) -> None:
    async with open_world(limits=replace(LIMITS, send_attempts_max=3)) as world:
        world.script.acks_lost = 100
        failed = await world.done(await world.host.send(ANN, "never acked"))
        assert (failed.state, failed.error) == (MessageState.FAILED, "gave up after 3 attempts")
        assert len(world.lab.whatsapp.raw) == 3


async def test_receipts_move_a_message_on_even_when_they_overtake_the_ack(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.script.receipts = (MessageState.DELIVERED, MessageState.READ)
        world.host.store.delay(0.1, 0.1)
        message = await world.host.send(ANN, "hello")
        await trio.sleep(2)
        assert (await world.host.desk.message(message.message_id)).state is MessageState.READ
        assert world.message(message.message_id).state is MessageState.READ


async def test_a_receipt_before_the_ack_is_not_undone_by_it(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.script.ack_delay_s = 1.0
        message = await world.host.send(ANN, "hello")
        await trio.sleep(0.5)
        connection = world.lab.whatsapp.open[ANN]
        connection.push(MessageProgressed(message.message_id, MessageState.DELIVERED))
        await trio.sleep(0.4)
        # A crash now must leave the doubt about the session that it went out in.
        assert world.message(message.message_id).state is MessageState.SENDING
        await trio.sleep(1.6)
        assert world.message(message.message_id).state is MessageState.DELIVERED
        assert (await world.host.desk.message(message.message_id)).state is MessageState.DELIVERED
        # The keys that came with the ack are stored all the same.
        keys = world.lab.codec.unpack(ANN, world.lab.state.accounts[ANN].parts)
        assert keys[KeyName(f"session-{TO}.0")]


async def test_a_receipt_never_moves_a_message_back(autojump_clock: MockClock) -> None:
    async with open_world() as world:
        world.script.receipts = (MessageState.READ, MessageState.DELIVERED)
        message = await world.host.send(ANN, "hello")
        await trio.sleep(1)
        assert world.message(message.message_id).state is MessageState.READ


async def test_unreadable_keys_quarantine_the_account_and_nothing_is_written(
    autojump_clock: MockClock,
) -> None:
    async with open_world(start=False) as world:
        stored = world.lab.state.accounts[ANN]
        other = world.lab.copy(ANN, Version(0, 9))
        # One part is of another copy: only opening it shows that.
        stored.parts = {**stored.parts, **{n: p for n, p in other.parts.items() if n != "main"}}
        parts = dict(stored.parts)
        world.lab.start(world.host)
        await world.host.journal.wait_for("restore.finished")
        assert await world.status() is AccountStatus.QUARANTINED
        assert world.lab.state.accounts[ANN].parts == parts
        assert world.opened == 0
        with pytest.raises(AccountQuarantined):
            await world.host.send(ANN, "refused")
        # It is not for good: the next term looks again, and a standby lists what was.
        assert world.stored().status is AccountStatus.CONNECTED


async def test_a_store_that_is_away_during_a_send_costs_time_and_nothing_else(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.host.store.apply_then_fail("commit", 2)
        message = await world.host.send(ANN, "hello")
        world.host.store.fail_next("commit", 3)
        assert (await world.done(message)).state is MessageState.SERVER_ACK
        assert len(world.lab.whatsapp.raw) == 1


# --- the end in good order


async def test_keys_that_change_while_a_session_ends_reach_the_store(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        [connection] = world.host.connector.bridges[-1].connections
        name = KeyName("session-4915.0")
        connection.push(KeysChanged(KeyChange({name: b"moved on"}), trio.Event()))
        # Nothing has run in between: the change is still on its way when the session stops.
        world.host.instance.request_drain("a deploy")
        await world.host.ended.wait()
        parts = world.lab.state.accounts[ANN].parts
        assert world.lab.codec.unpack(ANN, parts)[name] == b"moved on"


async def test_keys_that_changed_before_a_send_failed_reach_the_store(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        world.script.ack_delay_s = 5.0
        message = await world.host.send(ANN, "Hello")
        await trio.sleep(1)
        [connection] = world.host.connector.bridges[-1].connections
        name = KeyName("session-4915.0")
        connection.push(KeysChanged(KeyChange({name: b"moved on"}), trio.Event()))
        connection.end(ConnectionClosed(428, "cut"))
        await world.wait_connected(2)
        await world.done(message)
        ledger = world.host.term.sessions[ANN].ledger
        assert ledger is not None
        assert ledger.keys()[name] == b"moved on"


async def test_a_message_that_was_accepted_and_came_to_no_send_leaves_no_doubt(
    autojump_clock: MockClock,
) -> None:
    async with open_world() as world:
        accepted: list[Message] = []
        world.host.store.delay(0.1, 0.1)
        async with trio.open_nursery() as nursery:

            async def accept() -> None:
                accepted.append(await world.host.send(ANN, "Hello"))

            nursery.start_soon(accept)
            # It is being written as `sending`, ahead of its send, when the drain begins.
            await trio.sleep(0.05)
            world.host.instance.request_drain("a deploy")
        await world.host.ended.wait()
        [message] = accepted
        assert message.state is MessageState.SENDING
        assert world.message(message.message_id).state is MessageState.QUEUED
