"""The outermost layer: what every request passes before a route sees it, as plain ASGI.

Request id, token, body within its limit, then either the relay (what only the holder may answer)
or the routes of this instance. Every answer leaves through here and carries the same headers.
"""

from __future__ import annotations

import random
import re
import secrets
import traceback
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from daemon.http.auth import Guard
from daemon.http.closing import Closing
from daemon.http.errors import ApiError, ErrorCode, error_body, error_headers
from daemon.http.ports import ApiSettings, InstancePort, MakeMessageId
from daemon.http.server import Note
from daemon.journal import answering
from machine.records import AccountId, MessageId
from machine.states import State

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Header = tuple[bytes, bytes]

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
MESSAGE_ID = re.compile(rb"[A-Za-z0-9_-]{8,64}")

FORWARDED_BY = b"x-watchkeeper-forwarded-by"
FORWARDED_TO = b"x-watchkeeper-forwarded-to"
FORWARDED_FORMAT = b"x-watchkeeper-forwarded-format"
MESSAGE_ID_HEADER = b"x-watchkeeper-message-id"
SERVED_BY = b"x-watchkeeper-served-by"
INSTANCE = b"x-watchkeeper-instance"
STATE = b"x-watchkeeper-state"

FORMAT = 1
"""Of what instances tell each other in these headers. What an earlier release may overlook is a
header more and no new format; absent, it is 1."""

HOLDER_PATHS = frozenset({"/api/admin/step-down", "/api/admin/import"})
HOLDER_PREFIX = "/api/whatsapp/"
SEND_PATH = "/api/whatsapp/send-message"
INBOX_PATH = "/api/whatsapp/messages"
"""Read from the shared store, which every instance can."""

DRAIN_BYTES_MAX = 4 * 1024 * 1024
DRAIN_S = 2.0
"""How much of an oversized body is read and thrown away, so that the caller sees the answer
instead of a reset connection."""


@dataclass(slots=True)
class Inbound:
    """One request, read completely. `message_id` is made once, here or at the instance that
    forwarded it: every try to send the message uses the same one."""

    request_id: str
    method: str
    path: str
    query: bytes
    headers: Sequence[Header]
    body: bytes = b""
    forwarded_by: str | None = None
    forwarded_to: str | None = None
    forwarded_format: int = FORMAT
    message_id: MessageId | None = None
    not_active: bool = False
    """Set by the routes: this instance's term has ended, and the answer is not one to give."""
    begun: bool = False
    """Set with it: what was asked may have been done."""
    scope: Scope = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """One complete answer."""

    status: int
    headers: list[Header]
    body: bytes


AnswerAtHolder = Callable[[Inbound], Awaitable[Answer]]


class Edge:
    """The ASGI application that the server runs."""

    def __init__(
        self,
        routes: AsgiApp,
        relay: AnswerAtHolder,
        instance: InstancePort,
        settings: ApiSettings,
        *,
        make_message_id: MakeMessageId,
        note: Note,
        closing: Closing,
    ) -> None:
        self._make_message_id = make_message_id
        self._rng = random.SystemRandom()
        self._routes = routes
        self._relay = relay
        self._instance = instance
        self._settings = settings
        self._guard = Guard(settings.tokens)
        self._note = note
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1003})
            return
        inbound = Inbound(
            request_id=_request_id(scope["headers"]),
            method=scope["method"],
            path=scope["path"],
            query=scope["query_string"],
            headers=scope["headers"],
            scope=scope,
        )
        outbound = _Outbound(self, inbound, send)
        try:
            with answering(inbound.request_id):
                await self._answer(inbound, receive, outbound)
        except ApiError as error:
            await outbound.refuse(error, receive)
        except Exception as error:  # noqa: BLE001  (a bug: told, answered 500, and only this request)
            self._note(
                "http.request_failed",
                method=inbound.method,
                path=inbound.path,
                error=_place_of(error),
                request_id=inbound.request_id,
            )
            await outbound.refuse(bug(), receive)

    async def _answer(self, inbound: Inbound, receive: Receive, outbound: _Outbound) -> None:
        self._guard.check(inbound.path, inbound.headers, inbound.query)
        _read_internal_headers(inbound)
        body = await self._read_body(inbound, receive)
        if body is None:
            return
        inbound.body = body
        if inbound.path == SEND_PATH and inbound.message_id is None:
            self._name_message(inbound)
        at_holder = inbound.path.startswith(HOLDER_PREFIX) or inbound.path in HOLDER_PATHS
        if at_holder and inbound.path != INBOX_PATH:
            await outbound.send_whole(await self._relay(inbound))
        else:
            await self._routes(inner_scope(inbound), replay(inbound.body), outbound.send)

    def _name_message(self, inbound: Inbound) -> None:
        """Make the message id, before anything: every try, at any instance, uses this one.

        With an Idempotency-Key it follows from account and key, and each instance finds it itself.
        """
        if not any(name == b"idempotency-key" for name, _ in inbound.headers):
            inbound.message_id = self._make_message_id(AccountId(""), None, self._rng)

    async def _read_body(self, inbound: Inbound, receive: Receive) -> bytes | None:
        """The whole body; `None` when the caller has gone. Raises `ApiError` (413, 408)."""
        limit = self._settings.body_bytes_max
        if _declared_length(inbound.headers) > limit:
            raise _too_large(limit)
        chunks: list[bytes] = []
        total = 0
        with trio.move_on_after(self._settings.body_s):
            while True:
                event = await receive()
                if event["type"] == "http.disconnect":
                    return None
                chunk = event.get("body", b"")
                total += len(chunk)
                if total > limit:
                    raise _too_large(limit)
                chunks.append(chunk)
                if not event.get("more_body", False):
                    return b"".join(chunks)
        raise ApiError(
            ErrorCode.REQUEST_TIMEOUT,
            f"The body did not arrive within {self._settings.body_s:g} s: send it at once.",
        )

    def common_headers(self, inbound: Inbound) -> list[Header]:
        """What every answer of this instance carries."""
        state = self._instance.state
        headers = [
            (INSTANCE, self._instance.identity.name.encode("latin-1", "replace")),
            (STATE, state.value.encode()),
            (b"x-request-id", inbound.request_id.encode()),
            (b"cache-control", b"no-store"),
            (b"x-content-type-options", b"nosniff"),
        ]
        ending = state is State.DRAINING or self._closing.begun
        if ending and inbound.scope["http_version"].startswith("1"):
            # Callers open their next connection elsewhere, instead of losing it with us.
            headers.append((b"connection", b"close"))
        return headers


class _Outbound:
    """One answer on its way out. It is begun at most once."""

    def __init__(self, edge: Edge, inbound: Inbound, send: Send) -> None:
        self._edge = edge
        self._inbound = inbound
        self._send = send
        self._begun = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._begun = True
            message["headers"] = [
                *message.get("headers", ()),
                *self._edge.common_headers(self._inbound),
            ]
        await self._send(message)

    async def send_whole(self, answer: Answer) -> None:
        await self.send(
            {"type": "http.response.start", "status": answer.status, "headers": answer.headers}
        )
        await self._send({"type": "http.response.body", "body": answer.body})

    async def refuse(self, error: ApiError, receive: Receive) -> None:
        """Answer with an error, unless an answer has begun: then the connection is cut instead."""
        if self._begun:
            return
        answer = error_answer(error, self._inbound.request_id)
        if error.code not in {ErrorCode.PAYLOAD_TOO_LARGE, ErrorCode.UNAUTHORIZED}:
            await self.send_whole(answer)
            return
        # The body was not read. Closing over unread bytes resets the connection, and the caller
        # would never see why: the answer goes out first, then some of the body is thrown away.
        await self.send(
            {"type": "http.response.start", "status": answer.status, "headers": answer.headers}
        )
        await self._send({"type": "http.response.body", "body": answer.body, "more_body": True})
        await _throw_away(receive)
        await self._send({"type": "http.response.body", "body": b""})


def error_answer(error: ApiError, request_id: str) -> Answer:
    """An error as a complete answer."""
    body = error_body(error, request_id)
    headers = [*error_headers(error), (b"content-length", str(len(body)).encode())]
    return Answer(error.code.status, headers, body)


def inner_scope(inbound: Inbound) -> Scope:
    """The scope for the routes: a copy, with the request's facts under `watchkeeper`."""
    return {**inbound.scope, "state": {}, "watchkeeper": inbound}


def replay(body: bytes) -> Receive:
    """A `receive` that hands over `body` again, then waits as a silent caller would."""
    handed = False

    async def receive() -> MutableMapping[str, Any]:
        nonlocal handed
        if handed:
            await trio.sleep_forever()
        handed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _throw_away(receive: Receive) -> None:
    total = 0
    with trio.move_on_after(DRAIN_S):
        while total < DRAIN_BYTES_MAX:
            event = await receive()
            total += len(event.get("body", b""))
            if event["type"] == "http.disconnect" or not event.get("more_body", False):
                return


def _place_of(error: BaseException) -> str:
    """What kind of error, and where it was raised: not its words, which may hold a caller's."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    place = f" at {Path(frames[0].filename).name}:{frames[0].lineno}" if frames else ""
    return f"{type(error).__name__}{place}"


def _request_id(headers: Sequence[Header]) -> str:
    for name, value in headers:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return value.decode()
    return secrets.token_hex(8)


def _read_internal_headers(inbound: Inbound) -> None:
    """Take over what the forwarding instance says. Without its name, nothing of it counts."""
    said = {
        name: value
        for name, value in inbound.headers
        if name in {FORWARDED_BY, FORWARDED_TO, FORWARDED_FORMAT, MESSAGE_ID_HEADER}
    }
    if FORWARDED_BY not in said:
        return
    inbound.forwarded_by = said[FORWARDED_BY].decode("latin-1")[:100]
    inbound.forwarded_to = said.get(FORWARDED_TO, b"").decode("latin-1")[:100]
    written = said.get(FORWARDED_FORMAT, b"1")
    inbound.forwarded_format = int(written[:9]) if written.isdigit() else FORMAT + 1
    message_id = said.get(MESSAGE_ID_HEADER, b"")
    if MESSAGE_ID.fullmatch(message_id):
        inbound.message_id = MessageId(message_id.decode())


def _declared_length(headers: Sequence[Header]) -> int:
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


def _too_large(limit: int) -> ApiError:
    return ApiError(
        ErrorCode.PAYLOAD_TOO_LARGE,
        f"The body is over {limit // 1024} KiB: shorten the message, or send several.",
    )


def bug() -> ApiError:
    """The answer to a request that met a bug of ours."""
    return ApiError(
        ErrorCode.INTERNAL_ERROR,
        "Something went wrong here, not in your request: the log has the details under this "
        "request id.",
    )
