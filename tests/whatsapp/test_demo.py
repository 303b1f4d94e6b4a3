from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bridge.node.install import install_node_side

ROOT = Path(__file__).resolve().parents[2]
DEMO_S_MAX = 300


def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **env},
        timeout=DEMO_S_MAX,
        capture_output=True,
        text=True,
        check=False,
    )


def test_demo_needs_nothing_that_only_testing_needs() -> None:
    hidden = "import sys; sys.modules |= {'pytest': None, 'hypothesis': None}"
    told = run("-c", f"{hidden}; import tests.whatsapp.demo")
    assert told.returncode == 0, told.stderr


def test_demo_without_node_says_what_to_install(tmp_path: Path) -> None:
    told = run("-m", "tests.whatsapp.demo", PATH=str(tmp_path))
    assert (told.returncode, told.stderr) == (2, "")
    assert "install it" in told.stdout


@pytest.mark.node
@pytest.mark.system
@pytest.mark.long
def test_demo_loses_nothing_and_says_so() -> None:
    install_node_side()
    told = run("-m", "tests.whatsapp.demo")
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.endswith("Nothing was lost.\n")
    assert "PASSIVE: account restore skipped" in told.stdout
