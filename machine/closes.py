"""What a connection's close code means, and what is done then: one literal table.

WHATSAPP.md §2 says where the codes come from. Never lives here: doing it (`machine.session`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from machine.records import AccountStatus

NO_RESPONSE = 408
CLIENT_REFUSED = 405
RESTRICTED = 463
"""Not a close code: the error of an ack that refuses a message since its account is restricted."""

VERIFY_S = 30.0
"""A 401 this soon after a restart (515) or a restore is verified before it is believed."""

BAN_S_MAX = 30 * 86400.0
"""A longer ban is asked about again after this."""


class Step(Enum):
    """What to do after a close."""

    REOPEN = "at once, with the saved keys"
    BACK_OFF = "again, later and later"
    WAIT_TTL = "once more after a lease ttl; then never by itself"
    VERIFY = "once more; then it is true"
    WAIT_BAN = "when the ban is over"
    STOP = "never by itself"
    STOP_ALL = "none of this term's accounts that is not open, never by itself in this term"


@dataclass(frozen=True, slots=True)
class Reaction:
    """One row of the close-code table. `status` is the one shown when the step ends in a stop."""

    step: Step
    meaning: str
    status: AccountStatus = AccountStatus.BACKING_OFF
    advice: str = ""
    lasting: bool = True
    """Whether a stop holds for later terms too; if not, the next restore tries again."""
    event: str = "session.stopped"
    """How a stop is told: an alert, unless somebody is told already, or nothing is wrong."""


BACK_OFF = Reaction(Step.BACK_OFF, "connection lost")

REACTIONS: dict[int, Reaction] = {
    515: Reaction(Step.REOPEN, "restart required"),
    440: Reaction(
        Step.WAIT_TTL,
        "another client opened this device",
        AccountStatus.QUARANTINED,
        "find the other client (another backend with the same session files?), stop it, then "
        "reconnect the account",
    ),
    401: Reaction(
        Step.VERIFY,
        "logged out or device removed",
        AccountStatus.LOGGED_OUT,
        "pair it again with repair; its state is kept",
    ),
    402: Reaction(
        Step.WAIT_BAN,
        "temporary ban",
        advice="it is opened again by itself when the ban is over; its state is kept; send less, "
        "and to people who expect it",
    ),
    403: Reaction(
        Step.STOP, "locked or banned", AccountStatus.BANNED, "its state is kept; ask WhatsApp"
    ),
    406: Reaction(Step.STOP, "banned", AccountStatus.BANNED, "its state is kept; ask WhatsApp"),
    405: Reaction(
        Step.STOP_ALL,
        "client version refused",
        AccountStatus.STOPPED,
        "the connector is too old: upgrade Watchkeeper; the account's state is fine",
        lasting=False,
        event="session.held_back",
    ),
    408: Reaction(Step.BACK_OFF, "no answer"),
    411: Reaction(
        Step.STOP,
        "the phone is not multi-device",
        AccountStatus.STOPPED,
        "update WhatsApp on the phone, then repair",
    ),
    428: Reaction(Step.BACK_OFF, "connection closed by peer or network"),
    500: Reaction(Step.BACK_OFF, "stream error"),
    501: Reaction(Step.BACK_OFF, "service unavailable"),
    503: Reaction(Step.BACK_OFF, "service unavailable"),
}
"""WHATSAPP.md §2: decided by code, never by text. An unknown code backs off."""

PAIRING_OVER = Reaction(
    Step.STOP,
    "no phone scanned in time",
    AccountStatus.STOPPED,
    "ask for a new QR code with repair",
    event="pairing.expired",
)
"""408 while pairing."""
