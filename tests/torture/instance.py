"""An instance whose wall clock can be stepped: `python -m tests.torture.instance run`.

It is off by the seconds in the file that TORTURE_CLOCK names. Only what Python code reads is
shifted: in a process whose libc is shifted (libfaketime), gRPC's own waits, which the kernel times,
last for as long as the shift.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

CLOCK = Path(os.environ["TORTURE_CLOCK"])
true_time = time.time


def shifted_time() -> float:
    return true_time() + float(CLOCK.read_text())


if __name__ == "__main__":
    # Before anything of the daemon is imported and can have taken the true one.
    time.time = shifted_time
    from daemon.__main__ import release, serve
    from daemon.warden import keep

    sys.exit(keep(serve, release))
