"""The shared store behind a network, and the disks.

Lives here: what the server does with what arrives, and how a disk fails. Never lives here: when
(`tests.simulation.faults`), or what may be true of it (`tests.simulation.checks`).
"""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import trio

from machine.ports import StoreUnavailable
from machine.records import (
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    Fence,
    Grant,
    Lease,
    LeaseStamps,
    LeaseState,
    LeaseWrite,
    PartName,
    Stamp,
    Transition,
    Version,
)
from tests.fakes.local_store import FakeLocalStore
from tests.fakes.shared_store import FakeSharedState, FakeSharedStore, Passage, _Watcher
from tests.simulation.checks import Checks
from tests.simulation.network import SNAPSHOT_LATE_MAX_S, Link, Network
from tests.simulation.process import Process

T = TypeVar("T")
WRITE_INTERVAL_S = 1.0
"""What Firestore sustains of one document, and what a throttled store insists on."""


DISK_S = 0.003
SLOW_DISK_S = 2.0
DISK_WRITES = frozenset(
    {"save_account", "apply", "raise_epoch", "append_transition", "append_report"}
)


KEPT = 20
"""Of what grows with time: the simulation itself must not."""


class Call(Generic[T]):
    """One request on its way, and its answer."""

    def __init__(self, work: Callable[[], T], documents: Sequence[str]) -> None:
        self.work = work
        self.documents = documents
        """The documents that it writes, for the throttle."""
        self.answered = trio.Event()
        self._outcome: tuple[T | None, Exception | None] | None = None

    def handle(self) -> None:
        """Do the work. The reply to a duplicate goes nowhere: the first answer is the answer."""
        try:
            outcome: tuple[T | None, Exception | None] = (self.work(), None)
        except Exception as refusal:  # noqa: BLE001 - handed to whoever asked
            outcome = (None, refusal)
        self._outcome = self._outcome or outcome

    def refuse(self, error: Exception) -> None:
        self._outcome = self._outcome or (None, error)

    def answer(self) -> T:
        assert self._outcome is not None
        value, refusal = self._outcome
        if refusal is not None:
            raise refusal
        return value  # type: ignore[return-value]  # work() returned it; None only where T allows


@dataclass(frozen=True)
class Backup:
    """The documents as they were."""

    at: float
    lease: tuple[Lease, Stamp, float] | None
    fence: tuple[Fence, Stamp] | None
    accounts: Mapping[AccountId, Any]
    messages: Mapping[Any, Any]


class SimulatedState(FakeSharedState):
    """The server: tells each write that it applies. Runs in the world's time."""

    checks: Checks
    network: Network
    rng: random.Random

    def connect(self, checks: Checks, network: Network, rng: random.Random) -> None:
        self.checks, self.network, self.rng = checks, network, rng
        self.hanging = 0
        self.failing = 0
        self.throttled = 0
        self.fences: list[Fence] = []
        self._held_back: list[tuple[Call[Any], Callable[[], None]]] = []
        self._written_at: dict[str, float] = {}

    # --- requests

    def arrive(self, call: Call[Any], reply: Callable[[], None]) -> None:
        """A request has come. Handled now, unless the store hangs, fails or is throttled."""
        if self.hanging:
            self._held_back.append((call, reply))
            return
        if self.failing:
            call.refuse(StoreUnavailable("injected: the store is down", code="unavailable"))
        elif self.throttled and (wait_s := self._throttle(call)) > 0:
            if self.rng.random() < 0.5:
                call.refuse(StoreUnavailable("injected: too often", code="resource_exhausted"))
            else:
                self.network.post(wait_s, lambda: self.arrive(call, reply))
                return
        else:
            call.handle()
        reply()

    def go_on(self) -> None:
        """Handle what has arrived while the store hung, also of callers that have given up."""
        held_back, self._held_back = self._held_back, []
        for call, reply in held_back:
            self.arrive(call, reply)

    def _throttle(self, call: Call[Any]) -> float:
        now = trio.current_time()
        due = max((self._written_at.get(name, -9.0) for name in call.documents), default=-9.0)
        wait_s = due + WRITE_INTERVAL_S - now
        if wait_s <= 0:
            self._written_at.update(dict.fromkeys(call.documents, now))
        return wait_s

    # --- what is written

    def write_lease(self, write: LeaseWrite) -> LeaseStamps:
        before = self.fence
        stamps = super().write_lease(write)
        assert before is not None
        if write.lease is not None:
            self.checks.lease_written(write.lease)
        if write.fence is not None:
            self.checks.fence_written(before[0], write.fence)
            self.fences = [*self.fences, write.fence][-KEPT:]
        return stamps

    def create_account(
        self, grant: Grant, account: Account, version: Version, parts: Mapping[PartName, bytes]
    ) -> Stamp:
        stamp = super().create_account(grant, account, version, parts)
        self.checks.account_written(account.account_id, version, grant)
        return stamp

    def commit(self, commit: AccountCommit) -> Stamp:
        writes = self.writes
        stamp = super().commit(commit)
        if self.writes != writes:
            self.checks.received.update(inbound.message_id for inbound in commit.inbound)
            self.checks.account_written(commit.account.account_id, commit.version, commit.grant)
        return stamp

    # --- what happens to databases

    def back_up(self) -> Backup:
        return Backup(
            trio.current_time(),
            self.lease,
            self.fence,
            {account_id: copy.copy(one) for account_id, one in self.accounts.items()},
            dict(self.messages),
        )

    @property
    def missing(self) -> bool:
        """Whether the lease documents do not exist."""
        return self.lease is None

    def restore_lease(self, backup: Backup) -> None:
        """Put both lease documents back as they were, which is a write like any other."""
        assert backup.lease is not None
        assert backup.fence is not None
        self.lease = (backup.lease[0], self.stamp(), trio.current_time())
        # What an operator had asked for then is over by now.
        fence = replace(backup.fence[0], paused=False, step_down_of=None)
        self.fence = (fence, self.stamp())
        self.tell_watchers()

    def restore_account(self, account_id: AccountId, backup: Backup) -> None:
        stored = copy.copy(backup.accounts[account_id])
        stored.parts = dict(stored.parts)
        stored.stamp = self.stamp()
        self.accounts[account_id] = stored
        self.checks.account_put_back(account_id)

    def process_died(self, process: Process) -> None:
        """Its listener is closed by the kernel."""
        self._watchers[:] = [
            one
            for one in self._watchers
            if not (isinstance(one, _Listener) and one.store.process is process)
        ]

    def remove_watcher(self, watcher: _Watcher) -> None:
        if watcher in self._watchers:
            super().remove_watcher(watcher)

    def tell_watchers(self) -> None:
        assert self.fence is not None
        for watcher in self._watchers:
            watcher.offer(self.fence[0])


class _Listener(_Watcher):
    """One process's listener to the fence: everything comes over the network."""

    store: SimulatedStore

    def offer(self, fence: Fence) -> None:
        link, state = self.store.link, self.store.simulated
        if link.disordered:
            rng = link.rng
            state.network.post(rng.uniform(0, SNAPSHOT_LATE_MAX_S), lambda: self._arrive(fence))
            if state.fences and rng.random() < 0.5:
                old = rng.choice(state.fences)
                state.network.post(rng.uniform(0, SNAPSHOT_LATE_MAX_S), lambda: self._arrive(old))
        else:
            state.network.post(link.hop_s(), lambda: self._arrive(fence))

    def _arrive(self, fence: Fence) -> None:
        with suppress(trio.ClosedResourceError):
            super().offer(fence)


class SimulatedStore(FakeSharedStore):
    """One process's client: asks `Checks` at each write, and travels by its host's link."""

    def __init__(self, state: SimulatedState, link: Link, process: Process, checks: Checks) -> None:
        super().__init__(state)
        self.simulated = state
        self.link = link
        self.process = process
        self.checks = checks
        self.weather = link.weather

    @property
    def partitioned(self) -> bool:
        """For the listener only: a call asks the link itself."""
        return bool(self.link.cut or self.link.deaf or self.simulated.failing)

    @partitioned.setter
    def partitioned(self, cut: bool) -> None:
        raise NotImplementedError("the link is cut, not the client")

    async def _ask(self, operation: str, work: Callable[[], T]) -> T:
        return await self._carry(operation, Call(work, ()))

    async def _carry(self, operation: str, call: Call[T]) -> T:
        await trio.lowlevel.checkpoint()
        self.calls[operation] = self.calls.get(operation, 0) + 1
        passage = self.weather(operation)
        self._send(call, passage)
        await call.answered.wait()
        error = passage.error_before or passage.error_after
        if error is not None:
            raise error
        return call.answer()

    def _send(self, call: Call[T], passage: Passage) -> None:
        network = self.simulated.network

        def reply() -> None:
            if passage.answered:
                network.post(passage.reply_s, arrived)

        def arrived() -> None:
            if not self.link.cut:
                call.answered.set()

        if passage.error_before is not None:
            network.post(passage.request_s, call.answered.set)
        elif passage.delivered:
            network.post(passage.request_s, lambda: self.simulated.arrive(call, reply))
            if passage.again_after_s is not None:
                again_s = passage.request_s + passage.again_after_s
                network.post(again_s, lambda: self.simulated.arrive(call, _nowhere))

    @asynccontextmanager
    async def _watch_fence(self) -> AsyncIterator[trio.MemoryReceiveChannel[Fence]]:
        send, receive = trio.open_memory_channel[Fence](1)
        listener = _Listener(self, send, receive)
        self.state.add_watcher(listener)
        try:
            with send, receive:
                yield receive
        finally:
            self.state.remove_watcher(listener)

    # --- what is asked for, in that instant

    async def write(self, write: LeaseWrite) -> LeaseStamps:
        if write.lease is not None and write.lease.state is LeaseState.HELD:
            self.checks.lease_asked(self.process, write.lease)
        documents = [
            name
            for name, document in (("lease", write.lease), ("fence", write.fence))
            if document is not None
        ]
        return await self._carry("write", Call(lambda: self.state.write_lease(write), documents))

    async def create_account(
        self, grant: Grant, account: Account, version: Version, parts: Mapping[PartName, bytes]
    ) -> Stamp:
        self.checks.asked(self.process, f"creating {account.account_id}", grant.epoch)
        return await super().create_account(grant, account, version, parts)

    async def commit(self, commit: AccountCommit) -> Stamp:
        account_id = commit.account.account_id
        self.checks.asked(self.process, f"a commit of {account_id}", commit.grant.epoch)
        return await self._carry("commit", Call(lambda: self.state.commit(commit), [account_id]))

    async def seal(self, commits: Sequence[AccountCommit]) -> Sequence[Stamp | None]:
        for commit in commits:
            what = f"a seal of {commit.account.account_id}"
            self.checks.asked(self.process, what, commit.grant.epoch)
        return await super().seal(commits)

    async def remove_account(
        self, grant: Grant, account_id: AccountId, stamp: Stamp, *, purge: bool
    ) -> None:
        self.checks.asked(self.process, f"removing {account_id}", grant.epoch)
        await super().remove_account(grant, account_id, stamp, purge=purge)

    async def purge_messages(self, grant: Grant, *, before: float, count_max: int) -> int:
        self.checks.asked(self.process, "a purge", grant.epoch)
        return await super().purge_messages(grant, before=before, count_max=count_max)


def _nowhere() -> None:
    pass


class SimulatedDisk(FakeLocalStore):
    """A host's disk. It outlives processes; it fills up, and what was not finished may be torn."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.full = 0
        self.slow = 0
        self.flaky = 0.0
        """The chance that a write is done and yet answered with an error."""
        self.reports = deque(maxlen=KEPT)
        self._unfinished: AccountId | None = None

    async def _enter(self, operation: str) -> None:
        await trio.sleep(SLOW_DISK_S if self.slow else DISK_S)
        if self.full and operation in DISK_WRITES:
            raise StoreUnavailable("injected: no space left", code="disk_full")

    async def save_account(self, copy: AccountCopy) -> None:
        self._unfinished = copy.account.account_id
        await super().save_account(copy)
        self._finish("save_account")

    async def apply(self, commit: AccountCommit) -> None:
        self._unfinished = commit.account.account_id
        await super().apply(commit)
        self._finish("apply")

    async def append_transition(self, transition: Transition) -> None:
        await super().append_transition(transition)
        del self.transitions[:-KEPT]

    def _finish(self, operation: str) -> None:
        self._unfinished = None
        if self.flaky and self.rng.random() < self.flaky:
            raise StoreUnavailable(f"injected: {operation} done", code="io_error")

    def tear(self) -> str | None:
        """What a crash makes of it: the write it fell into may have ruined the copy."""
        account_id = self._unfinished
        if account_id is None or account_id not in self.copies:
            return None
        if self.rng.random() < 0.5:
            self.damage_account(account_id, "injected: torn")
        else:
            self.damage_rest(account_id, "injected: torn")
        return account_id

    def remember(self) -> tuple[dict[AccountId, AccountCopy], int]:
        """The disk as it is, for `go_back`."""
        return dict(self.copies), self.epoch

    def go_back(self, remembered: tuple[dict[AccountId, AccountCopy], int]) -> None:
        """The disk of an older snapshot."""
        self.copies, self.epoch = dict(remembered[0]), remembered[1]
        self.damaged_rests.clear()
