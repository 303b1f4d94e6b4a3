"""Session directories as the real Baileys writes them, made by `generate.mjs`."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from machine.records import KeyName
from tests.bridge.node.install import install_node_side

HERE = Path(__file__).parent
NODE_TIMEOUT_S = 60


SECRET = b"sEcReT-private-half-of-a-pair-32"


def packed(content: bytes) -> dict[str, str]:
    return {"type": "Buffer", "data": base64.b64encode(content).decode()}


def pair() -> dict[str, object]:
    return {"private": packed(SECRET), "public": packed(bytes(32))}


CREDENTIALS: dict[str, object] = {
    "noiseKey": pair(),
    "signedIdentityKey": pair(),
    "signedPreKey": {"keyPair": pair(), "signature": packed(bytes(64)), "keyId": 1},
    "registrationId": 7,
    "advSecretKey": base64.b64encode(SECRET).decode(),
    "me": {"id": "4915112345678:3@s.whatsapp.net", "name": "Anna"},
    "account": {"details": "x"},
}
"""Credentials that pass for those of a paired account, without Node; no server would take them."""


def make_directories(path: Path, count: int) -> Path:
    """Let Baileys write `count` paired accounts into `path`/account-0, account-1, …; `path`."""
    install_node_side()
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
