"""The table of what is lawful, pair by pair."""

from collections import Counter

import pytest

from machine.states import INITIAL, MEANINGS, TRANSITIONS, State, Trigger, lawful

LAWFUL = {
    (State.BOOTING, Trigger.BOOTED): State.PASSIVE,
    (State.BOOTING, Trigger.DRAIN): State.DRAINING,
    (State.PASSIVE, Trigger.ACTIVATE): State.ACTIVE,
    (State.PASSIVE, Trigger.DRAIN): State.DRAINING,
    (State.ACTIVE, Trigger.STEP_DOWN): State.PASSIVE,
    (State.ACTIVE, Trigger.DRAIN): State.DRAINING,
}
"""Written out a second time on purpose: a change of the table must be meant."""


@pytest.mark.parametrize("trigger", Trigger)
@pytest.mark.parametrize("state", State)
def test_every_pair_leads_where_the_design_says(state: State, trigger: Trigger) -> None:
    assert lawful(state, trigger) is LAWFUL.get((state, trigger))


def test_the_table_has_each_pair_once_and_no_others() -> None:
    pairs = Counter((rule.source, rule.trigger) for rule in TRANSITIONS)
    assert pairs == Counter(LAWFUL.keys())


def test_every_state_can_be_reached_and_draining_is_the_only_end() -> None:
    reached = {INITIAL}
    for _ in State:
        reached |= {rule.dest for rule in TRANSITIONS if rule.source in reached}
    assert reached == set(State)
    assert set(State) - {rule.source for rule in TRANSITIONS} == {State.DRAINING}


def test_no_transition_leads_to_where_it_starts() -> None:
    # The engine tells a transition that happened from one that did not by the change of state.
    assert all(rule.source is not rule.dest for rule in TRANSITIONS)


def test_every_state_has_a_meaning_to_show() -> None:
    assert set(MEANINGS) == set(State)
