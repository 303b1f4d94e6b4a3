"""What the service manager is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from daemon.notify import Notifier, describe, is_well, keep_notified
from machine.states import State
from machine.views import LeaseStatus


@dataclass
class Instance:
    """An instance as far as it is told of."""

    state: State = State.BOOTING
    epoch: int = 0
    alive: bool = True
    lease_status: LeaseStatus | None = None
    changed: trio.Event = field(default_factory=trio.Event)

    async def wait_changed(self) -> None:
        await self.changed.wait()

    def move(self, state: State) -> None:
        self.state = state
        self.changed.set()
        self.changed = trio.Event()


def lease(holder: str | None, remaining_s: float | None) -> LeaseStatus:
    return LeaseStatus(holder, 7, 15.0, remaining_s, 0, None, paused=False)


class Manager:
    """The receiving end, as systemd has it: the kernel queues a few datagrams, then drops."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.setblocking(False)

    def read(self) -> list[str]:
        """Every line that came since the last call."""
        lines: list[str] = []
        while True:
            try:
                lines += self._socket.recv(4096).decode().splitlines()
            except BlockingIOError:
                return lines

    async def hear(self, instance: Instance, notifier: Notifier, for_s: float) -> list[str]:
        """Everything that is told of an instance in so many seconds."""
        lines: list[str] = []
        with trio.move_on_after(for_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_notified, instance, notifier, dict)
                while True:
                    await trio.sleep(0.5)
                    lines += self.read()
        return lines

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    yield made
    made.close()


@pytest.fixture
def notifier(manager: Manager) -> Iterator[Notifier]:
    made = Notifier({"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "10000000"})
    yield made
    made.close()


async def test_a_standby_is_ready_and_says_whom_it_stands_by_for(
    manager: Manager, notifier: Notifier, autojump_clock: MockClock
) -> None:
    instance = Instance()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_notified, instance, notifier, dict)
        await trio.sleep(1)
        assert "READY=1" not in manager.read()
        instance.lease_status = lease("other", 9.0)
        instance.move(State.PASSIVE)
        await trio.sleep(0.1)
        assert manager.read() == ["STATUS=PASSIVE, lease held by other, epoch 7", "READY=1"]
        instance.move(State.ACTIVE)
        await trio.sleep(0.1)
        assert "READY=1" not in manager.read()
        nursery.cancel_scope.cancel()


async def test_signs_of_life_come_twice_in_the_watchdogs_time(
    manager: Manager, notifier: Notifier, autojump_clock: MockClock
) -> None:
    lines = await manager.hear(Instance(State.PASSIVE), notifier, 59.9)
    assert lines.count("WATCHDOG=1") == 12


async def test_an_instance_whose_main_task_ended_gives_no_sign_of_life(
    manager: Manager, notifier: Notifier, autojump_clock: MockClock
) -> None:
    lines = await manager.hear(Instance(State.PASSIVE, alive=False), notifier, 59.9)
    assert "READY=1" in lines
    assert "WATCHDOG=1" not in lines


async def test_a_drain_asks_for_the_time_it_needs_again_and_again(
    manager: Manager, notifier: Notifier, autojump_clock: MockClock
) -> None:
    lines = await manager.hear(Instance(State.DRAINING), notifier, 22)
    assert lines.count("STOPPING=1") == 1
    assert lines.count("EXTEND_TIMEOUT_USEC=10000000") == 5


async def test_nothing_is_done_where_nobody_listens(autojump_clock: MockClock) -> None:
    with trio.fail_after(1):
        await keep_notified(Instance(State.PASSIVE), Notifier({}), dict)


async def test_a_manager_that_is_gone_harms_nobody(tmp_path: Path) -> None:
    notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    notifier.tell(READY=1)
    notifier.close()


def test_a_status_stays_one_line(manager: Manager, notifier: Notifier) -> None:
    notifier.tell(STATUS="two\nREADY=1")
    assert manager.read() == ["STATUS=two READY=1"]


@pytest.mark.parametrize(
    ("state", "remaining_s", "well"),
    [
        (State.ACTIVE, 3.0, True),
        (State.ACTIVE, 0.0, False),
        (State.PASSIVE, 0.0, True),
        (State.PASSIVE, None, True),
    ],
)
def test_only_an_active_instance_whose_lease_is_over_is_unwell(
    state: State, remaining_s: float | None, well: bool
) -> None:
    assert is_well(Instance(state, 7, lease_status=lease("me", remaining_s))) is well


def test_a_holder_tells_its_epoch_and_its_accounts() -> None:
    instance = Instance(State.ACTIVE, 7, lease_status=lease("me", 3.0))
    accounts = {"connected": 2.0, "backing_off": 1.0}
    assert describe(instance, accounts) == "ACTIVE, epoch 7, 2 of 3 accounts connected"


def test_a_free_lease_is_told() -> None:
    instance = Instance(State.PASSIVE, lease_status=lease(None, 0.0))
    assert describe(instance, {}) == "PASSIVE, nobody holds the lease"
