"""Which instance answers: this one while it has a term, else the holder, else the next holder.

A request that only the holder may answer waits here through a handoff instead of failing. One
hop only: what was forwarded to us and finds no term is sent back with 503 `not_active`, and the
instance that forwarded it asks again elsewhere.

Never lives here: what the requests mean, beyond which of them may be made twice.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Protocol

import trio

from daemon.http.closing import Closing
from daemon.http.edge import (
    FORMAT,
    SEND_PATH,
    Answer,
    AsgiApp,
    Header,
    Inbound,
    inner_scope,
    replay,
)
from daemon.http.errors import ApiError, ErrorCode
from daemon.http.links import (
    NOT_STARTED,
    UNKNOWN,
    Outcome,
    is_listing,
    is_me,
    is_read,
    is_repeatable,
)
from daemon.http.ports import ApiSettings, InstancePort
from machine.views import Holder

POLL_S = 0.25
"""A holder that cannot be reached is asked again this often, while nothing else changes."""

KNOCKS_A_SECOND_MAX = 200
"""By all that wait together, each less often then. A thousand callers who asked a dead holder four
times a second each kept this instance from taking its place: for up to 8 s, measured."""


class AsksHolder(Protocol):
    """`daemon.http.links.HolderLink`: one try at one holder, without waiting for another."""

    async def ask(self, inbound: Inbound, holder: Holder) -> Answer | Outcome: ...


class Relay:
    """Answers what only a holder may answer, wherever the holder is."""

    def __init__(
        self,
        routes: AsgiApp,
        instance: InstancePort,
        settings: ApiSettings,
        link: AsksHolder,
        *,
        closing: Closing,
    ) -> None:
        self._routes = routes
        self._instance = instance
        self._settings = settings
        self._link = link
        self._closing = closing
        self._waiting = 0

    async def answer(self, inbound: Inbound) -> Answer:
        """The holder's answer, from here or from there. Raises `ApiError`.

        While the API closes: in time for the caller to hear it.
        """
        answer = await self._closing.in_time(lambda: self._answer(inbound))
        if answer is not None:
            return answer
        if is_read(inbound):
            raise _nobody("this instance ends now", NOT_STARTED)
        raise _unanswered(inbound)

    async def _answer(self, inbound: Inbound) -> Answer:
        if inbound.forwarded_by is not None:
            return await self._answer_forwarded(inbound)
        last = NOT_STARTED
        if self._instance.desk is not None:
            outcome = await self._answer_here(inbound)
            if isinstance(outcome, Answer):
                return outcome
            last = outcome
        if self._waiting >= self._settings.forwards_max:
            if last is UNKNOWN and not is_read(inbound):
                raise _unanswered(inbound)
            raise _nobody("too many requests wait for the holder already", UNKNOWN)
        self._waiting += 1
        try:
            return await self._answer_in_time(inbound, last)
        finally:
            self._waiting -= 1

    async def _answer_forwarded(self, inbound: Inbound) -> Answer:
        mine = inbound.forwarded_to in {None, "", self._instance.identity.incarnation}
        outcome: Answer | Outcome = NOT_STARTED
        if inbound.forwarded_format > FORMAT:
            # It may ask for something else than it seems to.
            raise ApiError(
                ErrorCode.NOT_ACTIVE,
                f"This request was forwarded in format {inbound.forwarded_format}, and this "
                f"instance reads {FORMAT}: it is of an earlier release. Upgrade it.",
            )
        # Another instance, or another group, may by now listen where the holder did: then the
        # name of the incarnation does not fit, and nothing is done in its place.
        if mine and self._instance.desk is not None:
            outcome = await self._answer_here(inbound)
        if isinstance(outcome, Answer):
            return outcome
        if outcome is UNKNOWN:
            raise _unanswered(inbound)
        raise ApiError(ErrorCode.NOT_ACTIVE, "This instance is not the holder (any more).")

    async def _answer_in_time(self, inbound: Inbound, last: Outcome) -> Answer:
        """Try here and there until `handoff_wait_s` is over. `last`: how a try before this ended.

        A try that has begun before then may take its own time.
        """
        listing = is_listing(inbound)
        wait_s = self._settings.status_wait_s if listing else self._settings.handoff_wait_s
        deadline = trio.current_time() + wait_s
        if last is UNKNOWN and not is_repeatable(inbound):
            raise _unanswered(inbound)
        while True:
            seen = self._seen()
            outcome = await self._try_once(inbound)
            if isinstance(outcome, Answer):
                return outcome
            if outcome is UNKNOWN:
                last = UNKNOWN
                if not is_repeatable(inbound):
                    raise _unanswered(inbound)
            # An API that closes still forwards to a holder that is known, and waits for no other.
            if trio.current_time() >= deadline or (self._closing.begun and self._alone()):
                break
            # What changed during the try is a reason to ask again at once.
            if seen == self._seen():
                poll_s = max(POLL_S, self._waiting / KNOCKS_A_SECOND_MAX)
                with trio.move_on_after(min(poll_s, deadline - trio.current_time())):
                    await self._instance.wait_changed()
        if listing:
            # The store has every account too; the routes read it when there is no term.
            return await self._call_routes(inbound)
        if last is UNKNOWN and not is_read(inbound):
            raise _unanswered(inbound)
        raise _nobody("no instance took over in time", last)

    def _alone(self) -> bool:
        """Nobody else is known to hold the lease."""
        holder = self._instance.holder
        return holder is None or is_me(holder, self._instance.identity)

    def _seen(self) -> tuple[object, ...]:
        desk = self._instance.desk
        return (None if desk is None else desk.epoch, self._instance.holder)

    async def _try_once(self, inbound: Inbound) -> Answer | Outcome:
        if self._instance.desk is not None:
            return await self._answer_here(inbound)
        holder = self._instance.holder
        if holder is None or self._alone():
            return NOT_STARTED
        return await self._ask_while_holder(inbound, holder)

    # --- here

    async def _answer_here(self, inbound: Inbound) -> Answer | Outcome:
        """This instance's own answer; when its term ended, whether anything may have been done."""
        inbound.not_active = inbound.begun = False
        answer = await self._call_routes(inbound)
        if not inbound.not_active:
            return answer
        return UNKNOWN if inbound.begun else NOT_STARTED

    async def _call_routes(self, inbound: Inbound) -> Answer:
        caught = _Caught()
        await self._routes(inner_scope(inbound), replay(inbound.body), caught.send)
        return caught.answer()

    # --- there

    async def _ask_while_holder(self, inbound: Inbound, holder: Holder) -> Answer | Outcome:
        """Ask the holder. What may be made twice is given up when there is another holder."""
        outcome: Answer | Outcome = UNKNOWN
        async with trio.open_nursery() as nursery:
            if is_repeatable(inbound):
                nursery.start_soon(self._give_up_on_change, holder, nursery.cancel_scope)
            outcome = await self._link.ask(inbound, holder)
            nursery.cancel_scope.cancel()
        return outcome

    async def _give_up_on_change(self, holder: Holder, scope: trio.CancelScope) -> None:
        """Cancel `scope` once another instance, perhaps this one, is known to be the holder.

        A lease that merely is free is no reason: the old holder may be about to answer.
        """
        while True:
            await self._instance.wait_changed()
            now = self._instance.holder
            if self._instance.desk is not None or (now is not None and now != holder):
                scope.cancel()


class _Caught:
    """An ASGI `send` that keeps the answer."""

    def __init__(self) -> None:
        self._status = 500
        self._headers: list[Header] = []
        self._chunks: list[bytes] = []

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = list(message.get("headers", ()))
        elif message["type"] == "http.response.body":
            self._chunks.append(message.get("body", b""))

    def answer(self) -> Answer:
        return Answer(self._status, self._headers, b"".join(self._chunks))


def _nobody(why: str, last: Outcome) -> ApiError:
    done = "nothing was accepted" if last is NOT_STARTED else "ask again"
    return ApiError(
        ErrorCode.NO_ACTIVE_INSTANCE,
        f"No instance holds the lease right now ({why}); {done}. "
        "If this lasts, look at /api/status/dashboard of each instance.",
    )


def _unanswered(inbound: Inbound) -> ApiError:
    if inbound.path == SEND_PATH:
        hint = "ask again with the same Idempotency-Key"
        if inbound.message_id is not None:
            hint = f"see GET /api/whatsapp/messages/{inbound.message_id} before you send it again"
    else:
        hint = "look at the account before you ask again"
    return ApiError(
        ErrorCode.HOLDER_UNREACHABLE,
        f"The holder took the request and did not answer; it may have been done: {hint}.",
    )
