from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from machine.records import MessageState
from tests.fakes.shared_store import Passage
from tests.machine.lab import ANN, open_lab


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_a_reopened_account_has_the_keys_of_an_ack_that_was_still_being_stored(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        host = lab.start(lab.make("a"))
        await host.journal.wait_for("restore.finished")
        first = await host.send(ANN, "makes the session")
        await host.desk.wait_progress(first.message_id)
        await trio.sleep(1.0)
        host.store.schedule("commit", Passage(), Passage(request_s=4.0))
        message = await host.send(ANN, "acknowledged, not stored yet")
        while len(lab.whatsapp.raw) < 2:
            await trio.sleep(0.01)
        lab.whatsapp.cut(ANN)
        again = await host.send(ANN, "with the next key")
        done = await host.desk.wait_progress(message.message_id)
        assert done.state is MessageState.SERVER_ACK
        await host.desk.wait_progress(again.message_id)
        # Once each on the wire: the first was not sent again under a session of its own.
        assert [one.message_id for one in lab.whatsapp.raw] == [
            first.message_id,
            message.message_id,
            again.message_id,
        ]
        assert lab.whatsapp.unreadable() == []
        # Nor was that session doubted, and begun anew.
        assert lab.whatsapp.sessions == 1


async def test_a_receipt_for_an_ack_that_came_to_nothing_leaves_its_session_in_doubt(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        host = lab.start(lab.make("a"))
        await host.journal.wait_for("restore.finished")
        first = await host.send(ANN, "makes the session")
        await host.desk.wait_progress(first.message_id)
        await trio.sleep(1.0)
        lab.whatsapp.script(ANN).receipts = (MessageState.DELIVERED,)
        lab.whatsapp.script(ANN).ack_delay_s = 1.0
        await host.send(ANN, "received, its keys never stored")
        await trio.sleep(0.5)
        stored = lab.state.accounts.pop(ANN)
        await host.journal.wait_for("commit.refused")
        await trio.sleep(0.5)
        lab.state.accounts[ANN] = stored
        await host.desk.reconnect(ANN)
        await host.journal.wait_for("session.connected", 2)
        lab.whatsapp.script(ANN).ack_delay_s = 0.0
        third = await host.send(ANN, "in a session that is not used up")
        await host.desk.wait_progress(third.message_id)
        assert third.message_id in [one.message_id for one in lab.whatsapp.inbox()]
        assert lab.whatsapp.unreadable() == []
