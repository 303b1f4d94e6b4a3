"""The facts that travel between the machine and its stores: frozen, comparable, without behaviour.

Keys and texts of messages are in no `repr`: an error or a log line may quote one of these.

Never lives here: anything that waits, and any word that belongs to one adapter only.
Moments called `…_at` are seconds since 1970 (wall clock), for people; no decision compares them
between two hosts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

AccountId = NewType("AccountId", str)
MessageId = NewType("MessageId", str)
Stamp = NewType("Stamp", str)
"""What a store says a document's present version is (Firestore: `update_time`). Opaque: compared
for equality by the store that made it, and by nobody else."""

KeyName = NewType("KeyName", str)
"""A name in an account's authentication state: `creds`, `session-4915….0`, `pre-key-17`."""

PartName = NewType("PartName", str)
"""One of the packed blobs that an account's authentication state is kept in. `MAIN_PART` holds
the credentials and the list of the others."""

MAIN_PART = PartName("main")

COUNT_MAX = 2**53
"""Of an epoch or a revision that a store may be believed. Nobody counts that far in a century, and
one more than a store's largest number would end whoever writes it."""


@dataclass(frozen=True, slots=True, order=True)
class Version:
    """How new an account's copy is. Ordered: the higher epoch wins, then the higher revision."""

    epoch: int
    revision: int

    def __str__(self) -> str:
        return f"{self.epoch}.{self.revision}"

    @property
    def plausible(self) -> bool:
        """Whether an instance can have counted that far. A store says no: it is damage."""
        return 0 <= self.epoch <= COUNT_MAX and 0 <= self.revision <= COUNT_MAX


class AccountStatus(StrEnum):
    """What an account is doing, as callers read it."""

    QR_READY = "qr_ready"
    AWAITING_SCAN = "awaiting_scan"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    RESTORING = "restoring"
    BACKING_OFF = "backing_off"
    LOGGED_OUT = "logged_out"
    BANNED = "banned"
    QUARANTINED = "quarantined"
    STOPPED = "stopped"


RESTORED_STATUSES = frozenset(
    {
        AccountStatus.CONNECTED,
        AccountStatus.CONNECTING,
        AccountStatus.QR_READY,
        AccountStatus.AWAITING_SCAN,
        AccountStatus.RESTORING,
        AccountStatus.BACKING_OFF,
    }
)
"""Accounts in these are opened when an instance becomes ACTIVE; the others are only listed."""


@dataclass(frozen=True, slots=True)
class Account:
    """The plain fields of an account, for queries and for people. Never holds a secret."""

    account_id: AccountId
    name: str
    status: AccountStatus
    created_at: float
    updated_at: float
    since: float
    """When `status` became what it is."""
    phone: str | None = None
    last_error: str | None = None
    last_connected_at: float | None = None
    banned_until: float | None = None
    """WhatsApp's own word for how long a temporary ban lasts, on our wall clock: the next holder
    does not open the account before it either. The clocks of two hosts may differ by less than
    matters here."""
    sessions_doubtful: bool = False
    """The Signal sessions may be older than what was on the wire: they are dropped at the next
    opening (`machine.doubt`)."""


@dataclass(frozen=True, slots=True)
class AccountCopy:
    """One store's copy of an account.

    `parts` holds `MAIN_PART`, unless the account was never paired; the other parts are there only
    when they were asked for (`fetch_account`): see `complete`.
    A copy that could not be read keeps its bytes in the store; `fault` says what is wrong with it
    and `account` holds what could still be made out.
    """

    account: Account
    version: Version
    parts: Mapping[PartName, bytes] = field(repr=False)
    complete: bool
    stamp: Stamp | None = None
    commit_id: str = ""
    """The `AccountCommit.commit_id` that wrote this copy: it tells whether a commit without an
    answer was applied."""
    fault: str | None = None
    removed: bool = False
    """The account was removed: this copy is only the mark that says so, at a version of its own."""
    newer: bool = False
    """A newer release wrote it, and that is its fault. Whatever its version seems to be, nothing
    of ours goes over it."""


@dataclass(frozen=True, slots=True)
class KeyChange:
    """A change set of an account's authentication state: applied whole or not at all.

    `None` deletes a key. `creds`, when present, is a complete new value.
    """

    values: Mapping[KeyName, bytes | None] = field(repr=False)


class MessageState(StrEnum):
    """How far a message has come. It only moves forward; `failed` is final."""

    QUEUED = "queued"
    SENDING = "sending"
    SERVER_ACK = "server_ack"
    DELIVERED = "delivered"
    READ = "read"
    FAILED = "failed"


PENDING_STATES = frozenset({MessageState.QUEUED, MessageState.SENDING})


@dataclass(frozen=True, slots=True)
class Message:
    """An outbox entry. `message_id` is made once, before the wire, and reused at every retry."""

    message_id: MessageId
    account_id: AccountId
    to: str
    """The recipient's phone number in international form, digits only."""
    text: str = field(repr=False)
    state: MessageState
    epoch: int
    created_at: float
    updated_at: float
    idempotency_key: str | None = None
    error: str | None = None
    attempts: int = 0
    state_at: Mapping[MessageState, float] = field(default_factory=dict)
    """When each state was reached."""


@dataclass(frozen=True, slots=True)
class InboundMessage:
    """A message that somebody sent to an account. WhatsApp delivers it again until it is stored.

    It is told apart by account, chat and `message_id`, which the sender made; the first text that
    was stored under them stays.
    """

    account_id: AccountId
    message_id: MessageId
    chat: str
    """The conversation: the other's phone number, or the name WhatsApp gives a group."""
    sender: str
    sender_name: str | None
    """What the sender calls himself."""
    text: str = field(repr=False)
    sent_at: float
    """The server's clock."""
    received_at: float


@dataclass(frozen=True, slots=True, order=True)
class InboxPlace:
    """Where a message stands among those of its account, in the order in which they were stored.

    `epoch` and `revision` are the account's version after the commit that stored it, `number` is
    its place in that commit. Versions only rise, so nothing is ever stored before a place that
    somebody has read up to.
    """

    epoch: int
    revision: int
    number: int


@dataclass(frozen=True, slots=True)
class InboxEntry:
    """A stored message and its place."""

    place: InboxPlace
    message: InboundMessage


class LeaseState(StrEnum):
    """What the lease and the fence say of themselves. `handoff` occurs in the fence only."""

    HELD = "held"
    RELEASED = "released"
    HANDOFF = "handoff"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who an instance is. `incarnation` is random for each process start."""

    name: str
    incarnation: str
    address: str
    """Where other instances reach its API, for example `http://10.0.0.7:8080`."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The heartbeat document. `nonce` is fresh for each attempt to write it."""

    holder: str
    incarnation: str
    epoch: int
    nonce: str
    ttl_s: float
    state: LeaseState

    @property
    def plausible(self) -> bool:
        """Whether an instance can have written it. A held one without a ttl would seem free."""
        held = self.state is not LeaseState.RELEASED
        return (
            0 <= self.epoch <= COUNT_MAX
            and 0 <= self.ttl_s < TTL_S_MAX
            and not (held and self.ttl_s == 0)
        )


@dataclass(frozen=True, slots=True)
class FenceChange:
    """One line of the fence's history: who changed it, when, to what and why."""

    at: float
    epoch: int
    state: LeaseState
    changed_by: str
    reason: str


@dataclass(frozen=True, slots=True)
class Fence:
    """The control document: who acts under which epoch, and what the operator asked for.

    `holder` acts under `epoch`; `epoch` never falls. `paused` keeps everyone from acquiring.
    """

    epoch: int
    holder: str
    incarnation: str
    address: str
    state: LeaseState
    handoff_to: str | None = None
    paused: bool = False
    step_down_of: int | None = None
    """An operator's wish: the holder of this epoch is to step down (`force` writes a new epoch)."""
    reason: str = ""
    changed_by: str = ""
    history: tuple[FenceChange, ...] = ()
    settled: bool = False
    """The last holder gave the lease back and left nothing that only its own disk has."""


FENCE_LASTING_FIELDS = ("epoch", "holder", "incarnation", "address", "state")
"""`Fence`'s first fields. No format of any store changes what they mean, so that an instance of an
earlier release still knows when it is over, and where to forward to."""

FENCE_HISTORY_MAX = 20

TTL_S_MAX = 86_400.0
"""Of a lease that a store may be believed: a day, far above what can be set."""


@dataclass(frozen=True, slots=True)
class LeaseView:
    """Both documents as one read saw them.

    `age_s` is the time since the lease was last written, on the store's clock (never a wall clock
    of ours). A store that can tell that the holder is dead (SQLite: another boot id) answers
    infinity.
    """

    lease: Lease
    fence: Fence
    lease_stamp: Stamp
    fence_stamp: Stamp
    age_s: float


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """The lease document alone, as one read saw it. `age_s`: as in `LeaseView`."""

    lease: Lease
    lease_stamp: Stamp
    age_s: float


@dataclass(frozen=True, slots=True)
class LeaseWrite:
    """One conditional commit: everything it depends on is a value in here, fixed before the await.

    `None` leaves that document alone. `lease_stamp`/`fence_stamp`, when given, are preconditions:
    the document must be exactly as it was when that stamp was read.
    """

    lease: Lease | None = None
    fence: Fence | None = None
    lease_stamp: Stamp | None = None
    fence_stamp: Stamp | None = None

    @property
    def takes_lease(self) -> bool:
        """Whether a new term begins with it."""
        return (
            self.lease is not None
            and self.fence is not None
            and self.lease.state is self.fence.state is LeaseState.HELD
        )


@dataclass(frozen=True, slots=True)
class LeaseStamps:
    """The stamps after a successful `LeaseWrite`; `None` for a document it did not write."""

    lease_stamp: Stamp | None
    fence_stamp: Stamp | None


@dataclass(frozen=True, slots=True)
class Grant:
    """Proof that an epoch was granted: what every write of its holder carries."""

    epoch: int
    holder: str
    incarnation: str
    fence_stamp: Stamp


COMMIT_WRITES_MAX = 500
"""Documents in one commit; the Firestore emulator and older databases refuse more."""

COMMIT_BYTES_MAX = 9 * 1024 * 1024
"""Of one commit; Firestore's limit is 10 MiB for the whole request
(https://firebase.google.com/docs/firestore/quotas)."""

DOCUMENT_BYTES = 4096
"""What a document adds to its text or part: its name, its fields, a key given by a caller."""


@dataclass(frozen=True, slots=True)
class AccountCommit:
    """One atomic, fenced change of one account and of messages in its outbox.

    Refused (`StaleWrite`) unless the stored account is exactly at `stamp`. The account's plain
    fields, version and `commit_id` are always written; the latter is how a commit without an
    answer is recognised.
    The same object may be committed again after an ambiguous answer: the commit is then either
    found applied (same `commit_id`) or applied now.
    """

    grant: Grant
    commit_id: str
    account: Account
    version: Version
    stamp: Stamp
    parts: Mapping[PartName, bytes | None] = field(default_factory=dict, repr=False)
    """The changed parts only; `None` deletes one. `MAIN_PART` is among them when any part is."""
    new_messages: tuple[Message, ...] = ()
    """Must not exist yet: `MessageExists` otherwise, and nothing at all is written."""
    messages: tuple[Message, ...] = ()
    inbound: tuple[InboundMessage, ...] = ()
    """Received messages, each at most once. One that is stored already is left as it is; the
    others get the places of this `version`, in order. With any, `version` has risen."""

    @property
    def write_count(self) -> int:
        """Documents that it writes: the account with its main part, and each of the others."""
        others = sum(part != MAIN_PART for part in self.parts)
        return 1 + others + len(self.new_messages) + len(self.messages) + len(self.inbound)

    @property
    def byte_count(self) -> int:
        """About how large it is, and never less: what a store with a limit on bytes counts."""
        texts = [message.text for message in (*self.new_messages, *self.messages)]
        texts += [message.text for message in self.inbound]
        parts = [part for part in self.parts.values() if part is not None]
        bodies = sum(map(len, parts)) + sum(len(text.encode()) for text in texts)
        return bodies + DOCUMENT_BYTES * self.write_count

    @property
    def fits(self) -> bool:
        """Whether a store takes it in one piece."""
        return self.write_count <= COMMIT_WRITES_MAX and self.byte_count <= COMMIT_BYTES_MAX


@dataclass(frozen=True, slots=True)
class Listing:
    """Every account that a store knows, readable or not, without order.

    `complete` is false when the store knows that it could not name all of them (a torn file).
    """

    copies: tuple[AccountCopy, ...]
    complete: bool = True
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Transition:
    """The record of one transition of the machine. `at` is wall time; `duration_s` is how long
    its callbacks took; `epoch` is the one acted under, 0 if none."""

    source: str
    dest: str
    trigger: str
    reason: str
    at: float
    duration_s: float
    epoch: int
    instance: str
