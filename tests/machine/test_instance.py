from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from machine.records import AccountStatus, MessageState
from machine.states import State
from tests.machine.lab import ANN, BEN, open_lab


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_a_new_instance_becomes_active_and_every_account_is_back(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.start(lab.make("a"))
        await a.journal.wait_for("restore.finished")
        views = await a.desk.list_accounts()
        assert [(v.account.account_id, v.account.status, v.in_memory) for v in views] == [
            (ANN, AccountStatus.CONNECTED, True),
            (BEN, AccountStatus.CONNECTED, True),
        ]
        message = await a.send(ANN, "hello")
        assert message.state is MessageState.SENDING
        done = await a.desk.wait_progress(message.message_id)
        assert done.state is MessageState.SERVER_ACK
        assert [m.text for m in lab.whatsapp.inbox()] == ["hello"]


async def test_drain_hands_over_to_the_standby_which_restores_all(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.start(lab.make("a"))
        await a.journal.wait_for("restore.finished")
        b = lab.start(lab.make("b"))
        await b.journal.wait_for("restore.skipped")
        assert b.instance.state is State.PASSIVE
        asked = trio.current_time()
        a.instance.request_drain("SIGTERM")
        await a.ended.wait()
        assert a.instance.state is State.DRAINING
        await b.journal.wait_for("restore.finished")
        assert trio.current_time() - asked < 1
        assert b.instance.epoch == 2
        assert lab.whatsapp.evictions == []
        report = b.instance.restore_report
        assert report is not None
        assert (report.total, report.restored, report.failures) == (2, 2, ())
        message = await b.send(BEN, "after the handoff")
        assert (await b.desk.wait_progress(message.message_id)).state is MessageState.SERVER_ACK
