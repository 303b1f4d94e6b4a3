"""The connections to other instances, and one request over them to the holder.

Never lives here: waiting for another holder, or a second try (`daemon.http.forward`).
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Final
from urllib.parse import quote

import httpx
import msgspec
import trio

from daemon.http.edge import (
    FORMAT,
    FORWARDED_BY,
    FORWARDED_FORMAT,
    FORWARDED_TO,
    HOLDER_PREFIX,
    INSTANCE,
    MESSAGE_ID_HEADER,
    SEND_PATH,
    SERVED_BY,
    Answer,
    Header,
    Inbound,
)
from daemon.http.errors import ErrorCode
from daemon.http.ports import ApiSettings, InstancePort
from daemon.http.server import Note
from machine.records import Identity
from machine.views import Holder

ACCOUNTS_PATH = f"{HOLDER_PREFIX}accounts"
IMPORT_PATH = "/api/admin/import"

REQUEST_HEADERS = frozenset(
    {b"authorization", b"content-type", b"accept", b"idempotency-key", b"user-agent"}
)
"""What of a caller's request goes on to the holder; the rest is between the caller and us."""

ANSWER_HEADERS = frozenset({b"content-type", b"retry-after", b"www-authenticate", b"location"})
"""What of the holder's answer goes back to the caller; the rest is ours to say."""


NOTHING_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
)
"""After these the other instance has certainly not seen the request."""


class Outcome(Enum):
    """How a try without an answer ended."""

    NOT_STARTED = "certainly not begun"
    UNKNOWN = "may have been done"


NOT_STARTED: Final = Outcome.NOT_STARTED
UNKNOWN: Final = Outcome.UNKNOWN


@dataclass(frozen=True, slots=True)
class Links:
    """The connections to other instances. Both never use a proxy and never follow a redirect.

    `fresh` opens a new connection for each request: a kept one may be closed by the other side in
    the moment it is used, and then nobody knows whether the request was begun.
    """

    kept: httpx.AsyncClient
    fresh: httpx.AsyncClient


@asynccontextmanager
async def open_links(settings: ApiSettings) -> AsyncIterator[Links]:
    """Yield the links, and close their connections at the end.

    Their own timeouts are for connecting only; all else has a deadline at the call.
    """
    count = settings.forward_connections_max
    # Shorter than the other side keeps them, so that none is used while it is being closed.
    kept = httpx.Limits(
        max_connections=count,
        max_keepalive_connections=count,
        keepalive_expiry=settings.keep_alive_s / 3,
    )
    fresh = httpx.Limits(max_connections=count, max_keepalive_connections=0)
    timeout = httpx.Timeout(None, connect=settings.connect_s, pool=settings.connect_s)
    trust = _trust()

    def client(limits: httpx.Limits) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            limits=limits, timeout=timeout, verify=trust, trust_env=False, follow_redirects=False
        )

    async with client(kept) as kept_client, client(fresh) as fresh_client:
        yield Links(kept=kept_client, fresh=fresh_client)


class _Body(httpx.AsyncByteStream):
    """A request's body that may be left half sent.

    httpx's own is an async generator; left behind at a cancellation, it is cleaned up by the
    garbage collector, with a warning.
    """

    def __init__(self, content: bytes) -> None:
        self._chunks = [content] if content else []

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        if not self._chunks:
            raise StopAsyncIteration
        return self._chunks.pop()


def build_request(
    client: httpx.AsyncClient, method: str, url: str, headers: Sequence[Header], body: bytes
) -> httpx.Request:
    """A request that may be cancelled anywhere. Raises `httpx.InvalidURL`."""
    request = client.build_request(method, url, headers=list(headers), content=body or None)
    request.stream = _Body(body)
    return request


@cache
def _trust() -> ssl.SSLContext:
    # Reading the certificates takes a tenth of a second; they are the same for every link.
    return httpx.create_ssl_context(trust_env=False)


def is_me(holder: Holder, identity: Identity) -> bool:
    """Whether the lease names this process (not merely an earlier one of the same name)."""
    return (holder.name, holder.incarnation) == (identity.name, identity.incarnation)


def is_read(inbound: Inbound) -> bool:
    """Whether a request changes nothing."""
    return inbound.method in {"GET", "HEAD"}


def is_repeatable(inbound: Inbound) -> bool:
    """Whether a request may be made twice: it reads, or it sends under one message id."""
    return is_read(inbound) or (inbound.method == "POST" and inbound.path == SEND_PATH)


def is_listing(inbound: Inbound) -> bool:
    """Whether it is the list of accounts, which the store can answer too."""
    return inbound.method == "GET" and inbound.path == ACCOUNTS_PATH


class HolderLink:
    """Asks the holder in this instance's name."""

    def __init__(
        self, instance: InstancePort, settings: ApiSettings, links: Links, note: Note
    ) -> None:
        self._instance = instance
        self._settings = settings
        self._links = links
        self._note = note

    async def ask_holder(self, inbound: Inbound) -> Answer | None:
        """One try at whom the lease names now; `None` when that is nobody else, or did not answer.

        For reading only.
        """
        holder = self._instance.holder
        if holder is None or is_me(holder, self._instance.identity):
            return None
        outcome = await self.ask(inbound, holder)
        return outcome if isinstance(outcome, Answer) else None

    async def ask(self, inbound: Inbound, holder: Holder) -> Answer | Outcome:
        """One try at the holder. Ends with an outcome, never with an error of the network."""
        client = self._links.kept if is_repeatable(inbound) else self._links.fresh
        try:
            with trio.fail_after(self._answer_s(inbound)):
                headers = self._headers(inbound, holder)
                url = _url(holder, inbound)
                request = build_request(client, inbound.method, url, headers, inbound.body)
                response = await client.send(request, stream=True)
                try:
                    answer = await self._read(response)
                finally:
                    with trio.CancelScope(shield=True, deadline=trio.current_time() + 1.0):
                        await response.aclose()
        except NOTHING_SENT as error:
            return self._failed(inbound, holder, error, NOT_STARTED)
        except (httpx.HTTPError, trio.TooSlowError) as error:
            return self._failed(inbound, holder, error, UNKNOWN)
        return _meaning(answer)

    def _failed(
        self, inbound: Inbound, holder: Holder, error: Exception, outcome: Outcome
    ) -> Outcome:
        self._note(
            "http.forward_failed",
            method=inbound.method,
            path=inbound.path,
            holder=holder.name,
            error=type(error).__name__,
            request_id=inbound.request_id,
        )
        return outcome

    async def _read(self, response: httpx.Response) -> Answer:
        chunks: list[bytes] = []
        total = 0
        async for chunk in response.aiter_raw():
            total += len(chunk)
            # What is over the limit is thrown away and not kept, until the deadline at the latest:
            # httpx leaves half-read iterators behind when one stops in the middle.
            if total <= self._settings.answer_bytes_max:
                chunks.append(chunk)
        if total > self._settings.answer_bytes_max:
            raise httpx.DecodingError("the answer is over the limit", request=response.request)
        body = b"".join(chunks)
        headers = [
            (name.lower(), value)
            for name, value in response.headers.raw
            if name.lower() in ANSWER_HEADERS
        ]
        served_by = response.headers.get(INSTANCE.decode(), "").encode("latin-1", "replace")
        if served_by:
            headers.append((SERVED_BY, served_by))
        if response.status_code != 204:
            headers.append((b"content-length", str(len(body)).encode()))
        return Answer(response.status_code, headers, body)

    def _headers(self, inbound: Inbound, holder: Holder) -> list[Header]:
        headers = [pair for pair in inbound.headers if pair[0] in REQUEST_HEADERS]
        headers.append((b"accept-encoding", b"identity"))
        headers.append((b"x-request-id", inbound.request_id.encode()))
        headers.append((FORWARDED_BY, self._instance.identity.name.encode("latin-1", "replace")))
        headers.append((FORWARDED_FORMAT, str(FORMAT).encode()))
        headers.append((FORWARDED_TO, holder.incarnation.encode("latin-1", "replace")))
        if inbound.message_id is not None:
            headers.append((MESSAGE_ID_HEADER, inbound.message_id.encode()))
        return headers

    def _answer_s(self, inbound: Inbound) -> float:
        if is_listing(inbound):
            return self._settings.status_wait_s
        if inbound.path == IMPORT_PATH:
            return self._settings.import_s
        wait_s = self._settings.send_wait_s if inbound.path == SEND_PATH else 0.0
        return self._settings.holder_answer_s + wait_s


def _url(holder: Holder, inbound: Inbound) -> str:
    query = f"?{inbound.query.decode('latin-1')}" if inbound.query else ""
    return f"{holder.address.rstrip('/')}{quote(inbound.path)}{query}"


def _meaning(answer: Answer) -> Answer | Outcome:
    """What the holder's answer means to whoever forwarded: that its term has ended is no answer."""
    if answer.status not in {ErrorCode.NOT_ACTIVE.status, ErrorCode.HOLDER_UNREACHABLE.status}:
        return answer
    try:
        said = msgspec.json.decode(answer.body)
    except msgspec.DecodeError:
        return answer
    code = said.get("error") if isinstance(said, dict) else None
    if code == ErrorCode.NOT_ACTIVE.value:
        return NOT_STARTED
    return UNKNOWN if code == ErrorCode.HOLDER_UNREACHABLE.value else answer
