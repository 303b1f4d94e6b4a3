"""The states, the triggers and the one table of what is lawful. The diagram is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """Where an instance stands."""

    BOOTING = "BOOTING"
    PASSIVE = "PASSIVE"
    ACTIVE = "ACTIVE"
    DRAINING = "DRAINING"


class Trigger(StrEnum):
    """What moves an instance. Only `Instance.run()` fires them."""

    BOOTED = "booted"
    ACTIVATE = "activate"
    STEP_DOWN = "step_down"
    DRAIN = "drain"


@dataclass(frozen=True, slots=True)
class Rule:
    """One lawful transition."""

    trigger: Trigger
    source: State
    dest: State


TRANSITIONS: tuple[Rule, ...] = (
    Rule(Trigger.BOOTED, State.BOOTING, State.PASSIVE),
    Rule(Trigger.ACTIVATE, State.PASSIVE, State.ACTIVE),
    Rule(Trigger.STEP_DOWN, State.ACTIVE, State.PASSIVE),
    Rule(Trigger.DRAIN, State.BOOTING, State.DRAINING),
    Rule(Trigger.DRAIN, State.PASSIVE, State.DRAINING),
    Rule(Trigger.DRAIN, State.ACTIVE, State.DRAINING),
)

MEANINGS: dict[State, str] = {
    State.BOOTING: "settings read, local state opened, listeners bound",
    State.PASSIVE: "healthy, not the holder: forwards, keeps its copy warm, asks for the lease",
    State.ACTIVE: "the holder of one epoch: restores every account, then serves",
    State.DRAINING: "on its way out: settles the outbox, closes sessions, releases the lease, ends",
}
"""One line for each state, for the diagram and the docs."""

INITIAL = State.BOOTING


def lawful(state: State, trigger: Trigger) -> State | None:
    """Where `trigger` leads from `state`, or `None` where it is refused."""
    for rule in TRANSITIONS:
        if rule.trigger is trigger and rule.source is state:
            return rule.dest
    return None
