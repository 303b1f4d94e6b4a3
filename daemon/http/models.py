"""The shapes of requests and answers: what is checked on the way in, and what OpenAPI documents.

Answers are written by `daemon.http.shapes`, without these models, for speed; the tests hold every
answer against them.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

from daemon.http.errors import ErrorCode
from machine.records import AccountStatus, MessageState
from machine.states import State

ACCOUNT_ID = r"^[A-Za-z0-9._-]{1,64}$"
TEXT_CHARS_MAX = 65_536
"""WhatsApp's own limit for a text message."""

MOMENT = "2025-01-31T12:00:00.000Z"

NUMBER_CHARS_MAX = 64

_JID = re.compile(r"\+?[0-9]{5,20}@s\.whatsapp\.net")
_SEPARATORS = " -().\u00a0\u2011"
_WITHOUT_SEPARATORS = str.maketrans("", "", _SEPARATORS)
_APART = f"[{_SEPARATORS.replace('-', '')}-]*"
NUMBER = rf"^({_APART}\+?({_APART}[0-9]){{5,20}}{_APART}|{_JID.pattern})$"
"""What `normal_number` takes, for the document. A test holds one against the other."""


def normal_number(value: object) -> object:
    """`+49 151 234-567`, `49151234567` or `…@s.whatsapp.net` as digits.

    ValueError: none of them.
    """
    if not isinstance(value, str) or len(value) > NUMBER_CHARS_MAX:
        raise ValueError("must be a phone number in international form, as a string")
    if value.endswith("@g.us"):
        raise ValueError("is a group; only single recipients are supported")
    if _JID.fullmatch(value):
        value = value.partition("@")[0]
    digits = value.translate(_WITHOUT_SEPARATORS).removeprefix("+")
    if not (5 <= len(digits) <= 20 and digits.isascii() and digits.isdecimal()):
        raise ValueError("must be a phone number in international form: 5 to 20 digits")
    return digits


def _usable_account_id(value: str) -> str:
    # Firestore refuses these as document names, and a file system means something else by two.
    if value in {".", ".."} or (value.startswith("__") and value.endswith("__")):
        raise ValueError("must not be '.', '..' or between double underscores")
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be empty")
    return value


PhoneNumber = Annotated[
    str,
    BeforeValidator(
        normal_number,
        json_schema_input_type=Annotated[str, Field(pattern=NUMBER, max_length=NUMBER_CHARS_MAX)],
    ),
    Field(description="International form, 5 to 20 digits; `+`, spaces and dashes are fine"),
]
NewAccountId = Annotated[str, Field(pattern=ACCOUNT_ID), AfterValidator(_usable_account_id)]
AccountIdPath = Annotated[
    str,
    Path(alias="accountId", pattern=ACCOUNT_ID, examples=["support"]),
    AfterValidator(_usable_account_id),
]
MessageIdPath = Annotated[
    str,
    Path(alias="messageId", pattern=r"^[A-Za-z0-9_-]{1,64}$", examples=["3EB0A1B2C3D4E5F60718"]),
]
Reason = Annotated[
    str,
    Field(min_length=1, max_length=200, description="Why: logged, and kept with the transition"),
    AfterValidator(_not_blank),
]


class _Shape(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", strict=True
    )


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [fields]})


# --- what callers send -----------------------------------------------------------------------


class NewAccount(_Shape):
    """An account to add; pairing begins."""

    model_config = _example(accountId="support", name="Support desk")

    account_id: NewAccountId | None = Field(
        default=None, description="Yours to choose, for good; made up when absent"
    )
    name: Annotated[str, Field(min_length=1, max_length=100), AfterValidator(_not_blank)]


class PairingRequest(_Shape):
    """The phone that is to be paired by typing a code."""

    model_config = _example(phone="+49 151 23456789")

    phone: PhoneNumber


class SendRequest(_Shape):
    """A text message."""

    model_config = _example(accountId="support", to="+49 151 23456789", message="Good morning!")

    account_id: Annotated[str, Field(pattern=ACCOUNT_ID)]
    to: PhoneNumber
    message: Annotated[
        str, Field(min_length=1, max_length=TEXT_CHARS_MAX), AfterValidator(_not_blank)
    ]


class StepDownRequest(_Shape):
    """Give the lease to a standby."""

    model_config = _example(reason="maintenance of host a", handoffTo="b")

    reason: Reason
    force: bool = Field(default=False, description="Step down although nobody stands by")
    handoff_to: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        default=None, description="The id of the standby that goes first"
    )


class DrainRequest(_Shape):
    """End this instance in order."""

    model_config = _example(reason="deploy 2025-01-31")

    reason: Reason


class ImportRequest(_Shape):
    """A directory of Baileys session directories, on the holder's host."""

    model_config = _example(directory="/var/lib/old-backend/sessions")

    directory: Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[^\x00]+$")]


class Hello(_Shape):
    """What a standby tells the holder of itself."""

    model_config = ConfigDict(
        # A standby of a later release may have more to tell.
        extra="ignore",
        **_example(
            id="b",
            incarnation="5f0c9a",
            state="PASSIVE",
            address="http://10.0.0.8:8080",
            version="1.0",
        ),
    )

    id: Annotated[str, Field(min_length=1, max_length=100)]
    incarnation: Annotated[str, Field(min_length=1, max_length=100)]
    # Over JSON an enum arrives as its text, which strict mode would refuse.
    state: Annotated[State, Field(strict=False)]
    address: Annotated[str, Field(min_length=1, max_length=300)]
    version: Annotated[str, Field(max_length=50)]


# --- what callers get ------------------------------------------------------------------------


class ErrorAnswer(_Shape):
    """Every error. `error` is one of a closed list."""

    model_config = _example(
        success=False,
        error="account_not_found",
        message="No store knows the account 'support': list them at GET /api/whatsapp/accounts.",
        requestId="5f0c9a7e21d34b68",
    )

    success: Literal[False]
    error: ErrorCode
    message: str
    request_id: str


class AccountShape(_Shape):
    """An account. `queued` is the depth of its outbox; `inMemory`, whether it has a session."""

    account_id: str
    name: str
    phone: str | None
    status: AccountStatus
    in_memory: bool
    last_error: str | None
    since: str
    created_at: str
    updated_at: str
    last_connected_at: str | None
    queued: int


ACCOUNT_EXAMPLE: dict[str, Any] = {
    "accountId": "support",
    "name": "Support desk",
    "phone": "4915123456789",
    "status": "connected",
    "inMemory": True,
    "lastError": None,
    "since": MOMENT,
    "createdAt": MOMENT,
    "updatedAt": MOMENT,
    "lastConnectedAt": MOMENT,
    "queued": 0,
}


class AccountAnswer(_Shape):
    """One account."""

    model_config = _example(success=True, account=ACCOUNT_EXAMPLE)

    success: Literal[True]
    account: AccountShape


class AccountsAnswer(_Shape):
    """Every account, by account id."""

    model_config = _example(success=True, accounts=[ACCOUNT_EXAMPLE], count=1)

    success: Literal[True]
    accounts: list[AccountShape]
    count: int


class QrAnswer(_Shape):
    """A QR code to scan now. Whoever scans it links a device: treat it as a secret."""

    model_config = _example(success=True, qr="2@aGVsbG8…", expiresAt=MOMENT)

    success: Literal[True]
    qr: str
    expires_at: str


class PairingCodeAnswer(_Shape):
    """A code to type on the phone."""

    model_config = _example(success=True, code="ABCD-1234", expiresAt=MOMENT)

    success: Literal[True]
    code: str
    expires_at: str


class SentAnswer(_Shape):
    """200: the server has it. 202: it is durable here, and goes out when the account can."""

    model_config = _example(success=True, messageId="3EB0A1B2C3D4E5F60718", status="server_ack")

    success: Literal[True]
    message_id: str
    status: MessageState


class MessageAnswer(_Shape):
    """A message's progress. `timestamps` has the moment each status was reached."""

    model_config = _example(
        success=True,
        messageId="3EB0A1B2C3D4E5F60718",
        accountId="support",
        to="4915123456789",
        status="server_ack",
        error=None,
        attempts=1,
        createdAt=MOMENT,
        updatedAt=MOMENT,
        timestamps={"queued": MOMENT, "server_ack": MOMENT},
    )

    success: Literal[True]
    message_id: str
    account_id: str
    to: str
    status: MessageState
    error: str | None
    attempts: int
    created_at: str
    updated_at: str
    timestamps: dict[str, str]


class InboundShape(_Shape):
    """A message that somebody sent to an account.

    `from` is the sender: a phone number, or WhatsApp's own name for somebody who hides his. In a
    group `chat` is the group, else it is the sender.
    """

    account_id: str
    message_id: str
    chat: str
    sender: str = Field(alias="from")
    sender_name: str | None = Field(alias="fromName")
    text: str
    sent_at: str = Field(description="The server's clock")
    received_at: str


class InboxAnswer(_Shape):
    """Received messages in the order in which they were stored.

    `cursor` reads on after the last of them, at any instance, also after a failover; with no
    message it is the one that was given. `more`: there are others already.
    """

    model_config = _example(
        success=True,
        messages=[
            {
                "accountId": "support",
                "messageId": "3A5F0C9A7E21D34B68AA",
                "chat": "4915123456789",
                "from": "4915123456789",
                "fromName": "Zoë",
                "text": "Hello",
                "sentAt": MOMENT,
                "receivedAt": MOMENT,
            }
        ],
        cursor="Ny4xMi4w",
        more=False,
    )

    success: Literal[True]
    messages: list[InboundShape]
    cursor: str
    more: bool


class InstanceShape(_Shape):
    """The instance that answers. `epoch` is the one it acts under; null while it does not."""

    id: str
    state: State
    since: str
    version: str
    epoch: int | None
    address: str


class LeaseShape(_Shape):
    """The lease as this instance last saw it."""

    holder: str | None
    epoch: int
    ttl_seconds: float
    remaining_seconds: float | None
    renewals: int
    last_renewal_at: str | None
    paused: bool


class FailureShape(_Shape):
    """What could not be restored; `accountId` null: a whole source."""

    account_id: str | None
    cause: str
    advice: str


class RestoreShape(_Shape):
    """The newest restore. `finishedAt` null: it is running. `durations` are seconds.

    `retries`: failed reads, for each source; `takenFrom`: how many accounts were gone on from the
    copy in which source.
    """

    epoch: int
    started_at: str
    finished_at: str | None
    found_shared: int | None
    found_disk: int | None
    total: int
    restored: int
    listed: int
    doubted: int
    pairing: int
    failed: int
    failures: list[FailureShape]
    durations: dict[str, float]
    retries: dict[str, int]
    taken_from: dict[str, int]


class OutboxShape(_Shape):
    """Messages accepted and not confirmed; null: this instance does not know."""

    depth: int | None


class PeerShape(_Shape):
    """Another instance of the group."""

    id: str
    state: str
    address: str
    version: str
    seen_at: str


class DashboardAnswer(_Shape):
    """This instance, the lease, the restore, the accounts, the peers.

    `accountsFrom`: `memory` (this instance is the holder), `holder` (it was asked), `store`, or
    `none` when neither answered in time.
    """

    model_config = _example(
        success=True,
        instance={
            "id": "a",
            "state": "ACTIVE",
            "since": MOMENT,
            "version": "1.0",
            "epoch": 7,
            "address": "http://10.0.0.7:8080",
        },
        lease={
            "holder": "a",
            "epoch": 7,
            "ttlSeconds": 15.0,
            "remainingSeconds": 12.4,
            "renewals": 31,
            "lastRenewalAt": MOMENT,
            "paused": False,
        },
        restore={
            "epoch": 7,
            "startedAt": MOMENT,
            "finishedAt": MOMENT,
            "foundShared": 1,
            "foundDisk": 1,
            "total": 1,
            "restored": 1,
            "listed": 0,
            "doubted": 0,
            "pairing": 0,
            "failed": 0,
            "failures": [],
            "durations": {"the shared store": 0.02, "this disk": 0.01, "open": 0.2},
            "retries": {"the shared store": 1},
            "takenFrom": {"this disk (same version in the shared store)": 1},
        },
        accounts=[ACCOUNT_EXAMPLE],
        accountsFrom="memory",
        outbox={"depth": 0},
        peers=[
            {
                "id": "b",
                "state": "PASSIVE",
                "address": "http://10.0.0.8:8080",
                "version": "1.0",
                "seenAt": MOMENT,
            }
        ],
    )

    success: Literal[True]
    instance: InstanceShape
    lease: LeaseShape | None
    restore: RestoreShape | None
    accounts: list[AccountShape]
    accounts_from: Literal["memory", "holder", "store", "none"]
    outbox: OutboxShape
    peers: list[PeerShape]


class TransitionShape(_Shape):
    """One transition; `durationSeconds` is how long its callbacks took."""

    model_config = ConfigDict(
        alias_generator=lambda name: {"source": "from"}.get(name, to_camel(name))
    )

    source: str
    to: str
    trigger: str
    reason: str
    at: str
    duration_seconds: float
    epoch: int
    instance: str


class TransitionsAnswer(_Shape):
    """The last transitions, newest last."""

    model_config = _example(
        success=True,
        transitions=[
            {
                "from": "PASSIVE",
                "to": "ACTIVE",
                "trigger": "activate",
                "reason": "lease acquired",
                "at": MOMENT,
                "durationSeconds": 0.31,
                "epoch": 7,
                "instance": "a",
            }
        ],
        count=1,
    )

    success: Literal[True]
    transitions: list[TransitionShape]
    count: int


class AcceptedAnswer(_Shape):
    """Asked; what comes of it is in /api/status/transitions."""

    model_config = _example(success=True, instance="a", state="ACTIVE", handoffTo="b")

    success: Literal[True]
    instance: str
    state: State
    handoff_to: str | None


class ImportAnswer(_Shape):
    """What an import found and did."""

    model_config = _example(success=True, report={"imported": ["support"], "failed": []})

    success: Literal[True]
    report: dict[str, Any]


class PeerOnWire(_Shape):
    """A peer between instances; `seenAt` in seconds since 1970."""

    id: str
    incarnation: str
    state: str
    address: str
    version: str
    seen_at: float


class HelloAnswer(_Shape):
    """Everyone whom the holder knows, itself included."""

    model_config = _example(
        success=True,
        peers=[
            {
                "id": "a",
                "incarnation": "77ab",
                "state": "ACTIVE",
                "address": "http://10.0.0.7:8080",
                "version": "1.0",
                "seenAt": 1738324800.0,
            }
        ],
    )

    success: Literal[True]
    peers: list[PeerOnWire]


class HealthAnswer(_Shape):
    """Whether what was asked holds; the status code says the same."""

    model_config = _example(ok=True, state="ACTIVE")

    ok: bool
    state: State
