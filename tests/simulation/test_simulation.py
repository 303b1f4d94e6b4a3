"""A hundred worlds without a violation, and four mistakes that do not get through them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from tests.simulation.mutants import MUTANTS
from tests.simulation.run import simulate, simulate_all

SEEDS = range(1, 101)
MINUTES = 10.0
PROCESSES = min(4, os.cpu_count() or 1)


def test_a_hundred_worlds_keep_every_promise() -> None:
    counts: Counter[str] = Counter()
    violations: dict[int, tuple[str, ...]] = {}
    for outcome in simulate_all(SEEDS, minutes=MINUTES, processes=PROCESSES):
        counts.update(outcome.counts)
        if outcome.violations:
            violations[outcome.seed] = outcome.violations[:3]
    assert violations == {}, "replay one: python -m tests.simulation --seed N --minutes 10"
    # Checks that have nothing to check pass too: this much has to have happened.
    assert counts["epochs"] > 10 * len(SEEDS)
    assert counts["faults"] > 30 * len(SEEDS)
    assert counts["accepted"] > 200 * len(SEEDS)


@pytest.mark.parametrize("mutant", sorted(MUTANTS))
def test_a_deliberate_mistake_is_noticed(mutant: str) -> None:
    for outcome in simulate_all(SEEDS, minutes=MINUTES, mutant=mutant, processes=PROCESSES):
        if outcome.violations:
            print(f"{mutant}: caught with seed {outcome.seed}: {outcome.violations[0]}")
            return
    pytest.fail(f"{MUTANTS[mutant].what}, and nothing noticed")


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
