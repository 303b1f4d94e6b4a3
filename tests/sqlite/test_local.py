"""What this host's store promises beyond the contract: damage, one process, and what it keeps."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from daemon.sqlite.copy_rows import ARCHIVED_PER_ACCOUNT_MAX, CHANGES_MAX
from daemon.sqlite.local import REPORTS_MAX, SCHEMA, TRANSITIONS_MAX, StateDirInUse, open_local
from machine.ports import StaleWrite, StoreMisconfigured, StoreUnavailable
from machine.records import (
    MAIN_PART,
    AccountCopy,
    AccountId,
    Grant,
    PartName,
    Stamp,
    Transition,
    Version,
)
from tests.contracts.samples import ANNA, BELA, MAIN, SESSIONS, a_commit, a_copy, an_account

GRANT = Grant(1, "a", "a-1", Stamp("1"))


def execute(directory: Path, statement: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(directory / "local.db")
    with connection:
        rows = connection.execute(statement).fetchall()
    connection.close()
    return rows


async def stocked(directory: Path) -> bytes:
    """A file with two copies and an epoch; its bytes."""
    async with open_local(directory) as store:
        await store.save_account(a_copy(parts={MAIN_PART: bytes(50_000)}))
        await store.save_account(a_copy(BELA))
        await store.raise_epoch(5)
    return (directory / "local.db").read_bytes()


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 20_000)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def overwrite(path: Path) -> None:
    path.write_bytes(b"\x00" * path.stat().st_size)


def damage_a_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(16384)
        file.write(b"\xff" * 16384)


@pytest.mark.parametrize("damage", [cut, empty, overwrite, damage_a_page])
async def test_a_damaged_file_is_set_aside_with_its_bytes_and_said_so(
    tmp_path: Path, damage: object
) -> None:
    path = tmp_path / "local.db"
    await stocked(tmp_path)
    assert callable(damage)
    damage(path)
    damaged = path.read_bytes()
    async with open_local(tmp_path) as store:
        listing = await store.list_accounts()
        assert listing.copies == ()
        assert not listing.complete
        assert listing.fault is not None
        assert "local.db.quarantined-1" in listing.fault
        assert (tmp_path / "local.db.quarantined-1").read_bytes() == damaged
        # The new file serves, and what the machine must never forget is not in it.
        await store.save_account(a_copy())
        assert await store.highest_epoch() == 5
        assert not (await store.list_accounts()).complete
    async with open_local(tmp_path) as store:
        listing = await store.list_accounts()
        assert (listing.complete, listing.fault) == (True, None)
        assert await store.fetch_account(ANNA) == a_copy()


async def test_each_damaged_file_gets_a_name_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "local.db"
    for _ in range(3):
        async with open_local(tmp_path):
            pass
        path.write_bytes(b"nonsense")
    async with open_local(tmp_path):
        pass
    kept = sorted(entry.name for entry in tmp_path.glob("local.db.quarantined-*"))
    assert kept == [f"local.db.quarantined-{number}" for number in (1, 2, 3)]


async def test_many_damaged_files_are_told_with_their_number_and_size(tmp_path: Path) -> None:
    for number in range(1, 4):
        (tmp_path / f"local.db.quarantined-{number}").write_bytes(bytes(1_000_000))
    (tmp_path / "local.db.quarantined-1-wal").write_bytes(bytes(500_000))
    async with open_local(tmp_path) as store:
        assert (await store.list_accounts()).fault is None
    (tmp_path / "local.db.quarantined-4").write_bytes(bytes(1_000_000))
    async with open_local(tmp_path) as store:
        listing = await store.list_accounts()
    assert listing.complete
    assert listing.fault is not None
    assert "4 damaged files" in listing.fault
    assert "4.5 MB" in listing.fault
    assert len(list(tmp_path.glob("local.db.quarantined-*"))) == 5


async def test_a_damaged_file_is_set_aside_together_with_its_wal(tmp_path: Path) -> None:
    await stocked(tmp_path)
    (tmp_path / "local.db").write_bytes(b"nonsense")
    (tmp_path / "local.db-wal").write_bytes(b"unfinished")
    async with open_local(tmp_path) as store:
        await store.save_account(a_copy())
    assert (tmp_path / "local.db.quarantined-1-wal").read_bytes() == b"unfinished"


async def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    await stocked(tmp_path)
    execute(tmp_path, "PRAGMA user_version = 99")
    before = (tmp_path / "local.db").read_bytes()
    with pytest.raises(StoreMisconfigured, match="newer"):
        async with open_local(tmp_path):
            raise AssertionError
    assert (tmp_path / "local.db").read_bytes() == before
    execute(tmp_path, f"PRAGMA user_version = {SCHEMA.version}")
    async with open_local(tmp_path) as store:
        assert len((await store.list_accounts()).copies) == 2


async def test_a_file_of_an_older_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    await stocked(tmp_path)
    execute(tmp_path, f"PRAGMA user_version = {SCHEMA.version - 1}")
    before = (tmp_path / "local.db").read_bytes()
    with pytest.raises(StoreMisconfigured, match=r"older.*move the file away"):
        async with open_local(tmp_path):
            raise AssertionError
    assert (tmp_path / "local.db").read_bytes() == before
    # Refused is not held: the directory is free again.
    execute(tmp_path, f"PRAGMA user_version = {SCHEMA.version}")
    async with open_local(tmp_path) as store:
        assert len((await store.list_accounts()).copies) == 2


async def test_a_second_instance_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    async with open_local(tmp_path) as store:
        with pytest.raises(StateDirInUse, match=r"process \d+"):
            async with open_local(tmp_path):
                raise AssertionError
        await store.save_account(a_copy())
    async with open_local(tmp_path) as store:
        assert len((await store.list_accounts()).copies) == 1


SECOND = """
import sys, trio
from pathlib import Path
from daemon.sqlite.local import StateDirInUse, open_local

async def main():
    try:
        async with open_local(Path(sys.argv[1])):
            print("opened")
    except StateDirInUse:
        print("in use")

trio.run(main)
"""


async def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    def run() -> str:
        command = [sys.executable, "-c", SECOND, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    async with open_local(tmp_path):
        assert await trio.to_thread.run_sync(run) == "in use"
    assert await trio.to_thread.run_sync(run) == "opened"


async def test_a_directory_is_made_for_this_user_alone(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "state"
    async with open_local(directory):
        pass
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "local.db").stat().st_mode & 0o777 == 0o600


async def test_a_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_bytes(b"")
    with pytest.raises(StoreMisconfigured, match="state"):
        async with open_local(tmp_path / "state"):
            raise AssertionError


async def test_an_error_in_the_stores_block_leaves_it_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        async with open_local(tmp_path):
            raise KeyError


async def test_changes_are_folded_into_the_copy_before_they_grow(tmp_path: Path) -> None:
    async with open_local(tmp_path) as store:
        await store.save_account(a_copy())
        for revision in range(2, 2 + 3 * CHANGES_MAX):
            await store.apply(
                a_commit(GRANT, Stamp("1"), revision=revision, parts={SESSIONS: b"n"})
            )
        ((rows,),) = execute(tmp_path, "SELECT count(*) FROM changes")
        assert isinstance(rows, int)
        assert 0 < rows <= CHANGES_MAX
        for revision in range(1000, 1005):
            big = a_commit(GRANT, Stamp("1"), revision=revision, parts={SESSIONS: bytes(200_000)})
            await store.apply(big)
        ((held,),) = execute(tmp_path, "SELECT coalesce(sum(length(change)), 0) FROM changes")
        assert isinstance(held, int)
        assert held < 500_000


async def test_a_commit_without_other_parts_leaves_no_change(tmp_path: Path) -> None:
    async with open_local(tmp_path) as store:
        await store.save_account(a_copy())
        await store.apply(a_commit(GRANT, Stamp("1"), parts={MAIN_PART: b"2"}))
        await store.apply(a_commit(GRANT, Stamp("1"), revision=3))
        assert execute(tmp_path, "SELECT * FROM changes") == []
        copy = await store.fetch_account(ANNA)
        assert copy is not None
        assert copy.parts == {**a_copy().parts, MAIN_PART: b"2"}


async def test_an_unreadable_copys_bytes_are_kept_when_it_is_replaced(tmp_path: Path) -> None:
    async with open_local(tmp_path) as store:
        await store.save_account(a_copy())
        await store.apply(a_commit(GRANT, Stamp("1"), parts={SESSIONS: b"changed"}))
        execute(tmp_path, "UPDATE copies SET head = x'c1c2'")
        (rest,) = execute(tmp_path, "SELECT rest FROM rests")
        await store.save_account(a_copy())
    ((head, main, archived, changes),) = execute(
        tmp_path, "SELECT head, main, rest, changes FROM archive"
    )
    assert (head, main, (archived,)) == (b"\xc1\xc2", MAIN, rest)
    assert isinstance(changes, bytes)
    assert b"changed" in changes


async def test_a_commit_on_unreadable_parts_is_stale_at_the_latest_when_folded(
    tmp_path: Path,
) -> None:
    async with open_local(tmp_path) as store:
        await store.save_account(a_copy())
        execute(tmp_path, "UPDATE rests SET rest = x'c1'")
        for revision in range(2, CHANGES_MAX + 2):
            await store.apply(
                a_commit(GRANT, Stamp("1"), revision=revision, parts={SESSIONS: b"n"})
            )
        with pytest.raises(StaleWrite):
            await store.apply(
                a_commit(GRANT, Stamp("1"), revision=CHANGES_MAX + 2, parts={SESSIONS: b"n"})
            )
        copy = await store.fetch_account(ANNA)
        assert copy is not None
        assert copy.fault


SWAPS = {
    "heads": (
        "UPDATE copies SET account_id = 'x' || account_id",
        "UPDATE copies SET account_id = iif(account_id = 'xanna', 'bela', 'anna')",
    ),
    "rests": ("UPDATE rests SET row = -row", "UPDATE rests SET row = 3 + row"),
    "changes": ("UPDATE changes SET copy = 3 - copy",),
}


@pytest.mark.parametrize("swap", SWAPS)
async def test_another_accounts_bytes_are_a_fault(tmp_path: Path, swap: str) -> None:
    async with open_local(tmp_path) as store:
        for account_id in (ANNA, BELA):
            await store.save_account(a_copy(account_id))
            commit = a_commit(
                GRANT, Stamp("1"), account=an_account(account_id), parts={SESSIONS: b"n"}
            )
            await store.apply(commit)
        for statement in SWAPS[swap]:
            execute(tmp_path, statement)
        for account_id in (ANNA, BELA):
            copy = await store.fetch_account(account_id)
            assert copy is not None
            assert copy.fault
            assert "another account's" in copy.fault


@pytest.mark.parametrize("loss", ["DELETE FROM rests", "DELETE FROM changes"])
async def test_a_lost_part_is_a_fault(tmp_path: Path, loss: str) -> None:
    new = PartName("new")
    async with open_local(tmp_path) as store:
        await store.save_account(a_copy())
        await store.apply(a_commit(GRANT, Stamp("1"), parts={new: b"n"}))
        execute(tmp_path, loss)
        copy = await store.fetch_account(ANNA)
        assert copy is not None
        assert copy.fault
        assert not copy.parts


def damage_middle(path: Path, content: bytes) -> None:
    """Overwrite a page in the middle of a blob that repeats `content`, a single byte."""
    data = path.read_bytes()
    size = SCHEMA.page_bytes
    found = [
        at for at in range(0, len(data), size) if data[at + 4 : at + size] == content * (size - 4)
    ]
    with path.open("r+b") as file:
        file.seek(found[1])
        file.write(b"\xff" * size)


async def test_a_damaged_page_of_one_accounts_parts_hides_no_other(tmp_path: Path) -> None:
    def parts(content: bytes) -> dict[PartName, bytes]:
        return {MAIN_PART: MAIN, SESSIONS: content * (5 * SCHEMA.page_bytes)}

    async with open_local(tmp_path) as store:
        await store.save_account(a_copy(ANNA, parts=parts(b"a")))
        await store.save_account(a_copy(BELA, parts=parts(b"b")))
    async with open_local(tmp_path) as store:
        damage_middle(tmp_path / "local.db", b"b")
        listing = await store.list_accounts()
        assert [copy.fault for copy in listing.copies] == [None, None]
        assert await store.fetch_account(ANNA) == a_copy(ANNA, parts=parts(b"a"))
        bela = await store.fetch_account(BELA)
        assert bela is not None
        assert bela.fault
        assert (bela.account, bela.version) == (an_account(BELA), Version(1, 1))
        # Neither is it held against anything else, nor does it stop what is written.
        await store.apply(a_commit(GRANT, Stamp("1"), parts={SESSIONS: b"n"}))
        await store.save_account(a_copy(AccountId("carl")))
        assert len((await store.list_accounts()).copies) == 3


async def test_many_accounts_fetched_at_once_all_come_and_those_that_leave_hold_up_none(
    tmp_path: Path,
) -> None:
    names = [AccountId(f"account-{number:03}") for number in range(100)]
    found: dict[AccountId, AccountCopy | None] = {}
    left = 0

    async with open_local(tmp_path) as store:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(store.save_account, a_copy(name))

        async def fetch(name: AccountId) -> None:
            found[name] = await store.fetch_account(name)

        async def fetch_and_leave(name: AccountId) -> None:
            nonlocal left
            with trio.CancelScope() as scope:
                scope.cancel()
                await store.fetch_account(name)
            left += scope.cancelled_caught

        async def fetch_and_leave_later(name: AccountId) -> None:
            nonlocal left
            with trio.move_on_after(0) as scope:
                await store.fetch_account(name)
            left += scope.cancelled_caught

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetch_and_leave_later, names[0])
                for name in names:
                    nursery.start_soon(fetch, name)
                    nursery.start_soon(fetch_and_leave, name)
                    nursery.start_soon(fetch_and_leave_later, name)
                nursery.start_soon(fetch, AccountId("nobody"))
    assert found == {**{name: a_copy(name) for name in names}, AccountId("nobody"): None}
    assert left >= len(names)


async def test_a_fetch_that_is_cancelled_leaves_nothing_behind(tmp_path: Path) -> None:
    async with open_local(tmp_path) as store:
        with trio.move_on_after(0) as scope:
            await store.fetch_account(ANNA)
        assert scope.cancelled_caught
        assert store.fetching == 0


async def test_removed_copies_are_archived_and_purged_ones_are_not(tmp_path: Path) -> None:
    async with open_local(tmp_path) as store:
        for _ in range(ARCHIVED_PER_ACCOUNT_MAX + 3):
            await store.save_account(a_copy())
            await store.remove_account(ANNA, purge=False)
        kept = execute(tmp_path, "SELECT DISTINCT account_id, count(*) FROM archive")
        assert kept == [("anna", ARCHIVED_PER_ACCOUNT_MAX)]
        await store.save_account(a_copy())
        await store.remove_account(ANNA, purge=True)
        assert execute(tmp_path, "SELECT * FROM archive") == []


async def test_transitions_and_reports_have_a_limit(tmp_path: Path) -> None:
    async with open_local(tmp_path) as store, trio.open_nursery() as nursery:
        for number in range(TRANSITIONS_MAX + 50):
            record = Transition("PASSIVE", "ACTIVE", "activate", "", 1.0, 0.1, number, "a")
            nursery.start_soon(store.append_transition, record)
        for number in range(REPORTS_MAX + 50):
            nursery.start_soon(store.append_report, {"number": number})
    async with open_local(tmp_path) as store:
        assert len(await store.list_transitions(5000)) == TRANSITIONS_MAX
    assert execute(tmp_path, "SELECT count(*) FROM reports") == [(REPORTS_MAX,)]


async def test_an_epoch_that_is_no_number_is_never_guessed(tmp_path: Path) -> None:
    async with open_local(tmp_path) as store:
        await store.raise_epoch(3)
        (tmp_path / "epoch").write_bytes(b"\xff3")
        with pytest.raises(StoreMisconfigured, match="epoch"):
            await store.highest_epoch()
        with pytest.raises(StoreMisconfigured, match="epoch"):
            await store.raise_epoch(4)


async def test_applies_at_once_share_their_transactions(tmp_path: Path) -> None:
    names = [AccountId(f"account-{number:03}") for number in range(100)]
    async with open_local(tmp_path) as store:
        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(store.save_account, a_copy(name))
        before = store.transactions
        async with trio.open_nursery() as nursery:
            for name in names:
                commit = a_commit(GRANT, Stamp("1"), account=an_account(name))
                nursery.start_soon(store.apply, commit)
        assert store.transactions - before < len(names) / 4


FULL_DISK = """
import resource, sys, trio
from pathlib import Path
from daemon.sqlite.local import open_local
from machine.ports import StoreUnavailable
from machine.records import MAIN_PART
from tests.contracts.samples import a_copy

async def main():
    async with open_local(Path(sys.argv[1])) as store:
        await store.save_account(a_copy())
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        try:
            await store.save_account(a_copy(revision=2, parts={MAIN_PART: bytes(500_000)}))
        except StoreUnavailable as error:
            print("unavailable")
        (copy,) = (await store.list_accounts()).copies
        print(copy.version)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        await store.save_account(a_copy(revision=2, parts={MAIN_PART: bytes(500_000)}))
    async with open_local(Path(sys.argv[1])) as store:
        (copy,) = (await store.list_accounts()).copies
        print(copy.version)

trio.run(main)
"""


def test_a_full_disk_refuses_writes_keeps_what_is_there_and_recovers(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert result.stderr == ""
    assert result.stdout.split() == ["unavailable", str(Version(1, 1)), str(Version(1, 2))]


KILLED = """
import os, sys, trio
from pathlib import Path
from daemon.sqlite.local import open_local
from machine.records import Grant, Stamp
from tests.contracts.samples import a_commit, a_copy

async def main():
    async with open_local(Path(sys.argv[1])) as store:
        await store.save_account(a_copy())
        await store.apply(a_commit(Grant(1, "a", "a-1", Stamp("1")), Stamp("1"), revision=9))
        await store.raise_epoch(4)
        os.kill(os.getpid(), 9)

trio.run(main)
"""


async def test_what_was_answered_survives_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    await trio.to_thread.run_sync(lambda: subprocess.run(command, check=False, timeout=60))
    async with open_local(tmp_path) as store:
        listing = await store.list_accounts()
        assert listing.complete
        assert [copy.version for copy in listing.copies] == [Version(1, 9)]
        assert await store.highest_epoch() == 4


async def test_an_epoch_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    async with open_local(tmp_path) as store:
        (tmp_path / "epoch.new").mkdir()
        with pytest.raises(StoreUnavailable):
            await store.raise_epoch(1)
        assert await store.highest_epoch() == 0


async def test_a_version_that_nobody_counted_to_is_a_fault(tmp_path: Path) -> None:
    await stocked(tmp_path)
    execute(tmp_path, f"UPDATE copies SET revision = {2**62} WHERE account_id = '{ANNA}'")
    async with open_local(tmp_path) as store:
        faults = {c.account.account_id: c.fault for c in (await store.list_accounts()).copies}
        assert "never counted to" in str(faults[ANNA])
        assert faults[BELA] is None
        # The account is quarantined, or a copy that can be read takes its place.
        await store.save_account(a_copy())
        assert await store.fetch_account(ANNA) == a_copy()
