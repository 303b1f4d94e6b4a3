"""In how many seeds each mutant is caught, as the table of docs/simulation.md."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tests.simulation.mutants import MUTANTS
from tests.simulation.run import Outcome, simulate

PAGE = Path(__file__).parents[2] / "docs" / "simulation.md"
BEGIN = "<!-- the table of mutants, made by `make mutants` -->"
END = "<!-- end of the table -->"
MOMENT = re.compile(r"\bat [\d.]+ s: ")
NAME = re.compile(r"^\| `([a-z-]+)` \|", re.MULTILINE)


def catch(name: str, minutes: float) -> Outcome | None:
    """The first world in which a mutant shows; `None` when it does not within its seeds."""
    for seed in MUTANTS[name].seeds:
        outcome = simulate(seed, minutes=minutes, mutant=name)
        if outcome.violations:
            return outcome
    return None


def _catch(job: tuple[str, float]) -> Outcome | None:
    return catch(*job)


def catch_all(
    names: Iterable[str], *, minutes: float, processes: int
) -> Iterator[tuple[str, Outcome | None]]:
    """Every mutant with the world that shows it, `processes` at a time."""
    listed = list(names)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        jobs = [(name, minutes) for name in listed]
        yield from zip(listed, pool.imap(_catch, jobs), strict=True)


def write_table(page: Path, caught: Mapping[str, Outcome | None]) -> None:
    """Put the table between its two marks."""
    rows = [
        f"| `{name}` | {MUTANTS[name].what} | {_shown(one)} | {_needed(name, one)} |"
        for name, one in caught.items()
    ]
    table = ["| mutant | bug | how it shows | seeds |", "| --- | --- | --- | --- |", *rows]
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + BEGIN, *table, END]) + after, encoding="utf-8")


def _shown(outcome: Outcome | None) -> str:
    """The claim that was broken, and how, without what differs from run to run."""
    if outcome is None:
        return "**not caught**"
    return MOMENT.sub("", outcome.violations[0].splitlines()[0])[:110].replace("|", "/")


def _needed(name: str, outcome: Outcome | None) -> str:
    """How many worlds it took."""
    return "-" if outcome is None else str(MUTANTS[name].seeds.index(outcome.seed) + 1)


def names_in(page: Path) -> list[str]:
    """The mutants that the page lists."""
    _, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return NAME.findall(rest.partition(END)[0])
