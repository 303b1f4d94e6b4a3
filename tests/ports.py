"""Ports for what listens, ends, and listens again at the same one."""

from __future__ import annotations

import random
import socket

FIRST, END = 20_000, 32_000
"""Below those that Linux gives to outgoing connections (ip(7), `ip_local_port_range`): one of these
may have taken such a port in the meantime."""
TRIES_MAX = 100

_rng = random.SystemRandom()


def free_port() -> int:
    """A port that is free now. Raises `OSError` when none is found."""
    for _ in range(TRIES_MAX):
        port = _rng.randrange(FIRST, END)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {FIRST} to {END}")
