from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from tests.machine.lab import ANN, TIMING, open_lab


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_a_lease_lost_while_the_bridge_starts_ends_nothing_but_the_term(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        host = lab.make("a")
        host.connector.start_s = 2 * TIMING.ttl_s
        lab.start(host)
        await host.journal.wait_for("lease.acquired")
        host.store.partitioned = True
        await host.journal.wait_for("lease.lost")
        assert trio.current_time() < TIMING.ttl_s
        host.store.partitioned = False
        host.connector.start_s = 0.0
        await host.journal.wait_for("restore.finished")
        assert host.instance.epoch == 2
        assert not host.ended.is_set()
