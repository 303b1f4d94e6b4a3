"""What the routes share: the instance they speak for, and how an answer is written.

Never lives here: a route.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
import trio
from fastapi import Request, Response

from daemon.http.edge import Answer, Inbound
from daemon.http.errors import ApiError, ErrorCode
from daemon.http.peers import Peers
from daemon.http.ports import (
    ApiSettings,
    DeskPort,
    InstancePort,
    MakeMessageId,
    RenderMetrics,
)
from machine.refusals import NotActive

AskHolder = Callable[[Inbound], Awaitable[Answer | None]]


@dataclass(frozen=True, slots=True)
class Api:
    """Everything that a route may use."""

    instance: InstancePort
    settings: ApiSettings
    peers: Peers
    make_message_id: MakeMessageId
    ask_holder: AskHolder
    """One try at the holder, for reading; `None` when there is none, or no answer."""
    render_metrics: RenderMetrics | None = None
    rng: random.Random = field(default_factory=random.SystemRandom)


def api_of(request: Request) -> Api:
    """The `Api` of the application that serves this request."""
    api: Api = request.app.state.api
    return api


def inbound_of(request: Request) -> Inbound:
    """The request as the edge read it."""
    inbound: Inbound = request.scope["watchkeeper"]
    return inbound


def active_desk(request: Request) -> DeskPort:
    """Where the term answers this request. Raises `NotActive`."""
    desk = api_of(request).instance.desk
    if desk is None:
        raise NotActive("This instance does not hold the lease.")
    return desk


@contextmanager
def in_time(seconds: float) -> Iterator[None]:
    """A deadline for the machine. Over it: `ApiError(STORE_UNAVAILABLE)`."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise ApiError(
            ErrorCode.STORE_UNAVAILABLE,
            f"Not confirmed within {seconds:g} s: what was asked may have happened. Look before "
            "you ask again; a send may be repeated with the same Idempotency-Key.",
        ) from None


def reply(data: object, status: int = 200) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(data), status, media_type="application/json")
