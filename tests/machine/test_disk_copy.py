from __future__ import annotations

import pytest
from trio.testing import MockClock, wait_all_tasks_blocked

from machine.limits import Durability
from machine.records import KeyName, Version
from tests.fakes.local_store import FakeLocalStore
from tests.machine.lab import ANN, Host, Lab, open_lab


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


async def with_an_older_disk(lab: Lab, durability: Durability) -> Host:
    """An instance that is ACTIVE, on a disk whose copy was older than the shared one."""
    await lab.add_accounts(ANN)
    stored = lab.state.accounts[ANN]
    newer = lab.copy(ANN, Version(0, 5), mark=b"newer")
    stored.version, stored.parts = newer.version, dict(newer.parts)
    disk = FakeLocalStore()
    disk.copies[ANN] = lab.copy(ANN, Version(0, 2), mark=b"older")
    # While PASSIVE the copy is brought up to date; not this time.
    disk.fail_next("save_account")
    host = lab.start(lab.make("a", local=disk, durability=durability))
    await host.journal.wait_for("restore.finished")
    return host


def assert_not_torn(lab: Lab, host: Host) -> None:
    shared, local = lab.state.accounts[ANN], host.local.copies[ANN]
    if local.version == shared.version:
        assert dict(local.parts) == shared.parts
    if local.version > shared.version:
        keys = lab.codec.unpack(ANN, local.parts)
        assert keys[KeyName("mark")] == b"newer"


@pytest.mark.parametrize("durability", Durability)
async def test_an_older_disk_copy_never_gets_a_newer_version_without_its_parts(
    autojump_clock: MockClock, durability: Durability
) -> None:
    async with open_lab() as lab:
        host = await with_an_older_disk(lab, durability)
        assert_not_torn(lab, host)
        for text in ("one", "two"):
            message = await host.send(ANN, text)
            await host.desk.wait_progress(message.message_id)
            await wait_all_tasks_blocked()
            assert_not_torn(lab, host)
        assert host.local.copies[ANN].version.epoch == 1


async def test_a_disk_that_missed_a_commit_gets_the_whole_copy_with_the_next(
    autojump_clock: MockClock,
) -> None:
    async with open_lab() as lab:
        host = await with_an_older_disk(lab, Durability.REMOTE)
        for operation, text in (("apply", "missed"), ("save_account", "too"), ("", "kept")):
            host.local.fail_next(operation)
            message = await host.send(ANN, text)
            await host.desk.wait_progress(message.message_id)
            await wait_all_tasks_blocked()
            assert_not_torn(lab, host)
        assert host.local.copies[ANN].version == lab.state.accounts[ANN].version
