from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bridge.node.install import install_node_side

ROOT = Path(__file__).resolve().parents[2]
DEMO_S_MAX = 300

pytestmark = [pytest.mark.node, pytest.mark.system, pytest.mark.long]


def test_demo_loses_nothing_and_says_so() -> None:
    install_node_side()
    told = subprocess.run(
        [sys.executable, "-m", "tests.whatsapp.demo"],
        cwd=ROOT,
        timeout=DEMO_S_MAX,
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.endswith("Nothing was lost.\n")
    assert "PASSIVE: account restore skipped" in told.stdout
