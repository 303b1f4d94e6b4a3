"""`python -m tests.torture --minutes 10 --seed 1`: real processes, real faults; docs/torture.md."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Mapping

from tests.torture.run import Outcome, run


def report(outcome: Outcome) -> str:
    """What was done, what was seen, and what was violated."""
    counts = outcome.counts
    wardens = f"{counts['warden.killed']} killed, {counts['warden.released']} leases released"
    slowest_s = max(outcome.calms_s, default=0)
    rows = {
        "seed": f"{outcome.seed}, {outcome.took_s / 60:.1f} min",
        "terms": f"{counts['terms']}, seen in {counts['looks']} looks at the lease",
        "messages accepted": str(counts["messages accepted"]),
        "by wardens": wardens,
        "ACTIVE after a storm": f"slowest {slowest_s:.1f} s of {len(outcome.calms_s)}",
        "logins thrown out": f"{counts['evictions of frozen hosts']}, hosts frozen as a whole",
        "complaints of libraries": str(counts["library.logged"]),
        "faults": _listed(outcome.faults),
        "exit codes": _listed(outcome.exits),
        "calls tried again": _listed(outcome.unanswered),
    }
    lines = [f"{name}: {told}" for name, told in rows.items()]
    lines += [f"not done here: {what}" for what in outcome.left_out]
    lines += [f"VIOLATED {claim}" for claim in outcome.violations] or ["violations: none"]
    return "\n".join(lines)


def _listed(counts: Mapping[str, int] | Mapping[int, int]) -> str:
    return ", ".join(f"{name} {times}x" for name, times in sorted(counts.items()))


def main() -> int:
    """Torture one group; 1 when a claim was violated."""
    parser = argparse.ArgumentParser(prog="tests.torture")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, help="of the nemesis' choices; default: another one")
    parser.add_argument("--no-warden", action="store_true", help="see what the wardens are for")
    parser.add_argument("--quiet", action="store_true", help="do not tell what is being done")
    arguments = parser.parse_args()
    seed = random.randrange(10**6) if arguments.seed is None else arguments.seed
    warden, tell = not arguments.no_warden, not arguments.quiet
    outcome = run(seed, arguments.minutes, warden=warden, tell=tell)
    print(report(outcome))
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
