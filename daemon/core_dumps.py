"""Keeps this process's memory, which holds every secret, out of core files.

Standard library only: it is the first thing that a process of ours does.
"""

from __future__ import annotations

import ctypes
import resource
import sys

PR_SET_DUMPABLE = 4

RECURSION_BYTES = 1
"""A limit of one byte, not of none: the kernel writes no file that small, and it is the one value
at which it starts no dump program either (`core_pattern` beginning with `|`), which a limit of
zero does not keep from being fed. See `fs/coredump.c`."""


def forbid_core_dumps() -> None:
    """Let no core be written of this process, nor of any that it starts. Never raises.

    For itself by the kernel's "not dumpable", which also keeps other processes of this user from
    reading its memory and its environment; that does not outlive an `exec`. For its children by
    the limit, which does.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 0 if hard == 0 else RECURSION_BYTES
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
    if sys.platform == "linux":
        # No kernel refuses this.
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
