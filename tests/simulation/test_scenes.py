"""A quiet day, a hundred terms, and a crash before every step of a life."""

from __future__ import annotations

import pytest

from daemon.cost import DAYS, Load, costs
from daemon.settings import Settings
from tests.simulation import scenes
from tests.simulation.world import ACCOUNTS, TIMINGS

TOLERATED = 1.02
"""Looks and renewals do not divide a day evenly, and the first one is extra."""
BYTES_GROWN_MAX = 8_000
"""By a hundred terms: 80 bytes each, which are reasons of different lengths."""


def check_quiet(hours: float) -> None:
    told = scenes.quiet_day(hours)
    assert told.violations == ()
    assert told.counts["epochs"] == 1
    # Each process is looked at when it becomes PASSIVE, at the start, and never again.
    assert told.counts["terms"] == 3
    assert told.counts["received"] > hours
    timing, load = TIMINGS[0], Load(accounts=len(ACCOUNTS), messages_per_day=0, standbys=2)
    settings = Settings(lease_ttl_s=timing.ttl_s, lease_renew_s=timing.renew_s)
    rows = {row.what: row for row in costs(settings, load)}
    renewals = rows["holder: renewals"].writes / DAYS * hours / 24
    looks = rows["2 standby: watching the lease"].reads / DAYS * hours / 24
    assert told.calls["write"] <= renewals * TOLERATED + 5
    assert told.calls["read_heartbeat"] + 2 * told.calls["read"] <= looks * TOLERATED + 20


def test_in_four_quiet_hours_nothing_happens_and_the_store_is_asked_what_was_reckoned() -> None:
    check_quiet(4)


@pytest.mark.long
def test_a_quiet_day_has_no_transition_and_costs_what_was_reckoned() -> None:
    check_quiet(24)


@pytest.mark.long
def test_a_hundred_terms_later_all_is_as_before() -> None:
    told = scenes.many_terms(160, look_every=20)
    assert told.violations == ()
    before, after = told.left[2], told.left[7]
    grown = after.pop("bytes") - before.pop("bytes")
    assert after == before
    assert grown <= BYTES_GROWN_MAX


def check_crashes(every: int) -> None:
    steps = scenes.crash_before_step(1_000_000).counts["steps"]
    assert steps > 300
    for step in range(0, steps, every):
        told = scenes.crash_before_step(step)
        assert told.violations == (), f"crash before step {step}"
        assert told.counts["crashed"] or step > steps - 100


@pytest.mark.long
def test_a_crash_before_a_step_loses_nothing() -> None:
    check_crashes(every=51)


@pytest.mark.long
def test_a_crash_before_any_step_loses_nothing() -> None:
    check_crashes(every=1)
