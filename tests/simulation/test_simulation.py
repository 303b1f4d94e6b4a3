"""Worlds without a violation, mistakes that do not get through them, and replays that are exact."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import pytest

from tests.simulation.__main__ import chosen
from tests.simulation.mutants import MUTANTS
from tests.simulation.pinned import PINNED
from tests.simulation.run import simulate, simulate_all
from tests.simulation.table import PAGE, catch, names_in

SEEDS = range(101, 105)
"""`make test` runs a hundred beside these tests; CI's own step 1 to 300."""
MINUTES = 10.0
PROCESSES = min(4, os.cpu_count() or 1)
QUICK = ("ambiguous-success", "impatient", "late-precondition", "release-first", "new-id-each-try")
"""Caught within seconds; the others are CI's."""


def check_worlds(seeds: Iterable[int]) -> Counter[str]:
    counts: Counter[str] = Counter()
    violations: dict[int, tuple[str, ...]] = {}
    for outcome in simulate_all(seeds, minutes=MINUTES, processes=PROCESSES):
        counts.update(outcome.counts)
        if outcome.violations:
            violations[outcome.seed] = outcome.violations[:3]
    assert violations == {}, "replay one: python -m tests.simulation --seed N --minutes 10"
    return counts


def test_worlds_keep_every_promise() -> None:
    counts = check_worlds(SEEDS)
    # Checks that have nothing to check pass too: this much has to have happened.
    assert counts["epochs"] > 8 * len(SEEDS)
    assert counts["faults"] > 30 * len(SEEDS)
    assert counts["accepted"] > 200 * len(SEEDS)
    assert counts["received"] > 100 * len(SEEDS)


def test_seeds_that_once_found_something_are_run_before_any_others() -> None:
    given = argparse.Namespace(first=2, seeds=2, mutant=None)
    assert chosen(given) == [*sorted(PINNED), 2]


@pytest.mark.parametrize("mutant", QUICK)
def test_a_deliberate_mistake_is_noticed(mutant: str) -> None:
    assert catch(mutant, MINUTES) is not None, MUTANTS[mutant].what


@pytest.mark.long
@pytest.mark.parametrize("mutant", sorted(set(MUTANTS) - set(QUICK)))
def test_any_deliberate_mistake_is_noticed_within_its_seeds(mutant: str) -> None:
    assert catch(mutant, MINUTES) is not None, MUTANTS[mutant].what


def test_the_page_lists_every_mutant() -> None:
    assert names_in(PAGE) == list(MUTANTS)


def test_the_same_seed_is_the_same_world() -> None:
    first, second = simulate(17, minutes=3.0), simulate(17, minutes=3.0)
    assert first.trace_hash == second.trace_hash
    assert simulate(18, minutes=3.0).trace_hash != first.trace_hash


def test_a_seed_is_the_same_world_in_another_process() -> None:
    script = (
        "from tests.simulation.run import simulate; print(simulate(17, minutes=3.0).trace_hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert hashes == {simulate(17, minutes=3.0).trace_hash + "\n"}
