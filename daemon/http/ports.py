"""What the HTTP layer asks of the rest of the daemon, and what the composition root tells it.

Never lives here: behaviour. `machine.instance.Instance` and `machine.desk.Desk` fit these by shape.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from daemon.http.auth import Tokens
from machine.inbox import InboxPage
from machine.records import AccountId, Identity, Message, MessageId, Transition
from machine.states import State
from machine.views import AccountView, Holder, LeaseStatus, PairingCode, QrCode, RestoreReport


class DeskPort(Protocol):
    """What a term answers. Every method raises `NotActive` the moment the term ends,
    and then nothing was accepted; `StoreAway` when it is not known."""

    @property
    def epoch(self) -> int: ...

    @property
    def outbox_depth(self) -> int: ...

    async def list_accounts(self) -> tuple[AccountView, ...]: ...

    async def account(self, account_id: AccountId) -> AccountView: ...

    async def add_account(self, account_id: AccountId, name: str) -> AccountView: ...

    async def qr(self, account_id: AccountId) -> QrCode: ...

    async def pairing_code(self, account_id: AccountId, phone: str) -> PairingCode: ...

    async def reconnect(self, account_id: AccountId) -> AccountView: ...

    async def log_out(self, account_id: AccountId) -> AccountView: ...

    async def repair(self, account_id: AccountId) -> AccountView: ...

    async def remove_account(self, account_id: AccountId, *, purge: bool) -> None: ...

    async def accept(
        self,
        *,
        message_id: MessageId,
        account_id: AccountId,
        to: str,
        text: str,
        idempotency_key: str | None,
    ) -> Message:
        """Durable on return. The same message id again answers the message that is there."""
        ...

    async def wait_progress(self, message_id: MessageId) -> Message:
        """Return when the message is no longer pending. The caller sets the deadline."""
        ...

    async def message(self, message_id: MessageId) -> Message: ...

    async def import_accounts(self, directory: str) -> Mapping[str, object]: ...


class InstancePort(Protocol):
    """The instance this API speaks for."""

    @property
    def identity(self) -> Identity: ...

    @property
    def state(self) -> State: ...

    @property
    def since(self) -> float: ...

    @property
    def transitions(self) -> Sequence[Transition]: ...

    @property
    def holder(self) -> Holder | None: ...

    @property
    def lease_status(self) -> LeaseStatus | None: ...

    @property
    def desk(self) -> DeskPort | None: ...

    @property
    def restore_report(self) -> RestoreReport | None: ...

    @property
    def alive(self) -> bool: ...

    def request_drain(self, reason: str) -> None: ...

    def request_step_down(self, reason: str, *, handoff_to: str | None = None) -> None: ...

    async def wait_changed(self) -> None:
        """Return when state, term or holder have changed since the call."""
        ...

    async def list_accounts(self) -> tuple[AccountView, ...]:
        """The accounts from the shared store. Raises `StoreUnavailable`, `StoreMisconfigured`."""
        ...

    async def list_inbox(self, account_id: AccountId, *, cursor: str, count_max: int) -> InboxPage:
        """What the account received after `cursor`, from the shared store.

        Raises `CursorUnknown`, `AccountNotFound`, `StoreUnavailable`, `StoreMisconfigured`.
        """
        ...


class MakeMessageId(Protocol):
    """Makes a message's id: always the same one from account and key, a random one without key."""

    def __call__(
        self, account_id: AccountId, idempotency_key: str | None, rng: random.Random
    ) -> MessageId: ...


RenderMetrics = Callable[[], bytes]
"""Prometheus' text format, as it is now."""


@dataclass(frozen=True, slots=True)
class ApiSettings:
    """Where and how the API listens. Built once; refuses numbers that contradict each other.

    Lengths of time are seconds; `…_bytes_max` are bytes.
    """

    tokens: Tokens = field(repr=False)
    version: str
    bind: str = "127.0.0.1:8080"
    handoff_wait_s: float = 10.0
    """How long a request waits for the next holder."""
    send_wait_s: float = 5.0
    """How long `send-message` waits for the server's acknowledgement before it answers 202."""
    status_wait_s: float = 2.0
    """How long a list of accounts may wait for the holder before the store answers it."""
    answer_s: float = 8.0
    """How long the machine may take for anything but an import; then `store_unavailable`."""
    connect_s: float = 2.0
    """How long a connection to another instance may take to open."""
    holder_answer_s: float = 10.0
    """How long another instance may take to answer; a send's wait comes on top."""
    import_s: float = 300.0
    """How long an import of a directory may take."""
    body_s: float = 10.0
    """How long a caller may take to hand over a body."""
    body_bytes_max: int = 256 * 1024
    answer_bytes_max: int = 64 * 1024 * 1024
    """A larger answer from the holder is not relayed."""
    forwards_max: int = 1000
    """Requests waiting for another instance at once; more are answered 503."""
    forward_connections_max: int = 256
    connections_max: int = 10_000
    """Connections at once; more get 503 and are closed."""
    keep_alive_s: float = 15.0
    """How long a connection may be idle, or take to hand over a request's head."""
    send_s: float = 30.0
    """How long a caller may take no byte of an answer."""
    stop_s: float = 5.0
    """How long requests in flight may take to finish when the API stops."""
    hello_s: float = 5.0
    """How often a standby tells the holder that it is there."""
    hello_first_s: float = 1.0
    """The same, while no holder has answered."""
    peer_ttl_s: float = 15.0
    """A peer that was silent for so long is forgotten."""

    def __post_init__(self) -> None:
        """Refuse what cannot work, with the names to change."""
        if self.peer_ttl_s < 2 * self.hello_s:
            raise ValueError(
                f"peer_ttl_s ({self.peer_ttl_s:g}) must be at least two hellos apart "
                f"(2 * hello_s = {2 * self.hello_s:g}): one lost hello would forget a standby"
            )
        if self.answer_s >= self.holder_answer_s:
            raise ValueError(
                f"holder_answer_s ({self.holder_answer_s:g}) must be over answer_s "
                f"({self.answer_s:g}): who forwards would give up before the holder answers"
            )
        if self.status_wait_s > self.handoff_wait_s:
            raise ValueError(
                f"status_wait_s ({self.status_wait_s:g}) is over handoff_wait_s "
                f"({self.handoff_wait_s:g})"
            )
