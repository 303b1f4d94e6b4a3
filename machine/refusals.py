"""The answers "no" that a caller of the machine can get: a closed list, each with its code.

The codes are API.md's; the HTTP layer maps them to a status and adds nothing to the sentence.
"""

from __future__ import annotations


class Refusal(Exception):
    """What was asked is refused, and the message says why and what to do.

    `retry_after_s` is given where waiting helps.
    """

    code = "refused"

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotActive(Refusal):
    """This instance does not hold the lease (any more). Ask the holder; nothing was accepted."""

    code = "no_active_instance"


class TermEnded(NotActive):
    """The term ended while this was being done: it may have happened. Ask the holder again, with
    the same idempotency key."""

    code = "holder_unreachable"


class StoreAway(Refusal):
    """The store did not confirm in time. What was asked may have happened: ask again with the
    same idempotency key."""

    code = "store_unavailable"


class AccountNotFound(Refusal):
    """No store knows the account."""

    code = "account_not_found"


class AccountAlreadyExists(Refusal):
    """The account id is taken."""

    code = "account_exists"


class AccountNotPaired(Refusal):
    """The account was never paired, or was logged out."""

    code = "account_not_paired"


class AccountQuarantined(Refusal):
    """The account's state cannot be read or trusted; its bytes are kept."""

    code = "account_quarantined"


class AccountBanned(Refusal):
    """WhatsApp has banned or locked the account."""

    code = "account_banned"


class NotAwaitingScan(Refusal):
    """There is no QR code now: the account is paired, or its pairing has ended."""

    code = "not_awaiting_scan"


class IdempotencyKeyReused(Refusal):
    """The idempotency key was used for another message."""

    code = "idempotency_key_reused"


class NotOnWhatsapp(Refusal):
    """The recipient's number has no WhatsApp account."""

    code = "not_on_whatsapp"


class OutboxFull(Refusal):
    """The account's outbox is at its limit."""

    code = "outbox_full"


class MessageNotFound(Refusal):
    """No message has this id, or its retention is over."""

    code = "message_not_found"


class CursorUnknown(Refusal):
    """The cursor is none that was given out."""

    code = "invalid_request"


class NoStandby(Refusal):
    """Nobody stands by who could take the lease."""

    code = "no_standby"
