"""Become the bridge's program: a few lines between the daemon's fork and Node's start.

Run as `python -I -S launch.py FD PARENT PROGRAM ARGUMENT…` with FD, one end of the line, inherited.
It moves the line to descriptor 3, asks to be killed when PARENT's main thread ends, and becomes
PROGRAM. Standard library only, and little of that: it stands in the way of every start.

Never lives here: anything that needs the package. Not in `preexec_fn`, which would run it in a
copy of a process with threads.
"""

import ctypes
import os
import signal
import sys

LINE = 3
PR_SET_PDEATHSIG = 1


def main() -> None:
    """Prepare this process and replace it; returns only if that fails."""
    line, parent, program = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    os.dup2(line, LINE, inheritable=True)
    if line != LINE:
        os.close(line)
    if sys.platform == "linux":
        # Kept over execve. The second net: the first is the end of the line.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # It died before we asked.
    os.execv(program, sys.argv[3:])  # noqa: S606  # no shell is what is wanted


if __name__ == "__main__":
    main()
