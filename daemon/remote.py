"""A running instance, as the commands see it: one HTTP client, its refusals and its absence.

Never lives here: what is printed (`daemon.cli`). The token goes into a header and nowhere else:
no redirect is followed and no proxy of the environment is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import httpx

from daemon.settings import UNSPECIFIED_HOSTS, Settings

CONNECT_S = 5.0
ANSWER_S = 60.0
"""Longer than an instance lets a request wait for a new holder and a send for its ack."""
IMPORT_S = 3600.0
PROBE_S = 3.0
TOKEN_FILE_BYTES_MAX = 4096


class Refused(Exception):
    """The instance answered no. The message is its own sentence; `code` is API.md's."""

    def __init__(self, code: str, message: str, status: int, request_id: str | None) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.request_id = request_id


class Unreachable(Exception):
    """Nobody answered, or not like one of ours. What was asked may have happened."""


class BadTarget(Exception):
    """The address or the token cannot be used; the message says what to change."""


def local_address(settings: Settings) -> str:
    """Where the instance with these settings answers on this host."""
    host, port = settings.host_port
    if settings.advertise_url is None and host in UNSPECIFIED_HOSTS:
        return f"http://{'[::1]' if ':' in host else '127.0.0.1'}:{port}"
    return settings.address()


def read_token(settings: Settings, token_file: Path | None) -> str | None:
    """Take the token from `token_file`, else from the settings. Raises `BadTarget`."""
    if token_file is None:
        return next(iter(settings.admin_tokens()), None)
    try:
        with token_file.open("rb") as file:
            text = file.read(TOKEN_FILE_BYTES_MAX).decode("ascii")
    except OSError as error:
        raise BadTarget(f"{token_file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError:
        raise BadTarget(f"{token_file} does not hold a token.") from None
    tokens = text.split()
    if not tokens:
        raise BadTarget(f"{token_file} is empty. Put the admin token into it.")
    return tokens[0]


class Remote:
    """One instance's API. Use as a context manager; every call is one request."""

    def __init__(self, url: str, token: str | None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.username:
            raise BadTarget("The address must look like http://127.0.0.1:8080.")
        self.url = url.rstrip("/")
        self._has_token = token is not None
        self._client = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            # Reading the certificates takes longer than most answers: not for plain HTTP.
            verify=parts.scheme == "https",
            trust_env=False,
            follow_redirects=False,
        )

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        frames: TracebackType | None,
    ) -> None:
        self._client.close()

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        answer_s: float = ANSWER_S,
    ) -> dict[str, Any]:
        """Ask, and give the answer's JSON; an empty object for an answer without a body.

        Raises `Refused`, `Unreachable`.
        """
        try:
            answer = self._client.request(
                method,
                path,
                json=body,
                headers={"Accept": "application/json", **(headers or {})},
                timeout=httpx.Timeout(answer_s, connect=CONNECT_S),
            )
        except httpx.HTTPError as error:
            raise Unreachable(
                f"No answer from {self.url} ({_why(error)}). Is an instance running there? Start "
                "one with `watchkeeper run`, or name another with --url."
            ) from error
        return self._read(answer)

    def _read(self, answer: httpx.Response) -> dict[str, Any]:
        if answer.status_code == 204:
            return {}
        try:
            content = answer.json()
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise Unreachable(
                f"{self.url} answered {answer.status_code}, but not like an instance of "
                "Watchkeeper. Check the address."
            )
        if answer.is_success and content.get("success") is not False:
            return content
        message = str(content.get("message") or f"The answer was {answer.status_code}.")
        if answer.status_code == 401:
            hint = "The token is another one's." if self._has_token else "No token was sent."
            message = f"{message} ({hint} Name the right one with --token-file.)"
        request_id = content.get("requestId") or answer.headers.get("x-request-id")
        raise Refused(
            str(content.get("error") or "refused"), message, answer.status_code, request_id
        )


def probe(url: str, path: str) -> tuple[bool, str]:
    """Ask a health endpoint, without a token; whether it says yes, and a sentence if not.

    Raises `Unreachable` when nobody answers within `PROBE_S`.
    """
    try:
        answer = httpx.get(url.rstrip("/") + path, timeout=PROBE_S, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise Unreachable(f"No answer from {url}{path} ({error}).") from error
    return answer.is_success, f"{url}{path} answered {answer.status_code}."


def _why(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "it took too long"
    return str(error) or type(error).__name__
