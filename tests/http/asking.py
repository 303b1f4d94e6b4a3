"""Ways to ask an API: in the process, without sockets, or over real ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import httpx
import trio
from fastapi import APIRouter

from daemon.http.api import Api
from daemon.http.app import make_edge, make_routes, serve_api
from daemon.http.closing import Closing
from daemon.http.documented import document
from daemon.http.edge import Inbound
from daemon.http.links import open_links
from daemon.http.peers import Peers
from daemon.http.ports import ApiSettings, RenderMetrics
from tests.http.documented import Document
from tests.http.fakes import NOW, TOKEN, FakeInstance, Notes, World, make_message_id, settings

HOLD_CONNECTIONS = """
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(int(sys.argv[2]))]
print(len(held), flush=True)
sys.stdin.read()
"""
"""A program that opens connections to a port of this host, and holds them until its stdin ends."""

BEARER = {"authorization": f"Bearer {TOKEN}"}


@cache
def the_document() -> Document:
    # The document does not depend on the instance that serves it.
    async def nobody(inbound: Inbound) -> None:
        return None

    given = settings()
    peers = Peers(given.peer_ttl_s, lambda: NOW, Notes())
    api = Api(FakeInstance(World()), given, peers, make_message_id, nobody)
    return Document(document(make_routes(api)))


async def hold_against_document(response: httpx.Response) -> None:
    """Every answer that a test gets is documented, down to its fields."""
    await response.aread()
    media_type = response.headers.get("content-type", "").partition(";")[0]
    content = response.json() if media_type == "application/json" else None
    faults = the_document().faults_of_answer(
        response.request.method,
        response.request.url.path,
        response.status_code,
        media_type,
        content,
    )
    assert not faults, faults


@dataclass
class Asking:
    """An API under test, and how to ask it."""

    client: httpx.AsyncClient
    peers: Peers
    notes: Notes
    closing: Closing

    async def get(self, path: str, **more: Any) -> httpx.Response:
        return await self.client.get(path, **more)

    async def post(self, path: str, content: object = None, **more: Any) -> httpx.Response:
        return await self.client.post(path, json=content, **more)

    async def send(self, **changes: Any) -> httpx.Response:
        headers = changes.pop("headers", {})
        content = {"accountId": "support", "to": "+49 151 2345", "message": "Hello", **changes}
        return await self.post("/api/whatsapp/send-message", content, headers=headers)


@asynccontextmanager
async def asked_in_process(
    instance: FakeInstance,
    given: ApiSettings | None = None,
    *,
    routers: Sequence[APIRouter] = (),
    render_metrics: RenderMetrics | None = None,
    checked: bool = True,
) -> AsyncIterator[Asking]:
    """The whole application, without sockets: Trio's virtual clock works."""
    given = given or settings()
    notes = Notes()
    peers = Peers(given.peer_ttl_s, lambda: NOW, notes)
    closing = Closing()
    async with open_links(given) as links:
        edge = make_edge(
            instance,
            given,
            links=links,
            peers=peers,
            make_message_id=make_message_id,
            routers=routers,
            render_metrics=render_metrics,
            note=notes,
            closing=closing,
        )
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=edge),
            base_url="http://api",
            headers=BEARER,
            event_hooks={"response": [hold_against_document] if checked else []},
        ) as client:
            yield Asking(client, peers, notes, closing)


@dataclass
class Served:
    """An API on a real socket."""

    url: str
    notes: Notes
    shutdown: trio.Event
    ended: trio.Event


@asynccontextmanager
async def served(instance: FakeInstance, given: ApiSettings | None = None) -> AsyncIterator[Served]:
    """Serve on a free port; the instance then knows its address."""
    notes = Notes()
    shutdown, ended = trio.Event(), trio.Event()

    async def serve(*, task_status: trio.TaskStatus[str]) -> None:
        await serve_api(
            instance,
            given or settings(stop_s=0.3),
            make_message_id=make_message_id,
            note=notes,
            shutdown=shutdown,
            task_status=task_status,
        )
        ended.set()

    async with trio.open_nursery() as nursery:
        url = await nursery.start(partial(serve))
        instance.at(url)
        yield Served(url, notes, shutdown, ended)
        shutdown.set()


def talking_to(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        headers=BEARER,
        trust_env=False,
        timeout=15,
        event_hooks={"response": [hold_against_document]},
    )
