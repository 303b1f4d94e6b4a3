from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from machine.records import AccountStatus
from machine.refusals import AccountQuarantined
from tests.machine.lab import ANN, BEN, Host, Lab, open_lab


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def _with_unreadable_keys(lab: Lab) -> Host:
    await lab.add_accounts(ANN, BEN)
    lab.codec.unreadable.add(ANN)
    host = lab.start(lab.make("a"))
    await host.journal.wait_for("restore.finished")
    view = await host.desk.account(ANN)
    assert view.account.status is AccountStatus.QUARANTINED
    return host


async def test_a_quarantined_account_is_paired_again_on_request_and_its_bytes_are_kept(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        host = await _with_unreadable_keys(lab)
        stored = lab.state.fetch_account(ANN)
        assert stored is not None
        view = await host.desk.repair(ANN)
        assert view.account.status is AccountStatus.QR_READY
        (kept,) = lab.state.archive
        assert (kept.account_id, dict(kept.parts)) == (ANN, dict(stored.parts))
        lab.codec.unreadable.clear()
        lab.whatsapp.scan(ANN)
        while (await host.desk.account(ANN)).account.status is not AccountStatus.CONNECTED:
            await trio.sleep(0.1)


async def test_a_quarantined_account_is_removed_on_request_and_its_bytes_are_kept(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        host = await _with_unreadable_keys(lab)
        stored = lab.state.fetch_account(ANN)
        assert stored is not None
        await host.desk.remove_account(ANN, purge=False)
        assert [v.account.account_id for v in await host.desk.list_accounts()] == [BEN]
        assert [dict(kept.parts) for kept in lab.state.archive] == [dict(stored.parts)]


async def test_a_record_that_cannot_be_read_at_all_is_neither_paired_again_nor_removed(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        host = await _with_unreadable_keys(lab)
        lab.state.damage_account(ANN)
        with pytest.raises(AccountQuarantined):
            await host.desk.repair(ANN)
        with pytest.raises(AccountQuarantined):
            await host.desk.remove_account(ANN, purge=False)
        assert lab.state.archive == []
