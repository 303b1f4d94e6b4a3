"""How the loopback WhatsApp is told to misbehave, and the limits of that.

Lives here: the commands as one frozen record, and its spelling as JSON for the database.
Never lives here: who obeys them (`daemon.loopback.server`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Literal

Receipts = Literal["none", "delivered", "read"]

ACK_ERRORS = frozenset({463, 479})
"""Account restricted, malformed stanza (WHATSAPP.md §2)."""

CLOSE_CODES = frozenset({401, 402, 403, 405, 406, 408, 411, 428, 440, 500, 501, 503, 515})
"""What a connection may be closed with (WHATSAPP.md §2)."""

DELAY_S_MAX = 3600.0
TIMES_MAX = 1_000_000
NUMBERS_MAX = 10_000


@dataclass(frozen=True, slots=True)
class Behaviour:
    """What the server does to one account, or to all that have no behaviour of their own.

    `ack_times` and `login_times` say for how many sends or logins `ack_lost`, `ack_refused` and
    `login_refused` hold; `None` is until the next command. Contradictions and values out of range
    raise `ValueError`, with the field's name.
    """

    ack_delay_s: float = 0.0
    """The recipient has the message at once, the sender its ack this much later."""
    ack_lost: bool = False
    """The recipient has the message, the ack never comes."""
    ack_lost_close_s: float = 10.0
    """A connection that waits for a lost ack is closed with 408 after this much silence."""
    ack_refused: int | None = None
    """The server refuses the message with this ack error; the recipient never sees it."""
    ack_times: int | None = None
    login_delay_s: float = 0.0
    login_refused: int | None = None
    login_expire_s: float | None = None
    """How long a ban (402) is said to last."""
    login_times: int | None = None
    receipts: Receipts = "delivered"
    """The furthest receipt that a recipient sends."""
    receipt_delay_s: float = 0.0
    """Between the ack and each receipt."""
    not_on_whatsapp: frozenset[str] = frozenset()
    """Phone numbers, digits only, that have no account."""

    def __post_init__(self) -> None:
        for name in ("ack_delay_s", "ack_lost_close_s", "login_delay_s", "receipt_delay_s"):
            if not 0 <= getattr(self, name) <= DELAY_S_MAX:
                raise ValueError(f"{name} must be between 0 and {DELAY_S_MAX:g} seconds")
        for name in ("ack_times", "login_times"):
            times = getattr(self, name)
            if times is not None and not 1 <= times <= TIMES_MAX:
                raise ValueError(f"{name} must be between 1 and {TIMES_MAX}")
        if self.ack_refused is not None and self.ack_refused not in ACK_ERRORS:
            raise ValueError(f"ack_refused must be one of {sorted(ACK_ERRORS)}")
        if self.ack_refused is not None and self.ack_lost:
            raise ValueError("ack_refused and ack_lost exclude each other")
        if self.login_refused is not None and self.login_refused not in CLOSE_CODES:
            raise ValueError(f"login_refused must be one of {sorted(CLOSE_CODES)}")
        if self.login_expire_s is not None and not 0 <= self.login_expire_s <= 10**9:
            raise ValueError("login_expire_s must be between 0 and a billion seconds")
        if self.receipts not in ("none", "delivered", "read"):
            raise ValueError("receipts must be none, delivered or read")
        if len(self.not_on_whatsapp) > NUMBERS_MAX:
            raise ValueError(f"not_on_whatsapp must hold at most {NUMBERS_MAX} numbers")

    def after_ack(self) -> Behaviour:
        """What remains once one send was lost or refused."""
        if self.ack_times is None:
            return self
        if self.ack_times <= 1:
            return replace(self, ack_times=None, ack_lost=False, ack_refused=None)
        return replace(self, ack_times=self.ack_times - 1)

    def after_login(self) -> Behaviour:
        """What remains once one login was refused."""
        if self.login_times is None:
            return self
        if self.login_times <= 1:
            return replace(self, login_times=None, login_refused=None, login_expire_s=None)
        return replace(self, login_times=self.login_times - 1)


def dump_behaviour(behaviour: Behaviour) -> str:
    """JSON for the database."""
    fields = asdict(behaviour)
    fields["not_on_whatsapp"] = sorted(behaviour.not_on_whatsapp)
    return json.dumps(fields)


def load_behaviour(body: str) -> Behaviour:
    """The opposite of `dump_behaviour`."""
    fields = json.loads(body)
    fields["not_on_whatsapp"] = frozenset(fields["not_on_whatsapp"])
    return Behaviour(**fields)
