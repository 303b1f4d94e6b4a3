"""Telling systemd how the instance is: ready, its status line, alive, stopping.

The protocol of sd_notify(3): datagrams of `NAME=value` lines to the socket that `NOTIFY_SOCKET`
names. Nothing here decides anything, and without that variable nothing is sent. The service file
needs `NotifyAccess=all`: the daemon is the warden's child, and systemd's main process the warden.

Never lives here: what ends an instance that systemd takes for dead (that is systemd's).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol

import trio

from machine.records import AccountStatus
from machine.states import State
from machine.views import LeaseStatus

EXTEND_EVERY_S = 5.0
STATUS_EVERY_S = 5.0
"""How often the status line is looked at besides at each change: accounts come and go without."""


class Watched(Protocol):
    """What is told of: `machine.instance.Instance` by shape."""

    @property
    def state(self) -> State: ...

    @property
    def epoch(self) -> int: ...

    @property
    def alive(self) -> bool: ...

    @property
    def lease_status(self) -> LeaseStatus | None: ...

    async def wait_changed(self) -> None: ...


class Notifier:
    """The line to the service manager. Never waits, never raises.

    A datagram that cannot be sent is left out: systemd then sees a missing sign of life, which is
    what it is there for.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + path[1:] if path.startswith("@") else path
        self._socket: socket.socket | None = None
        if self._address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        self.watchdog_s = _watchdog_s(environ)

    @property
    def present(self) -> bool:
        """Whether anybody listens."""
        return self._socket is not None

    def tell(self, **lines: str | int) -> None:
        """Send assignments such as `READY=1`."""
        if self._socket is not None:
            content = "\n".join(f"{name}={_one_line(str(value))}" for name, value in lines.items())
            with suppress(OSError):
                self._socket.sendto(content.encode(), self._address)

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    """How often systemd wants a sign of life; `None` when it does not.

    `WATCHDOG_PID` names the process that systemd started: this one's parent is the warden, so it
    is not compared.
    """
    try:
        usec = int(environ.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    return usec / 1e6 if usec > 0 else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


async def keep_notified(
    instance: Watched, notifier: Notifier, count_accounts: Callable[[], Mapping[str, float]]
) -> None:
    """Tell the service manager of every change, until cancelled. Nothing to do without one.

    `count_accounts` answers how many accounts in memory have which status.
    """
    if not notifier.present:
        return
    async with trio.open_nursery() as nursery:
        if notifier.watchdog_s is not None:
            nursery.start_soon(_keep_watchdog_fed, instance, notifier, notifier.watchdog_s)
        ready = stopping = False
        while True:
            lines: dict[str, str | int] = {"STATUS": describe(instance, count_accounts())}
            if not ready and instance.state is not State.BOOTING:
                # A standby is ready: that is what a rolling deploy waits for.
                ready = True
                lines["READY"] = 1
            if not stopping and instance.state is State.DRAINING:
                stopping = True
                lines["STOPPING"] = 1
                nursery.start_soon(_keep_extending, notifier)
            notifier.tell(**lines)
            with trio.move_on_after(STATUS_EVERY_S):
                await instance.wait_changed()


def describe(instance: Watched, accounts: Mapping[str, float]) -> str:
    """The line that `systemctl status` shows."""
    lease = instance.lease_status
    parts = [f"{instance.state}"]
    if instance.epoch:
        parts.append(f"epoch {instance.epoch}")
    elif lease is not None and lease.holder is not None:
        parts.append(f"lease held by {lease.holder}, epoch {lease.epoch}")
    elif lease is not None:
        parts.append("nobody holds the lease")
    if instance.state is State.ACTIVE:
        connected = accounts.get(AccountStatus.CONNECTED, 0)
        parts.append(f"{connected:.0f} of {sum(accounts.values()):.0f} accounts connected")
    return ", ".join(parts)


def is_well(instance: Watched) -> bool:
    """Whether the instance deserves a sign of life.

    That this is asked at all shows that the event loop turns. Not well: its main task has ended,
    or it is ACTIVE on a lease whose time is over, which its own deadline should have ended.
    A shared store that is away is no reason: a restart would not bring it back.
    """
    lease = instance.lease_status
    remaining_s = lease.remaining_s if lease is not None else None
    lease_blind = instance.state is State.ACTIVE and remaining_s is not None and remaining_s <= 0
    return instance.alive and not lease_blind


async def _keep_watchdog_fed(instance: Watched, notifier: Notifier, watchdog_s: float) -> None:
    while True:
        if is_well(instance):
            notifier.tell(WATCHDOG=1)
        # sd_watchdog_enabled(3) recommends half of the time.
        await trio.sleep(watchdog_s / 2)


async def _keep_extending(notifier: Notifier) -> None:
    """While draining: each word is good for two more rounds, so a hung drain still ends."""
    while True:
        notifier.tell(EXTEND_TIMEOUT_USEC=int(2 * EXTEND_EVERY_S * 1e6))
        await trio.sleep(EXTEND_EVERY_S)
