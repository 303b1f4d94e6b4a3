from __future__ import annotations

import pytest
import trio

from daemon.bridge.suspects import SUSPECTED_S, Suspects
from machine.records import AccountId

ANNA, BERT = AccountId("anna"), AccountId("bert")


@pytest.mark.parametrize(
    ("accounts_max", "caps"),
    [(1, [1, 1]), (2, [2, 1]), (8, [8, 2, 1]), (50, [50, 12, 3, 1]), (200, [200, 50, 12, 3, 1])],
)
def test_each_death_leaves_a_quarter_of_the_company_down_to_none(
    accounts_max: int, caps: list[int]
) -> None:
    suspects = Suspects(accounts_max)
    assert [suspects.cap(level) for level in range(suspects.level_max + 1)] == caps


async def test_an_account_rises_with_its_own_deaths_and_no_further_than_alone() -> None:
    suspects = Suspects(8)
    levels = []
    for _ in range(4):
        levels.append((suspects.level(ANNA), suspects.is_convicted(ANNA)))
        suspects.blame(ANNA)
    assert levels == [(0, False), (1, False), (2, False), (2, True)]
    assert suspects.level(BERT) == 0


async def test_suspicion_ends_when_nothing_has_died_for_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    suspects = Suspects(8)
    suspects.blame(ANNA)
    await trio.sleep(SUSPECTED_S - 1)
    assert suspects.level(ANNA) == 1
    suspects.blame(ANNA)
    await trio.sleep(SUSPECTED_S - 1)
    assert suspects.level(ANNA) == 2
    await trio.sleep(2)
    assert suspects.level(ANNA) == 0
