"""Opening the lease's store for the commands that need nothing else of it: `init` and `doctor`.

Never lives here: anything that acquires or renews; that is an instance's work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from daemon.settings import Settings, StoreKind
from machine.ports import LeaseStore

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
    from daemon.firestore.client import open_firestore
    from daemon.firestore.lease import FirestoreLeaseStore

    project = settings.firestore_project or ""
    async with open_firestore(
        project, settings.firestore_database, settings.firestore_emulator_host
    ) as client:
        yield FirestoreLeaseStore(client, settings.group)


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
