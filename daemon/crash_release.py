"""Release the lease in the name of a daemon that died: a process's short last work.

Run by the warden in a process of its own, once nothing of the daemon runs any more. Only a lease
that this very daemon wrote is touched: an incarnation is random for each start, so nobody else can
have written it, and the preconditions are of what is read here.

Never lives here: whether the daemon is dead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import SystemRandom
from typing import Any

import trio

from daemon.warden import FAILED, NOT_OURS, RELEASED, boottime
from machine.lease import HeldLease, LeaseTiming, describe_error, release
from machine.ports import LeaseMissing, LeaseStore, StoreUnavailable
from machine.records import Grant, LeaseState, LeaseView

TIMING = LeaseTiming(attempt_s=1.0)
"""`release` takes at most four attempts: less than the warden lets us live."""
REASON = "its process died; released in its name"


def main(lease: Mapping[str, Any]) -> int:
    """Release what `store_of` and a grant describe; `RELEASED`, `NOT_OURS` or `FAILED`."""
    code = FAILED
    try:
        code = trio.run(_release, lease)
    except* (StoreUnavailable, LeaseMissing, trio.TooSlowError) as errors:
        for error in errors.exceptions:
            sys.stderr.write(f"watchkeeper: the dead daemon's lease: {describe_error(error)}\n")
    return code


async def _release(lease: Mapping[str, Any]) -> int:
    async with _open_store(lease) as store:
        with trio.fail_after(TIMING.attempt_s):
            view = await store.read()
        if not written_by(view, lease):
            return NOT_OURS
        released = await release(
            held_by_dead(view), store, TIMING, _Clocks(), SystemRandom(), _Silence(), reason=REASON
        )
        return RELEASED if released else FAILED


def written_by(view: LeaseView, lease: Mapping[str, Any]) -> bool:
    """Whether the dead daemon holds the lease as it is stored.

    A later epoch than the last told is its own as well: it died before it could tell.
    """
    stored = view.lease
    return (
        stored.state is LeaseState.HELD
        and stored.incarnation == lease["incarnation"]
        and stored.epoch >= lease["epoch"]
    )


def held_by_dead(view: LeaseView) -> HeldLease:
    """What the daemon held, as the store has it. There is no deadline to it any more."""
    lease = view.lease
    return HeldLease(
        grant=Grant(lease.epoch, lease.holder, lease.incarnation, view.fence_stamp),
        lease=lease,
        lease_stamp=view.lease_stamp,
        fence=view.fence,
        fence_stamp=view.fence_stamp,
        deadline=0.0,
        boot_deadline=0.0,
        asked_at=0.0,
    )


def sqlite_store(path: Path) -> dict[str, object]:
    """Name a SQLite store."""
    return {"store": "sqlite", "path": str(path.absolute())}


def firestore_store(
    project: str, database: str, emulator: str | None, group: str
) -> dict[str, object]:
    """Name a Firestore store; its credentials come from the environment, as the daemon's did."""
    return {
        "store": "firestore",
        "project": project,
        "database": database,
        "emulator": emulator,
        "group": group,
    }


@asynccontextmanager
async def _open_store(lease: Mapping[str, Any]) -> AsyncIterator[LeaseStore]:
    # The adapters are imported here, since each brings what the other has no use for.
    if lease["store"] == "sqlite":
        from daemon.sqlite.shared import open_sqlite_shared

        async with open_sqlite_shared(Path(lease["path"])) as store:
            yield store
        return
    from daemon.firestore.client import open_firestore
    from daemon.firestore.lease import FirestoreLeaseStore

    async with open_firestore(lease["project"], lease["database"], lease["emulator"]) as client:
        yield FirestoreLeaseStore(client, lease["group"])


class _Clocks:
    def wall(self) -> float:
        return time.time()

    def boottime(self) -> float:
        return boottime()


class _Silence:
    """The warden tells what came of it, in one line."""

    def note(self, event: str, /, **fields: object) -> None: ...
