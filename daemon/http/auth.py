"""Who may ask: the bearer token, compared in constant time.

Never lives here: a message that repeats what was sent.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from daemon.http.errors import ApiError, ErrorCode

OPEN_PATHS = frozenset(
    {
        "/livez",
        "/readyz",
        "/startupz",
        "/active",
        "/passive",
        "/openapi.json",
        "/docs",
        "/docs/oauth2-redirect",
        "/redoc",
    }
)
"""Answered without a token: health, and the documentation of the API, which holds no data."""

TOKEN_CHARACTERS_MIN = 8
AUTHORIZATION_BYTES_MAX = 4096
"""A longer header is refused unread; no token of ours comes near it."""

Headers = Iterable[tuple[bytes, bytes]]


class Tokens:
    """The bearer tokens that are accepted now; another set may take their place at any moment.

    `own` is the first: what this instance sends to others. Several are there for a change of token
    without an interruption.
    """

    def __init__(self, accepted: Sequence[str]) -> None:
        self.replace(accepted)

    def replace(self, accepted: Sequence[str]) -> None:
        """Accept these, and no others, from the next request on.

        Raises `ValueError` when there is none, or one that is too short to be a secret.
        """
        if not accepted or any(len(value) < TOKEN_CHARACTERS_MIN for value in accepted):
            raise ValueError(
                f"every API token must have at least {TOKEN_CHARACTERS_MIN} characters, and one "
                "must exist"
            )
        self.own = accepted[0]
        self.digests = tuple(_digest(value.encode()) for value in accepted)


class Guard:
    """Lets requests pass that carry an accepted token."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def check(self, path: str, headers: Headers, query: bytes) -> None:
        """Let a request pass, or raise `ApiError(UNAUTHORIZED)`."""
        if path in OPEN_PATHS:
            return
        if _has_token_in_query(query):
            raise ApiError(
                ErrorCode.UNAUTHORIZED,
                "A token in the address ends up in logs: send `Authorization: Bearer …` instead, "
                "and replace that token if it was a real one.",
            )
        sent = [value for name, value in headers if name == b"authorization"]
        if not sent:
            raise ApiError(
                ErrorCode.UNAUTHORIZED, "No token: send the header `Authorization: Bearer …`."
            )
        if len(sent) > 1 or not self._accepts(sent[0]):
            raise ApiError(
                ErrorCode.UNAUTHORIZED,
                "The token is not accepted: compare it with the instance's token file.",
            )

    def _accepts(self, header: bytes) -> bool:
        if len(header) > AUTHORIZATION_BYTES_MAX:
            return False
        scheme, _, secret = header.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        sent = _digest(secret.strip())
        # Every digest is compared, so that the time does not tell which one came close.
        matches = [hmac.compare_digest(sent, digest) for digest in self._tokens.digests]
        return any(matches)


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _has_token_in_query(query: bytes) -> bool:
    if not query:
        return False
    names = (part.partition(b"=")[0].lower() for part in query.split(b"&"))
    return any(name in {b"token", b"access_token"} for name in names)
