"""The routes that operate the group: step down, drain, import; and the hello between instances.

`step-down` and `import` act at the holder, whoever was asked; `drain` ends the instance addressed.
"""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from daemon.http.api import active_desk, api_of, in_time, reply
from daemon.http.documented import AT_HOLDER, WITH_BODY, errors
from daemon.http.errors import ErrorCode
from daemon.http.models import (
    AcceptedAnswer,
    DrainRequest,
    Hello,
    HelloAnswer,
    ImportAnswer,
    ImportRequest,
    StepDownRequest,
)
from daemon.http.peers import HELLO_PATH, Peers, peer_json
from machine.refusals import NoStandby

router = APIRouter(tags=["operations"])


@router.post(
    "/api/admin/step-down",
    status_code=202,
    response_model=AcceptedAnswer,
    responses=errors(ErrorCode.NO_STANDBY, *WITH_BODY, *AT_HOLDER),
)
async def step_down(request: Request, wanted: StepDownRequest) -> Response:
    """Let the holder give the lease to a standby: it drains first, then releases.

    Refused when nobody stands by, unless `force` is true: then nobody may be ACTIVE for a while.
    """
    api = api_of(request)
    active_desk(request)
    if not wanted.force:
        _require_standby(api.peers, wanted.handoff_to)
    api.instance.request_step_down(wanted.reason, handoff_to=wanted.handoff_to)
    return _accepted(request, wanted.handoff_to)


@router.post(
    "/api/admin/drain",
    status_code=202,
    response_model=AcceptedAnswer,
    responses=errors(*WITH_BODY),
)
async def drain(request: Request, wanted: DrainRequest) -> Response:
    """End the instance that you ask, in order: settle, close, release, exit."""
    api_of(request).instance.request_drain(wanted.reason)
    return _accepted(request, None)


@router.post(
    "/api/admin/import",
    response_model=ImportAnswer,
    responses=errors(*WITH_BODY, *AT_HOLDER),
)
async def import_accounts(request: Request, wanted: ImportRequest) -> Response:
    """Import Baileys session directories that lie on the holder's host. The originals stay."""
    with in_time(api_of(request).settings.import_s):
        report = await active_desk(request).import_accounts(wanted.directory)
    return reply({"success": True, "report": dict(report)})


@router.post(
    HELLO_PATH,
    response_model=HelloAnswer,
    responses=errors(ErrorCode.NO_ACTIVE_INSTANCE, *WITH_BODY),
)
async def hello(request: Request, said: Hello) -> Response:
    """Between instances: a standby tells the holder that it is there, and learns of the others."""
    api = api_of(request)
    active_desk(request)
    api.peers.see(
        name=said.id,
        incarnation=said.incarnation,
        state=said.state.value,
        address=said.address,
        version=said.version,
    )
    identity = api.instance.identity
    own = {
        "id": identity.name,
        "incarnation": identity.incarnation,
        "state": api.instance.state.value,
        "address": identity.address,
        "version": api.settings.version,
        "seenAt": api.peers.wall(),
    }
    return reply({"success": True, "peers": [own, *map(peer_json, api.peers.known())]})


def _require_standby(peers: Peers, handoff_to: str | None) -> None:
    standbys = [peer.name for peer in peers.standbys()]
    if not standbys:
        raise NoStandby(
            "Nobody stands by: start a second instance, or ask again with force: true and live "
            "without an ACTIVE one until somebody takes over."
        )
    if handoff_to is not None and handoff_to not in standbys:
        raise NoStandby(f"{handoff_to!r} does not stand by. These do: {', '.join(standbys)}.")


def _accepted(request: Request, handoff_to: str | None) -> Response:
    instance = api_of(request).instance
    return reply(
        {
            "success": True,
            "instance": instance.identity.name,
            "state": instance.state.value,
            "handoffTo": handoff_to,
        },
        202,
    )
