"""Every limit of the machine besides the lease's own times, with what happens at the limit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Durability(StrEnum):
    """When a key change counts: when the shared store has it, or when this host's disk has it."""

    REMOTE = "remote"
    LOCAL = "local"


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds and counts. Built once from the settings; refuses numbers that contradict."""

    import_try_s: float = 300.0
    """Reading a legacy directory (300 accounts/s were measured); then it is told, and left."""
    store_try_s: float = 5.0
    """One try of one small store operation; then it is tried again."""
    read_concurrency: int = 16
    """Accounts being read one by one at once, from either store; the others wait their turn. A
    cold start that asked for a thousand at once left no room for the lease's renewals."""
    restore_try_s: float = 20.0
    """One try to list all accounts of one source; then it is tried again."""
    restore_give_up_s: float = 120.0
    """Both sources unreadable for this long: step down and let another instance try.
    One of the two: go on with the other, and say so. The outbox: open the accounts without it."""
    restore_first_pass_s: float = 90.0
    """How long `activate` waits for accounts to connect; the rest goes on in the background."""
    open_concurrency: int = 50
    """Accounts being opened at once; the others wait their turn."""
    open_try_s: float = 30.0
    """From opening to connected; then the try has failed and the account backs off."""
    open_jitter_s: float = 0.05
    reconnect_first_s: float = 1.0
    reconnect_cap_s: float = 300.0
    """Reconnects back off exponentially between these, with jitter."""
    qr_wait_s: float = 2.0
    """How long the answer to a new pairing waits for its first QR code."""
    ack_s: float = 20.0
    """How long a send waits for the server's ack; then the connection counts as broken."""
    outbox_per_account_max: int = 1000
    """Pending messages of one account; then `outbox_full`."""
    outbox_settled_kept: int = 200
    """Settled messages an account remembers in memory; older ones are read from the store."""
    hang_up_s: float = 3.0
    """How long a connection's end in good order may take; then it is cut off."""
    send_attempts_max: int = 20
    """Tries to deliver one message before it is `failed`."""
    commit_messages_max: int = 100
    """Messages in one commit; what is over goes with the next."""
    settle_s: float = 20.0
    """How long a drain waits for what is in flight; the rest is handed to the next holder."""
    linger_s: float = 2.0
    """How long an instance that released the lease goes on forwarding while nobody has it."""
    message_retention_s: float = 7 * 86400.0
    purge_every_s: float = 3600.0
    purge_count_max: int = 400
    replicate_within_s: float = 1.0
    """With `Durability.LOCAL`: how old a change may be that only the disk has."""
    warm_every_s: float = 3600.0
    """How often a PASSIVE instance brings its disk copy up to date."""
    warm_concurrency: int = 8
    recipients_known_max: int = 10_000
    """Recipients an account remembers as being on WhatsApp; then the oldest are asked again."""
    handoff_grace_s: float = 3.0
    """How long the others leave the lease to the instance it is handed to."""
    stand_back_s: float = 5.0
    """How long an instance that stepped down leaves the lease to the others."""
    transitions_kept: int = 1000

    def __post_init__(self) -> None:
        """Refuse what cannot work, with the numbers that contradict."""
        if self.restore_try_s > self.restore_give_up_s:
            raise ValueError(
                f"restore_try_s ({self.restore_try_s:g}) is longer than restore_give_up_s "
                f"({self.restore_give_up_s:g}): not one try would fit. Raise restore_give_up_s."
            )
        if self.open_concurrency < 1 or self.outbox_per_account_max < 1:
            raise ValueError("open_concurrency and outbox_per_account_max must be at least 1")
        if self.reconnect_first_s > self.reconnect_cap_s:
            raise ValueError(
                f"reconnect_first_s ({self.reconnect_first_s:g}) is over reconnect_cap_s "
                f"({self.reconnect_cap_s:g})"
            )
