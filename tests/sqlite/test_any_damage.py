"""A SQLite file cut, zeroed or scribbled upon anywhere: refused or read, never a wrong key.

SQLite keeps no checksums of its pages, so some damage goes unnoticed by it: what stands between
that and an account is the seal of each packed part, so the real codec judges here.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from daemon.auth_codec import EncryptionKey, Keyring, PackedAuthCodec
from daemon.sqlite.local import open_local
from daemon.sqlite.shared import open_sqlite_shared
from machine.ports import AuthUnreadable, LeaseMissing, StoreMisconfigured, StoreUnavailable
from machine.records import AccountCopy, AccountId, KeyChange, KeyName, Listing, Version
from tests.contracts.samples import a_copy, acquire, an_account

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CODEC = PackedAuthCodec(Keyring(EncryptionKey(bytes(32))))
ACCOUNTS = [AccountId(f"account-{number}") for number in range(6)]
KEYS = {KeyName("creds"): b"c" * 700} | {
    KeyName(f"session-4915{number}.0"): bytes([number]) * 900 for number in range(40)
}


def _made() -> dict[AccountId, AccountCopy]:
    version = Version(1, 1)
    copies = {}
    for account_id in ACCOUNTS:
        changed = CODEC.change(account_id, {}, KeyChange(KEYS), version)
        parts = {name: data for name, data in changed.items() if data is not None}
        copies[account_id] = replace(a_copy(account_id, parts=parts), version=version)
    return copies


TRUTH = _made()


@pytest.fixture(scope="module")
def local_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local file with some accounts, closed in order."""
    directory = tmp_path_factory.mktemp("local")

    async def fill() -> None:
        async with open_local(directory) as store:
            for copy in TRUTH.values():
                await store.save_account(copy)

    trio.run(fill)
    return directory / "local.db"


@pytest.fixture(scope="module")
def shared_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared file with a lease and the same accounts."""
    path = tmp_path_factory.mktemp("shared") / "shared.db"

    async def fill() -> None:
        async with open_sqlite_shared(path) as store:
            await store.initialise()
            grant = await acquire(store)
            for account_id, copy in TRUTH.items():
                account = an_account(account_id)
                await store.create_account(grant, account, copy.version, copy.parts)

    trio.run(fill)
    return path


@dataclass(frozen=True)
class Damage:
    """What a power cut, a bad disk or a stranger does to a file."""

    kind: str
    where: float
    """As a part of the file's length."""
    bytes_count: int
    noise: bytes

    def __call__(self, content: bytes) -> bytes:
        at = int(self.where * len(content))
        end = min(at + self.bytes_count, len(content))
        match self.kind:
            case "cut":
                return content[:at]
            case "zeros":
                return content[:at] + bytes(end - at) + content[end:]
            case "ones":
                return content[:at] + b"\xff" * (end - at) + content[end:]
            case "head":
                at %= 100
                return content[:at] + self.noise[:4] + content[at + 4 :]
            case "shift":
                return content[:at] + self.noise + content[at:]
        return content[:at] + self.noise + content[at + len(self.noise) :]


damages = st.builds(
    Damage,
    st.sampled_from(["cut", "zeros", "ones", "head", "shift", "noise"]),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from([1, 16, 512, 4096, 40_000]),
    st.binary(min_size=16, max_size=16),
)


def judge(listing: Listing, fetched: dict[AccountId, AccountCopy | None]) -> None:
    """Every copy that passes for a sound one holds exactly the keys that were written."""
    for account_id, copy in fetched.items():
        if copy is None or copy.fault is not None or not copy.parts:
            continue
        # Every opening goes through it.
        with suppress(AuthUnreadable):
            assert CODEC.unpack(account_id, copy.parts) == KEYS
    for copy in listing.copies:
        name = copy.account.account_id
        if copy.fault is None and copy.parts and CODEC.check(name, copy.parts) is None:
            assert name in TRUTH


@FEW
@given(damages)
def test_any_damage_to_the_local_file_is_set_aside_or_read_around(
    tmp_path: Path, local_file: Path, damage: Damage
) -> None:
    directory = tmp_path / "state"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    damaged = damage(local_file.read_bytes())
    (directory / "local.db").write_bytes(damaged)

    async def use() -> None:
        try:
            async with open_local(directory) as store:
                listing = await store.list_accounts()
                names = {*TRUTH, *(copy.account.account_id for copy in listing.copies)}
                fetched = {name: await store.fetch_account(name) for name in names}
                await store.save_account(a_copy())
        except (StoreMisconfigured, StoreUnavailable) as refused:
            assert str(refused)  # noqa: PT017 - one of two lawful ends
            return
        judge(listing, fetched)

    trio.run(use)
    aside = directory / "local.db.quarantined-1"
    if aside.exists():
        assert aside.read_bytes() == damaged


@FEW
@given(damages)
@example(Damage("zeros", 0.462890625, 512, bytes(16)))  # columns that may not be empty are
@example(Damage("head", 0.31, 1, bytes(16)))
def test_any_damage_to_the_shared_file_is_refused_or_read_around(
    tmp_path: Path, shared_file: Path, damage: Damage
) -> None:
    directory = tmp_path / "shared"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    path = directory / "shared.db"
    damaged = damage(shared_file.read_bytes())
    path.write_bytes(damaged)

    async def use() -> None:
        try:
            async with open_sqlite_shared(path) as store:
                listing = await store.list_accounts()
                names = {*TRUTH, *(copy.account.account_id for copy in listing.copies)}
                fetched = {name: await store.fetch_account(name) for name in names}
                await store.read()
        except (StoreMisconfigured, StoreUnavailable, LeaseMissing) as refused:
            assert str(refused)  # noqa: PT017 - one of two lawful ends
            return
        judge(listing, fetched)

    trio.run(use)
    # Reading wrote nothing: whatever it was, it is still there for whoever can mend it.
    same = path.read_bytes() == damaged
    assert same
