"""Runs `units.test.mjs`: the parts of the Node side that need no socket."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.bridge.node.install import install_node_side

pytestmark = pytest.mark.node


def test_the_units_of_the_node_side_hold() -> None:
    install_node_side()
    done = subprocess.run(
        ["node", "--test", str(Path(__file__).with_name("units.test.mjs"))],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^# pass [1-9]", done.stdout, re.MULTILINE), done.stdout
