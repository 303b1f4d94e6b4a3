"""The Firestore stores as the contract suite opens them: an empty project of an emulator each."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from daemon.firestore.accounts import FirestoreAccountStore
from daemon.firestore.client import open_firestore
from daemon.firestore.lease import FirestoreLeaseStore
from daemon.firestore.outbox import FirestoreOutboxStore
from tests.emulator import new_project

GROUP = "contract"


class FirestoreAccountsAndOutbox(FirestoreAccountStore, FirestoreOutboxStore):
    """Both ports in one object, as a test may want them."""

    def __init__(self, accounts: FirestoreAccountStore, outbox: FirestoreOutboxStore) -> None:
        self.__dict__.update(vars(accounts))
        self.__dict__.update(vars(outbox))


@asynccontextmanager
async def open_firestore_lease_store(
    host: str, project: str | None = None
) -> AsyncIterator[FirestoreLeaseStore]:
    """The lease of `project` (a new one by default) at `host`."""
    async with open_firestore(project or new_project(), emulator_host=host) as client:
        yield FirestoreLeaseStore(client, GROUP)


@asynccontextmanager
async def open_firestore_account_store(
    host: str, project: str | None = None
) -> AsyncIterator[tuple[FirestoreAccountsAndOutbox, FirestoreLeaseStore]]:
    """Accounts, outbox and lease of `project` (a new one by default) at `host`."""
    async with open_firestore(project or new_project(), emulator_host=host) as client:
        both = FirestoreAccountsAndOutbox(
            FirestoreAccountStore(client, GROUP), FirestoreOutboxStore(client, GROUP)
        )
        yield both, FirestoreLeaseStore(client, GROUP)
