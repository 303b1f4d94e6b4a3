from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from machine.limits import Durability
from tests.machine.lab import ANN, open_lab


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_drain_that_leaves_changes_on_this_disk_only_says_so(
    autojump_clock: MockClock, hangs: bool
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.start(lab.make("a", durability=Durability.LOCAL))
        await a.journal.wait_for("restore.finished")
        await a.send(ANN, "its key change counts once the disk has it")
        await a.journal.wait_for("message.acked")
        if hangs:
            a.store.hang_next("commit", 1000)
        a.instance.request_drain("SIGTERM")
        with trio.fail_after(60):
            await a.ended.wait()
        assert [e["accounts"] for e in a.journal.of("drain.unflushed")] == ([1] if hangs else [])
