"""The routes about messages: accept one durably, wait a little for the server, say what is true;
and read what came in."""

from __future__ import annotations

from typing import Annotated, Literal

import trio
from fastapi import APIRouter, Header, Query, Request, Response

from daemon.http.api import Api, active_desk, api_of, in_time, inbound_of, reply
from daemon.http.documented import AT_HOLDER, WITH_BODY, errors
from daemon.http.errors import ApiError, ErrorCode
from daemon.http.models import (
    ACCOUNT_ID,
    InboxAnswer,
    MessageAnswer,
    MessageIdPath,
    SendRequest,
    SentAnswer,
)
from daemon.http.ports import DeskPort
from daemon.http.shapes import inbox_json, message_json, sent_json
from machine.inbox import PAGE_MAX
from machine.ports import StoreUnavailable
from machine.records import PENDING_STATES, AccountId, Message, MessageId, MessageState
from machine.refusals import Refusal

router = APIRouter(prefix="/api/whatsapp", tags=["messages"])

LOOK_S = 0.5
"""How long the last look at a message that is not acknowledged yet may take."""

IdempotencyKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="Yours to choose: the same key and body are the same message, at any instance",
    ),
]


@router.post(
    "/send-message",
    response_model=SentAnswer,
    responses={
        202: {"model": SentAnswer, "description": "Durable, and not acknowledged yet"},
        **errors(
            ErrorCode.ACCOUNT_NOT_FOUND,
            ErrorCode.ACCOUNT_NOT_PAIRED,
            ErrorCode.ACCOUNT_QUARANTINED,
            ErrorCode.ACCOUNT_BANNED,
            ErrorCode.IDEMPOTENCY_KEY_REUSED,
            ErrorCode.NOT_ON_WHATSAPP,
            ErrorCode.MESSAGE_FAILED,
            ErrorCode.OUTBOX_FULL,
            *WITH_BODY,
            *AT_HOLDER,
        ),
    },
)
async def send_message(
    request: Request, wanted: SendRequest, idempotency_key: IdempotencyKey = None
) -> Response:
    """Send a text message.

    200: WhatsApp's server has it. 202: it is stored and goes out when the account can; follow it
    at `GET /api/whatsapp/messages/{messageId}`.
    """
    api = api_of(request)
    desk = active_desk(request)
    account_id = AccountId(wanted.account_id)
    with in_time(api.settings.answer_s):
        accepted = await desk.accept(
            message_id=_message_id(api, request, account_id, idempotency_key),
            account_id=account_id,
            to=wanted.to,
            text=wanted.message,
            idempotency_key=idempotency_key,
        )
    return _sent(await _follow(api, desk, accepted))


@router.get(
    "/messages",
    response_model=InboxAnswer,
    responses=errors(
        ErrorCode.INVALID_REQUEST, ErrorCode.ACCOUNT_NOT_FOUND, ErrorCode.STORE_UNAVAILABLE
    ),
)
async def list_received(
    request: Request,
    account_id: Annotated[str, Query(alias="accountId", pattern=ACCOUNT_ID, examples=["support"])],
    direction: Annotated[
        Literal["in"], Query(description="Received messages; those sent are known by their id")
    ] = "in",
    cursor: Annotated[
        str,
        Query(max_length=100, description="That of the last answer; none: from the oldest on"),
    ] = "",
    limit: Annotated[int, Query(ge=1, le=PAGE_MAX, examples=[100])] = 100,
) -> Response:
    """What an account has received, in the order in which it was stored.

    Any instance answers from the shared store, holder or not. Ask again with the `cursor` of the
    last answer: nothing is left out and nothing comes twice. Kept as long as sent messages are.
    """
    api = api_of(request)
    with in_time(api.settings.answer_s):
        page = await api.instance.list_inbox(AccountId(account_id), cursor=cursor, count_max=limit)
    return reply(inbox_json(page))


@router.get(
    "/messages/{messageId}",
    response_model=MessageAnswer,
    responses=errors(ErrorCode.INVALID_REQUEST, ErrorCode.MESSAGE_NOT_FOUND, *AT_HOLDER),
)
async def get_message(request: Request, message_id: MessageIdPath) -> Response:
    """How far a message has come. Its text is not repeated."""
    with in_time(api_of(request).settings.answer_s):
        return reply(message_json(await active_desk(request).message(MessageId(message_id))))


def _message_id(
    api: Api, request: Request, account_id: AccountId, idempotency_key: str | None
) -> MessageId:
    if idempotency_key is not None:
        return api.make_message_id(account_id, idempotency_key, api.rng)
    made = inbound_of(request).message_id
    return made or api.make_message_id(account_id, None, api.rng)


async def _follow(api: Api, desk: DeskPort, accepted: Message) -> Message:
    """Wait up to `send_wait_s` for the message to leave; then the newest that is known of it.

    It is durable already, so nothing that goes wrong here makes the answer an error.
    """
    if accepted.state not in PENDING_STATES:
        return accepted
    newest = accepted
    try:
        with trio.move_on_after(api.settings.send_wait_s):
            return await desk.wait_progress(accepted.message_id)
        with trio.move_on_after(LOOK_S):
            newest = await desk.message(accepted.message_id)
    except (Refusal, StoreUnavailable):
        # The term is over, or the store is away: the next holder goes on with the message.
        return newest
    return newest


def _sent(message: Message) -> Response:
    if message.state is MessageState.FAILED:
        raise _failure(message)
    return reply(sent_json(message), 202 if message.state in PENDING_STATES else 200)


def _failure(message: Message) -> ApiError:
    reason = message.error or "no reason was given"
    told = f"Message {message.message_id} failed for good: {reason}."
    if reason.startswith(ErrorCode.NOT_ON_WHATSAPP.value):
        return ApiError(ErrorCode.NOT_ON_WHATSAPP, told)
    return ApiError(ErrorCode.MESSAGE_FAILED, told)
