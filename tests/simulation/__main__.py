"""Run simulated worlds: one seed with its whole trace, or many."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter

from tests.simulation.mutants import MUTANTS
from tests.simulation.run import Outcome, simulate, simulate_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, help="this one only, with its trace")
    parser.add_argument("--seeds", type=int, default=100, help="how many, from --first on")
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=10.0, help="of simulated time, each")
    parser.add_argument("--mutant", choices=sorted(MUTANTS), help="with a deliberate mistake")
    parser.add_argument("--quiet", action="store_true", help="no trace")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
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
    failed, simulated_s, took_s, healed_s = 0, 0.0, 0.0, 0.0
    seeds = range(given.first, given.first + given.seeds)
    for outcome in simulate_all(
        seeds, minutes=given.minutes, mutant=given.mutant, processes=given.processes
    ):
        total.update(outcome.counts)
        simulated_s += outcome.simulated_s
        took_s += outcome.took_s
        healed_s = max(healed_s, *outcome.healed_in_s, 0.0)
        if outcome.violations:
            failed += 1
            print(line(outcome), flush=True)
    print(f"{given.seeds} seeds, {failed} with violations; {simulated_s / 3600:.1f} h simulated")
    print(f"{simulated_s / took_s:.0f} x real time a core; ACTIVE {healed_s:.1f} s after healing")
    print(", ".join(f"{name}: {count}" for name, count in sorted(total.items())))
    return bool(failed)


def line(outcome: Outcome) -> str:
    """One seed's result."""
    said = "\n  ".join(outcome.violations[:3]) or "no violation"
    if len(outcome.violations) > 3:
        said += f"\n  and {len(outcome.violations) - 3} more"
    return (
        f"seed {outcome.seed}: {said} ({outcome.simulated_s:.0f} s simulated in "
        f"{outcome.took_s:.2f} s, trace {outcome.trace_hash[:16]}, {outcome.counts})"
    )


if __name__ == "__main__":
    sys.exit(main())
