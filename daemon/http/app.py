"""Puts the API together and serves it: routes, errors, edge, relay, hellos, server."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import trio
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from daemon.http import accounts, messages, operations, status
from daemon.http.api import Api, inbound_of
from daemon.http.closing import Closing
from daemon.http.documented import document
from daemon.http.edge import AsgiApp, Edge, Receive, Scope, Send, bug, error_answer
from daemon.http.errors import ApiError, ErrorCode, from_refusal
from daemon.http.forward import Relay
from daemon.http.links import HolderLink, Links, open_links
from daemon.http.peers import Peers, keep_saying_hello
from daemon.http.ports import ApiSettings, InstancePort, MakeMessageId, RenderMetrics
from daemon.http.server import ConnectionLimits, Listening, Note, Server, bind_http
from machine.ports import StoreMisconfigured, StoreUnavailable
from machine.refusals import NotActive, Refusal, TermEnded

FIELDS_NAMED_MAX = 3
"""How many wrong fields one answer names."""


def silent(event: str, /, **fields: object) -> None:
    """A journal for nobody."""


def make_routes(api: Api, routers: Sequence[APIRouter] = ()) -> FastAPI:
    """The routes, with every error turned into its documented answer."""
    # A redirect would lead wherever the caller's Host header says; a 404 says what is wrong.
    app = FastAPI(title="Watchkeeper", version=api.settings.version, redirect_slashes=False)
    app.state.api = api
    for router in (
        accounts.router,
        messages.router,
        status.status_router,
        operations.router,
        status.health_router,
        *routers,
    ):
        # Not `include_router`: it builds each route anew at the first request, and so holds the
        # event loop up for a tenth of a second, with the lease on it.
        app.router.routes.extend(router.routes)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(Refusal, _on_refusal)
    app.add_exception_handler(StoreUnavailable, _on_store_away)
    app.add_exception_handler(StoreMisconfigured, _on_store_away)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)
    # Starlette answers with it and raises the error again, for the edge to tell the journal.
    app.add_exception_handler(Exception, _on_bug)
    # FastAPI's own way to replace the document: a method of the instance.
    app.openapi = partial(document, app)  # type: ignore[method-assign]
    return app


async def serve_api(
    instance: InstancePort,
    settings: ApiSettings,
    *,
    make_message_id: MakeMessageId,
    listening: Listening | None = None,
    routers: Sequence[APIRouter] = (),
    render_metrics: RenderMetrics | None = None,
    note: Note = silent,
    shutdown: trio.Event | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the API until `shutdown` is set or the caller cancels; started with its address.

    `listening` may be bound before (`bind_http`), when the address must be known earlier; it is
    closed in any case. At the end, requests in flight have `stop_s` to finish, and those that
    wait for a holder are answered 503.
    Raises `BindFailed`.
    """
    listening = listening or bind_http(settings.bind)
    closing = Closing()
    peers = Peers(settings.peer_ttl_s, time.time, note)
    try:
        async with open_links(settings) as links:
            edge = make_edge(
                instance,
                settings,
                links=links,
                peers=peers,
                make_message_id=make_message_id,
                routers=routers,
                render_metrics=render_metrics,
                note=note,
                closing=closing,
            )
            server = Server(edge, _limits(settings), note)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_saying_hello, instance, settings, links.kept, peers)
                try:
                    note("http.opened", address=listening.address)
                    # The sockets queue callers already: whoever is told now may ask now.
                    task_status.started(listening.address)
                    await server.serve(
                        listening,
                        shutdown=trio.Event() if shutdown is None else shutdown,
                        closing=closing,
                    )
                finally:
                    nursery.cancel_scope.cancel()
    finally:
        listening.close()


async def serve_metrics(
    settings: ApiSettings,
    render_metrics: RenderMetrics,
    *,
    listening: Listening,
    note: Note = silent,
    shutdown: trio.Event | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve `GET /metrics` on a listener of its own, without a token. Ends as `serve_api` does."""
    server = Server(_metrics_app(render_metrics), _limits(settings), note)
    task_status.started(listening.address)
    try:
        await server.serve(
            listening, shutdown=trio.Event() if shutdown is None else shutdown, closing=Closing()
        )
    finally:
        listening.close()


def _metrics_app(render_metrics: RenderMetrics) -> AsgiApp:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found = scope["type"] == "http" and scope["path"] == "/metrics"
        body = render_metrics() if found else b""
        headers = [
            (b"content-type", status.METRICS_TYPE.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        if scope["type"] == "http":
            code = 200 if found else 404
            await send({"type": "http.response.start", "status": code, "headers": headers})
            await send({"type": "http.response.body", "body": body})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})

    return app


def _limits(settings: ApiSettings) -> ConnectionLimits:
    return ConnectionLimits(
        connections_max=settings.connections_max,
        keep_alive_s=settings.keep_alive_s,
        send_s=settings.send_s,
        stop_s=settings.stop_s,
    )


def make_edge(
    instance: InstancePort,
    settings: ApiSettings,
    *,
    links: Links,
    peers: Peers,
    make_message_id: MakeMessageId,
    routers: Sequence[APIRouter],
    render_metrics: RenderMetrics | None,
    note: Note,
    closing: Closing,
) -> Edge:
    """The whole application, without sockets."""
    link = HolderLink(instance, settings, links, note)
    api = Api(
        instance=instance,
        settings=settings,
        peers=peers,
        make_message_id=make_message_id,
        ask_holder=link.ask_holder,
        render_metrics=render_metrics,
    )
    # Starlette types an application by its own aliases of the same shapes.
    routes = cast(AsgiApp, make_routes(api, routers))
    relay = Relay(routes, instance, settings, link, closing=closing)
    return Edge(
        routes,
        relay.answer,
        instance,
        settings,
        make_message_id=make_message_id,
        note=note,
        closing=closing,
    )


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    answer = error_answer(error, inbound_of(request).request_id)
    response = Response(answer.body, answer.status)
    response.raw_headers = list(answer.headers)
    return response


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    if isinstance(error, NotActive):
        # The relay asks elsewhere instead of telling the caller.
        inbound_of(request).not_active = True
        inbound_of(request).begun = isinstance(error, TermEnded)
    return await _on_api_error(request, from_refusal(error))


async def _on_store_away(request: Request, error: Exception) -> Response:
    told = "The store did not answer: ask again; its state is in the log."
    return await _on_api_error(request, ApiError(ErrorCode.STORE_UNAVAILABLE, told))


async def _on_bug(request: Request, error: Exception) -> Response:
    return await _on_api_error(request, bug())


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    told = "; ".join(_wrong(found) for found in error.errors()[:FIELDS_NAMED_MAX])
    return await _on_api_error(request, ApiError(ErrorCode.INVALID_REQUEST, f"{told}."))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """FastAPI's own: no such path, no such method, a body that it cannot read."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 405:
        told = ApiError(ErrorCode.METHOD_NOT_ALLOWED, f"Not {request.method} here: see /docs.")
        response = await _on_api_error(request, told)
        response.headers["allow"] = ", ".join(sorted(_methods_of_path(request)))
        return response
    if error.status_code == 404:
        told = ApiError(ErrorCode.NOT_FOUND, f"There is no {path[:200]}: see /docs.")
    else:
        told = ApiError(ErrorCode.INVALID_REQUEST, "The body cannot be read as JSON.")
    return await _on_api_error(request, told)


def _methods_of_path(request: Request) -> set[str]:
    """Every method that the path has. (Starlette's own list is the first route's alone.)"""
    methods: set[str] = set()
    for route in request.app.routes:
        match, _ = route.matches(request.scope)
        if match is not Match.NONE:
            methods |= route.methods
    return methods


def _wrong(found: dict[str, Any]) -> str:
    """One wrong field in words. What was sent is not repeated: it may be a secret."""
    where, *names = found["loc"]
    if found["type"] == "json_invalid":
        return f"the body is not valid JSON (at character {names[0] if names else 0})"
    if where == "body" and not names:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    field = ".".join(str(name) for name in names)
    told = str(found["msg"]).removeprefix("Value error, ")
    return f"{field}: {told[:1].lower()}{told[1:]}"
