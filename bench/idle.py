"""What an idle PASSIVE and an idle ACTIVE use: memory, CPU, and Firestore operations.

Two groups run side by side, one with accounts and one without: the difference is what the accounts
cost. Operations are counted by the instances themselves, and held against the budget of the lease:
one renewal every `renew_s`, and a standby that reads one document at each expected expiry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import trio

from bench.places import (
    Usage,
    open_group,
    start_holder,
    start_standby,
    store_operations,
    usage_of,
)
from bench.rows import Figure, Row, main, progress
from machine.lease import LeaseTiming
from tests.system.cluster import Cluster, Node

HOUR_S = 3600.0
MIB = 2.0**20
RENEWALS_AN_HOUR = HOUR_S / LeaseTiming().renew_s
JUDGED_FROM_S = 60.0
READS_AN_HOUR = HOUR_S / LeaseTiming().ttl_s
"""A standby's budget: one document in each ttl (172,800 a month at ttl 15)."""


@dataclass(frozen=True, slots=True)
class Size:
    """How many accounts; seconds before the window, so that nothing of the start is in it; and
    seconds of the window."""

    accounts: int
    settle_s: float
    window_s: float


@dataclass(frozen=True, slots=True)
class Seen:
    """One node at one moment."""

    usage: Usage
    operations: dict[str, float]


async def measure(size: Size, stores: Sequence[str], rows: list[Row]) -> None:
    """Measure on each store."""
    for store in stores:
        async with (
            open_group(store, size.accounts) as full,
            open_group(store, 0) as empty,
        ):
            nodes = [
                await start_holder(full.cluster, "a", size.accounts),
                await start_standby(full.cluster, "b"),
                await start_holder(empty.cluster, "c", 0),
                await start_standby(empty.cluster, "d"),
            ]
            clusters = [full.cluster, full.cluster, empty.cluster, empty.cluster]
            await trio.sleep(size.settle_s)
            before = [await _look(*each) for each in zip(clusters, nodes, strict=True)]
            progress(f"{store}: idle for {size.window_s:g} s")
            await trio.sleep(size.window_s)
            after = [await _look(*each) for each in zip(clusters, nodes, strict=True)]
        for index, state in enumerate(("ACTIVE", "PASSIVE")):
            spans = [(before[i], after[i]) for i in (index, index + 2)]
            rows += _rows(size, store, state, spans)


async def _look(cluster: Cluster, node: Node) -> Seen:
    operations = await store_operations(cluster, node)
    return Seen(usage_of(node.daemon_pid), operations)


def _rows(size: Size, store: str, state: str, spans: list[tuple[Seen, Seen]]) -> list[Row]:
    """The rows of one state: with accounts first, without them second."""
    (cpu, rss), (cpu_empty, rss_empty) = (
        (_cpu_percent(before, after), after.usage.rss_bytes) for before, after in spans
    )
    rows = [
        Row(
            "idle",
            f"{state}, {size.accounts:,} accounts, {store}",
            f"{rss / MIB:.0f} MiB, {cpu:.2f} % of a core",
            f"without accounts: {rss_empty / MIB:.0f} MiB, {cpu_empty:.2f} %",
            values={
                "rss_bytes": rss,
                "cpu_percent": cpu,
                "rss_bytes_without_accounts": rss_empty,
                "cpu_percent_without_accounts": cpu_empty,
                "window_s": size.window_s,
            },
        )
    ]
    if store == "firestore":
        rows.append(_operations_row(size, state, *spans[0]))
    return rows


def _cpu_percent(before: Seen, after: Seen) -> float:
    span_s = after.usage.at - before.usage.at
    return 100 * (after.usage.cpu_s - before.usage.cpu_s) / span_s


def _operations_row(size: Size, state: str, before: Seen, after: Seen) -> Row:
    span_s = after.usage.at - before.usage.at
    counted = {kind: after.operations[kind] - before.operations[kind] for kind in after.operations}
    hourly = {kind: count * HOUR_S / span_s for kind, count in counted.items()}
    if state == "ACTIVE":
        budget = {"writes": RENEWALS_AN_HOUR, "reads": 0.0}
    else:
        budget = {"writes": 0.0, "reads": READS_AN_HOUR}
    # A window holds a whole number of renewals and looks: one of each may fall in or out of it.
    room = HOUR_S / span_s
    within = all(hourly[kind] <= most + (room if most else 0.0) for kind, most in budget.items())
    # In a short window that room is larger than the budget, and nothing would be shown.
    met = within if span_s >= JUDGED_FROM_S else None
    told = ", ".join(f"{hourly[kind]:.0f} {kind}" for kind in ("writes", "reads", "deletes"))
    return Row(
        "idle",
        f"Firestore operations an hour, {state}",
        f"{told} (counted in {span_s:.0f} s)",
        ", ".join(f"budget {most:.0f} {kind}" for kind, most in budget.items()),
        "within the budget, to one look or renewal",
        met,
        {"counted": counted, "an_hour": hourly, "budget_an_hour": budget, "window_s": span_s},
    )


FIGURE = Figure(
    "idle",
    {"full": Size(1000, 8, 60), "quick": Size(200, 1, 6), "tiny": Size(2, 0.1, 0.5)},
    measure,
)

if __name__ == "__main__":
    main(FIGURE)
