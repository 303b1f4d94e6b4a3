"""Write one more account with the stores of whichever release is on the path, as its holder would.

Run by `make_fixtures` with the first release's code: nothing here may need more than that has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from daemon.auth_codec import Keyring, PackedAuthCodec, parse_key
from daemon.firestore.accounts import FirestoreAccountStore
from daemon.firestore.client import open_firestore
from daemon.firestore.lease import FirestoreLeaseStore
from daemon.sqlite.local import open_local
from daemon.sqlite.shared import open_sqlite_shared
from machine.ports import AccountStore, LeaseStore
from machine.records import (
    Account,
    AccountCopy,
    AccountId,
    AccountStatus,
    Grant,
    KeyChange,
    KeyName,
    Version,
)

AT = 1_700_000_000.0


@asynccontextmanager
async def _open_shared(given: Mapping[str, Any]) -> AsyncIterator[tuple[LeaseStore, AccountStore]]:
    if "shared" in given:
        async with open_sqlite_shared(Path(given["shared"])) as store:
            yield store, store
        return
    async with open_firestore(given["project"], "(default)", given["emulator"]) as client:
        yield (
            FirestoreLeaseStore(client, given["group"]),
            FirestoreAccountStore(client, given["group"]),
        )


async def main(given: Mapping[str, Any]) -> None:
    """Write the account to the shared store under its present epoch, and to the disk."""
    codec = PackedAuthCodec(Keyring(parse_key(given["key"])))
    account = Account(
        AccountId(given["account"]), "Dora", AccountStatus.STOPPED, AT, AT, AT, phone="4915100"
    )
    async with _open_shared(given) as (leases, accounts), open_local(Path(given["disk"])) as local:
        view = await leases.read()
        fence = view.fence
        grant = Grant(fence.epoch, fence.holder, fence.incarnation, view.fence_stamp)
        version = Version(fence.epoch, 1)
        change = KeyChange({KeyName(k): v.encode() for k, v in given["keys"].items()})
        changed = codec.change(account.account_id, {}, change, version)
        parts = {name: data for name, data in changed.items() if data is not None}
        await accounts.create_account(grant, account, version, parts)
        await local.save_account(AccountCopy(account, version, parts, complete=True))


if __name__ == "__main__":
    trio.run(main, json.load(sys.stdin))
