"""Start-up: from exec of a standby to the first 200 of /readyz, beside a holder.

Compared to the interpreter alone, and to importing the same modules without running anything.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from bench.places import Group, open_group, start_holder, time_command, wait_ready
from bench.rows import Figure, Row, main, median, progress, seconds

START_S_MAX = 60.0
IMPORTS = {
    "sqlite": "import daemon.main, daemon.cli, daemon.sqlite.shared",
    "firestore": "import daemon.main, daemon.cli, daemon.firestore.lease, daemon.firestore.outbox",
}


@dataclass(frozen=True, slots=True)
class Size:
    """How many accounts the group has, and how often it is measured."""

    accounts: int
    rounds: int


async def measure(size: Size, stores: Sequence[str], rows: list[Row]) -> None:
    """Measure on each store."""
    for store in stores:
        async with open_group(store, size.accounts) as group:
            rows.append(await _measure_one(size, store, group))


async def _measure_one(size: Size, store: str, group: Group) -> Row:
    await start_holder(group.cluster, "a", size.accounts)
    standby = group.cluster.make("b")
    ready: list[float] = []
    passive: list[float] = []
    imports: list[float] = []
    bare: list[float] = []
    for _ in range(size.rounds):
        bare.append(await time_command("-c", "pass"))
        imports.append(await time_command("-c", IMPORTS[store]))
        began = time.perf_counter()
        standby.spawn()
        with trio.fail_after(START_S_MAX):
            await wait_ready(standby.port)
            ready.append(time.perf_counter() - began)
            await wait_ready(standby.port, "/passive")
            passive.append(time.perf_counter() - began)
        await standby.stop()
    progress(f"{store}: {seconds(median(ready))}")
    return Row(
        "startup",
        f"exec to /readyz, {store}",
        f"p50 {seconds(median(ready))}, max {seconds(max(ready))} of {size.rounds}; "
        f"PASSIVE after {seconds(median(passive))}",
        f"importing alone {seconds(median(imports))}, bare Python {seconds(median(bare))}",
        values={"ready_s": ready, "passive_s": passive, "imports_s": imports, "python_s": bare},
    )


FIGURE = Figure(
    "startup", {"full": Size(1000, 5), "quick": Size(50, 2), "tiny": Size(2, 1)}, measure
)

if __name__ == "__main__":
    main(FIGURE)
