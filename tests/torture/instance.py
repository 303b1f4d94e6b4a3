"""An instance whose wall clock can be stepped: `python -m tests.torture.instance run`.

It is off by the seconds in the file that TORTURE_CLOCK names, for all Python code but gRPC's: that
adds its timeouts to it, and its C core, which goes by the kernel's clock, would wait for as much
longer or not at all. (A process whose whole libc is shifted, by libfaketime, hangs there as well.)
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

CLOCK = Path(os.environ["TORTURE_CLOCK"])
true_time = time.time


def shifted_time() -> float:
    caller = str(sys._getframe(1).f_globals.get("__name__"))
    return true_time() + (0.0 if caller.startswith("grpc.") else float(CLOCK.read_text()))


if __name__ == "__main__":
    # Before anything of the daemon is imported and can have taken the true one.
    time.time = shifted_time
    from daemon.__main__ import release, serve
    from daemon.warden import keep

    sys.exit(keep(serve, release))
