"""The bridge's own npm packages, installed from its lock file once for all tests that need them."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from daemon.bridge.install import SOURCES as NODE_SIDE
from daemon.bridge.install import BridgeUnusable, check_install, set_up

__all__ = ["NODE_SIDE", "install_node_side", "skip_or_fail"]


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
    with (NODE_SIDE / "package-lock.json").open("rb") as opened:
        # Two test runs may begin at once; the lock file itself is never written.
        fcntl.flock(opened, fcntl.LOCK_EX)
        try:
            check_install(NODE_SIDE)
        except BridgeUnusable:
            try:
                set_up(NODE_SIDE)
            except BridgeUnusable as error:
                skip_or_fail(f"needs Baileys: {error}")
    return NODE_SIDE
