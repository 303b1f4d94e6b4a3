"""Run the figures, one after the other, each in a process of its own; one table at the end.

`python -m bench [--quick] [--only NAME…] [--json FILE]`. Two figures at a time would measure each
other. Ends with 1 when one could not be measured; an aim that is missed is a figure, not a failure.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from bench.rows import Row, host_facts, progress, read_rows, show

FIGURES = ("startup", "sends", "restore", "handoff", "crash", "idle")


def run_figure(name: str, size: str, path: Path) -> tuple[list[Row], bool]:
    """One figure's rows, and whether they are all that it has."""
    progress(f"--- {name}")
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        f"bench.{name}",
        "--quiet",
        "--size",
        size,
        "--json",
        str(path),
    ]
    code = subprocess.run(command, check=False).returncode
    progress(f"--- {name}: {time.monotonic() - began:.0f} s")
    return (read_rows(path) if path.exists() else []), code == 0


def main() -> int:
    """Run what is asked for, and print it."""
    parser = argparse.ArgumentParser(prog="make bench", description="Measure, and print figures.")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, for CI (< 3 minutes)")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, metavar="NAME")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON here too")
    arguments = parser.parse_args()
    before = host_facts()
    rows: list[Row] = []
    failed = []
    took_s: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.only:
            began = time.monotonic()
            found, complete = run_figure(
                name, "quick" if arguments.quick else "full", Path(directory) / f"{name}.json"
            )
            took_s[name] = round(time.monotonic() - began, 1)
            rows += found
            if not complete:
                failed.append(name)
    content = {
        "host": before,
        "load_average_after": host_facts()["load_average"],
        "size": "quick" if arguments.quick else "full",
        "rows": [asdict(row) for row in rows],
        "failed": failed,
        "took_s": took_s,
    }
    show(rows)
    print(f"{sum(took_s.values()) / 60:.1f} minutes in all")
    print(f"load average {before['load_average']} before, {content['load_average_after']} after")
    print(json.dumps(content))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if failed:
        print(f"not measured, or not all of it: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
