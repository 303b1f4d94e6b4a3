"""The closed list of error codes, and how an error is told to a caller.

Never lives here: the sentences of the machine's own refusals (`machine.refusals`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum

import msgspec

from machine.refusals import Refusal


class ErrorCode(StrEnum):
    """Every `error` that an answer can carry."""

    INVALID_REQUEST = "invalid_request"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    ACCOUNT_NOT_FOUND = "account_not_found"
    MESSAGE_NOT_FOUND = "message_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    NOT_ACCEPTABLE = "not_acceptable"
    REQUEST_TIMEOUT = "request_timeout"
    ACCOUNT_EXISTS = "account_exists"
    ACCOUNT_NOT_PAIRED = "account_not_paired"
    ACCOUNT_QUARANTINED = "account_quarantined"
    ACCOUNT_BANNED = "account_banned"
    NOT_AWAITING_SCAN = "not_awaiting_scan"
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused"
    NO_STANDBY = "no_standby"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    NOT_ON_WHATSAPP = "not_on_whatsapp"
    MESSAGE_FAILED = "message_failed"
    OUTBOX_FULL = "outbox_full"
    INTERNAL_ERROR = "internal_error"
    NO_ACTIVE_INSTANCE = "no_active_instance"
    NOT_ACTIVE = "not_active"
    STORE_UNAVAILABLE = "store_unavailable"
    TOO_MANY_CONNECTIONS = "too_many_connections"
    HOLDER_UNREACHABLE = "holder_unreachable"

    @property
    def status(self) -> int:
        """The HTTP status that goes with it, always the same one."""
        return STATUS_OF[self]


STATUS_OF: Mapping[ErrorCode, int] = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.UNAUTHORIZED: 401,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.ACCOUNT_NOT_FOUND: 404,
    ErrorCode.MESSAGE_NOT_FOUND: 404,
    ErrorCode.METHOD_NOT_ALLOWED: 405,
    ErrorCode.NOT_ACCEPTABLE: 406,
    ErrorCode.REQUEST_TIMEOUT: 408,
    ErrorCode.ACCOUNT_EXISTS: 409,
    ErrorCode.ACCOUNT_NOT_PAIRED: 409,
    ErrorCode.ACCOUNT_QUARANTINED: 409,
    ErrorCode.ACCOUNT_BANNED: 409,
    ErrorCode.NOT_AWAITING_SCAN: 409,
    ErrorCode.IDEMPOTENCY_KEY_REUSED: 409,
    ErrorCode.NO_STANDBY: 409,
    ErrorCode.PAYLOAD_TOO_LARGE: 413,
    ErrorCode.NOT_ON_WHATSAPP: 422,
    ErrorCode.MESSAGE_FAILED: 422,
    ErrorCode.OUTBOX_FULL: 429,
    ErrorCode.INTERNAL_ERROR: 500,
    ErrorCode.NO_ACTIVE_INSTANCE: 503,
    ErrorCode.NOT_ACTIVE: 503,
    ErrorCode.STORE_UNAVAILABLE: 503,
    ErrorCode.TOO_MANY_CONNECTIONS: 503,
    ErrorCode.HOLDER_UNREACHABLE: 504,
}

MEANINGS: Mapping[ErrorCode, str] = {
    ErrorCode.INVALID_REQUEST: "A field is missing or wrong; the message names it.",
    ErrorCode.UNAUTHORIZED: "The bearer token is missing or wrong.",
    ErrorCode.NOT_FOUND: "There is no such path.",
    ErrorCode.ACCOUNT_NOT_FOUND: "No store knows the account.",
    ErrorCode.MESSAGE_NOT_FOUND: "No message has this id, or its retention is over.",
    ErrorCode.METHOD_NOT_ALLOWED: "The path exists, not with this method.",
    ErrorCode.NOT_ACCEPTABLE: "None of the formats in Accept or ?format= is offered.",
    ErrorCode.REQUEST_TIMEOUT: "The request's body did not arrive in time.",
    ErrorCode.ACCOUNT_EXISTS: "The account id is taken.",
    ErrorCode.ACCOUNT_NOT_PAIRED: "The account was never paired, or was logged out.",
    ErrorCode.ACCOUNT_QUARANTINED: "The account's state cannot be trusted; its bytes are kept.",
    ErrorCode.ACCOUNT_BANNED: "WhatsApp has banned or locked the account.",
    ErrorCode.NOT_AWAITING_SCAN: "There is no QR code now.",
    ErrorCode.IDEMPOTENCY_KEY_REUSED: "The Idempotency-Key belongs to another message.",
    ErrorCode.NO_STANDBY: "Nobody stands by who could take the lease.",
    ErrorCode.PAYLOAD_TOO_LARGE: "The request's body is over 256 KiB.",
    ErrorCode.NOT_ON_WHATSAPP: "The recipient's number has no WhatsApp account.",
    ErrorCode.MESSAGE_FAILED: "The message failed for good; the message says why.",
    ErrorCode.OUTBOX_FULL: "The account's outbox is at its limit.",
    ErrorCode.INTERNAL_ERROR: "A bug; the log has the details under the request id.",
    ErrorCode.NO_ACTIVE_INSTANCE: "No instance holds the lease right now; nothing was accepted.",
    ErrorCode.NOT_ACTIVE: (
        "Between instances only: the request was forwarded here, and this is not the holder."
    ),
    ErrorCode.STORE_UNAVAILABLE: (
        "The store did not confirm in time: what was asked may have happened. "
        "A send may be repeated with the same Idempotency-Key."
    ),
    ErrorCode.TOO_MANY_CONNECTIONS: "The connection limit is reached.",
    ErrorCode.HOLDER_UNREACHABLE: (
        "The holder took the request and did not answer: what was asked may have happened. "
        "A send may be repeated with the same Idempotency-Key."
    ),
}

RETRY_AFTER_S: Mapping[ErrorCode, float] = {
    ErrorCode.OUTBOX_FULL: 5.0,
    ErrorCode.NO_ACTIVE_INSTANCE: 2.0,
    ErrorCode.NOT_ACTIVE: 1.0,
    ErrorCode.STORE_UNAVAILABLE: 2.0,
    ErrorCode.TOO_MANY_CONNECTIONS: 5.0,
    ErrorCode.HOLDER_UNREACHABLE: 2.0,
}
"""Where waiting helps, and nobody knew better."""


class ApiError(Exception):
    """An answer "no" that the HTTP layer itself gives; `message` says what to do."""

    def __init__(
        self, code: ErrorCode, message: str, *, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after_s = RETRY_AFTER_S.get(code) if retry_after_s is None else retry_after_s


def from_refusal(refusal: Refusal) -> ApiError:
    """The same answer with its HTTP code. ValueError: a refusal that the list does not have."""
    return ApiError(ErrorCode(refusal.code), str(refusal), retry_after_s=refusal.retry_after_s)


def error_body(error: ApiError, request_id: str) -> bytes:
    """The documented JSON of an error."""
    return msgspec.json.encode(
        {
            "success": False,
            "error": error.code.value,
            "message": error.message,
            "requestId": request_id,
        }
    )


def error_headers(error: ApiError) -> list[tuple[bytes, bytes]]:
    """The headers that belong to an error: Retry-After (whole seconds, up), the challenge."""
    headers = [(b"content-type", b"application/json")]
    if error.retry_after_s is not None:
        seconds = max(1, math.ceil(error.retry_after_s))
        headers.append((b"retry-after", str(seconds).encode()))
    if error.code is ErrorCode.UNAUTHORIZED:
        headers.append((b"www-authenticate", b'Bearer realm="watchkeeper"'))
    return headers
