"""What the machine asks of the world, and the errors that each port may raise.

Adapters take no `timeout=`: whoever calls writes `trio.fail_after` around the call, and an adapter
that is cancelled stops at once and leaves no thread, call or connection behind. Adapters never
retry; the machine does, in one place (`machine.retry`), and only on the errors named here.

Every method may raise `StoreUnavailable` (the answer is not known: the work may or may not have
been done) unless its docstring says otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import trio

from machine.records import (
    COMMIT_BYTES_MAX,
    COMMIT_WRITES_MAX,
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    Fence,
    Grant,
    Heartbeat,
    InboundMessage,
    InboxEntry,
    InboxPlace,
    KeyChange,
    KeyName,
    LeaseStamps,
    LeaseView,
    LeaseWrite,
    Listing,
    Message,
    MessageId,
    MessageState,
    PartName,
    Stamp,
    Transition,
    Version,
)


class StoreUnavailable(Exception):
    """The store did not answer, or answered that it cannot now. What was asked may have happened.

    `code` is the store's own word for it, for logs and metrics.
    """

    def __init__(self, message: str, *, code: str = "unavailable") -> None:
        super().__init__(message)
        self.code = code


class StoreMisconfigured(StoreUnavailable):
    """The store refuses us for good: wrong project, no permission, a newer format.

    At start it is the end; the message says what to change. Later it is an outage like any other:
    asked again with backoff, since somebody may mend it meanwhile.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, code="misconfigured")


# --- the lease -------------------------------------------------------------------------------


class LeaseMissing(Exception):
    """A lease document does not exist. Unknown, never free: only `watchkeeper init` makes them."""


class LeaseRefused(Exception):
    """A precondition did not hold. Not proof that nothing was written: read again and compare."""


class LeaseStore(Protocol):
    """Two documents, written in one conditional commit."""

    async def read(self) -> LeaseView:
        """Read lease and fence in one call, outside any transaction.

        Raises `LeaseMissing`, `StoreUnavailable`, `StoreMisconfigured`.
        """
        ...

    async def read_heartbeat(self) -> Heartbeat:
        """Read the lease alone: half the price, and enough to see that it is still held.

        Raises as `read`; `LeaseMissing` for the lease only.
        """
        ...

    async def write(self, write: LeaseWrite) -> LeaseStamps:
        """Commit both documents under the preconditions in `write`, atomically.

        Raises `LeaseRefused`, `LeaseMissing`, `StoreUnavailable`: after each of them the write may
        have been applied all the same.
        """
        ...

    async def initialise(self, *, epoch: int = 0) -> bool:
        """Create both documents, released, at `epoch`; false when they already exist.

        Touches nothing that exists: one document without the other raises `LeaseMissing`.
        """
        ...

    def watch_fence(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Fence]]:
        """Yield the fence after each change, the newest only, starting with the present one.

        It only accelerates: it may be late, repeat itself or stay silent while the store is away.
        Reopens by itself with backoff; never raises into the reader.
        """
        ...


# --- accounts and outbox ---------------------------------------------------------------------


def check_fits(commit: AccountCommit) -> None:
    """What every store does first: one that has no limit must not hide that another has."""
    if not commit.fits:
        raise ValueError(
            f"a commit of {commit.write_count} documents and {commit.byte_count} bytes; at most "
            f"{COMMIT_WRITES_MAX} and {COMMIT_BYTES_MAX} fit in one"
        )


class StaleWrite(Exception):
    """The account is not at the stamp the write expected, or the epoch is not the newest."""


class AccountExists(Exception):
    """The account cannot be created: it is there already."""


class MessageExists(Exception):
    """A new message's id is taken. Nothing was written. `message` is the one that is there."""

    def __init__(self, message: Message) -> None:
        super().__init__(f"message {message.message_id} exists")
        self.message = message


class AccountStore(Protocol):
    """The shared copy of every account. Reads are anyone's; writes are fenced."""

    async def list_accounts(self) -> Listing:
        """Every account at one moment, each with its `MAIN_PART`, version and stamp.

        What cannot be read is in the listing with its `fault`; it never raises for one account.
        """
        ...

    async def fetch_account(self, account_id: AccountId) -> AccountCopy | None:
        """One account, complete, as of one moment."""
        ...

    async def create_account(
        self, grant: Grant, account: Account, version: Version, parts: Mapping[PartName, bytes]
    ) -> Stamp:
        """Write a new account. Raises `AccountExists`; `StaleWrite` when the epoch has moved on."""
        ...

    async def commit(self, commit: AccountCommit) -> Stamp:
        """Apply one account's commit, or find it applied already; the account's new stamp.

        Raises `StaleWrite`, `MessageExists`, `StoreUnavailable`; `ValueError`, and nothing is
        written, when it does not fit (`AccountCommit.fits`).
        """
        ...

    async def seal(self, commits: Sequence[AccountCommit]) -> Sequence[Stamp | None]:
        """Commit many accounts' plain fields and versions, in as few calls as the store allows.

        One answer for each, in order: the new stamp, or `None` where the account was not as
        expected (that one was not written). Raises only when nothing is known.
        """
        ...

    async def remove_account(
        self, grant: Grant, account_id: AccountId, stamp: Stamp, *, purge: bool
    ) -> None:
        """Archive an account's bytes and take it off the list; with `purge` destroy them.

        Raises `StaleWrite`.
        """
        ...

    async def archive_parts(self, copy: AccountCopy, reason: str) -> None:
        """Keep a copy's bytes aside, for `repair` and logouts, before they are replaced."""
        ...


class OutboxStore(Protocol):
    """Messages accepted and kept. They are written by `AccountStore.commit`."""

    async def list_pending(self) -> Sequence[Message]:
        """Every message in `PENDING_STATES`, oldest first."""
        ...

    async def fetch_message(self, message_id: MessageId) -> Message | None: ...

    async def purge_messages(self, grant: Grant, *, before: float, count_max: int) -> int:
        """Delete settled messages last updated before `before` (wall clock); how many went."""
        ...


class InboxStore(Protocol):
    """Messages that accounts received. They are written by `AccountStore.commit`."""

    async def list_inbox(
        self, account_id: AccountId, *, after: InboxPlace | None, count_max: int
    ) -> Sequence[InboxEntry]:
        """The account's messages in the order of their places, those after `after` only.

        At most `count_max`; fewer only at the end.
        """
        ...

    async def purge_inbox(self, grant: Grant, *, before: float, count_max: int) -> int:
        """Delete messages received before `before` (wall clock), oldest first; how many went.

        Raises `StaleWrite`.
        """
        ...


# --- the local disk --------------------------------------------------------------------------


class LocalStore(Protocol):
    """This host's own copy. An older version never overwrites a newer one (`StaleWrite`)."""

    async def list_accounts(self) -> Listing:
        """Every account with its `MAIN_PART`, each with its fault if it cannot be read.

        Entering ACTIVE waits for it: what only opening an account needs is read then.
        """
        ...

    async def fetch_account(self, account_id: AccountId) -> AccountCopy | None:
        """One account, complete, with its fault if it cannot be read."""
        ...

    async def save_account(self, copy: AccountCopy) -> None:
        """Replace an account's copy by a complete one."""
        ...

    async def apply(self, commit: AccountCommit) -> None:
        """Apply a commit's account, version and changed parts to the copy that is here.

        Returns when the disk has it. Raises `StaleWrite` when there is no copy to apply it to.
        """
        ...

    async def remove_account(self, account_id: AccountId, *, purge: bool) -> None:
        """Archive the copy, or destroy it. No copy: nothing to do."""
        ...

    async def highest_epoch(self) -> int:
        """The highest epoch this host has ever seen granted; 0 on a new disk."""
        ...

    async def raise_epoch(self, epoch: int) -> None:
        """Remember `epoch` if it is the highest; returns when the disk has it."""
        ...

    async def append_transition(self, transition: Transition) -> None: ...

    async def list_transitions(self, count_max: int) -> Sequence[Transition]:
        """The newest `count_max`, oldest first."""
        ...

    async def append_report(self, report: Mapping[str, object]) -> None:
        """Keep a restore report, as JSON-able data; the newest 100 are kept."""
        ...


# --- credentials and keys --------------------------------------------------------------------


class AuthUnreadable(Exception):
    """The bytes are there and mean nothing to us: wrong key, cut short, or not ours.

    The message says which, and what to do; it never holds any of the bytes.
    """


class AuthCodec(Protocol):
    """Packs an account's keys into encrypted parts and back. Pure computation: nothing waits."""

    def check(self, account_id: AccountId, parts: Mapping[PartName, bytes]) -> str | None:
        """What is wrong with the parts that are there, or `None`. Opens `MAIN_PART`."""
        ...

    def unpack(
        self, account_id: AccountId, parts: Mapping[PartName, bytes]
    ) -> dict[KeyName, bytes]:
        """Every key. Raises `AuthUnreadable` when a part is missing, foreign or broken."""
        ...

    def change(
        self,
        account_id: AccountId,
        parts: Mapping[PartName, bytes],
        change: KeyChange,
        version: Version,
    ) -> dict[PartName, bytes | None]:
        """The parts that differ after `change`, written at `version`; `MAIN_PART` among them.

        `parts` empty makes a new state. Raises `AuthUnreadable`, `AuthTooLarge`.
        """
        ...

    def rotate(
        self, account_id: AccountId, parts: Mapping[PartName, bytes], version: Version
    ) -> dict[PartName, bytes]:
        """All parts written again under the active key; empty when they are already.

        Raises `AuthUnreadable`.
        """
        ...


class AuthTooLarge(Exception):
    """A part would grow over what a store accepts in one document."""


# --- WhatsApp --------------------------------------------------------------------------------


class ConnectionClosed(Exception):
    """The account's connection is gone; `code` as in WHATSAPP.md §2 (428, 440, 401, …)."""

    def __init__(self, code: int, detail: str = "", *, expire_s: float | None = None) -> None:
        super().__init__(f"closed with {code}: {detail}" if detail else f"closed with {code}")
        self.code = code
        self.detail = detail
        self.expire_s = expire_s
        """How long a temporary ban (402) lasts."""


class SendRefused(Exception):
    """The server refuses this message for good. `code` is its ack error (463, 479) or 404."""

    def __init__(self, code: int, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


class ConnectorDown(Exception):
    """The connector cannot go on in this term: its processes are dead beyond repair."""


@dataclass(frozen=True, slots=True)
class Connected:
    """The account is logged in; sends may begin."""

    phone: str


@dataclass(frozen=True, slots=True)
class QrShown:
    """A new QR code to scan, valid until `expires_at` (wall clock). Pairing only."""

    qr: str = field(repr=False)
    expires_at: float


@dataclass(frozen=True, slots=True)
class PairingScanned:
    """The phone has scanned; the new identity's keys follow, and its login."""


@dataclass(frozen=True, slots=True)
class KeysChanged:
    """Keys changed outside a send. `stored` is set by the machine when they are durable."""

    change: KeyChange
    stored: trio.Event


@dataclass(frozen=True, slots=True)
class MessageProgressed:
    """A receipt: a message went further than the server's ack, or the server refused it late."""

    message_id: MessageId
    state: MessageState
    error: str | None = None


@dataclass(frozen=True, slots=True)
class MessageReceived:
    """Somebody sent a message. `keys`, changed by reading it, are stored in the same commit.

    `stored` is set by the machine when both are durable. Only then does the server hear that it
    arrived; until then it is delivered again, at the latest at the next login.
    """

    message: InboundMessage
    keys: KeyChange | None
    stored: trio.Event


@dataclass(frozen=True, slots=True)
class BodyAsked:
    """A recipient could not read a message of ours, and its text is needed once more.

    `answer` is called once, with the text, or with `None` when it is not known; unless the
    connection ends before.
    """

    message_id: MessageId
    answer: Callable[[str | None], None]


ConnectionEvent = (
    Connected
    | QrShown
    | PairingScanned
    | KeysChanged
    | MessageProgressed
    | MessageReceived
    | BodyAsked
)


@dataclass(frozen=True, slots=True)
class ServerAck:
    """The server has taken the message. `keys` changed by it are stored in the same commit."""

    keys: KeyChange | None = None


class Connection(Protocol):
    """One account's live connection. Exists from `open_connection` to the end of that block.

    Keys are told in the order in which they changed, whoever is told: those of a `ServerAck` too.
    `next_event` returns nothing that changed after an ack before that ack's caller has run on to
    its own next await, and `send_text` returns no ack before everything that changed earlier was
    returned by `next_event`. So two tasks that hand keys to the ledger as they get them, without an
    await in between, hand them over in order; an old ratchet never overwrites a newer one. For that
    somebody must be reading events while messages are sent.
    """

    def hang_up(self) -> None:
        """Ask for the connection's end in good order, and hear the rest of it.

        What it still has to tell (keys that changed, a message that was just read) comes out of
        `next_event`, and then `ConnectionClosed`. Without it the block's end cuts that off.
        """
        ...

    async def next_event(self) -> ConnectionEvent:
        """Wait for the next event. Raises `ConnectionClosed` once all earlier ones were read."""
        ...

    async def send_text(self, message_id: MessageId, to: str, text: str) -> ServerAck:
        """Send, and wait for the server's ack. Several may wait; they go out in their order.

        Each ack brings every key that was changed when it came, those of later sends too.
        Raises `SendRefused` (final), `ConnectionClosed` (not known whether it went out).
        Cancelled: it may have gone out.
        """
        ...

    async def is_on_whatsapp(self, to: str) -> bool:
        """False only when the server says so: where it does not answer, the send will tell.

        Raises `ConnectionClosed`.
        """
        ...

    async def request_pairing_code(self, phone: str) -> tuple[str, float]:
        """A code to type on the phone, and when it expires (wall clock). While pairing only."""
        ...

    async def log_out(self) -> None:
        """Unlink the device at the server. Raises `ConnectionClosed`."""
        ...


class Bridge(Protocol):
    """What connections are made of during one term (for Baileys: its Node processes)."""

    def open_connection(
        self,
        account_id: AccountId,
        keys: Mapping[KeyName, bytes] | None,
        *,
        doubtful: Collection[str] = (),
        distrust_sessions: bool = False,
    ) -> AbstractAsyncContextManager[Connection]:
        """Connect an account with its `keys`; `None` begins a pairing: a new identity.

        `doubtful` recipients may have had a message on the wire that was never recorded: their
        Signal sessions are dropped first. `distrust_sessions`: all of them may be older than what
        was on the wire, and all are dropped. What is dropped is told as `KeysChanged`, before
        `Connected`. The block's end closes the connection.
        Raises `ConnectionClosed`, `ConnectorDown`.
        """
        ...


class Connector(Protocol):
    """Makes bridges. `loopback` and `baileys` are the two."""

    def open_bridge(self) -> AbstractAsyncContextManager[Bridge]:
        """Start what a term needs. After the block nothing of it runs any more, dead or alive."""
        ...


# --- accounts that come from elsewhere --------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LegacyAccount:
    """An account read from a directory of another backend, ready to be created here.

    `notes` are (cause, advice) of what was left out of it.
    """

    account_id: AccountId
    name: str
    phone: str | None
    keys: Mapping[KeyName, bytes] = field(repr=False)
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class LegacyFault:
    """A directory that could not be imported. Its files are untouched."""

    directory: str
    account_id: AccountId
    cause: str
    advice: str


class LegacySource(Protocol):
    """Directories of other backends (Baileys' multi-file layout). Only ever read."""

    async def scan(
        self, directory: str | None = None, *, known: Collection[AccountId] = ()
    ) -> Sequence[LegacyAccount | LegacyFault]:
        """Everything in `directory`; `None`: in the configured one, nothing when there is none.

        Directories of `known` accounts are passed over without being read.
        """
        ...


# --- telling ---------------------------------------------------------------------------------


class Level(StrEnum):
    """How loud an event is."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Journal(Protocol):
    """The one place that events go to: log, metrics, event stream. Never waits, never raises."""

    def note(self, event: str, /, **fields: object) -> None:
        """Record an event of `machine.events.EVENTS` with its fields (no secrets, no bodies)."""
        ...


class Clocks(Protocol):
    """The clocks besides Trio's."""

    def wall(self) -> float:
        """Seconds since 1970: for people's eyes."""
        ...

    def boottime(self) -> float:
        """Seconds since boot, suspend included (CLOCK_BOOTTIME): for the term's deadline."""
        ...


# --- who ends us when we cannot ---------------------------------------------------------------


class Guard(Protocol):
    """Stands outside this process, and kills it when a term outlives its deadline.

    It is told, and never asks. Nothing here waits or raises.
    """

    def deadline_moved(self, grant: Grant, kill_at: float) -> None:
        """Take note: what still runs at `kill_at` (CLOCK_BOOTTIME) acts without the lease.

        Told before anything of the term runs, and at each renewal.
        """
        ...

    def term_over(self) -> None:
        """Take note: nothing of the term runs any more. The lease may still be ours."""
        ...

    def lease_released(self) -> None:
        """Take note: there is nothing to give back in our name, should we die now."""
        ...


class Unguarded:
    """`Guard` where nobody stands outside: a term ends by itself or not at all."""

    def deadline_moved(self, grant: Grant, kill_at: float) -> None: ...

    def term_over(self) -> None: ...

    def lease_released(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Ports:
    """The world as the machine is given it, once, by the composition root."""

    lease: LeaseStore
    accounts: AccountStore
    outbox: OutboxStore
    inbox: InboxStore
    local: LocalStore
    codec: AuthCodec
    connector: Connector
    legacy: LegacySource
    journal: Journal
    clocks: Clocks
    rng: random.Random
    guard: Guard = field(default_factory=Unguarded)
