"""Many paired accounts at once, as earlier terms would have left them: for tests and benches.

The loopback server knows their devices, and the shared store has their records; pairing them one
by one over HTTP would take minutes.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path

import trio

from daemon.auth_codec import EncryptionKey, Keyring, PackedAuthCodec
from daemon.firestore.accounts import FirestoreAccountStore
from daemon.firestore.client import open_firestore
from daemon.firestore.lease import FirestoreLeaseStore
from daemon.initialise import SHARED_FILE
from daemon.loopback.database import open_database
from daemon.loopback.device import make_keys, new_device, phone_of
from daemon.settings import decode_key
from daemon.sqlite.shared import open_sqlite_shared
from machine.legacy import new_account
from machine.ports import AccountStore, LeaseStore
from machine.records import (
    Account,
    AccountId,
    AccountStatus,
    Grant,
    KeyChange,
    KeyName,
    Version,
)

IN_FLIGHT = 16


class Stores:
    """The lease and the accounts of a group, opened from outside of any instance."""

    def __init__(self, lease: LeaseStore, accounts: AccountStore) -> None:
        self.lease = lease
        self.accounts = accounts


@asynccontextmanager
async def open_stores(env: Mapping[str, str]) -> AsyncIterator[Stores]:
    """The stores that instances with these settings use, initialised if they are fresh."""
    if env["WATCHKEEPER_STORE"] == "sqlite":
        directory = Path(env["WATCHKEEPER_SHARED_DIR"])
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        async with open_sqlite_shared(directory / SHARED_FILE) as store:
            await store.initialise()
            yield Stores(store, store)
        return
    async with open_firestore(
        env["WATCHKEEPER_FIRESTORE_PROJECT"], "(default)", env["FIRESTORE_EMULATOR_HOST"]
    ) as client:
        group = env.get("WATCHKEEPER_GROUP", "default")
        lease = FirestoreLeaseStore(client, group)
        await lease.initialise()
        yield Stores(lease, FirestoreAccountStore(client, group))


async def seed_accounts(
    env: Mapping[str, str], count: int, *, contacts: int = 0, first: int = 0
) -> list[AccountId]:
    """Create `count` paired accounts, each with sessions of so many contacts; their ids."""
    ids = [AccountId(f"acc{number:05d}") for number in range(first, first + count)]
    codec = PackedAuthCodec(Keyring(EncryptionKey(decode_key(env["WATCHKEEPER_ENCRYPTION_KEY"]))))
    keys_of = _link_devices(Path(env["WATCHKEEPER_LOOPBACK_DIR"]), ids)
    async with open_stores(env) as stores:
        view = await stores.lease.read()
        fence = view.fence
        grant = Grant(fence.epoch, fence.holder, fence.incarnation, view.fence_stamp)
        limiter = trio.CapacityLimiter(IN_FLIGHT)
        version = Version(fence.epoch, 1)

        async def create(account_id: AccountId) -> None:
            keys: dict[KeyName, bytes] = {**keys_of[account_id]}
            for contact in range(contacts):
                keys[KeyName(f"session-49151{contact:08d}.0")] = bytes(700)
            changed = codec.change(account_id, {}, KeyChange(keys), version)
            parts = {name: part for name, part in changed.items() if part is not None}
            async with limiter:
                await stores.accounts.create_account(grant, _paired(account_id), version, parts)

        async with trio.open_nursery() as nursery:
            for account_id in ids:
                nursery.start_soon(create, account_id)
    return ids


def _paired(account_id: AccountId) -> Account:
    now = time.time()
    account = new_account(account_id, f"{account_id}'s", now)
    return replace(
        account,
        status=AccountStatus.CONNECTED,
        phone=phone_of(account_id),
        last_connected_at=now,
    )


def _link_devices(directory: Path, ids: list[AccountId]) -> dict[AccountId, dict[KeyName, bytes]]:
    """Make the loopback server know a device for each account; the devices' keys."""
    keys: dict[AccountId, dict[KeyName, bytes]] = {}
    rows = []
    for account_id in ids:
        device = new_device()
        phone = phone_of(account_id)
        keys[account_id] = make_keys(device, phone)
        rows.append((device.device_id, account_id, device.proof, phone, time.time()))
    open_database(directory).close()
    with closing(sqlite3.connect(directory / "loopback.db")) as database, database:
        database.executemany("INSERT INTO device VALUES (?, ?, ?, ?, 0, ?)", rows)
    return keys
