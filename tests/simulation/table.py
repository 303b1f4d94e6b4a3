"""In how many seeds each mutant is caught, as the table of docs/simulation.md."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from tests.simulation.mutants import MUTANTS
from tests.simulation.run import Outcome, simulate_all

BEGIN = "<!-- the table of mutants, made by `make mutants` -->"
END = "<!-- end of the table -->"
MOMENT = re.compile(r"\bat [\d.]+ s: ")
NAME = re.compile(r"^\| `([a-z-]+)` \|", re.MULTILINE)


def catch(name: str, *, minutes: float, processes: int) -> Outcome | None:
    """The first world in which a mutant shows; `None` when it does not within its seeds."""
    seeds = range(1, MUTANTS[name].seeds_max + 1)
    for outcome in simulate_all(seeds, minutes=minutes, mutant=name, processes=processes):
        if outcome.violations:
            print(f"{name}: seed {outcome.seed}: {outcome.violations[0][:150]}", flush=True)
            return outcome
    return None


def write_table(page: Path, caught: Mapping[str, Outcome | None]) -> None:
    """Put the table between its two marks."""
    rows = [
        f"| `{name}` | {MUTANTS[name].what} | {_shown(one)} | {one.seed if one else '-'} |"
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


def names_in(page: Path) -> list[str]:
    """The mutants that the page lists."""
    _, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    return NAME.findall(rest.partition(END)[0])
