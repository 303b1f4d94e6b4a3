"""Daemons for the warden to watch: `python -m tests.warden_scenes SCENE`. They print what they see.

The pipe's lines and the process tree are the real ones; only what the daemon does is made up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from daemon.warden import NOT_OURS, RELEASED, State, boottime, keep

DEADLINE_S = 0.4


def say(*words: object) -> None:
    print(*words, flush=True)


class Daemon:
    """What a scene has in hand: the pipe to the warden, and a lease that names its own group."""

    def __init__(self, told: int) -> None:
        self._told = told
        self.lease: dict[str, object] = {"epoch": 7, "group": os.getpid()}

    def hold(self, within_s: float = DEADLINE_S, **more: object) -> None:
        self.tell(State(kill_at=boottime() + within_s, lease={**self.lease, **more}))

    def tell(self, state: State) -> None:
        os.write(self._told, state.encode())


def ends(daemon: Daemon) -> int:
    return 3


def dies(daemon: Daemon) -> int:
    daemon.hold()
    say("dies", time.monotonic())
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def dies_unreleasable(daemon: Daemon) -> int:
    daemon.hold(refuse=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def dies_of_another_epoch(daemon: Daemon) -> int:
    daemon.hold(stranger=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def dies_and_the_release_hangs(daemon: Daemon) -> int:
    daemon.hold(hang=True)
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def dies_after_it_released(daemon: Daemon) -> int:
    daemon.hold()
    daemon.tell(State())
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def ends_without_a_release(daemon: Daemon) -> int:
    daemon.hold()
    daemon.tell(State(lease=daemon.lease))
    return 0


def listens(daemon: Daemon) -> int:
    """Prints each signal that comes, and ends with the second SIGTERM or SIGINT."""
    heard = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    say("ready", os.getpid(), os.getppid(), os.getpgrp())
    ends_in = 2
    while ends_in:
        number = signal.sigwait(heard)
        say(signal.Signals(number).name)
        ends_in -= number in (signal.SIGTERM, signal.SIGINT)
    return 0


def listens_to_nothing(daemon: Daemon) -> int:
    say("ready", os.getpid(), os.getppid(), os.getpgrp())
    time.sleep(60)
    return 0


def spins(daemon: Daemon) -> int:
    """Holds the lease and is wedged: nothing else runs in this process any more."""
    daemon.hold()
    say("holds", time.monotonic())
    while True:
        pass


def stops(daemon: Daemon) -> int:
    """Holds the lease and is stopped, as by SIGSTOP of somebody; its bridge runs on."""
    bridge = subprocess.Popen(["sleep", "60"])
    daemon.hold()
    say("bridge", bridge.pid)
    os.kill(os.getpid(), signal.SIGSTOP)
    say("went on")
    return 0


def renews(daemon: Daemon) -> int:
    """Renews in time for longer than one deadline, then ends its term and stays."""
    daemon.hold()
    say("holds")
    for _ in range(8):
        time.sleep(DEADLINE_S / 4)
        daemon.hold()
    daemon.tell(State(lease=daemon.lease))
    time.sleep(DEADLINE_S * 1.5)
    daemon.tell(State())
    return 0


def leaves_orphans(daemon: Daemon) -> int:
    """Makes a grandchild whose parent dies at once; ends when told to."""
    script = "sleep 0.5 & echo orphan $!"
    subprocess.run(["sh", "-c", script], check=True)
    return listens(daemon)


def leaves_a_stubborn_bridge(daemon: Daemon) -> int:
    """Dies, and its bridge ignores every signal that can be ignored."""
    script = "trap '' TERM INT HUP; echo bridge $$; sleep 60; sleep 60"
    bridge = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE)
    assert bridge.stdout is not None
    say(bridge.stdout.readline().decode().strip())
    daemon.hold()
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def ends_before_its_bridge(daemon: Daemon) -> int:
    """Holds nothing, ends in order, and its bridge runs on."""
    quiet = subprocess.DEVNULL
    bridge = subprocess.Popen(["sleep", "60"], stdout=quiet, stderr=quiet)
    say("bridge", bridge.pid)
    return 0


def has_a_bridge(daemon: Daemon) -> int:
    """A bridge ends when what it reads from the daemon ends."""
    bridge = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    say("bridge", bridge.pid)
    time.sleep(60)
    return 0


SCENES: dict[str, Callable[[Daemon], int]] = {
    scene.__name__: scene
    for scene in (
        ends,
        dies,
        dies_unreleasable,
        dies_of_another_epoch,
        dies_and_the_release_hangs,
        dies_after_it_released,
        ends_without_a_release,
        listens,
        listens_to_nothing,
        spins,
        stops,
        renews,
        leaves_orphans,
        leaves_a_stubborn_bridge,
        ends_before_its_bridge,
        has_a_bridge,
    )
}


def release(lease: Mapping[str, Any]) -> int:
    """Say what is released, and whether anything of the daemon's group is left."""
    try:
        os.killpg(int(lease["group"]), 0)
        left = "somebody is left"
    except ProcessLookupError:
        left = "nobody is left"
    say("release", lease["epoch"], left)
    if lease.get("hang"):
        time.sleep(60)
    if lease.get("refuse"):
        raise RuntimeError("the store is away")
    return NOT_OURS if lease.get("stranger") else RELEASED


if __name__ == "__main__":
    sys.exit(keep(lambda told: SCENES[sys.argv[1]](Daemon(told)), release))
