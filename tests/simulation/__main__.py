"""Run simulated worlds: one seed with its whole trace, many of them, or every mutant."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter

from tests.simulation.mutants import MUTANTS
from tests.simulation.pinned import PINNED
from tests.simulation.run import Outcome, simulate, simulate_all
from tests.simulation.table import PAGE, catch_all, write_table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="this one only, with its trace")
    parser.add_argument(
        "--seeds", type=int, default=100, help="how many, from --first on, after the pinned ones"
    )
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0, help="of simulated time, each")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="with a deliberate mistake")
    parser.add_argument("--mutants", action="store_true", help="every mistake; writes their table")
    parser.add_argument("--quiet", action="store_true", help="no trace")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    if given.mutants:
        return run_mutants(given)
    if given.seed is not None:
        outcome = simulate(
            given.seed, minutes=given.minutes, mutant=given.mutant, keep_trace=not given.quiet
        )
        if not given.quiet:
            print("\n".join(outcome.trace))
        print(line(outcome))
        return bool(outcome.violations)
    return run_many(given)


def run_many(given: argparse.Namespace) -> int:
    total: Counter[str] = Counter()
    failed: list[int] = []
    simulated_s = took_s = healed_s = 0.0
    began = time.monotonic()
    seeds = chosen(given)
    for outcome in simulate_all(
        seeds, minutes=given.minutes, mutant=given.mutant, processes=given.processes
    ):
        total.update(outcome.counts)
        simulated_s += outcome.simulated_s
        took_s += outcome.took_s
        healed_s = max(healed_s, *outcome.healed_in_s, 0.0)
        if outcome.violations:
            failed.append(outcome.seed)
            print(line(outcome))
            print(f"  replay: {replay(outcome.seed, given)}", flush=True)
    took = time.monotonic() - began
    print(
        f"{len(seeds)} seeds, {len(failed)} with violations {failed or ''}; "
        f"{simulated_s / 3600:.1f} h simulated in {took:.0f} s, "
        f"{simulated_s / took_s:.0f} x real time a core; ACTIVE {healed_s:.1f} s after healing"
    )
    print(", ".join(f"{name}: {count}" for name, count in sorted(total.items())))
    return bool(failed)


def chosen(given: argparse.Namespace) -> list[int]:
    """The seeds to run: what was asked for, and before it every one that once found something."""
    asked = range(given.first, given.first + given.seeds)
    # A mistake made on purpose is looked for in its own seeds.
    pinned = [] if given.mutant else sorted(PINNED)
    return [*pinned, *(seed for seed in asked if seed not in pinned)]


def replay(seed: int, given: argparse.Namespace) -> str:
    """The command that shows this world again, with its trace."""
    mutant = f" --mutant {given.mutant}" if given.mutant else ""
    return f"python -m tests.simulation --seed {seed} --minutes {given.minutes:g}{mutant}"


def run_mutants(given: argparse.Namespace) -> int:
    caught: dict[str, Outcome | None] = {}
    names = MUTANTS if given.mutant is None else [given.mutant]
    for name, outcome in catch_all(names, minutes=given.minutes, processes=given.processes):
        caught[name] = outcome
        if outcome is None:
            tried = len(MUTANTS[name].seeds)
            print(f"{name}: {MUTANTS[name].what}, and {tried} seeds noticed nothing", flush=True)
        else:
            print(f"{name}: seed {outcome.seed}: {outcome.violations[0][:150]}", flush=True)
    if given.mutant is None:
        write_table(PAGE, caught)
    survived = sum(outcome is None for outcome in caught.values())
    print(f"{len(caught)} mutants, {len(caught) - survived} caught")
    return bool(survived)


def line(outcome: Outcome) -> str:
    """One seed's result."""
    said = "\n  ".join(outcome.violations[:3]) or "no violation"
    if len(outcome.violations) > 3:
        said += f"\n  and {len(outcome.violations) - 3} more"
    counts = ", ".join(f"{name} {count}" for name, count in sorted(outcome.counts.items()))
    return (
        f"seed {outcome.seed}: {said}\n  {outcome.simulated_s:.0f} s simulated in "
        f"{outcome.took_s:.2f} s, trace {outcome.trace_hash[:16]}; {counts}"
    )


if __name__ == "__main__":
    sys.exit(main())
