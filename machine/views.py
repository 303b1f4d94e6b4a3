"""What the machine shows of itself to the API, the command line and the dashboard: read only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from machine.records import Account, AccountId


@dataclass(frozen=True, slots=True)
class Holder:
    """Whom the lease names, as last seen."""

    name: str
    incarnation: str
    address: str
    epoch: int


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """The lease, as this instance last saw it.

    `remaining_s`: for the holder, until its own deadline; for others, until the lease could be
    taken at the earliest; `None` when unknown. `last_renewal_at` is wall time, of our own renewals.
    """

    holder: str | None
    epoch: int
    ttl_s: float
    remaining_s: float | None
    renewals: int
    last_renewal_at: float | None
    paused: bool


@dataclass(frozen=True, slots=True)
class AccountView:
    """An account as callers see it. `queued` is the depth of its outbox."""

    account: Account
    in_memory: bool
    queued: int


@dataclass(frozen=True, slots=True)
class QrCode:
    """A QR code to scan now; `expires_at` is wall time."""

    qr: str = field(repr=False)
    expires_at: float


@dataclass(frozen=True, slots=True)
class PairingCode:
    """A code to type on the phone; `expires_at` is wall time."""

    code: str = field(repr=False)
    expires_at: float


@dataclass(frozen=True, slots=True)
class RestoreFailure:
    """One account, or one source (`account_id` None), that could not be restored, and why."""

    account_id: AccountId | None
    cause: str
    advice: str


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """What entering ACTIVE brought back. `finished_at` None: still running.

    `restored` counts the accounts that reached an open connection in the first pass, `listed`
    those that are kept but not opened (logged out, banned, stopped), `pairing` those that wait
    for a phone, `doubted` those whose Signal sessions may be old and are begun anew. `durations`
    has seconds for each phase, by its name: the shared store, this disk, reconcile, seal, open.
    `retries` counts, for each source, the reads that failed before one was answered or it was
    given up; `taken_from`, for each source, the accounts whose copy there was gone on from.
    """

    epoch: int
    started_at: float
    finished_at: float | None = None
    found_shared: int | None = None
    found_disk: int | None = None
    total: int = 0
    restored: int = 0
    listed: int = 0
    pairing: int = 0
    doubted: int = 0
    failures: tuple[RestoreFailure, ...] = ()
    durations: Mapping[str, float] = field(default_factory=dict)
    retries: Mapping[str, int] = field(default_factory=dict)
    taken_from: Mapping[str, int] = field(default_factory=dict)
