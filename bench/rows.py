"""What a figure hands back, and how figures are shown: one table for people, JSON for programs.

Never lives here: any measuring.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import trio
from rich import box
from rich.console import Console
from rich.table import Table

from tests.emulator import MISSING, emulator_command

S = TypeVar("S")

STORES = ("sqlite", "firestore")

FIGURE_S_MAX = 1800.0
"""A figure that hangs ends then, and the others are measured all the same."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measured value. `met` is `None` where nobody has set an aim."""

    figure: str
    name: str
    measured: str
    """For people: the value with its unit, and its spread."""
    against: str
    """What it is compared to, with what that took in the same run."""
    aim: str = ""
    met: bool | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    """For programs: the numbers behind the words, seconds and bytes, each run on its own."""


@dataclass(frozen=True, slots=True)
class Figure(Generic[S]):
    """A figure: how big it can be asked for, and what measures it."""

    name: str
    sizes: Mapping[str, S]
    """`full`, `quick` (CI) and `tiny` (the test that it still runs)."""
    measure: Callable[[S, Sequence[str], list[Row]], Awaitable[None]]
    """Given a size, the stores to measure it on, and where to put each row as soon as it is known:
    what was measured before a failure is kept."""


def median(values: Sequence[float]) -> float:
    """The median; not a number for nothing at all."""
    return statistics.median(values) if values else math.nan


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of all values do not exceed (nearest rank)."""
    if not values:
        return math.nan
    ranked = sorted(values)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


def seconds(value: float) -> str:
    """A length of time in the unit that reads best."""
    if math.isnan(value):
        return "-"
    if value < 0.0995:
        return f"{value * 1e3:.1f} ms"
    return f"{value * 1e3:.0f} ms" if value < 0.9995 else f"{value:.2f} s"


def stores_here() -> tuple[str, ...]:
    """The stores that can be measured here. Ends the program in CI when one is missing."""
    if os.environ.get("WATCHKEEPER_TEST_EMULATOR") or emulator_command(0) is not None:
        return STORES
    if os.environ.get("CI"):
        raise SystemExit(MISSING)
    progress(f"Firestore is left out: {MISSING}")
    return STORES[:1]


def progress(text: str) -> None:
    """Tell whoever waits how far it is; results go elsewhere."""
    print(f"  {text}", file=sys.stderr, flush=True)


def show(rows: Sequence[Row]) -> None:
    """Print the table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("figure", "measured", "compared to, in the same run", "aim", "met"):
        table.add_column(title, overflow="fold")
    for row in rows:
        met = {True: "yes", False: "[bold red]NO[/]", None: ""}[row.met]
        table.add_row(f"{row.figure}: {row.name}", row.measured, row.against, row.aim, met)
    # Not narrower than its words, also where the output goes to a file.
    console = Console()
    Console(width=max(console.width, 150) if not console.is_terminal else None).print(table)


def host_facts() -> dict[str, object]:
    """What the figures depend on besides the code."""
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "machine": platform.machine(),
        "kernel": platform.release(),
    }


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that `main` has written."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def write_rows(path: Path, rows: Sequence[Row], facts: Mapping[str, object]) -> None:
    """Write everything as JSON."""
    content = {"host": facts, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(figure: Figure[S]) -> None:
    """Run one figure by itself: `python -m bench.<name> [--size SIZE] [--json FILE]`."""
    parser = argparse.ArgumentParser(prog=f"bench.{figure.name}")
    parser.add_argument("--size", choices=sorted(figure.sizes), default="full")
    parser.add_argument("--store", choices=STORES, help="on this store only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here")
    parser.add_argument("--quiet", action="store_true", help="print no table")
    arguments = parser.parse_args()
    stores = [each for each in stores_here() if arguments.store in (None, each)]
    before = host_facts()
    rows: list[Row] = []

    async def measure() -> bool:
        with trio.move_on_after(FIGURE_S_MAX):
            await figure.measure(figure.sizes[arguments.size], stores, rows)
            return True
        return False

    try:
        complete = trio.run(measure)
    finally:
        if arguments.json is not None:
            write_rows(arguments.json, rows, before)
        if not arguments.quiet:
            show(rows)
    if not complete:
        sys.exit(f"{figure.name}: not all of it was measured within {FIGURE_S_MAX:g} s")
