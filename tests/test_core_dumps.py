"""No core file of a process that holds secrets, nor of a child of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FORBID = "from daemon.core_dumps import forbid_core_dumps; forbid_core_dumps()"
ABORT = "import os; os.abort()"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ABORT!r}])"


def cores_of(directory: Path, program: str) -> list[Path]:
    """Run a program whose limits allow a core of any size; the cores it left in `directory`."""
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if pattern.startswith(("|", "/", "@")):
        pytest.skip(f"cores of this host go elsewhere: {pattern}")
    subprocess.run(
        ["prlimit", "--core=unlimited:unlimited", sys.executable, "-c", program],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return list(directory.glob("core*"))


@pytest.mark.parametrize("last", [ABORT, CHILD], ids=["itself", "a child"])
def test_no_core_is_written(tmp_path: Path, last: str) -> None:
    assert cores_of(tmp_path, last), "or this test could not fail"
    for core in tmp_path.iterdir():
        core.unlink()
    assert cores_of(tmp_path, f"{FORBID}; {last}") == []


def test_a_program_that_is_fed_cores_gets_none() -> None:
    """A limit of zero would not keep it from being started, one byte does."""
    read = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE))"
    for hard, expected in (("unlimited", "(1, 1)"), ("0", "(0, 0)")):
        done = subprocess.run(
            ["prlimit", f"--core=0:{hard}", sys.executable, "-c", f"{FORBID}; {read}"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == expected


def test_other_processes_of_the_user_may_not_read_its_memory() -> None:
    get_dumpable = "import ctypes; print(ctypes.CDLL(None).prctl(3))"
    for before, expected in ((get_dumpable, "1"), (f"{FORBID}; {get_dumpable}", "0")):
        done = subprocess.run(
            [sys.executable, "-c", before], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
