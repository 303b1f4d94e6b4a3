"""An instance meets what a newer release wrote: it stands back, and says what to do."""

from __future__ import annotations

from copy import deepcopy

import pytest
import trio
from trio.testing import MockClock

from machine.records import AccountStatus, LeaseState
from machine.refusals import AccountQuarantined
from machine.restore import ADVICE_NEWER
from machine.states import State
from tests.machine.lab import ANN, BEN, Lab, open_lab

LONG_S = 300.0


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def stored(lab: Lab) -> object:
    state = lab.state
    return deepcopy((state.lease, state.fence, state.accounts, state.messages))


@pytest.mark.parametrize("which", ["lease", "fence"])
async def test_a_standby_does_not_take_a_newer_lease_and_forwards_to_its_holder(
    which: str, autojump_clock: MockClock
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        newer = lab.start(lab.make("newer"))
        await newer.journal.wait_for("restore.finished")
        older = lab.start(lab.make("older"))
        await older.journal.wait_for("restore.skipped")
        lab.state.make_newer(which)
        newer.store.partitioned = True
        before = stored(lab)
        # Its ttl is over long since, and nobody renews it.
        await trio.sleep(LONG_S)
        assert older.instance.state is State.PASSIVE
        assert stored(lab) == before
        said = older.journal.of("lease.unreadable")
        assert said
        assert "start an instance" in str(said[-1]["error"])
        assert older.instance.holder is not None
        assert older.instance.holder.name == "newer"
        lab.state.newer.clear()
        await older.wait(State.ACTIVE)


async def test_a_holder_that_a_newer_release_has_replaced_ends_its_term_in_time(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN)
        a = lab.start(lab.make("a"))
        await a.journal.wait_for("restore.finished")
        lab.state.make_newer("lease")
        before = stored(lab)
        with trio.fail_after(a.instance._timing.ttl_s):
            await a.wait(State.PASSIVE)
        await trio.sleep(LONG_S)
        assert a.instance.state is State.PASSIVE
        lease, fence = lab.state.lease, lab.state.fence
        assert lease is not None
        assert fence is not None
        assert (lease, fence) == (before[0], before[1])  # type: ignore[index]
        assert lease[0].state is LeaseState.HELD


async def test_a_newer_account_is_quarantined_though_this_disk_could_read_its_own_copy(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        first = lab.start(lab.make("a"))
        await first.journal.wait_for("restore.finished")
        first.instance.request_drain("upgrade")
        await first.ended.wait()
        assert (await first.local.fetch_account(ANN)) is not None
        lab.state.make_account_newer(ANN)
        before = deepcopy(lab.state.accounts[ANN])
        again = lab.start(lab.make("a", local=first.local))
        await again.journal.wait_for("restore.finished")
        view = await again.desk.account(ANN)
        assert view.account.status is AccountStatus.QUARANTINED
        report = again.instance.restore_report
        assert report is not None
        assert [(f.account_id, f.advice) for f in report.failures] == [(ANN, ADVICE_NEWER)]
        for refused in (
            lambda: again.desk.repair(ANN),
            lambda: again.desk.remove_account(ANN, purge=True),
            lambda: again.desk.reconnect(ANN),
        ):
            with pytest.raises(AccountQuarantined, match="newer"):
                await refused()
        assert lab.state.accounts[ANN] == before
        assert (await again.desk.account(BEN)).account.status is AccountStatus.CONNECTED


async def test_an_account_that_becomes_newer_under_its_holder_is_not_written_over(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        await lab.add_accounts(ANN, BEN)
        a = lab.start(lab.make("a"))
        await a.journal.wait_for("restore.finished")
        lab.state.make_account_newer(ANN)
        before = deepcopy(lab.state.accounts[ANN])
        with pytest.raises(AccountQuarantined, match="newer"):
            await a.send(ANN, "hello")
        await trio.sleep(LONG_S)
        assert lab.state.accounts[ANN] == before
