"""Session directories as the real Baileys writes them, made by `generate.mjs`.

The first use installs Baileys from the lock file into `node_modules` beside this file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from machine.records import KeyName

HERE = Path(__file__).parent
INSTALL_TIMEOUT_S = 300
NODE_TIMEOUT_S = 60


def skip_or_fail(reason: str) -> None:
    """A missing tool is a skip at a desk and a failure in CI."""
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def install_baileys() -> None:
    """Install what package-lock.json says, once; skips the test where that is not possible."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            skip_or_fail("needs Node >= 20 and npm")
    lock_file = HERE / "package-lock.json"
    wanted = hashlib.sha256(lock_file.read_bytes()).hexdigest()
    installed = HERE / "node_modules" / ".installed"
    with lock_file.open("rb") as opened:
        # Two test runs may begin at once; the lock file itself is never written.
        fcntl.flock(opened, fcntl.LOCK_EX)
        if installed.exists() and installed.read_text() == wanted:
            return
        command = "npm ci --ignore-scripts --omit=optional --no-audit --no-fund"
        done = subprocess.run(
            command.split(), cwd=HERE, timeout=INSTALL_TIMEOUT_S, capture_output=True, check=False
        )
        if done.returncode != 0:
            skip_or_fail("needs Baileys, and `npm ci` in tests/baileys failed")
        installed.write_text(wanted)


def make_directories(path: Path, count: int) -> Path:
    """Let Baileys write `count` paired accounts into `path`/account-0, account-1, …; `path`."""
    install_baileys()
    _node("make", str(path), str(count))
    return path


def differences(directory: Path, keys: Mapping[KeyName, bytes]) -> tuple[int, list[str]]:
    """How many values Baileys reads from an account's directory, and which of them differ in `keys`
    when looked up as a connector does."""
    keys_file = directory.parent / f"{directory.name}.keys.json"
    keys_file.write_text(json.dumps({name: value.decode() for name, value in keys.items()}))
    ids_file = directory.parent / f"{directory.name}.ids.json"
    ids = json.loads(directory.parent.with_suffix(".ids.json").read_text())[directory.name]
    ids_file.write_text(json.dumps(ids))
    try:
        answer = json.loads(_node("compare", str(directory), str(ids_file), str(keys_file)))
    finally:
        keys_file.unlink()
        ids_file.unlink()
    return answer["compared"], answer["differs"]


def fingerprints(directory: Path) -> dict[str, tuple[str, int, int]]:
    """Contents, mode and time of change of everything below a directory."""
    return {
        str(path): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mode,
            path.stat().st_mtime_ns,
        )
        for path in [directory, *directory.rglob("*")]
    }


def _node(*arguments: str) -> str:
    done = subprocess.run(
        ["node", str(HERE / "generate.mjs"), *arguments],
        timeout=NODE_TIMEOUT_S,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode in (0, 1)
    return done.stdout
