from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from machine.ports import Bridge
from tests.fakes.connector import FakeConnector, FakeWhatsApp
from tests.machine.lab import ANN, TIMING, open_lab


class SlowConnector(FakeConnector):
    @asynccontextmanager
    async def _open_bridge(self) -> AsyncIterator[Bridge]:
        await trio.sleep(2 * TIMING.ttl_s)
        async with super()._open_bridge() as bridge:
            yield bridge


class SlowWhatsApp(FakeWhatsApp):
    def connector(self) -> FakeConnector:
        return SlowConnector(self)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def test_a_lease_lost_while_the_bridge_starts_ends_nothing_but_the_term(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        lab.whatsapp = SlowWhatsApp()
        await lab.add_accounts(ANN)
        host = lab.start(lab.make("a"))
        await host.journal.wait_for("lease.acquired")
        host.store.partitioned = True
        await host.journal.wait_for("lease.lost")
        host.store.partitioned = False
        await host.journal.wait_for("restore.finished")
        assert host.instance.epoch == 2
        assert not host.ended.is_set()
