"""What each process answers to callers: the real forwarding, over a simulated network.

`daemon.http.forward.Relay` decides which instance answers. Lives here: what it needs around it,
which is the send route in short, and the way to another host.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import trio

from daemon.http.auth import Tokens
from daemon.http.closing import Closing
from daemon.http.edge import Answer, Inbound, Receive, Scope, Send
from daemon.http.errors import ApiError, ErrorCode, from_refusal
from daemon.http.forward import Relay
from daemon.http.links import NOT_STARTED, UNKNOWN, Outcome
from daemon.http.ports import ApiSettings
from machine.instance import Instance
from machine.outbox import make_message_id
from machine.ports import StoreUnavailable
from machine.records import AccountId, MessageId
from machine.refusals import NotActive, Refusal, TermEnded
from machine.views import Holder
from tests.simulation.network import Link, Network

API = ApiSettings(tokens=Tokens(("simulated",)), version="simulation")
SEND_PATH = "/api/whatsapp/send-message"


@dataclass(eq=False)
class Visit:
    """One request at one process; `outcome` is there once `done`."""

    inbound: Inbound
    outcome: Answer | ApiError | Outcome | None = None
    done: trio.Event = field(default_factory=trio.Event)

    def finish(self, outcome: Answer | ApiError | Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self.done.set()


def send_request(account_id: AccountId, to: str, text: str, key: str | None) -> Inbound:
    """A caller's request to send a message, as `daemon.http.edge` hands it on."""
    body = json.dumps({"accountId": account_id, "to": to, "message": text}).encode()
    headers = [] if key is None else [(b"idempotency-key", key.encode())]
    return Inbound("simulated", "POST", SEND_PATH, b"", headers, body)


class Front:
    """One process's API. `visits` are those that are being answered."""

    def __init__(
        self,
        instance: Instance,
        link: Link,
        network: Network,
        rng: random.Random,
        find: Callable[[str], Front | None],
    ) -> None:
        self.instance = instance
        self.link = link
        self.dead = False
        self.visits: set[Visit] = set()
        self._network = network
        self._rng = rng
        self._find = find
        self._door, self._inside = trio.open_memory_channel[Visit](10_000)
        self._relay = Relay(self._routes, instance, API, self, closing=Closing())

    # --- its callers' side

    def knock(self, inbound: Inbound) -> Visit:
        """Begin a visit. A dead process refuses connections."""
        visit = Visit(inbound)
        if self.dead:
            visit.finish(NOT_STARTED)
        else:
            self.visits.add(visit)
            self._door.send_nowait(visit)
        return visit

    def die(self) -> None:
        """Every connection is closed by the kernel."""
        self.dead = True
        for visit in self.visits:
            visit.finish(UNKNOWN)
        self.visits.clear()

    # --- the process's side

    async def serve(self) -> None:
        """Answer visits; never returns."""
        async with trio.open_nursery() as nursery:
            async for visit in self._inside:
                nursery.start_soon(self._answer, visit)

    async def _answer(self, visit: Visit) -> None:
        inbound = visit.inbound
        if inbound.message_id is None and not inbound.headers:
            # As `daemon.http.edge` does: once, before anything; every try uses the same one.
            inbound.message_id = make_message_id(AccountId(""), None, self._rng)
        try:
            visit.finish(await self._relay.answer(inbound))
        except ApiError as error:
            visit.finish(error)
        self.visits.discard(visit)

    async def _routes(self, scope: Scope, _receive: Receive, send: Send) -> None:
        inbound: Inbound = scope["watchkeeper"]
        try:
            status, body = 202, {"messageId": str(await self._send_message(inbound))}
        except ApiError as error:
            status, body = error.code.status, {"error": error.code.value}
        start: MutableMapping[str, Any] = {"type": "http.response.start", "status": status}
        await send(start)
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    async def _send_message(self, inbound: Inbound) -> MessageId:
        """The route `send-message`: accept, and wait a while for the server's ack."""
        wanted = json.loads(inbound.body)
        account_id = AccountId(wanted["accountId"])
        key = inbound.headers[0][1].decode() if inbound.headers else None
        message_id = inbound.message_id
        if key is not None:
            message_id = make_message_id(account_id, key, self._rng)
        assert message_id is not None
        desk = self.instance.desk
        try:
            if desk is None:
                raise NotActive("nobody is active here")
            with trio.fail_after(API.answer_s):
                await desk.accept(
                    message_id=message_id,
                    account_id=account_id,
                    to=wanted["to"],
                    text=wanted["message"],
                    idempotency_key=key,
                )
        except NotActive as not_active:
            inbound.not_active = True
            inbound.begun = isinstance(not_active, TermEnded)
            raise from_refusal(not_active) from None
        except Refusal as refusal:
            raise from_refusal(refusal) from None
        except (StoreUnavailable, trio.TooSlowError):
            raise ApiError(ErrorCode.STORE_UNAVAILABLE, "no answer") from None
        try:
            with trio.move_on_after(API.send_wait_s):
                await desk.wait_progress(message_id)
        except (Refusal, StoreUnavailable):
            pass  # it is durable already: the next holder goes on with it
        return message_id

    # --- to the holder (`daemon.http.forward.AsksHolder`)

    async def ask(self, inbound: Inbound, holder: Holder) -> Answer | Outcome:
        """One try at the holder, as `daemon.http.links` makes it."""
        forwarded = Inbound(
            inbound.request_id,
            inbound.method,
            inbound.path,
            inbound.query,
            inbound.headers,
            inbound.body,
            forwarded_by=self.instance.identity.name,
            forwarded_to=holder.incarnation,
            message_id=inbound.message_id,
        )
        visit: Visit | None = None
        there = trio.Event()

        def arrive() -> None:
            nonlocal visit
            front = self._find(holder.address)
            if front is None or not front.link.alone:
                visit = _refused(forwarded) if front is None else front.knock(forwarded)
                there.set()

        with trio.move_on_after(API.holder_answer_s + API.send_wait_s):
            if not self.link.alone:
                self._network.post(self.link.hop_s(), arrive)
            with trio.move_on_after(API.connect_s):
                await there.wait()
            if visit is None:
                return NOT_STARTED
            await visit.done.wait()
            back = trio.Event()
            if not self.link.alone:
                self._network.post(self.link.hop_s(), back.set)
            await back.wait()
            return _read(visit)
        return UNKNOWN


def _refused(inbound: Inbound) -> Visit:
    """A visit where nobody listens."""
    visit = Visit(inbound)
    visit.finish(NOT_STARTED)
    return visit


def _read(visit: Visit) -> Answer | Outcome:
    """What the holder's answer means for who forwarded."""
    outcome = visit.outcome
    assert outcome is not None
    if isinstance(outcome, ApiError):
        if outcome.code is ErrorCode.NOT_ACTIVE:
            return NOT_STARTED
        if outcome.code is ErrorCode.HOLDER_UNREACHABLE:
            return UNKNOWN
        return Answer(outcome.code.status, [], json.dumps({"error": outcome.code.value}).encode())
    return outcome
