"""The bridge's own npm packages, installed from its lock file once for all tests that need them."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

NODE_SIDE = Path(__file__).resolve().parents[3] / "daemon" / "bridge" / "node"
INSTALL_TIMEOUT_S = 300


def skip_or_fail(reason: str) -> None:
    """A missing tool is a skip at a desk and a failure in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def install_node_side() -> Path:
    """Install what package-lock.json says, once; its directory. Skips where it cannot be done."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            skip_or_fail("needs Node >= 20 and npm")
    lock_file = NODE_SIDE / "package-lock.json"
    wanted = hashlib.sha256(lock_file.read_bytes()).hexdigest()
    installed = NODE_SIDE / "node_modules" / ".installed"
    with lock_file.open("rb") as opened:
        # Two test runs may begin at once; the lock file itself is never written.
        fcntl.flock(opened, fcntl.LOCK_EX)
        if installed.exists() and installed.read_text() == wanted:
            return NODE_SIDE
        command = "npm ci --ignore-scripts --omit=optional --no-audit --no-fund"
        done = subprocess.run(
            command.split(),
            cwd=NODE_SIDE,
            timeout=INSTALL_TIMEOUT_S,
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            skip_or_fail("needs Baileys, and `npm ci` in daemon/bridge/node failed")
        installed.write_text(wanted)
    return NODE_SIDE
