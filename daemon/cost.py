"""What the lease and the accounts cost on Firestore, computed from the settings.

A pure computation: nothing here talks to Firestore. The bench counts the operations really made;
this table says what to expect. Never lives here: prices without their source.
"""

from __future__ import annotations

from dataclasses import dataclass

from daemon.settings import Settings, StoreKind

MONTH_S = 30 * 86_400
DAYS = 30

PRICE_SOURCE = (
    "list prices of the nam5 multi-region in US dollars, cloud.google.com/firestore/pricing, "
    "as last compared in 2026-11; most single regions cost about half"
)
READS_PRICE = 0.06 / 100_000
WRITES_PRICE = 0.18 / 100_000
DELETES_PRICE = 0.02 / 100_000

FREE_READS_PER_DAY = 50_000
FREE_WRITES_PER_DAY = 20_000
FREE_DELETES_PER_DAY = 20_000
"""One database in a project has this quota for nothing (same source)."""

DOCUMENTS_PER_ACQUISITION = 3
"""The heartbeat that is found expired or released, then lease and fence together."""

WRITES_PER_MESSAGE = 9
"""Accepted: message and account. Acknowledged: message, account, one bucket of keys. Delivered
and read: message and account each."""

WRITES_PER_RECEIVED = 3
"""The message, its account, one bucket of keys; those that come together share the latter two."""


@dataclass(frozen=True, slots=True)
class Load:
    """What the settings do not say: how much there is to do."""

    accounts: int = 100
    messages_per_day: int = 1000
    standbys: int = 1
    deploys_per_day: float = 1.0
    received_per_day: int = 1000


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations a month of one kind of work, and how the number came about."""

    what: str
    how: str
    reads: float = 0
    writes: float = 0
    deletes: float = 0

    @property
    def dollars(self) -> float:
        """At list price, as if nothing were free."""
        return self.reads * READS_PRICE + self.writes * WRITES_PRICE + self.deletes * DELETES_PRICE


def costs(settings: Settings, load: Load) -> tuple[Cost, ...]:
    """Every kind of work with its operations a month, of a group with these settings."""
    renewals = MONTH_S / settings.lease_renew_s
    # A look comes when the newest renewal that the last one saw would expire: right after the
    # last of the renewals that fit into a ttl.
    look_every_s = settings.lease_renew_s * (settings.lease_ttl_s // settings.lease_renew_s)
    looks = MONTH_S / look_every_s * load.standbys
    warms = MONTH_S / settings.warm_every_s * load.standbys
    activations = load.deploys_per_day * DAYS
    messages = load.messages_per_day * DAYS
    received = load.received_per_day * DAYS
    return (
        Cost(
            "holder: renewals",
            f"one write every {settings.lease_renew_s:g} s",
            writes=renewals,
        ),
        Cost(
            f"{load.standbys} standby: watching the lease",
            f"one read every {look_every_s:g} s (the whole renewals in a ttl)",
            reads=looks,
        ),
        Cost(
            f"{load.standbys} standby: keeping its copy warm",
            f"{load.accounts} accounts every {settings.warm_every_s:g} s",
            reads=warms * load.accounts,
        ),
        Cost(
            "deploys: restoring",
            f"{load.accounts} accounts read and sealed, {load.deploys_per_day:g} times a day",
            reads=activations * (load.accounts + DOCUMENTS_PER_ACQUISITION),
            writes=activations * (load.accounts + 4),
        ),
        Cost(
            "messages sent",
            f"{load.messages_per_day} a day, {WRITES_PER_MESSAGE} writes each",
            writes=messages * WRITES_PER_MESSAGE,
            deletes=messages,
        ),
        Cost(
            "messages received",
            f"{load.received_per_day} a day, {WRITES_PER_RECEIVED} writes each, read once",
            reads=received,
            writes=received * WRITES_PER_RECEIVED,
            deletes=received,
        ),
    )


def inside_free_quota(rows: tuple[Cost, ...]) -> bool:
    """Whether an average day stays within what one database has for nothing."""
    return (
        sum(row.reads for row in rows) / DAYS <= FREE_READS_PER_DAY
        and sum(row.writes for row in rows) / DAYS <= FREE_WRITES_PER_DAY
        and sum(row.deletes for row in rows) / DAYS <= FREE_DELETES_PER_DAY
    )


def report(settings: Settings, load: Load) -> dict[str, object]:
    """Give the same as plain data, for `--json` and for the table."""
    rows = costs(settings, load)
    note = (
        "an average day stays inside the free quota of one database per project"
        if inside_free_quota(rows)
        else "an average day is over the free quota"
    )
    if settings.store is StoreKind.SQLITE:
        note += "; the present store is sqlite, which costs nothing: this is what Firestore would"
    return {
        "rows": [
            {
                "what": row.what,
                "how": row.how,
                "reads": round(row.reads),
                "writes": round(row.writes),
                "deletes": round(row.deletes),
                "dollars": round(row.dollars, 4),
            }
            for row in rows
        ],
        "dollarsPerMonth": round(sum(row.dollars for row in rows), 2),
        "insideFreeQuota": inside_free_quota(rows),
        "note": note,
        "prices": PRICE_SOURCE,
    }
