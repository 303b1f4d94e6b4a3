"""Run every figure in this directory, one after the other, each in a process of its own.

`python -m bench [--quick] [NAME…]`. A figure is a module with a `main` behind
`if __name__ == "__main__"` that prints its table, then its result as one line of JSON, and that
takes `--quick` for fewer rounds. Two at a time would measure each other.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

MARK = 'if __name__ == "__main__":'


def figures() -> list[str]:
    """The modules that can be run, by name."""
    here = Path(__file__).parent
    return sorted(
        path.stem
        for path in here.glob("*.py")
        if path != Path(__file__) and MARK in path.read_text(encoding="utf-8")
    )


def main() -> int:
    """Run them; 1 when one of them failed."""
    parser = argparse.ArgumentParser(prog="make bench", description="Measure, and print figures.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for CI")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(figures())}")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(figures()):
        parser.error(f"no such figure: {', '.join(sorted(unknown))}")
    failed = []
    for name in arguments.names or figures():
        print(f"\n=== {name}", flush=True)
        started_at = time.monotonic()
        command = [sys.executable, "-m", f"bench.{name}", *["--quick"] * arguments.quick]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
        print(f"=== {name}: {time.monotonic() - started_at:.1f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
