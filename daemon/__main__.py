"""`python -m daemon`, and the `watchkeeper` command.

Light on purpose: what runs before anything else must not wait for imports.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping


def main() -> None:
    """Run the command line; exits the process. `run` is the warden's, and the daemon its child."""
    from daemon.core_dumps import forbid_core_dumps

    # Before a secret is in this process's memory, or in a child's.
    forbid_core_dumps()
    if sys.argv[1:] == ["run"] and sys.platform == "linux":
        from daemon.warden import keep

        sys.exit(keep(serve, release))
    from daemon.cli import app

    app()


def serve(told: int) -> int:
    """Run an instance that tells its warden on the file descriptor `told`."""
    from daemon.cli import app

    return int(app(["run", "--told", str(told)]) or 0)


def release(lease: Mapping[str, object]) -> int:
    """Release a dead instance's lease."""
    from daemon.crash_release import main

    return main(lease)


if __name__ == "__main__":
    main()
