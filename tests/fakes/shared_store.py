"""The shared store in memory: lease, accounts and outbox, with a network that can be bad.

`FakeSharedState` is the server; each `FakeSharedStore` is one client of it, with its own weather.
A request that was sent is on its way: it is applied when it is due, whether or not its caller
still waits. Time is Trio's; nothing here draws a random number of its own.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from machine.ports import (
    AccountExists,
    LeaseMissing,
    LeaseRefused,
    MessageExists,
    StaleWrite,
    StoreMisconfigured,
    StoreUnavailable,
    check_fits,
)
from machine.records import (
    FENCE_LASTING_FIELDS,
    MAIN_PART,
    PENDING_STATES,
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    Fence,
    Grant,
    Heartbeat,
    InboxEntry,
    InboxPlace,
    Lease,
    LeaseStamps,
    LeaseState,
    LeaseView,
    LeaseWrite,
    Listing,
    Message,
    MessageId,
    PartName,
    Stamp,
    Version,
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Passage:
    """How one call travels. The default arrives at once and is answered at once.

    `request_s`, `reply_s`: the time each way takes. A lost request is
    `delivered=False`, a lost reply `answered=False`, and either keeps the caller waiting until it
    is cancelled. `error_before` is raised instead of sending, `error_after` instead of the answer.
    `again_after_s` delivers the request a second time, that long after the first.
    """

    request_s: float = 0.0
    reply_s: float = 0.0
    delivered: bool = True
    answered: bool = True
    error_before: Exception | None = None
    error_after: Exception | None = None
    again_after_s: float | None = None


CALM = Passage()
LOST_REQUEST = Passage(delivered=False)
LOST_REPLY = Passage(answered=False)


def failing() -> Passage:
    """Fail at once; nothing was done."""
    return Passage(error_before=StoreUnavailable("injected: not sent", code="injected"))


def applied_then_failing() -> Passage:
    """Do the work, then answer that it is not known."""
    return Passage(error_after=StoreUnavailable("injected: applied", code="injected"))


_REFUSALS = (
    LeaseMissing,
    LeaseRefused,
    StaleWrite,
    AccountExists,
    MessageExists,
    StoreMisconfigured,
)

NEWER = "injected: format 2 is newer than this release reads (1); start an instance of a later one"


class _Request(Generic[T]):
    """One request on its way: `outcome` is set when the server has handled it."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.outcome: tuple[T | None, Exception | None] | None = None

    def handle(self) -> None:
        try:
            outcome: tuple[T | None, Exception | None] = (self.work(), None)
        except _REFUSALS as refusal:
            outcome = (None, refusal)
        # The reply to a duplicate goes nowhere: the first answer is the answer.
        if self.outcome is None:
            self.outcome = outcome


@dataclass(slots=True)
class _StoredAccount:
    account: Account
    version: Version
    parts: dict[PartName, bytes]
    stamp: Stamp
    commit_id: str = ""
    fault: str | None = None
    removed: bool = False
    newer: bool = False


@dataclass(frozen=True, slots=True)
class Archived:
    """What `remove_account` and `archive_parts` kept."""

    account_id: AccountId
    parts: Mapping[PartName, bytes]
    reason: str


@dataclass(slots=True)
class _Watcher:
    store: FakeSharedStore
    send: trio.MemorySendChannel[Fence]
    receive: trio.MemoryReceiveChannel[Fence]

    def offer(self, fence: Fence) -> None:
        """Leave `fence` as the only one to read. A cut client hears nothing."""
        if self.store.partitioned or self.store.deaf:
            return
        try:
            self.send.send_nowait(fence)
        except trio.WouldBlock:
            self.receive.receive_nowait()
            self.send.send_nowait(fence)
        except trio.BrokenResourceError:
            pass  # its reader has closed it and leaves the block next


@dataclass(slots=True)
class FakeSharedState:
    """The server: the documents, a counter of writes that the stamps are made of, the wire."""

    lease: tuple[Lease, Stamp, float] | None = None
    """The document, its stamp, and when it was written (Trio's clock)."""
    fence: tuple[Fence, Stamp] | None = None
    accounts: dict[AccountId, _StoredAccount] = field(default_factory=dict)
    messages: dict[MessageId, Message] = field(default_factory=dict)
    inbox: dict[tuple[AccountId, str, MessageId], InboxEntry] = field(default_factory=dict)
    archive: list[Archived] = field(default_factory=list)
    newer: set[str] = field(default_factory=set)
    """What a newer release wrote: `lease`, `fence`, ids of messages and of received ones."""
    writes: int = 0
    _wire: list[tuple[float, int, _Request[object]]] = field(default_factory=list)
    _sent: int = 0
    _watchers: list[_Watcher] = field(default_factory=list)
    _thawed: trio.Event | None = None

    # -- the wire

    def freeze(self) -> None:
        """Answer nobody and handle nothing, as a stopped process does."""
        if self._thawed is None:
            self._thawed = trio.Event()

    def thaw(self) -> None:
        """Handle what has arrived since `freeze`, also of callers that have given up."""
        thawed, self._thawed = self._thawed, None
        if thawed is not None:
            self.settle()
            thawed.set()

    async def wait_thawed(self) -> None:
        while self._thawed is not None:
            await self._thawed.wait()

    def send(self, request: _Request[object], due: float) -> None:
        self._sent += 1
        heapq.heappush(self._wire, (due, self._sent, request))

    def settle(self) -> None:
        """Handle every request that is due, in the order of arrival."""
        if self._thawed is not None:
            return
        while self._wire and self._wire[0][0] <= trio.current_time():
            heapq.heappop(self._wire)[2].handle()

    def stamp(self) -> Stamp:
        self.writes += 1
        return Stamp(str(self.writes))

    # -- the lease

    def read_lease(self) -> LeaseView:
        if self.lease is None or self.fence is None:
            raise LeaseMissing("a lease document does not exist")
        self._refuse_newer("lease", "fence")
        lease, lease_stamp, written_at = self.lease
        fence, fence_stamp = self.fence
        age_s = trio.current_time() - written_at
        return LeaseView(lease, fence, lease_stamp, fence_stamp, age_s)

    def read_heartbeat(self) -> Heartbeat:
        if self.lease is None:
            raise LeaseMissing("the lease document does not exist")
        self._refuse_newer("lease")
        lease, lease_stamp, written_at = self.lease
        return Heartbeat(lease, lease_stamp, trio.current_time() - written_at)

    def _refuse_newer(self, *names: str) -> None:
        if self.newer.intersection(names):
            raise StoreMisconfigured(NEWER)

    def make_newer(self, name: str) -> None:
        """Let a newer release have written the lease, the fence, or a message: in its format."""
        self.newer.add(name)
        if name == "lease" and self.lease is not None:
            self.lease = (self.lease[0], self.stamp(), self.lease[2])
        if name == "fence" and self.fence is not None:
            self.fence = (self.fence[0], self.stamp())
            lasting = Fence(*(getattr(self.fence[0], name) for name in FENCE_LASTING_FIELDS))
            for watcher in self._watchers:
                watcher.offer(lasting)

    def make_account_newer(self, account_id: AccountId) -> None:
        """Let a newer release have written the account, its version where we do not look for it."""
        stored = self.accounts[account_id]
        stored.fault, stored.newer = NEWER, True
        stored.stamp, stored.version = self.stamp(), Version(0, 0)

    def write_lease(self, write: LeaseWrite) -> LeaseStamps:
        for wanted, expected, stored in (
            (write.lease, write.lease_stamp, self.lease and self.lease[1]),
            (write.fence, write.fence_stamp, self.fence and self.fence[1]),
        ):
            if wanted is None and expected is None:
                continue
            if stored is None:
                raise LeaseMissing("a lease document does not exist")
            if expected is not None and expected != stored:
                raise LeaseRefused(f"expected stamp {expected}, found {stored}")
        lease_stamp = fence_stamp = None
        if write.lease is not None:
            lease_stamp = self.stamp()
            self.lease = (write.lease, lease_stamp, trio.current_time())
        if write.fence is not None:
            fence_stamp = self.stamp()
            self.fence = (write.fence, fence_stamp)
            for watcher in self._watchers:
                watcher.offer(write.fence)
        return LeaseStamps(lease_stamp, fence_stamp)

    def initialise(self, epoch: int) -> bool:
        if (self.lease is None) != (self.fence is None):
            raise LeaseMissing("one lease document exists without the other")
        if self.lease is not None:
            return False
        lease = Lease("", "", epoch, "", 0.0, LeaseState.RELEASED)
        self.lease = (lease, self.stamp(), trio.current_time())
        self.fence = (Fence(epoch, "", "", "", LeaseState.RELEASED), self.stamp())
        return True

    def age_lease(self, by_s: float) -> None:
        """Make the lease `by_s` older than it is."""
        assert self.lease is not None
        lease, stamp, written_at = self.lease
        self.lease = (lease, stamp, written_at - by_s)

    def add_watcher(self, watcher: _Watcher) -> None:
        self._watchers.append(watcher)
        if self.fence is not None:
            watcher.offer(self.fence[0])

    def remove_watcher(self, watcher: _Watcher) -> None:
        self._watchers.remove(watcher)

    def refresh_watchers(self, store: FakeSharedStore) -> None:
        for watcher in self._watchers:
            if watcher.store is store and self.fence is not None:
                watcher.offer(self.fence[0])

    # -- accounts and outbox

    def verify_grant(self, grant: Grant) -> None:
        if self.fence is None:
            raise StaleWrite("there is no fence")
        fence = self.fence[0]
        if (fence.epoch, fence.incarnation) != (grant.epoch, grant.incarnation):
            raise StaleWrite(f"epoch {grant.epoch} is over: the fence is at {fence.epoch}")

    def copy_of(self, stored: _StoredAccount, *, complete: bool) -> AccountCopy:
        if stored.fault is not None:
            return AccountCopy(
                stored.account,
                stored.version,
                {},
                False,
                stored.stamp,
                fault=stored.fault,
                newer=stored.newer,
            )
        parts = {name: data for name, data in stored.parts.items() if complete or name == MAIN_PART}
        return AccountCopy(
            stored.account,
            stored.version,
            parts,
            complete=len(parts) == len(stored.parts),
            stamp=stored.stamp,
            commit_id=stored.commit_id,
            removed=stored.removed,
        )

    def list_accounts(self) -> Listing:
        return Listing(tuple(self.copy_of(one, complete=False) for one in self.accounts.values()))

    def fetch_account(self, account_id: AccountId) -> AccountCopy | None:
        stored = self.accounts.get(account_id)
        return None if stored is None else self.copy_of(stored, complete=True)

    def create_account(
        self, grant: Grant, account: Account, version: Version, parts: Mapping[PartName, bytes]
    ) -> Stamp:
        self.verify_grant(grant)
        stored = self.accounts.get(account.account_id)
        if stored is not None and not stored.removed:
            raise AccountExists(account.account_id)
        stamp = self.stamp()
        self.accounts[account.account_id] = _StoredAccount(account, version, dict(parts), stamp)
        return stamp

    def commit(self, commit: AccountCommit) -> Stamp:
        stored = self.accounts.get(commit.account.account_id)
        if stored is None or stored.removed:
            raise StaleWrite("the account is not there")
        if stored.commit_id == commit.commit_id:
            return stored.stamp
        if stored.stamp != commit.stamp:
            raise StaleWrite(f"expected stamp {commit.stamp}, found {stored.stamp}")
        for message in commit.new_messages:
            if message.message_id in self.messages:
                self._refuse_newer(message.message_id)
                raise MessageExists(self.messages[message.message_id])
        for message in (*commit.new_messages, *commit.messages):
            self.messages[message.message_id] = message
        for name, data in commit.parts.items():
            if data is None:
                stored.parts.pop(name, None)
            else:
                stored.parts[name] = data
        for number, inbound in enumerate(commit.inbound):
            place = InboxPlace(commit.version.epoch, commit.version.revision, number)
            key = (inbound.account_id, inbound.chat, inbound.message_id)
            self.inbox.setdefault(key, InboxEntry(place, inbound))
        stored.account, stored.version = commit.account, commit.version
        stored.commit_id, stored.stamp = commit.commit_id, self.stamp()
        return stored.stamp

    def seal(self, commits: Sequence[AccountCommit]) -> list[Stamp | None]:
        stamps: list[Stamp | None] = []
        for commit in commits:
            try:
                stamps.append(self.commit(commit))
            except StaleWrite:
                stamps.append(None)
        return stamps

    def remove_account(
        self, grant: Grant, account_id: AccountId, stamp: Stamp, *, purge: bool
    ) -> None:
        stored = self.accounts.get(account_id)
        if stored is None or stored.removed or stored.stamp != stamp:
            raise StaleWrite("the account is not as expected")
        if purge:
            self.archive = [one for one in self.archive if one.account_id != account_id]
        else:
            self.archive.append(Archived(account_id, stored.parts, "removed"))
        mark = Version(grant.epoch, stored.version.revision + 1)
        self.accounts[account_id] = _StoredAccount(
            stored.account, mark, {}, self.stamp(), removed=True
        )

    def list_pending(self) -> list[Message]:
        pending = [
            one
            for one in self.messages.values()
            if one.state in PENDING_STATES and one.message_id not in self.newer
        ]
        return sorted(pending, key=lambda one: (one.created_at, one.message_id))

    def fetch_message(self, message_id: MessageId) -> Message | None:
        self._refuse_newer(message_id)
        return self.messages.get(message_id)

    def purge_messages(self, grant: Grant, before: float, count_max: int) -> int:
        self.verify_grant(grant)
        settled = [
            one
            for one in self.messages.values()
            if one.state not in PENDING_STATES and one.updated_at < before
            if one.message_id not in self.newer
        ]
        settled.sort(key=lambda one: (one.updated_at, one.message_id))
        for message in settled[:count_max]:
            del self.messages[message.message_id]
        return len(settled[:count_max])

    def list_inbox(
        self, account_id: AccountId, after: InboxPlace | None, count_max: int
    ) -> list[InboxEntry]:
        entries = [
            entry
            for entry in self.inbox.values()
            if entry.message.account_id == account_id and (after is None or entry.place > after)
            if entry.message.message_id not in self.newer
        ]
        return sorted(entries, key=lambda entry: entry.place)[:count_max]

    def purge_inbox(self, grant: Grant, before: float, count_max: int) -> int:
        self.verify_grant(grant)
        old = [key for key, entry in self.inbox.items() if entry.message.received_at < before]
        old.sort(key=lambda key: self.inbox[key].message.received_at)
        for key in old[:count_max]:
            del self.inbox[key]
        return len(old[:count_max])

    def damage_account(self, account_id: AccountId, fault: str = "injected: unreadable") -> None:
        """Make the account unreadable from now on."""
        self.accounts[account_id].fault = fault


class FakeSharedStore:
    """One client: lease, accounts, outbox and inbox, over a shared state.

    `weather(operation)` says how each call travels, unless `schedule` has planned it; operations
    are the ports' method names. `calls` counts what was asked. While `partitioned` is true nothing
    gets through in either direction.
    """

    def __init__(self, state: FakeSharedState | None = None) -> None:
        self.state = state if state is not None else FakeSharedState()
        self.weather: Callable[[str], Passage] = lambda _operation: CALM
        self.calls: dict[str, int] = {}
        self._planned: dict[str, deque[Passage]] = {}
        self._partitioned = False
        self.deaf = False
        """Nothing of the fence's listener comes through; calls do."""

    def client(self) -> FakeSharedStore:
        """Another client of the same state, in calm weather."""
        return FakeSharedStore(self.state)

    # -- faults

    def schedule(self, operation: str, *passages: Passage) -> None:
        """Plan how the next calls of `operation` travel, one each, ahead of `weather`."""
        self._planned.setdefault(operation, deque()).extend(passages)

    def fail_next(self, operation: str, count: int = 1) -> None:
        self.schedule(operation, *(failing() for _ in range(count)))

    def apply_then_fail(self, operation: str, count: int = 1) -> None:
        self.schedule(operation, *(applied_then_failing() for _ in range(count)))

    def hang_next(self, operation: str, count: int = 1, *, applied: bool = False) -> None:
        """Keep the next callers until they are cancelled, the work done or not."""
        self.schedule(operation, *([LOST_REPLY if applied else LOST_REQUEST] * count))

    def delay(self, request_s: float, reply_s: float = 0.0) -> None:
        """Let everything take this long from now on."""
        passage = Passage(request_s=request_s, reply_s=reply_s)
        self.weather = lambda _operation: passage

    @property
    def partitioned(self) -> bool:
        return self._partitioned

    @partitioned.setter
    def partitioned(self, cut: bool) -> None:
        self._partitioned = cut
        if not cut:
            self.state.refresh_watchers(self)

    # -- the way there and back

    async def _ask(self, operation: str, work: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint()
        self.calls[operation] = self.calls.get(operation, 0) + 1
        planned = self._planned.get(operation)
        passage = planned.popleft() if planned else self.weather(operation)
        if passage.error_before is not None:
            raise passage.error_before
        await self._cross(passage.delivered)
        request: _Request[T] = _Request(work)
        due = trio.current_time() + passage.request_s
        # The wire carries requests of every shape and reads none of their answers.
        self.state.send(request, due)  # type: ignore[arg-type]
        if passage.again_after_s is not None:
            self.state.send(request, due + passage.again_after_s)  # type: ignore[arg-type]
        await trio.sleep_until(due)
        await self.state.wait_thawed()
        self.state.settle()
        await trio.sleep(passage.reply_s)
        await self._cross(passage.answered)
        if passage.error_after is not None:
            raise passage.error_after
        assert request.outcome is not None
        value, refusal = request.outcome
        if refusal is not None:
            raise refusal
        return value  # type: ignore[return-value]  # work() returned it; None only where T allows

    async def _cross(self, through: bool) -> None:
        """Get through, or keep the caller until it is cancelled."""
        if self._partitioned or not through:
            await trio.sleep_forever()

    # -- LeaseStore

    async def read(self) -> LeaseView:
        return await self._ask("read", self.state.read_lease)

    async def read_heartbeat(self) -> Heartbeat:
        return await self._ask("read_heartbeat", self.state.read_heartbeat)

    async def write(self, write: LeaseWrite) -> LeaseStamps:
        return await self._ask("write", lambda: self.state.write_lease(write))

    async def initialise(self, *, epoch: int = 0) -> bool:
        return await self._ask("initialise", lambda: self.state.initialise(epoch))

    def watch_fence(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Fence]]:
        return self._watch_fence()

    @asynccontextmanager
    async def _watch_fence(self) -> AsyncIterator[trio.MemoryReceiveChannel[Fence]]:
        send, receive = trio.open_memory_channel[Fence](1)
        watcher = _Watcher(self, send, receive)
        self.state.add_watcher(watcher)
        try:
            with send, receive:
                yield receive
        finally:
            self.state.remove_watcher(watcher)

    # -- AccountStore

    async def list_accounts(self) -> Listing:
        return await self._ask("list_accounts", self.state.list_accounts)

    async def fetch_account(self, account_id: AccountId) -> AccountCopy | None:
        return await self._ask("fetch_account", lambda: self.state.fetch_account(account_id))

    async def create_account(
        self, grant: Grant, account: Account, version: Version, parts: Mapping[PartName, bytes]
    ) -> Stamp:
        return await self._ask(
            "create_account", lambda: self.state.create_account(grant, account, version, parts)
        )

    async def commit(self, commit: AccountCommit) -> Stamp:
        check_fits(commit)
        return await self._ask("commit", lambda: self.state.commit(commit))

    async def seal(self, commits: Sequence[AccountCommit]) -> Sequence[Stamp | None]:
        for commit in commits:
            check_fits(commit)
        return await self._ask("seal", lambda: self.state.seal(commits))

    async def remove_account(
        self, grant: Grant, account_id: AccountId, stamp: Stamp, *, purge: bool
    ) -> None:
        await self._ask(
            "remove_account",
            lambda: self.state.remove_account(grant, account_id, stamp, purge=purge),
        )

    async def archive_parts(self, copy: AccountCopy, reason: str) -> None:
        kept = Archived(copy.account.account_id, dict(copy.parts), reason)
        await self._ask("archive_parts", lambda: self.state.archive.append(kept))

    # -- OutboxStore

    async def list_pending(self) -> Sequence[Message]:
        return await self._ask("list_pending", self.state.list_pending)

    async def fetch_message(self, message_id: MessageId) -> Message | None:
        return await self._ask("fetch_message", lambda: self.state.fetch_message(message_id))

    async def purge_messages(self, grant: Grant, *, before: float, count_max: int) -> int:
        return await self._ask(
            "purge_messages", lambda: self.state.purge_messages(grant, before, count_max)
        )

    # -- InboxStore

    async def list_inbox(
        self, account_id: AccountId, *, after: InboxPlace | None, count_max: int
    ) -> Sequence[InboxEntry]:
        return await self._ask(
            "list_inbox", lambda: self.state.list_inbox(account_id, after, count_max)
        )

    async def purge_inbox(self, grant: Grant, *, before: float, count_max: int) -> int:
        return await self._ask(
            "purge_inbox", lambda: self.state.purge_inbox(grant, before, count_max)
        )
