"""What the daemon tells its warden, over the pipe that it was given. The adapter of `Guard`.

Never lives here: a decision. When a term must be over is `machine.lease`'s, the kill the warden's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress

from daemon.warden import LINE_BYTES_MAX, State
from machine.ports import Guard
from machine.records import Grant, Stamp

BOOTTIME_MAX = 1e12
EPOCH_MAX = 2**63 - 1


class PipeGuard(Guard):
    """Writes the whole state at each change, in one line, so that the last one is always enough.

    `lease` is what `daemon.crash_release` needs besides the grant. A warden that does not read for
    so long that the pipe is full misses the newer ones, and kills at the last deadline it knows.
    Raises `ValueError` when a line would not fit into one write.
    """

    def __init__(
        self, descriptor: int, *, instance: str, json_lines: bool, lease: Mapping[str, object]
    ) -> None:
        self._descriptor = descriptor
        self._lease = lease
        self._state = State(instance=instance, json_lines=json_lines)
        os.set_blocking(descriptor, False)
        longest = self._state._replace(
            kill_at=-BOOTTIME_MAX / 3,
            lease=self._describe(Grant(EPOCH_MAX, "", "x" * 64, Stamp(""))),
        )
        if len(longest.encode()) > LINE_BYTES_MAX:
            raise ValueError(
                f"what the warden has to know of the store takes more than {LINE_BYTES_MAX} bytes: "
                "choose a shorter path for it"
            )
        self._tell()

    def deadline_moved(self, grant: Grant, kill_at: float) -> None:
        self._state = self._state._replace(kill_at=kill_at, lease=self._describe(grant))
        self._tell()

    def term_over(self) -> None:
        self._state = self._state._replace(kill_at=None)
        self._tell()

    def lease_released(self) -> None:
        self._state = self._state._replace(lease=None)
        self._tell()

    def _describe(self, grant: Grant) -> Mapping[str, object]:
        return {**self._lease, "epoch": grant.epoch, "incarnation": grant.incarnation}

    def _tell(self) -> None:
        # A warden that is gone takes us with it; one that does not read kills us: nothing to do.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(self._descriptor, self._state.encode())
