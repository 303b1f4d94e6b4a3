from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from machine.records import AccountStatus, MessageState, Version
from tests.fakes.local_store import FakeLocalStore
from tests.machine.lab import ANN, open_lab


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@pytest.mark.parametrize("unanswered", [False, True])
async def test_an_account_that_only_this_disk_has_is_written_to_the_shared_store(
    autojump_clock: MockClock, unanswered: bool
) -> None:
    """The shared store was restored from a backup older than the account, for example."""
    async with open_lab() as lab:
        local = FakeLocalStore()
        await local.save_account(lab.copy(ANN, Version(0, 7)))
        a = lab.make("a", local=local)
        if unanswered:
            a.store.apply_then_fail("create_account")
        lab.start(a)
        await a.journal.wait_for("session.connected")
        (view,) = await a.desk.list_accounts()
        assert view.account.status is AccountStatus.CONNECTED
        stored = lab.state.fetch_account(ANN)
        assert stored is not None
        assert (stored.version.epoch, stored.version.revision >= 7) == (1, True)
        assert set(stored.parts) == set(lab.copy(ANN, Version(0, 7)).parts)
        message = await a.send(ANN, "still here")
        assert (await a.desk.wait_progress(message.message_id)).state is MessageState.SERVER_ACK
        await trio.sleep(1)
