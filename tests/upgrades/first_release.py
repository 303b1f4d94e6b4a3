"""The first release, taken out of this repository's history; and what its fixtures hold.

It is the last state of the first day: the whole daemon, with documentation and CI, whose shared.db
is of format 1, and whose Firestore documents lack what came later.
"""

from __future__ import annotations

import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

from daemon.key_names import CREDS
from machine.records import AccountId, KeyName
from tests.bridge.node.install import skip_or_fail

COMMIT = "c88c51706f0b99bae289a33413cc1218782c852a"
ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(__file__).parent / "fixtures"
"""See the README.md there."""

GROUP = "default"
PAIRED = ("ann", "ben", "cleo")
IMPORTED = AccountId("dora")
"""An account with keys as Baileys has them, which the loopback WhatsApp could not connect."""
SENT = ("hello", "how are you", "see you")
SENDING, QUEUED = "on the wire at the kill", "behind it"


def extract(directory: Path) -> Path:
    """The first release's code in `directory`; skips where the history does not have it."""
    packed = subprocess.run(
        ["git", "archive", COMMIT, "daemon", "machine"], cwd=ROOT, capture_output=True, check=False
    )
    if packed.returncode != 0:
        skip_or_fail(f"the history of this checkout does not reach back to {COMMIT[:7]}")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(directory, filter="data")
    return directory


def imported_keys() -> dict[KeyName, bytes]:
    """Made-up bytes under names as Baileys gives them, of every type, in many parts."""
    names = [
        CREDS,
        *(f"pre-key-{number}" for number in range(1, 301)),
        *(f"session-49151000{number:04d}.0" for number in range(60)),
        "session-49151000000.7",
        "sender-key-49151-1600000000@g.us--49151000001--0",
        "sender-key-memory-49151-1600000000@g.us",
        "app-state-sync-key-AAAAAPp7",
        "app-state-sync-version-regular_low",
    ]
    return {KeyName(name): f"{{made up: {name}}}".encode() * 3 for name in names}
