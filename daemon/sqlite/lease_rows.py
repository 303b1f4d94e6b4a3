"""The lease and the fence as two rows of the embedded store. Runs in a worker's transaction."""

from __future__ import annotations

import math
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from machine.ports import LeaseMissing, LeaseRefused, StoreMisconfigured
from machine.records import (
    COUNT_MAX,
    FENCE_LASTING_FIELDS,
    Fence,
    FenceChange,
    Heartbeat,
    Lease,
    LeaseStamps,
    LeaseState,
    LeaseView,
    LeaseWrite,
    Stamp,
)

TABLES = """
CREATE TABLE lease (
    row INTEGER PRIMARY KEY CHECK (row = 1),
    stamp TEXT NOT NULL,
    holder TEXT NOT NULL,
    incarnation TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    nonce TEXT NOT NULL,
    ttl_s REAL NOT NULL,
    state TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    written_at REAL NOT NULL
) STRICT;
CREATE TABLE fence (
    row INTEGER PRIMARY KEY CHECK (row = 1),
    stamp TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    holder TEXT NOT NULL,
    incarnation TEXT NOT NULL,
    address TEXT NOT NULL,
    state TEXT NOT NULL,
    handoff_to TEXT,
    paused INTEGER NOT NULL,
    step_down_of INTEGER,
    reason TEXT NOT NULL,
    changed_by TEXT NOT NULL,
    history TEXT NOT NULL,
    settled INTEGER NOT NULL DEFAULT 0
) STRICT
"""


@dataclass(frozen=True, slots=True)
class Boot:
    """The clock that every process of the host shares, and which boot it counts from.

    `boottime()` is in seconds and goes on in a suspend.
    """

    boot_id: str
    boottime: Callable[[], float]


def new_stamp() -> Stamp:
    """A stamp that no document ever had, also not before a backup was put back."""
    return Stamp(secrets.token_hex(8))


def read(connection: sqlite3.Connection, boot: Boot) -> LeaseView:
    """Both documents. Raises `LeaseMissing`, `StoreMisconfigured`."""
    beat = read_heartbeat(connection, boot)
    found = read_fence(connection)
    if found is None:
        raise _missing("fence")
    return LeaseView(beat.lease, found[0], beat.lease_stamp, found[1], beat.age_s)


def read_heartbeat(connection: sqlite3.Connection, boot: Boot) -> Heartbeat:
    """The lease alone. Raises `LeaseMissing`, `StoreMisconfigured`."""
    row = connection.execute(
        "SELECT holder, incarnation, epoch, nonce, ttl_s, state, stamp, boot_id, written_at"
        " FROM lease"
    ).fetchone()
    if row is None:
        raise _missing("lease")
    holder, incarnation, epoch, nonce, ttl_s, state, stamp, boot_id, written_at = row
    try:
        lease = Lease(holder, incarnation, epoch, nonce, ttl_s, LeaseState(state))
    except ValueError as error:
        raise StoreMisconfigured(f"the lease cannot be read: {error}") from error
    if not lease.plausible:
        raise StoreMisconfigured("the lease cannot be read: its epoch or ttl was never written")
    age_s = boot.boottime() - written_at if boot_id == boot.boot_id else math.inf
    return Heartbeat(lease, Stamp(stamp), max(0.0, age_s))


def _missing(which: str) -> LeaseMissing:
    return LeaseMissing(f"the {which} is missing: run `watchkeeper init` if that is expected")


def read_fence(connection: sqlite3.Connection) -> tuple[Fence, Stamp] | None:
    """The fence and its stamp, if there is one. Raises `StoreMisconfigured`."""
    row = connection.execute(
        "SELECT epoch, holder, incarnation, address, state, handoff_to, paused, step_down_of,"
        " reason, changed_by, history, settled, stamp FROM fence"
    ).fetchone()
    if row is None:
        return None
    epoch, holder, incarnation, address, state, handoff_to, paused, step_down_of = row[:8]
    reason, changed_by, history, settled, stamp = row[8:]
    try:
        known_state = LeaseState(state)
        lines = msgspec.json.decode(history, type=tuple[FenceChange, ...])
    except ValueError as error:
        raise StoreMisconfigured(f"the fence cannot be read: {error}") from error
    if not 0 <= epoch <= COUNT_MAX:
        raise StoreMisconfigured("the fence cannot be read: its epoch was never counted to")
    fence = Fence(
        epoch,
        holder,
        incarnation,
        address,
        known_state,
        handoff_to,
        bool(paused),
        step_down_of,
        reason,
        changed_by,
        lines,
        bool(settled),
    )
    return fence, Stamp(stamp)


def read_lasting_fence(connection: sqlite3.Connection) -> tuple[Fence, Stamp] | None:
    """What every format says of the fence: enough to forward by. Raises `StoreMisconfigured`."""
    row = connection.execute(
        f"SELECT {', '.join(FENCE_LASTING_FIELDS)}, stamp FROM fence"  # noqa: S608  # our names
    ).fetchone()
    if row is None:
        return None
    epoch, holder, incarnation, address, state, stamp = row
    try:
        return Fence(epoch, holder, incarnation, address, LeaseState(state)), Stamp(stamp)
    except ValueError as error:
        raise StoreMisconfigured(f"the fence cannot be read: {error}") from error


def write(connection: sqlite3.Connection, boot: Boot, write: LeaseWrite) -> LeaseStamps:
    """Write what `write` names, under its preconditions. Raises `LeaseMissing`, `LeaseRefused`."""
    _check(connection, "lease", write.lease is not None, write.lease_stamp)
    _check(connection, "fence", write.fence is not None, write.fence_stamp)
    lease_stamp = fence_stamp = None
    if write.lease is not None:
        lease_stamp = _put_lease(connection, boot, write.lease)
    if write.fence is not None:
        fence_stamp = _put_fence(connection, write.fence)
    return LeaseStamps(lease_stamp, fence_stamp)


def is_any_there(connection: sqlite3.Connection) -> bool:
    """Whether there is a lease, or a fence, or both."""
    return any(_counts(connection))


def _counts(connection: sqlite3.Connection) -> tuple[int, int]:
    leases = connection.execute("SELECT count(*) FROM lease").fetchone()[0]
    fences = connection.execute("SELECT count(*) FROM fence").fetchone()[0]
    return leases, fences


def initialise(connection: sqlite3.Connection, boot: Boot, epoch: int) -> bool:
    """Create both, or find both. Raises `LeaseMissing` where there is only one."""
    leases, fences = _counts(connection)
    if leases != fences:
        raise LeaseMissing(
            "one of lease and fence is missing: put back a backup of the shared directory"
        )
    if leases:
        return False
    _put_lease(connection, boot, Lease("", "", epoch, "", 0.0, LeaseState.RELEASED))
    _put_fence(connection, Fence(epoch, "", "", "", LeaseState.RELEASED))
    return True


def _check(
    connection: sqlite3.Connection, table: str, written: bool, expected: Stamp | None
) -> None:
    if not written and expected is None:
        return
    row = connection.execute(f"SELECT stamp FROM {table}").fetchone()  # noqa: S608  # our names
    if row is None:
        raise LeaseMissing(f"the {table} is missing")
    if expected is not None and row[0] != expected:
        raise LeaseRefused(f"the {table} has changed since it was read")


def _put_lease(connection: sqlite3.Connection, boot: Boot, lease: Lease) -> Stamp:
    stamp = new_stamp()
    connection.execute(
        "REPLACE INTO lease VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            stamp,
            lease.holder,
            lease.incarnation,
            lease.epoch,
            lease.nonce,
            lease.ttl_s,
            lease.state,
            boot.boot_id,
            boot.boottime(),
        ),
    )
    return stamp


def _put_fence(connection: sqlite3.Connection, fence: Fence) -> Stamp:
    stamp = new_stamp()
    connection.execute(
        "REPLACE INTO fence VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            stamp,
            fence.epoch,
            fence.holder,
            fence.incarnation,
            fence.address,
            fence.state,
            fence.handoff_to,
            fence.paused,
            fence.step_down_of,
            fence.reason,
            fence.changed_by,
            msgspec.json.encode(fence.history).decode(),
            fence.settled,
        ),
    )
    return stamp
