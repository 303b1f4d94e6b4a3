"""The loopback world over HTTP: `/api/loopback/…`.

Lives here: JSON in, JSON out. Never lives here: who may ask (the application's token) and how
errors look (the application turns refusals and validation errors into its own).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.alias_generators import to_camel

from daemon.loopback.behaviour import (
    ACK_ERRORS,
    CLOSE_CODES,
    DELAY_S_MAX,
    NUMBERS_MAX,
    TIMES_MAX,
    Behaviour,
    Receipts,
)
from daemon.loopback.server import TEXT_CHARACTERS_MAX, Arrival
from daemon.loopback.world import MESSAGES_PAGE_MAX, LoopbackWorld
from machine.records import AccountId


def _one_of(codes: frozenset[int]) -> Callable[[int], int]:
    def check(value: int) -> int:
        if value not in codes:
            raise ValueError(f"must be one of {sorted(codes)}")
        return value

    return check


def _documented(codes: frozenset[int]) -> WithJsonSchema:
    return WithJsonSchema({"type": "integer", "enum": sorted(codes)})


def _unicode(text: str) -> str:
    """JSON can spell half a character; neither the database nor the wire can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be Unicode text") from None
    return text


ACCOUNT = r"^[A-Za-z0-9._-]{1,64}$"

AccountPath = Annotated[str, Path(pattern=ACCOUNT, examples=["sales"])]
AccountQuery = Annotated[str | None, Query(alias="accountId", pattern=ACCOUNT)]
Phone = Annotated[str, Field(pattern=r"^[0-9]{5,20}$", examples=["4915112345678"])]
DelayS = Annotated[float, Field(ge=0, le=DELAY_S_MAX, description="Seconds.")]
Times = Annotated[int, Field(ge=1, le=TIMES_MAX)]
CloseCode = Annotated[int, AfterValidator(_one_of(CLOSE_CODES)), _documented(CLOSE_CODES)]
AckError = Annotated[int, AfterValidator(_one_of(ACK_ERRORS)), _documented(ACK_ERRORS)]


class LoopbackModel(BaseModel):
    """Names in camelCase, in and out; unknown ones are refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", strict=True
    )


class ScanRequest(LoopbackModel):
    """What the phone does. Without a number it keeps its last, or gets a made-up one."""

    phone: Phone | None = None
    code: str | None = Field(default=None, max_length=16, examples=["K7PM2QXD"])


class ScanAnswer(LoopbackModel):
    """The phone has linked the device; the account is connected a moment later."""

    success: Literal[True] = True
    account_id: str = Field(examples=["sales"])
    phone: str = Field(examples=["4915112345678"])


class ReceiveRequest(LoopbackModel):
    """A message that somebody sends to an account. It waits while the account is away."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"accountId": "sales", "from": "4915187654321", "text": "Hello"}]
        }
    )

    account_id: str = Field(pattern=ACCOUNT)
    sender: str = Field(alias="from", pattern=r"^[0-9]{5,20}$")
    text: Annotated[str, AfterValidator(_unicode)] = Field(
        min_length=1, max_length=TEXT_CHARACTERS_MAX
    )
    sender_name: Annotated[str, AfterValidator(_unicode)] | None = Field(
        default=None, alias="fromName", max_length=100
    )
    message_id: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9_-]{1,64}$",
        description="To send one message twice; left out: made up.",
    )
    copies: int = Field(
        default=1, ge=1, le=10, description="Deliver it so often: WhatsApp does now and then."
    )


class ReceiveAnswer(LoopbackModel):
    """The message is with the server. `waiting`: what the account has not acknowledged."""

    success: Literal[True] = True
    message_id: str = Field(examples=["3A5F0C9A7E21D34B68AA"])
    waiting: int = Field(examples=[1])


class WaitingAnswer(LoopbackModel):
    """What the account was sent and has not acknowledged: it is delivered at each login."""

    count: int = Field(examples=[0])


class ArrivedMessage(LoopbackModel):
    """A message as its recipient has it. `readable` and `duplicate` are in the raw list only."""

    sequence: int = Field(examples=[17], description="Rises with each arrival.")
    account_id: str = Field(examples=["sales"])
    to: str = Field(examples=["4915187654321"])
    message_id: str = Field(examples=["3EB0A1B2C3D4E5F60718"])
    text: str = Field(examples=["Hello"])
    at: float = Field(examples=[1767225600.25], description="Seconds since 1970.")
    readable: bool | None = Field(
        default=None, description="False: the sender's ratchet was rolled back."
    )
    duplicate: bool | None = Field(
        default=None, description="This message id had been read before."
    )


class MessagesAnswer(LoopbackModel):
    """A page of messages. `next` is the `after` of the following page, or of a later look."""

    messages: list[ArrivedMessage]
    next: int = Field(examples=[17])
    more: bool = Field(examples=[False])
    dropped: int = Field(examples=[0], description="The oldest arrivals, forgotten by now.")


class Evicted(LoopbackModel):
    """A login that was ended by another login of the same device."""

    account_id: str = Field(examples=["sales"])
    at: float = Field(examples=[1767225600.25], description="Seconds since 1970.")


class EvictionsAnswer(LoopbackModel):
    """`count` of all times; the newest 1,000 are named, oldest first."""

    count: int = Field(examples=[0])
    evictions: list[Evicted]


class ConnectionsAnswer(LoopbackModel):
    """Who is logged in, at whichever instance."""

    count: int = Field(examples=[1])
    accounts: list[str] = Field(examples=[["sales"]])


class BehaviourModel(LoopbackModel):
    """What the server does to an account. What is left out is as usual."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"accountId": "sales", "ackLost": True, "ackTimes": 1}]}
    )

    account_id: str | None = Field(
        default=None, pattern=ACCOUNT, description="Left out: all accounts."
    )
    ack_delay_s: DelayS = 0
    ack_lost: bool = False
    ack_lost_close_s: DelayS = 10
    ack_refused: AckError | None = None
    ack_times: Times | None = Field(
        default=None, description="For so many sends; left out: for good."
    )
    login_delay_s: DelayS = 0
    login_refused: CloseCode | None = None
    login_expire_s: float | None = Field(default=None, ge=0, le=10**9, description="Of a 402.")
    login_times: Times | None = Field(default=None, description="For so many logins.")
    receipts: Receipts = "delivered"
    receipt_delay_s: DelayS = 0
    not_on_whatsapp: list[Phone] = Field(default=[], max_length=NUMBERS_MAX)

    @model_validator(mode="after")
    def _refuse_contradictions(self) -> BehaviourModel:
        self.behaviour()
        return self

    def behaviour(self) -> Behaviour:
        """The same, as the world knows it. Raises `ValueError`."""
        fields = self.model_dump(exclude={"account_id", "not_on_whatsapp"})
        return Behaviour(**fields, not_on_whatsapp=frozenset(self.not_on_whatsapp))


class CutRequest(LoopbackModel):
    """How the connection ends."""

    code: CloseCode = Field(default=428, examples=[428])
    expire_s: float | None = Field(default=None, ge=0, le=10**9, description="Of a 402.")


class CountAnswer(LoopbackModel):
    """How many connections (or devices) were hit."""

    success: Literal[True] = True
    count: int = Field(examples=[1])


def loopback_router(
    world: LoopbackWorld, responses: Mapping[int | str, dict[str, Any]] | None = None
) -> APIRouter:
    """The routes on `world`, under `/api/loopback`.

    They raise `machine.refusals.NotAwaitingScan` and `machine.ports.StoreUnavailable`;
    `responses` documents what the application makes of these, and of requests that it refuses.
    """
    router = APIRouter(
        prefix="/api/loopback", tags=["loopback"], responses=dict(responses) if responses else None
    )
    _add_phone(router, world)
    _add_recipients(router, world)
    _add_commands(router, world)
    return router


def _add_phone(router: APIRouter, world: LoopbackWorld) -> None:
    @router.post("/scan/{account_id}")
    async def scan(account_id: AccountPath, request: ScanRequest | None = None) -> ScanAnswer:
        """Be the phone: scan the QR code that the account shows, or type its pairing code."""
        asked = request or ScanRequest()
        phone = await world.scan(AccountId(account_id), asked.phone, code=asked.code)
        return ScanAnswer(account_id=account_id, phone=phone)

    @router.post("/receive")
    async def receive(request: ReceiveRequest) -> ReceiveAnswer:
        """Be somebody who writes to the account. It is read at `GET /api/whatsapp/messages`."""
        account_id = AccountId(request.account_id)
        message_id = await world.receive(
            account_id,
            request.sender,
            request.text,
            sender_name=request.sender_name,
            message_id=request.message_id,
            copies=request.copies,
        )
        waiting = await world.count_waiting(account_id)
        return ReceiveAnswer(message_id=message_id, waiting=waiting)

    @router.get("/waiting/{account_id}")
    async def waiting(account_id: AccountPath) -> WaitingAnswer:
        """How many messages the account has not acknowledged."""
        return WaitingAnswer(count=await world.count_waiting(AccountId(account_id)))

    @router.post("/unlink/{account_id}")
    async def unlink(account_id: AccountPath) -> CountAnswer:
        """Be the phone: remove the account's linked devices (they end with 401)."""
        return CountAnswer(count=await world.unlink(AccountId(account_id)))


def _add_recipients(router: APIRouter, world: LoopbackWorld) -> None:
    @router.get("/messages", response_model_exclude_none=True)
    async def messages(
        account_id: AccountQuery = None,
        raw: Annotated[bool, Query(description="Duplicates and unreadable ones too.")] = False,
        after: Annotated[int, Query(ge=0, le=2**62)] = 0,
        limit: Annotated[int, Query(ge=1, le=MESSAGES_PAGE_MAX)] = MESSAGES_PAGE_MAX,
    ) -> MessagesAnswer:
        """What recipients received, in order of arrival; one for each message id."""
        page = await world.list_messages(
            None if account_id is None else AccountId(account_id),
            raw=raw,
            after=after,
            limit=limit,
        )
        return MessagesAnswer(
            messages=[_message(arrival, raw=raw) for arrival in page.arrivals],
            next=page.next_seq,
            more=page.more,
            dropped=page.dropped,
        )

    @router.get("/evictions")
    async def evictions() -> EvictionsAnswer:
        """How often a second login ended a first: 0 unless two instances acted at once."""
        count, newest = await world.list_evictions()
        return EvictionsAnswer(
            count=count,
            evictions=[Evicted(account_id=each.account_id, at=each.at) for each in newest],
        )

    @router.get("/connections")
    async def connections() -> ConnectionsAnswer:
        """Who is logged in now."""
        accounts = await world.list_connected()
        return ConnectionsAnswer(count=len(accounts), accounts=list(accounts))


def _add_commands(router: APIRouter, world: LoopbackWorld) -> None:
    @router.post("/behaviour")
    async def set_behaviour(request: BehaviourModel) -> BehaviourModel:
        """Command the server. The answer is what now holds for the account (or for all)."""
        account_id = None if request.account_id is None else AccountId(request.account_id)
        told = request.behaviour()
        # Nothing but defaults takes the command back, so that the one for all holds again.
        told_now = await world.set_behaviour(account_id, None if told == Behaviour() else told)
        return _behaviour(account_id, told_now)

    @router.get("/behaviour")
    async def behaviour(
        account_id: AccountQuery = None,
    ) -> BehaviourModel:
        """What holds for an account, or for all that have no command of their own."""
        named = None if account_id is None else AccountId(account_id)
        return _behaviour(named, await world.behaviour(named))

    @router.post("/cut/{account_id}")
    async def cut(account_id: AccountPath, request: CutRequest | None = None) -> CountAnswer:
        """Close the account's connection now."""
        asked = request or CutRequest()
        count = await world.cut(AccountId(account_id), asked.code, expire_s=asked.expire_s)
        return CountAnswer(count=count)


def _message(arrival: Arrival, *, raw: bool) -> ArrivedMessage:
    return ArrivedMessage(
        sequence=arrival.seq,
        account_id=arrival.account_id,
        to=arrival.to,
        message_id=arrival.message_id,
        text=arrival.text,
        at=arrival.at,
        readable=arrival.readable if raw else None,
        duplicate=arrival.duplicate if raw else None,
    )


def _behaviour(account_id: AccountId | None, told: Behaviour) -> BehaviourModel:
    fields = {name: getattr(told, name) for name in Behaviour.__dataclass_fields__}
    fields["not_on_whatsapp"] = sorted(told.not_on_whatsapp)
    return BehaviourModel(account_id=account_id, **fields)
