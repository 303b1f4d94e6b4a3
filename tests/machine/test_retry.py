"""Trying again: on the virtual clock, to the second."""

import math
import random
from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock

from machine.retry import Backoff, TryTimedOut, retry

STEADY = Backoff(first_s=1, factor=2, cap_s=5, jitter=0)


class Away(Exception):
    pass


class Broken(Exception):
    pass


def failing(times: int, error: Exception) -> Callable[[], Awaitable[str]]:
    left = [times]

    async def attempt() -> str:
        await trio.lowlevel.checkpoint()
        if left[0]:
            left[0] -= 1
            raise error
        return "answer"

    return attempt


async def hang() -> None:
    await trio.sleep_forever()


async def test_first_success_is_answered_without_waiting(autojump_clock: MockClock) -> None:
    answer = await retry(
        failing(0, Away()), on=(Away,), backoff=STEADY, try_s=9, rng=random.Random(1)
    )
    assert answer == "answer"
    assert trio.current_time() == 0


async def test_waits_grow_by_the_factor_up_to_the_cap(autojump_clock: MockClock) -> None:
    noted: list[tuple[int, float, float]] = []
    answer = await retry(
        failing(5, Away()),
        on=(Away,),
        backoff=STEADY,
        try_s=9,
        rng=random.Random(1),
        noted=lambda tries, error, wait_s: noted.append((tries, wait_s, trio.current_time())),
    )
    assert answer == "answer"
    assert noted == [(1, 1, 0), (2, 2, 1), (3, 4, 3), (4, 5, 7), (5, 5, 12)]
    assert trio.current_time() == 17


async def test_a_try_that_runs_out_is_tried_again_and_counts(autojump_clock: MockClock) -> None:
    with pytest.raises(TryTimedOut, match="3 s"):
        await retry(hang, on=(Away,), backoff=STEADY, try_s=3, rng=random.Random(1), tries_max=2)
    assert trio.current_time() == 3 + 1 + 3


async def test_giving_up_raises_the_last_error(autojump_clock: MockClock) -> None:
    errors = [Away("first"), Away("second"), Away("third")]
    noted: list[Exception] = []

    async def attempt() -> None:
        raise errors.pop(0)

    with pytest.raises(Away, match="third"):
        await retry(
            attempt,
            on=(Away,),
            backoff=STEADY,
            try_s=9,
            rng=random.Random(1),
            tries_max=3,
            noted=lambda tries, error, wait_s: noted.append(error),
        )
    assert [str(error) for error in noted] == ["first", "second"]


async def test_an_error_that_is_not_named_passes_through_at_once(
    autojump_clock: MockClock,
) -> None:
    with pytest.raises(Broken):
        await retry(failing(1, Broken()), on=(Away,), backoff=STEADY, try_s=9, rng=random.Random(1))
    assert trio.current_time() == 0


async def test_a_deadline_of_the_attempts_own_is_not_a_try_that_ran_out(
    autojump_clock: MockClock,
) -> None:
    async def attempt() -> None:
        with trio.fail_after(1):
            await trio.sleep_forever()

    with pytest.raises(trio.TooSlowError):
        await retry(attempt, on=(Away,), backoff=STEADY, try_s=9, rng=random.Random(1))
    assert trio.current_time() == 1


@pytest.mark.parametrize("after_s", [2, 3.5])
async def test_the_callers_deadline_ends_a_try_and_a_wait_alike(
    autojump_clock: MockClock, after_s: float
) -> None:
    with trio.move_on_after(after_s) as scope:
        await retry(hang, on=(Away,), backoff=STEADY, try_s=3, rng=random.Random(1))
    assert scope.cancelled_caught
    assert trio.current_time() == after_s


async def test_the_callers_deadline_in_the_same_instant_as_the_trys_wins(
    autojump_clock: MockClock,
) -> None:
    with trio.move_on_after(3) as scope:
        await retry(hang, on=(Away,), backoff=STEADY, try_s=3, rng=random.Random(1))
    assert scope.cancelled_caught
    assert trio.current_time() == 3


def test_jitter_shortens_a_wait_and_never_lengthens_it() -> None:
    rng = random.Random(7)
    backoff = Backoff(first_s=4, factor=3, cap_s=10, jitter=0.5)
    first = [backoff.wait_s(1, rng) for _ in range(200)]
    assert 2 <= min(first) < 2.2
    assert 3.8 < max(first) <= 4
    capped = [backoff.wait_s(1_000_000, rng) for _ in range(200)]
    assert min(capped) >= 5
    assert max(capped) <= 10


@pytest.mark.parametrize("factor", [1, 1.5, 1e9])
def test_no_number_of_tries_overflows(factor: float) -> None:
    backoff = Backoff(first_s=0.1, factor=factor, cap_s=30, jitter=0)
    assert backoff.wait_s(1, random.Random(1)) == 0.1
    assert backoff.wait_s(10**9, random.Random(1)) == (0.1 if factor == 1 else 30)


@pytest.mark.parametrize(
    ("first_s", "factor", "cap_s", "jitter"),
    [
        (0, 2, 5, 0),
        (6, 2, 5, 0),
        (1, 0.5, 5, 0),
        (1, 2, 5, 1.1),
        (1, 2, 5, -0.1),
        (1, 2, math.inf, 0),
        (math.nan, 2, 5, 0),
    ],
)
def test_contradictory_numbers_are_refused(
    first_s: float, factor: float, cap_s: float, jitter: float
) -> None:
    with pytest.raises(ValueError, match=r"infinity|shorten|share"):
        Backoff(first_s, factor, cap_s, jitter)


async def test_no_try_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one try"):
        await retry(hang, on=(), backoff=STEADY, try_s=1, rng=random.Random(1), tries_max=0)
