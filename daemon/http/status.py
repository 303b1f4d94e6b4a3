"""The routes about this instance: dashboard, transitions, diagram, health, metrics.

Each is answered by the instance that was asked; none is forwarded.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Annotated, Any, Protocol, cast

import msgspec
import trio
from fastapi import APIRouter, Query, Request, Response

from daemon.http.accept import choose_format, documented_formats
from daemon.http.api import Api, api_of, inbound_of, reply
from daemon.http.documented import errors, file_answer
from daemon.http.edge import Inbound
from daemon.http.errors import ApiError, ErrorCode
from daemon.http.links import ACCOUNTS_PATH
from daemon.http.models import DashboardAnswer, HealthAnswer, TransitionsAnswer
from daemon.http.shapes import (
    Json,
    accounts_json,
    lease_json,
    moment,
    peer_seen_json,
    restore_json,
    transition_json,
)
from machine.ports import StoreMisconfigured, StoreUnavailable
from machine.refusals import Refusal
from machine.states import State

status_router = APIRouter(prefix="/api/status", tags=["status"])
health_router = APIRouter(tags=["health"])

TRANSITIONS_MAX = 1000

DIAGRAM_FORMATS = {
    "svg": "image/svg+xml",
    "mermaid": "text/vnd.mermaid",
    "dot": "text/vnd.graphviz",
}
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class RenderDiagram(Protocol):
    """`daemon.diagram.render`: the state diagram, with the present state marked."""

    def __call__(self, format: str, *, current: State | None = None) -> str | bytes: ...


@status_router.get("/dashboard", response_model=DashboardAnswer, responses=errors())
async def get_dashboard(request: Request) -> Response:
    """This instance, the lease as it sees it, the last restore, the accounts, the peers."""
    api = api_of(request)
    instance = api.instance
    desk = instance.desk
    accounts, source = await _accounts(api, inbound_of(request))
    depth = sum(cast(int, account["queued"]) for account in accounts)
    return reply(
        {
            "success": True,
            "instance": {
                "id": instance.identity.name,
                "state": instance.state.value,
                "since": moment(instance.since),
                "version": api.settings.version,
                "epoch": None if desk is None else desk.epoch,
                "address": instance.identity.address,
            },
            "lease": lease_json(instance.lease_status),
            "restore": restore_json(instance.restore_report),
            "accounts": accounts,
            "accountsFrom": source,
            "outbox": {"depth": _depth(source, None if desk is None else desk.outbox_depth, depth)},
            "peers": [peer_seen_json(peer) for peer in api.peers.known()],
        }
    )


@status_router.get("/transitions", response_model=TransitionsAnswer, responses=errors())
async def get_transitions(request: Request) -> Response:
    """The last 1,000 transitions of this instance, newest last."""
    newest = list(api_of(request).instance.transitions)[-TRANSITIONS_MAX:]
    transitions = [transition_json(transition) for transition in newest]
    return reply({"success": True, "transitions": transitions, "count": len(transitions)})


@status_router.get(
    "/diagram",
    response_class=Response,
    responses={
        200: file_answer("The state diagram, with the present state", *DIAGRAM_FORMATS.values()),
        **errors(ErrorCode.NOT_ACCEPTABLE),
    },
)
async def get_diagram(
    request: Request,
    wanted: Annotated[
        str | None, documented_formats(DIAGRAM_FORMATS), Query(alias="format")
    ] = None,
) -> Response:
    """The state diagram with the present state marked, by `Accept` or `?format=`."""
    accept = request.headers.get("accept")
    # Browsers and curl take anything; `text/plain` gets the one that reads well as text.
    if wanted is None and accept == "text/plain":
        wanted = "mermaid"
    name = choose_format(DIAGRAM_FORMATS, accept, wanted)
    # Only here: it brings a drawing library along that nothing else of the API needs.
    render: RenderDiagram = importlib.import_module("daemon.diagram").render
    drawn = render(name, current=api_of(request).instance.state)
    media_type = DIAGRAM_FORMATS[name] + ("" if name == "svg" else "; charset=utf-8")
    return Response(drawn, media_type=media_type)


@health_router.get(
    "/metrics",
    response_class=Response,
    responses={
        200: file_answer("Prometheus' text format", "text/plain"),
        **errors(ErrorCode.NOT_FOUND),
    },
)
async def get_metrics(request: Request) -> Response:
    """Prometheus' text format. With the token here; without on the metrics listener, if any."""
    render = api_of(request).render_metrics
    if render is None:
        raise ApiError(ErrorCode.NOT_FOUND, "This instance keeps no metrics.")
    return Response(render(), headers={"content-type": METRICS_TYPE})


HEALTH: dict[int | str, dict[str, Any]] = {503: {"model": HealthAnswer, "description": "No"}}


@health_router.get("/livez", response_model=HealthAnswer, responses=HEALTH)
async def livez(request: Request) -> Response:
    """200 while the event loop turns and no essential task is dead. Otherwise: restart it."""
    return _health(request, api_of(request).instance.alive)


@health_router.get("/readyz", response_model=HealthAnswer, responses=HEALTH)
async def readyz(request: Request) -> Response:
    """200 while this instance can answer, forward, or hold requests through a handoff."""
    instance = api_of(request).instance
    return _health(request, instance.alive and instance.state in {State.PASSIVE, State.ACTIVE})


@health_router.get("/startupz", response_model=HealthAnswer, responses=HEALTH)
async def startupz(request: Request) -> Response:
    """200 once the instance has booted."""
    return _health(request, api_of(request).instance.state is not State.BOOTING)


@health_router.get("/active", response_model=HealthAnswer, responses=HEALTH)
async def active(request: Request) -> Response:
    """200 only while ACTIVE: for load balancers."""
    return _health(request, api_of(request).instance.state is State.ACTIVE)


@health_router.get("/passive", response_model=HealthAnswer, responses=HEALTH)
async def passive(request: Request) -> Response:
    """200 only while PASSIVE: for load balancers."""
    return _health(request, api_of(request).instance.state is State.PASSIVE)


def _health(request: Request, ok: bool) -> Response:
    state = api_of(request).instance.state
    return reply({"ok": ok, "state": state.value}, 200 if ok else 503)


async def _accounts(api: Api, inbound: Inbound) -> tuple[list[Json], str]:
    """The accounts from here, the holder or the store: whoever answers within `status_wait_s`."""
    instance = api.instance
    with trio.move_on_after(api.settings.status_wait_s):
        try:
            if instance.desk is not None:
                return _listed(accounts_json(await instance.desk.list_accounts())), "memory"
        except Refusal:
            pass  # The term has just ended: somebody else knows now.
        asked = await api.ask_holder(_listing_for(inbound))
        if asked is not None and asked.status == 200:
            return _listed(msgspec.json.decode(asked.body)), "holder"
    with trio.move_on_after(api.settings.status_wait_s):
        try:
            views = await instance.list_accounts()
        except (StoreUnavailable, StoreMisconfigured):
            return [], "none"
        return _listed(accounts_json(views, in_memory=False)), "store"
    return [], "none"


def _listing_for(inbound: Inbound) -> Inbound:
    """The caller's own request for the list of accounts, with its token."""
    return Inbound(
        request_id=inbound.request_id,
        method="GET",
        path=ACCOUNTS_PATH,
        query=b"",
        headers=[pair for pair in inbound.headers if pair[0] == b"authorization"],
    )


def _listed(answer: Json) -> list[Json]:
    return list(cast(Iterable[Json], answer["accounts"]))


def _depth(source: str, here: int | None, counted: int) -> int | None:
    if source == "memory":
        return counted if here is None else here
    return counted if source == "holder" else None
