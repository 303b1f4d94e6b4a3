"""The routes about accounts. Each is answered by the holder; only the list also by the store."""

from __future__ import annotations

import io
import secrets
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Annotated

import segno
from fastapi import APIRouter, Query, Request, Response

from daemon.http.accept import choose_format, documented_formats
from daemon.http.api import active_desk, api_of, in_time, reply
from daemon.http.documented import AT_HOLDER, WITH_BODY, errors, file_answer
from daemon.http.errors import ErrorCode
from daemon.http.models import (
    AccountAnswer,
    AccountIdPath,
    AccountsAnswer,
    NewAccount,
    PairingCodeAnswer,
    PairingRequest,
    QrAnswer,
)
from daemon.http.shapes import account_json, accounts_json, moment
from machine.records import AccountId
from machine.views import AccountView

router = APIRouter(prefix="/api/whatsapp/accounts", tags=["accounts"])

QR_FORMATS = {
    "json": "application/json",
    "svg": "image/svg+xml",
    "png": "image/png",
    "text": "text/plain",
}

ONE_ACCOUNT = (ErrorCode.INVALID_REQUEST, ErrorCode.ACCOUNT_NOT_FOUND, *AT_HOLDER)


@router.get(
    "",
    response_model=AccountsAnswer,
    responses=errors(ErrorCode.STORE_UNAVAILABLE, ErrorCode.NO_ACTIVE_INSTANCE),
)
async def list_accounts(request: Request) -> Response:
    """Every account. Without a holder in reach the store answers, each with `inMemory: false`."""
    api = api_of(request)
    with in_time(api.settings.answer_s):
        desk = api.instance.desk
        if desk is not None:
            return reply(accounts_json(await desk.list_accounts()))
        return reply(accounts_json(await api.instance.list_accounts(), in_memory=False))


@router.post(
    "",
    status_code=201,
    response_model=AccountAnswer,
    responses=errors(ErrorCode.ACCOUNT_EXISTS, *WITH_BODY, *AT_HOLDER),
)
async def add_account(request: Request, wanted: NewAccount) -> Response:
    """Add an account and begin its pairing: get its QR code, or a pairing code, next."""
    account_id = AccountId(wanted.account_id or f"account-{secrets.token_hex(4)}")
    with in_time(api_of(request).settings.answer_s):
        view = await active_desk(request).add_account(account_id, wanted.name)
    return _one(view, 201)


@router.get("/{accountId}", response_model=AccountAnswer, responses=errors(*ONE_ACCOUNT))
async def get_account(request: Request, account_id: AccountIdPath) -> Response:
    """One account."""
    with in_time(api_of(request).settings.answer_s):
        return _one(await active_desk(request).account(AccountId(account_id)))


@router.get(
    "/{accountId}/qr",
    response_model=QrAnswer,
    responses={
        200: file_answer("The QR code, in the format asked for", *list(QR_FORMATS.values())[1:]),
        **errors(ErrorCode.NOT_AWAITING_SCAN, ErrorCode.NOT_ACCEPTABLE, *ONE_ACCOUNT),
    },
)
async def get_qr(
    request: Request,
    account_id: AccountIdPath,
    wanted: Annotated[str | None, documented_formats(QR_FORMATS), Query(alias="format")] = None,
) -> Response:
    """The QR code to scan now, by `Accept` or `?format=`: json, svg, png, or text for terminals."""
    name = choose_format(QR_FORMATS, request.headers.get("accept"), wanted)
    with in_time(api_of(request).settings.answer_s):
        code = await active_desk(request).qr(AccountId(account_id))
    if name == "json":
        return reply({"success": True, "qr": code.qr, "expiresAt": moment(code.expires_at)})
    media_type = QR_FORMATS[name] + ("; charset=utf-8" if name == "text" else "")
    return Response(_draw(code.qr, name), media_type=media_type)


@router.post(
    "/{accountId}/pairing-code",
    response_model=PairingCodeAnswer,
    responses=errors(ErrorCode.NOT_AWAITING_SCAN, *ONE_ACCOUNT, *WITH_BODY),
)
async def request_pairing_code(
    request: Request, account_id: AccountIdPath, wanted: PairingRequest
) -> Response:
    """A code to type on the phone, instead of scanning."""
    with in_time(api_of(request).settings.answer_s):
        code = await active_desk(request).pairing_code(AccountId(account_id), wanted.phone)
    return reply({"success": True, "code": code.code, "expiresAt": moment(code.expires_at)})


@router.post(
    "/{accountId}/reconnect",
    status_code=202,
    response_model=AccountAnswer,
    responses=errors(
        ErrorCode.ACCOUNT_NOT_PAIRED,
        ErrorCode.ACCOUNT_QUARANTINED,
        ErrorCode.ACCOUNT_BANNED,
        *ONE_ACCOUNT,
    ),
)
async def reconnect(request: Request, account_id: AccountIdPath) -> Response:
    """Close the account's connection, if any, and open it again now."""
    return await _ask(request, active_desk(request).reconnect, account_id)


@router.post(
    "/{accountId}/logout",
    status_code=202,
    response_model=AccountAnswer,
    responses=errors(ErrorCode.ACCOUNT_NOT_PAIRED, *ONE_ACCOUNT),
)
async def log_out(request: Request, account_id: AccountIdPath) -> Response:
    """Unlink the device. The account stays listed; its state is archived."""
    return await _ask(request, active_desk(request).log_out, account_id)


@router.post(
    "/{accountId}/repair",
    status_code=202,
    response_model=AccountAnswer,
    responses=errors(*ONE_ACCOUNT),
)
async def repair(request: Request, account_id: AccountIdPath) -> Response:
    """Pair again under the same account id. The old state is archived, not destroyed."""
    return await _ask(request, active_desk(request).repair, account_id)


@router.delete("/{accountId}", status_code=204, responses=errors(*ONE_ACCOUNT))
async def remove_account(
    request: Request,
    account_id: AccountIdPath,
    purge: Annotated[bool, Query(description="Destroy the state instead of archiving it")] = False,
) -> Response:
    """Take an account off the list."""
    with in_time(api_of(request).settings.answer_s):
        await active_desk(request).remove_account(AccountId(account_id), purge=purge)
    return Response(status_code=204)


async def _ask(
    request: Request, ask: Callable[[AccountId], Awaitable[AccountView]], account_id: str
) -> Response:
    with in_time(api_of(request).settings.answer_s):
        return _one(await ask(AccountId(account_id)), 202)


def _one(view: AccountView, status: int = 200) -> Response:
    return reply({"success": True, "account": account_json(view)}, status)


@lru_cache(maxsize=64)
def _draw(qr: str, name: str) -> bytes:
    """A QR code as svg, png or terminal blocks. Drawing takes milliseconds, hence the cache."""
    drawing = segno.make(qr, error="l", micro=False)
    if name == "text":
        text = io.StringIO()
        drawing.terminal(text, compact=True)
        return text.getvalue().encode()
    image = io.BytesIO()
    drawing.save(image, kind=name, scale=8, border=4, light="white")
    return image.getvalue()
