"""Runs `attempts.test.mjs`, against Baileys' own Signal repository on both sides."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.bridge.node.install import install_node_side

pytestmark = pytest.mark.node


def test_a_message_on_an_old_session_leaves_the_new_one_whole() -> None:
    install_node_side()
    done = subprocess.run(
        ["node", "--test", str(Path(__file__).with_name("attempts.test.mjs"))],
        timeout=60,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# pass 2" in done.stdout, done.stdout
