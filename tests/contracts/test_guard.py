"""The contract of `Guard`: what is in force after each word, at the fake and at the pipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

from daemon.guard import PipeGuard
from daemon.warden import LINE_BYTES_MAX, State
from machine.ports import Guard
from machine.records import Grant, Stamp
from tests.fakes.guard import RecordingGuard

GRANT = Grant(3, "a", "a-1", Stamp("1"))
STORE = {"store": "sqlite", "path": "/var/lib/watchkeeper/shared.db"}

InForce = Callable[[], tuple[float | None, int | None]]
"""When the process would be killed now, and which epoch would be released in its name."""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    listening, told = os.pipe()
    os.set_blocking(listening, False)
    yield listening, told
    os.close(listening)
    os.close(told)


def last_state(listening: int) -> State:
    """The last line that is there; whole lines only."""
    *lines, rest = os.read(listening, 1 << 20).split(b"\n")
    assert rest == b""
    return State.decode(lines[-1])


@pytest.fixture(params=["fake", "pipe"])
def guard(request: pytest.FixtureRequest, pipe: tuple[int, int]) -> tuple[Guard, InForce]:
    if request.param == "fake":
        fake = RecordingGuard()
        return fake, lambda: (fake.kill_at, fake.releasable.epoch if fake.releasable else None)
    listening, told = pipe

    def in_force() -> tuple[float | None, int | None]:
        state = last_state(listening)
        return state.kill_at, state.lease["epoch"] if state.lease else None

    return PipeGuard(told, instance="a", json_lines=False, lease=STORE), in_force


def test_at_first_there_is_nothing_to_kill_for_and_nothing_to_release(
    guard: tuple[Guard, InForce],
) -> None:
    assert guard[1]() == (None, None)


def test_the_last_deadline_counts(guard: tuple[Guard, InForce]) -> None:
    told, in_force = guard
    told.deadline_moved(GRANT, 100.25)
    told.deadline_moved(GRANT, 105.25)
    assert in_force() == (105.25, 3)


def test_after_a_term_the_lease_may_still_have_to_be_released(
    guard: tuple[Guard, InForce],
) -> None:
    told, in_force = guard
    told.deadline_moved(GRANT, 100.0)
    told.term_over()
    assert in_force() == (None, 3)
    told.lease_released()
    assert in_force() == (None, None)


def test_the_next_term_is_another_epochs(guard: tuple[Guard, InForce]) -> None:
    told, in_force = guard
    told.deadline_moved(GRANT, 100.0)
    told.term_over()
    told.deadline_moved(Grant(9, "a", "a-1", Stamp("2")), 200.0)
    assert in_force() == (200.0, 9)


def test_the_pipe_names_the_store_and_the_incarnation(pipe: tuple[int, int]) -> None:
    listening, told = pipe
    guard = PipeGuard(told, instance="a", json_lines=True, lease=STORE)
    guard.deadline_moved(GRANT, 100.0)
    state = last_state(listening)
    assert state.lease == {**STORE, "epoch": 3, "incarnation": "a-1"}
    assert (state.instance, state.json_lines) == ("a", True)


def test_a_warden_that_does_not_read_never_makes_the_daemon_wait(pipe: tuple[int, int]) -> None:
    listening, told = pipe
    guard = PipeGuard(told, instance="a", json_lines=False, lease=STORE)
    for moment in range(5000):
        guard.deadline_moved(GRANT, float(moment))
    # What did fit is whole, and the newest of it is an earlier deadline, never a later one.
    first = last_state(listening).kill_at
    assert first is not None
    assert first < 4999


def test_a_warden_that_is_gone_is_no_error() -> None:
    listening, told = os.pipe()
    guard = PipeGuard(told, instance="a", json_lines=False, lease=STORE)
    os.close(listening)
    guard.deadline_moved(GRANT, 1.0)
    os.close(told)


def test_a_store_whose_name_does_not_fit_into_one_write_is_refused(pipe: tuple[int, int]) -> None:
    path = "/" + "x" * LINE_BYTES_MAX
    with pytest.raises(ValueError, match="choose a shorter path"):
        PipeGuard(pipe[1], instance="a", json_lines=False, lease={"store": "sqlite", "path": path})
