"""Opening the shared store for the commands that look after it: `init` and `doctor`.

Never lives here: anything that acquires or renews; that is an instance's work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

import trio

from daemon.findings import Finding, fail
from daemon.settings import Settings, StoreKind
from machine.ports import LeaseStore, StoreUnavailable

if TYPE_CHECKING:
    from daemon.firestore.client import FirestoreClient

SHARED_FILE = "shared.db"
STORE_S = 15.0
"""How long a command waits for the store before it says that there is no answer."""


@asynccontextmanager
async def open_lease_store(settings: Settings) -> AsyncIterator[LeaseStore]:
    """Open the configured lease store. Raises `StoreMisconfigured`, `StoreUnavailable`."""
    # The adapters are imported here, since each brings what the other has no use for.
    if settings.store is StoreKind.SQLITE:
        from daemon.sqlite.shared import open_sqlite_shared

        await trio.to_thread.run_sync(_make_shared_dir, settings)
        async with open_sqlite_shared(settings.shared_dir / SHARED_FILE) as store:
            yield store
        return
    from daemon.firestore.lease import FirestoreLeaseStore

    async with _open_firestore(settings) as client:
        yield FirestoreLeaseStore(client, settings.group)


def _open_firestore(settings: Settings) -> AbstractAsyncContextManager[FirestoreClient]:
    from daemon.firestore.client import open_firestore

    return open_firestore(
        settings.firestore_project or "",
        settings.firestore_database,
        settings.firestore_emulator_host,
    )


def _make_shared_dir(settings: Settings) -> None:
    settings.shared_dir.mkdir(mode=0o700, parents=True, exist_ok=True)


async def initialise(settings: Settings, *, epoch: int = 0) -> bool:
    """Create the group's lease documents; false when they are there already.

    Raises `LeaseMissing` when only one of them exists, `StoreMisconfigured`, `StoreUnavailable`,
    `trio.TooSlowError`.
    """
    with trio.fail_after(STORE_S):
        async with open_lease_store(settings) as store:
            return await store.initialise(epoch=epoch)


async def inspect_store(settings: Settings) -> tuple[Finding, ...]:
    """Whether the store has what an instance will ask of it, apart from the lease.

    Nothing for SQLite, which is as we make it. Takes as long as the slowest check.
    """
    if settings.store is StoreKind.SQLITE or not settings.firestore_project:
        return ()
    from daemon.firestore.inspection import inspect

    try:
        async with _open_firestore(settings) as client:
            emulated = settings.firestore_emulator_host is not None
            return await inspect(client, settings.group, emulated=emulated)
    except StoreUnavailable as error:
        return (fail("credentials", str(error), "Mend that, then ask again."),)
