"""An instance that can be wedged: `python -m tests.system.wedged run`, then SIGUSR1 to the daemon.

From then on its event loop does not turn: the handler runs in the loop's own thread and never
returns. Everything else is the real thing, composed as the command composes it.
"""

from __future__ import annotations

import signal
import sys

from daemon.__main__ import release, serve
from daemon.warden import keep


def wedge(number: int, frame: object) -> None:
    while True:
        pass


def serve_until_wedged(told: int) -> int:
    signal.signal(signal.SIGUSR1, wedge)
    return serve(told)


if __name__ == "__main__":
    sys.exit(keep(serve_until_wedged, release))
