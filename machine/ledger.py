"""One account's durable state: the only writer of its copy in the shared store and on this disk.

Every change of an account goes through its `Ledger`, one commit at a time; what arrives during a
commit goes with the next (group commit). A commit carries the epoch and expects the stamp that the
account had last, so a holder that is not one any more is refused by the store.

Never lives here: what the change means (`machine.session`, `machine.outbox`).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import trio

from machine.doubt import ONLY_DISK
from machine.lease import describe_error
from machine.limits import Durability, Limits
from machine.places import Places, last_used_at
from machine.ports import (
    AccountExists,
    AuthTooLarge,
    MessageExists,
    Ports,
    StaleWrite,
    StoreUnavailable,
)
from machine.records import (
    COMMIT_BYTES_MAX,
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    Grant,
    InboundMessage,
    KeyChange,
    KeyName,
    Message,
    MessageId,
    MessageState,
    PartName,
    Stamp,
    Version,
)
from machine.refusals import Refusal, StoreAway
from machine.retry import Backoff, TryTimedOut, retry

T = TypeVar("T")

COMMIT_BACKOFF = Backoff(first_s=0.05, factor=2.0, cap_s=2.0, jitter=0.5)

READOPTIONS_MAX = 5
"""How often one commit may find the account changed under it before it is given up."""

BATCH_TEXT_BYTES_MAX = COMMIT_BYTES_MAX // 2
"""Of messages that share a commit; the other half is for keys. What is over goes with the next."""


class AccountVanished(Exception):
    """The shared store has the account no more: it was removed, or is `AccountUnreadable`."""


class AccountUnreadable(AccountVanished):
    """The account is there, and cannot be read: nothing of it is written over."""


class TermGuard(Protocol):
    """What a ledger needs of its term."""

    grant: Grant
    reading: Places
    """The places for accounts being read one by one."""

    def check(self) -> None:
        """Raise `NotActive` when the term is over, on either clock."""
        ...

    def lose(self, reason: str, *, epoch_seen: int = 0) -> None:
        """End the term at once: another acts, under `epoch_seen` where that is known."""
        ...

    def spawn(self, work: Callable[[], Any]) -> None:
        """Run `work` in the term's nursery."""
        ...


@dataclass(slots=True)
class _Entry:
    """One change that waits for its commit. `applied` is called in the instant it is durable."""

    keys: KeyChange | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    new_message: Message | None = None
    messages: tuple[Message, ...] = ()
    applied: Callable[[], None] | None = None
    failed: Callable[[Exception], None] | None = None
    inbound: tuple[InboundMessage, ...] = ()
    shared: bool = False
    """Must reach the shared store, whatever the durability."""
    complete: bool = False
    """Needs every part in memory."""
    rotate: bool = False
    """Writes every part again, under the active encryption key."""
    clear: bool = False
    """Deletes every part."""
    done: trio.Event = field(default_factory=trio.Event)
    error: Exception | None = None

    def finish(self, error: Exception | None = None) -> None:
        self.error = error
        if error is None and self.applied is not None:
            self.applied()
        if error is not None and self.failed is not None:
            self.failed(error)
        self.done.set()

    @property
    def text_bytes(self) -> int:
        """How much its messages say."""
        new = () if self.new_message is None else (self.new_message,)
        return sum(len(message.text.encode()) for message in (*new, *self.messages, *self.inbound))

    @property
    def empty(self) -> bool:
        """Nothing to write: the entry only asks for what a commit brings about."""
        changes = (self.keys, self.fields, self.new_message, self.messages, self.inbound)
        return not any((*changes, self.rotate, self.clear))


@dataclass(slots=True)
class _Behind:
    """What only this disk has (`Durability.LOCAL`), until the shared store has it too."""

    parts: dict[PartName, bytes | None] = field(default_factory=dict)
    messages: dict[MessageId, Message] = field(default_factory=dict)
    dirty: bool = False


class Ledger:
    """One account's copy, and its commits.

    Between calls: `account`, `version` and `parts` are what the last durable commit wrote (plus
    plain fields noted by `note`, which go with the next); at most one commit is in flight; no
    commit is sent before the account is sealed under this term's epoch, or seals it.
    """

    def __init__(
        self,
        copy: AccountCopy,
        *,
        term: TermGuard,
        ports: Ports,
        limits: Limits,
        durability: Durability,
        push: bool = False,
        saved: bool = False,
    ) -> None:
        self.account: Account = copy.account
        self.version: Version = copy.version
        self.parts: dict[PartName, bytes] = dict(copy.parts)
        self.complete = copy.complete
        self.stamp: Stamp | None = copy.stamp
        self._term = term
        self._ports = ports
        self._limits = limits
        self._durability = durability
        self._push = push
        # The parts that the shared store has of a copy that ours is to replace; `None`: unknown.
        self._replaced: tuple[PartName, ...] | None = None
        self._waiting: list[_Entry] = []
        self._busy = False
        self._idle = trio.Event()
        self._idle.set()
        self._noted: dict[str, Any] = {}
        self._behind = _Behind()
        self._replicating = False
        self._saved = copy.version if saved else None
        # The version that the last commit was built on.
        self._base = copy.version
        self._disk_failed = False

    @property
    def account_id(self) -> AccountId:
        """Whose ledger this is."""
        return self.account.account_id

    @property
    def sealed(self) -> bool:
        """Whether the shared copy carries this term's epoch: an older holder's writes now fail."""
        return self.stamp is not None and self.version.epoch == self._term.grant.epoch

    def keys(self) -> dict[KeyName, bytes]:
        """Every key of the account. Raises `AuthUnreadable`."""
        return self._ports.codec.unpack(self.account_id, self.parts)

    def note(self, **fields: Any) -> None:
        """Change plain fields in memory; they are stored with the next commit."""
        self.account = replace(self.account, **fields)
        self._noted.update(fields)

    def doubt_sessions(self, cause: str) -> None:
        """Have the sessions dropped at the next opening; stored with the next commit, the seal."""
        if not self.account.sessions_doubtful:
            self.note(sessions_doubtful=True)
            self._ports.journal.note("account.doubted", account_id=self.account_id, cause=cause)

    # --- writing

    def post(
        self,
        *,
        keys: KeyChange | None = None,
        fields: Mapping[str, Any] | None = None,
        new_message: Message | None = None,
        messages: tuple[Message, ...] = (),
        inbound: tuple[InboundMessage, ...] = (),
        applied: Callable[[], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        """Queue a change, in order, without waiting.

        `applied` is called in the instant it is durable, or `failed` with what `write` raises.
        """
        self._post(_Entry(keys, fields or {}, new_message, messages, applied, failed, inbound))

    async def write(
        self,
        *,
        keys: KeyChange | None = None,
        fields: Mapping[str, Any] | None = None,
        new_message: Message | None = None,
        messages: tuple[Message, ...] = (),
        applied: Callable[[], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        """Queue a change and wait until it is durable.

        Raises `MessageExists` (this change was not written), `AccountVanished`, `StoreAway`,
        `AuthUnreadable`, `AuthTooLarge`. Cancelled: the change may be written all the same, and
        `applied` (or `failed`) is then called all the same.
        """
        await self._wait(_Entry(keys, fields or {}, new_message, messages, applied, failed))

    def _post(self, entry: _Entry) -> None:
        self._waiting.append(entry)
        self._start()

    async def _wait(self, entry: _Entry) -> None:
        self._post(entry)
        await entry.done.wait()
        if entry.error is not None:
            raise entry.error

    @property
    def flushed(self) -> bool:
        """Whether the shared store has everything: nothing is queued, in flight, or only here."""
        return not (self._busy or self._waiting or self._behind.dirty)

    async def flush(self) -> None:
        """Wait until everything queued is durable and the shared store has all of it.

        Raises `AccountVanished`, `StoreAway`.
        """
        while self._busy or self._behind.dirty:
            if self._behind.dirty:
                await self._wait(_Entry(shared=True))
            # A commit that was in flight may have put us behind only now: look again.
            await self._idle.wait()

    # --- sealing many accounts at once (`machine.restore`)

    def begin_seal(self) -> AccountCommit | None:
        """Hold back commits, and answer the commit that seals this account.

        `None`: it is sealed already, being written, or needs a read first (`ensure_sealed`).
        """
        if self.sealed or self._busy or self._push or self.stamp is None:
            return None
        self._busy = True
        self._idle = trio.Event()
        return AccountCommit(
            grant=self._term.grant,
            commit_id=self._make_commit_id(),
            account=self.account,
            version=Version(self._term.grant.epoch, self.version.revision),
            stamp=self.stamp,
        )

    def end_seal(self, commit: AccountCommit, stamp: Stamp | None) -> bool:
        """Take over the answer to `begin_seal`'s commit; false when it was refused."""
        if stamp is not None:
            self._base = self.version
            self.stamp, self.version = stamp, commit.version
        self._busy = False
        self._idle.set()
        if self._waiting:
            self._start()
        return stamp is not None

    async def save_seal(self, commit: AccountCommit) -> None:
        """Bring the disk copy up to a seal, so that the next restore need not fetch it."""
        if self.version == commit.version and self._saved != commit.version:
            await self._save_locally(commit)

    def abandon_seal(self) -> None:
        """Let commits go on: the seal has no answer, and the next commit finds out."""
        self._busy = False
        self._idle.set()
        if self._waiting:
            self._start()

    async def ensure_sealed(self) -> None:
        """Wait until this account is sealed, reading it again where that is needed.

        Raises `AccountVanished`, `StoreAway`.
        """
        if not self.sealed:
            await self._wait(_Entry(shared=True))

    async def ensure_complete(self) -> None:
        """Have every part in memory, reading the shared copy if they were not listed.

        Raises `AccountVanished`, `StoreAway`.
        """
        if not self.complete:
            await self._wait(_Entry(complete=True))

    async def wait_written(self) -> None:
        """Wait until everything that was queued before this call is durable.

        Raises `AccountVanished`, `StoreAway`.
        """
        if self._busy or self._waiting:
            await self._wait(_Entry())

    async def rotate(self) -> bool:
        """Re-encrypt every part under the active key; false when they are already.

        Raises `AuthUnreadable`, `AccountVanished`, `StoreAway`.
        """
        version = Version(self._term.grant.epoch, self.version.revision + 1)
        if not self._ports.codec.rotate(self.account_id, self.parts, version):
            return False
        await self._wait(_Entry(rotate=True))
        return True

    async def clear_keys(self, **fields: Any) -> None:
        """Forget every key, for a new pairing. The caller has archived them.

        Raises `AccountVanished`, `StoreAway`.
        """
        await self.ensure_complete()
        await self._wait(_Entry(fields=fields, clear=True))

    # --- the one committer

    def _start(self) -> None:
        if not self._busy:
            self._busy = True
            self._idle = trio.Event()
            self._term.spawn(self._commit_waiting)

    async def _commit_waiting(self) -> None:
        """Commit what waits until nothing does. The only place that writes after the seal."""
        try:
            while self._waiting:
                await self._commit_batch(self._take_batch())
        finally:
            self._busy = False
            self._idle.set()

    def _take_batch(self) -> list[_Entry]:
        """What goes with the next commit: in order, up to the limit, each new message once.

        A second entry for the same message waits, and finds then that it exists.
        """
        batch: list[_Entry] = []
        new: set[MessageId] = set()
        text_bytes = 0
        for entry in self._waiting[: self._limits.commit_messages_max]:
            text_bytes += entry.text_bytes
            if batch and text_bytes > BATCH_TEXT_BYTES_MAX:
                break
            if entry.new_message is not None:
                if entry.new_message.message_id in new:
                    break
                new.add(entry.new_message.message_id)
            batch.append(entry)
        del self._waiting[: len(batch)]
        return batch

    async def _commit_batch(self, batch: list[_Entry]) -> None:
        """Commit `batch` whole; when one entry makes that impossible, that entry alone fails."""
        try:
            await self._commit(batch)
        except MessageExists as exists:
            taken = exists.message.message_id
            rest: list[_Entry] = []
            for entry in batch:
                if entry.new_message is not None and entry.new_message.message_id == taken:
                    entry.finish(exists)
                else:
                    rest.append(entry)
            if len(rest) == len(batch):
                _fail(batch, exists)
            elif rest:
                self._waiting[:0] = rest
        except Exception as error:  # noqa: BLE001 - passed on, not swallowed
            # Whoever waits for the change decides what it means; nothing was written.
            behind, self._waiting = self._waiting, []
            _fail(batch, error)
            _fail(behind, self._why_not_behind(error))

    def _why_not_behind(self, error: Exception) -> Exception:
        """What is told those whose change was queued behind one that was not written.

        They were queued in the knowledge of it: a receipt, stored without the keys that its
        message changed, would end the doubt about them.
        """
        if isinstance(error, (AccountVanished, Refusal)):
            return error
        return StoreAway(
            f"account {self.account_id}: a change before this one was not stored; ask again",
            retry_after_s=1,
        )

    async def _commit(self, batch: list[_Entry]) -> None:
        local_first = (
            self._durability is Durability.LOCAL
            and self.sealed
            # A commit that the disk cannot build on has to reach the shared store itself.
            and self._saved == self.version
            and not any(entry.shared or entry.new_message or entry.inbound for entry in batch)
            # The mark that a message may be on the wire counts before it is: only the shared store
            # keeps messages, and without the mark a crash would have its key used twice.
            and not any(m.state is MessageState.SENDING for e in batch for m in e.messages)
        )
        needs_parts = any(e.complete or e.keys or e.clear for e in batch)
        if needs_parts and not self.complete and not self._push:
            await self._complete()
        if not local_first and (self.stamp is None or (self._push and self._replaced is None)):
            await self._readopt()
        settled = self.sealed and not self._behind.dirty and not self._push
        if settled and all(entry.empty for entry in batch):
            for entry in batch:
                entry.finish()
            return
        noted, self._noted = self._noted, {}
        try:
            commit = self._build(batch, noted)
            if not (local_first and await self._commit_locally(commit)):
                commit = await self._commit_shared(commit, lambda: self._build(batch, noted))
        except BaseException:
            self._noted = {**noted, **self._noted}
            raise
        for entry in batch:
            entry.finish()
        if self.version != self._saved:
            await self._save_locally(commit)

    def _build(self, batch: list[_Entry], noted: Mapping[str, Any]) -> AccountCommit:
        """One commit of everything in `batch`. Raises `AuthUnreadable`, `AuthTooLarge`."""
        account = replace(self.account, **noted)
        values: dict[KeyName, bytes | None] = {}
        for entry in batch:
            account = replace(account, **entry.fields)
            if entry.clear:
                values.clear()
            if entry.keys is not None:
                values.update(entry.keys.values)
        cleared = any(entry.clear for entry in batch)
        rotated = any(entry.rotate for entry in batch) and not cleared
        inbound = _each_once(message for entry in batch for message in entry.inbound)
        changed = bool(values or noted or rotated or cleared or inbound)
        changed = changed or any(entry.fields for entry in batch)
        version = Version(self._term.grant.epoch, self.version.revision + changed)
        if changed:
            account = replace(account, updated_at=self._ports.clocks.wall())
        parts: dict[PartName, bytes | None] = {}
        codec = self._ports.codec
        present = self.parts
        if cleared:
            parts, present = dict.fromkeys(self.parts), {}
        if rotated:
            anew = codec.rotate(self.account_id, self.parts, version)
            parts, present = {**anew}, {**self.parts, **anew}
        if values:
            parts.update(codec.change(self.account_id, present, KeyChange(values), version))
        return AccountCommit(
            grant=self._term.grant,
            commit_id=self._make_commit_id(),
            account=account,
            version=version,
            stamp=self.stamp or Stamp(""),
            parts=parts,
            new_messages=tuple(e.new_message for e in batch if e.new_message is not None),
            messages=tuple(message for entry in batch for message in entry.messages),
            inbound=inbound,
        )

    async def _commit_shared(
        self, commit: AccountCommit, rebuild: Callable[[], AccountCommit]
    ) -> AccountCommit:
        """Write `commit` to the shared store, as often as it takes while the term lasts.

        Answers the commit that was written: on an account that had changed it is built again.
        Raises `MessageExists`, `AccountVanished`, `StoreAway`; ends the term when fenced out.
        """
        for _ in range(READOPTIONS_MAX):
            try:
                await self._catch_up(commit)
                full = self._with_what_is_behind(commit)
                stamp = await self._send(full)
            except StaleWrite as stale:
                self._ports.journal.note(
                    "commit.refused", account_id=self.account_id, reason=str(stale)
                )
                await self._readopt()
                if self.version.revision >= commit.version.revision and commit.parts:
                    # Built on parts that are not the stored ones: whoever asked must ask again.
                    raise StoreAway(
                        f"account {self.account_id} changed in the store; ask again",
                        retry_after_s=1,
                    ) from stale
                commit = rebuild()
                continue
            self._adopt(full, stamp)
            self._behind = _Behind()
            self._push = False
            return commit
        raise StoreAway(f"account {self.account_id} keeps changing in the store", retry_after_s=1)

    def _with_what_is_behind(self, commit: AccountCommit) -> AccountCommit:
        """`commit` as it goes to the shared store: with what only this disk had until now."""
        assert self.stamp is not None
        parts: dict[PartName, bytes | None] = {**self._behind.parts, **commit.parts}
        if self._push:
            parts = {**dict.fromkeys(self._replaced or ()), **self.parts, **commit.parts}
        messages = {**self._behind.messages, **{m.message_id: m for m in commit.messages}}
        revision = max(commit.version.revision, self.version.revision)
        return replace(
            commit,
            stamp=self.stamp,
            version=Version(commit.version.epoch, revision),
            parts=parts,
            messages=tuple(messages.values()),
        )

    async def _catch_up(self, commit: AccountCommit) -> None:
        """Send what only this disk has ahead of `commit`, while both are too much for one commit.

        Keys first, messages after them: a message whose ack did not make it is sent again by
        whoever takes over in between, under the id that its recipient knows. The other way round,
        the next message would be encrypted with keys that were used before.
        """
        while not self._with_what_is_behind(commit).fits:
            step = _as_far_as_it_fits(self._with_what_is_behind(self._build([], {})))
            if step is None:
                self._ports.journal.note(
                    "commit.refused",
                    account_id=self.account_id,
                    reason="its keys are more than one commit takes",
                )
                raise AuthTooLarge(
                    f"account {self.account_id}: its keys are more than one commit takes"
                )
            self._adopt(step, await self._send(step))
            self._push = False
            self._behind.parts.clear()
            for message in step.messages:
                del self._behind.messages[message.message_id]

    async def _send(self, commit: AccountCommit) -> Stamp:
        def noted(tries: int, error: Exception, pause_s: float) -> None:
            self._ports.journal.note(
                "commit.retried",
                account_id=self.account_id,
                tries=tries,
                error=describe_error(error),
                retry_s=round(pause_s, 3),
            )

        return await self._ask(lambda: self._ports.accounts.commit(commit), noted=noted)

    async def _ask(
        self,
        attempt: Callable[[], Awaitable[T]],
        *,
        queued: bool = False,
        noted: Callable[[int, Exception, float], None] | None = None,
    ) -> T:
        """Ask the shared store until it answers, as long as the term lasts.

        `queued`: each try waits for a reader's place first. Its own time begins when its turn has
        come, and the place is free again after it.
        """

        async def once() -> T:
            async with self._place() if queued else nullcontext():
                # The last look before the effect; nothing is awaited between it and the call.
                self._term.check()
                with trio.move_on_after(self._limits.store_try_s):
                    return await attempt()
            raise TryTimedOut(self._limits.store_try_s)

        return await retry(
            once,
            on=(StoreUnavailable,),
            backoff=COMMIT_BACKOFF,
            try_s=math.inf,
            rng=self._ports.rng,
            noted=noted,
        )

    def _place(self) -> AbstractAsyncContextManager[None]:
        return self._term.reading.hold(last_used_at(self.account))

    async def _complete(self) -> None:
        """Have every part in memory: this disk's, if they are of this very copy, or the shared.

        Raises as `_readopt`.
        """
        if not await self._complete_locally():
            await self._readopt()

    async def _complete_locally(self) -> bool:
        """Take the parts from this disk; false when it does not have those of this copy."""
        if not self.complete and self._saved is not None:
            copy = await self._fetch_locally()
            if copy is not None and copy.version in (self._saved, self.version):
                self.parts = dict(copy.parts)
                self.complete = True
        return self.complete

    async def _create(self) -> None:
        """Write the account to a shared store that does not have it: only this disk did.

        Raises `AccountVanished` when the disk cannot be read, and `StoreAway`.
        """
        if not await self._complete_locally():
            raise AccountUnreadable(f"account {self.account_id}: this disk's copy cannot be read")
        version = Version(self._term.grant.epoch, self.version.revision)
        if self.parts:
            self.doubt_sessions(ONLY_DISK)
        try:
            self.stamp = await self._ask(
                lambda: self._ports.accounts.create_account(
                    self._term.grant, self.account, version, self.parts
                )
            )
        except AccountExists:
            # An earlier try of ours that got no answer: the next look finds it.
            raise StoreAway(f"account {self.account_id} is being written; ask again") from None
        except StaleWrite as stale:
            self._term.lose(f"account {self.account_id} could not be written: {stale}")
            self._term.check()
        self.version, self._push = version, False

    async def _fetch_locally(self) -> AccountCopy | None:
        """This disk's copy, `None` when it cannot be read: then the shared one serves."""
        try:
            async with self._place():
                with trio.fail_after(self._limits.store_try_s):
                    copy = await self._ports.local.fetch_account(self.account_id)
        except (StoreUnavailable, trio.TooSlowError) as error:
            fault: str | None = describe_error(error)
        else:
            if copy is None:
                return None
            fault = copy.fault or self._ports.codec.check(self.account_id, copy.parts)
            if fault is None:
                return copy
        self._ports.journal.note(
            "disk.unreadable", account_id=self.account_id, version=str(self.version), error=fault
        )
        return None

    async def _readopt(self) -> None:
        """Read the shared copy again and go on from it. An older copy never replaces ours.

        Raises `AccountVanished`; ends the term (and raises `NotActive`) when a higher epoch is
        found, or ours in another's name.
        """
        head = await self._ask(
            lambda: self._ports.accounts.fetch_account(self.account_id), queued=True
        )
        if head is None and (self._push or self.stamp is None):
            await self._create()
            return
        if head is None or head.removed:
            raise AccountVanished(f"account {self.account_id} is not in the shared store any more")
        if head.version.epoch > self._term.grant.epoch or self._is_anothers(head):
            self._term.lose(
                f"account {self.account_id} carries epoch {head.version.epoch} of another, "
                f"ours is {self._term.grant.epoch}",
                epoch_seen=head.version.epoch,
            )
            self._term.check()
        if head.newer:
            raise self._unreadable(head)
        # A version that the restore found broken there, and pushes: its keys may be all that is.
        broken = self._push and self.version == head.version
        if self.version > head.version or broken:
            await self._replace(head)
            self.stamp = head.stamp
            return
        if head.fault is not None:
            raise self._unreadable(head)
        self.stamp = head.stamp
        if head.version != self.version:
            self._ports.journal.note("account.refused_seal", account_id=self.account_id)
        self.account = replace(head.account, **self._noted)
        self.version, self.parts = head.version, dict(head.parts)
        self.complete, self._push = True, False

    def _is_anothers(self, head: AccountCopy) -> bool:
        """Whether another wrote it under our own epoch: the lease documents were a backup's."""
        ours = head.commit_id == "" or head.commit_id.startswith(self._commit_prefix)
        return head.version.epoch == self._term.grant.epoch and not ours

    def _unreadable(self, head: AccountCopy) -> AccountUnreadable:
        # Our stamp stays: the next commit, too, must look first and not write over it.
        return AccountUnreadable(f"account {self.account_id} cannot be read: {head.fault}")

    async def _replace(self, head: AccountCopy) -> None:
        """Have the next commit write ours whole: the shared store has an older copy, or a broken.

        Raises `AccountVanished` when this disk has not all of it.
        """
        if not await self._complete_locally():
            raise AccountUnreadable(
                f"account {self.account_id}: this disk's copy {self.version} is newer than the "
                f"shared store's {head.version}, and cannot be read"
            )
        self._push, self._replaced = True, tuple(head.parts)

    def _adopt(self, commit: AccountCommit, stamp: Stamp | None) -> None:
        self.account = replace(commit.account, **self._noted)
        self._base, self.version = self.version, commit.version
        if stamp is not None:
            self.stamp = stamp
        for name, part in commit.parts.items():
            if part is None:
                self.parts.pop(name, None)
            else:
                self.parts[name] = part

    # --- this host's disk

    async def _commit_locally(self, commit: AccountCommit) -> bool:
        """`Durability.LOCAL`: the disk has it, so it counts; the shared store follows.

        False: the disk does not take it, and the shared store must.
        """
        # Until the disk has answered, nobody knows what it has.
        self._saved = None
        try:
            with trio.fail_after(self._limits.store_try_s):
                await self._ports.local.apply(commit)
        except (StaleWrite, StoreUnavailable, trio.TooSlowError) as error:
            self._tell_disk_failed(error)
            return False
        self._disk_failed = False
        self._saved = commit.version
        self._adopt(commit, None)
        self._behind.parts.update(commit.parts)
        self._behind.messages.update({m.message_id: m for m in commit.messages})
        self._behind.dirty = True
        if not self._replicating:
            self._replicating = True
            self._term.spawn(self._replicate)
        return True

    async def _replicate(self) -> None:
        await trio.sleep(self._limits.replicate_within_s)
        self._replicating = False
        self._post(_Entry(shared=True))

    async def _save_locally(self, commit: AccountCommit) -> None:
        """Bring the disk copy along. It may fail: the shared store has everything.

        A commit holds only what it changed. It is applied to the version it was built on and to
        no other: an older copy would keep its older parts under the new version, and the next
        restore would take them for the newest.
        """
        follows = self._saved == self._base
        if not follows and not self.complete:
            return
        # Until the disk has answered, nobody knows what it has.
        self._saved = None
        try:
            with trio.fail_after(self._limits.store_try_s):
                saved = await self._save(commit if follows else None)
        except (StaleWrite, StoreUnavailable, trio.TooSlowError) as error:
            self._tell_disk_failed(error)
        else:
            self._disk_failed = False
            self._saved = saved

    def _tell_disk_failed(self, error: Exception) -> None:
        """Told once, until the disk works again."""
        if not self._disk_failed:
            self._disk_failed = True
            self._ports.journal.note(
                "disk.failed", what=f"account {self.account_id}", error=describe_error(error)
            )

    async def _save(self, commit: AccountCommit | None) -> Version:
        """Apply `commit` to the disk copy, or replace that; the version the disk then has."""
        if commit is not None:
            try:
                await self._ports.local.apply(commit)
                return commit.version
            except StaleWrite:
                if not self.complete:
                    raise
        copy = self.copy()
        await self._ports.local.save_account(copy)
        return copy.version

    def copy(self) -> AccountCopy:
        """The account as it stands, for the disk."""
        return AccountCopy(
            account=self.account,
            version=self.version,
            parts=dict(self.parts),
            complete=self.complete,
            stamp=self.stamp,
        )

    def _make_commit_id(self) -> str:
        return f"{self._commit_prefix}{self._ports.rng.getrandbits(64):016x}"

    @property
    def _commit_prefix(self) -> str:
        return f"{self._term.grant.epoch}-{self._term.grant.incarnation}-"


def _as_far_as_it_fits(step: AccountCommit) -> AccountCommit | None:
    """`step` with as many of its messages as one commit takes; `None` when that is of no use."""

    def shortened(count: int) -> AccountCommit:
        return replace(step, messages=step.messages[:count])

    over = bisect_left(
        range(len(step.messages) + 1), True, key=lambda count: not shortened(count).fits
    )
    first = shortened(over - 1) if over else None
    return first if first is not None and (first.parts or first.messages) else None


def _each_once(messages: Iterable[InboundMessage]) -> tuple[InboundMessage, ...]:
    """The messages in order; of those that are the same one the first."""
    found: dict[tuple[str, MessageId], InboundMessage] = {}
    for message in messages:
        found.setdefault((message.chat, message.message_id), message)
    return tuple(found.values())


def _fail(batch: list[_Entry], error: Exception) -> None:
    for entry in batch:
        entry.finish(error)
