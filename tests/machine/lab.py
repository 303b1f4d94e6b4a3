"""A group of instances on fakes and a virtual clock: what the machine's tests are run in."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace

import trio

from machine.desk import Desk
from machine.instance import Instance
from machine.lease import LeaseTiming
from machine.legacy import new_account
from machine.limits import Durability, Limits
from machine.outbox import make_message_id
from machine.ports import Bridge, LegacyAccount, LegacyFault, Ports
from machine.records import (
    AccountCopy,
    AccountId,
    AccountStatus,
    Grant,
    Identity,
    KeyChange,
    KeyName,
    Message,
    Stamp,
    Version,
)
from machine.states import State
from machine.term import Term
from tests.fakes.clocks import FakeClocks
from tests.fakes.codec import FakeCodec
from tests.fakes.connector import FakeConnector, FakeWhatsApp
from tests.fakes.guard import RecordingGuard
from tests.fakes.journal import RecordingJournal
from tests.fakes.local_store import FakeLocalStore
from tests.fakes.shared_store import FakeSharedState, FakeSharedStore

ANN = AccountId("ann")
BEN = AccountId("ben")
TIMING = LeaseTiming()
LIMITS = Limits(open_jitter_s=0.0)


class FakeLegacy:
    """Legacy directories as a list: what a scan of any directory finds."""

    def __init__(self) -> None:
        self.found: list[LegacyAccount | LegacyFault] = []

    async def scan(
        self, directory: str | None = None, *, known: Collection[AccountId] = ()
    ) -> Sequence[LegacyAccount | LegacyFault]:
        await trio.lowlevel.checkpoint()
        return tuple(self.found)


class LabConnector(FakeConnector):
    """A connector whose bridges take `start_s` to start, as a Node process does."""

    start_s = 0.0

    def open_bridge(self) -> AbstractAsyncContextManager[Bridge]:
        return self._open_slowly()

    @asynccontextmanager
    async def _open_slowly(self) -> AsyncIterator[Bridge]:
        await trio.sleep(self.start_s)
        async with super().open_bridge() as bridge:
            yield bridge


@dataclass
class Host:
    """One instance with everything of its own: disk, journal, way to the stores."""

    name: str
    instance: Instance
    store: FakeSharedStore
    local: FakeLocalStore
    journal: RecordingJournal
    connector: LabConnector
    legacy: FakeLegacy
    clocks: FakeClocks
    guard: RecordingGuard
    ports: Ports
    ended: trio.Event = field(default_factory=trio.Event)
    failure: BaseException | None = None

    @property
    def term(self) -> Term:
        term = self.instance.term
        assert term is not None
        return term

    @property
    def desk(self) -> Desk:
        return self.term.desk

    async def wait(self, state: State) -> None:
        while self.instance.state is not state:
            await self.instance.wait_changed()

    async def wait_serving(self) -> Term:
        while self.instance.term is None:
            await self.instance.wait_changed()
        return self.instance.term

    async def send(self, account_id: AccountId, text: str, *, key: str | None = None) -> Message:
        return await self.desk.accept(
            message_id=make_message_id(account_id, key, random.Random(text)),
            account_id=account_id,
            to="4915112345678",
            text=text,
            idempotency_key=key,
        )


class Lab:
    """A world with one group. `start` hosts in it; everything ends with the block."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.state = FakeSharedState()
        self.whatsapp = FakeWhatsApp()
        self.codec = FakeCodec()
        self.hosts: list[Host] = []

    def make(
        self,
        name: str,
        *,
        limits: Limits = LIMITS,
        timing: LeaseTiming = TIMING,
        durability: Durability = Durability.REMOTE,
        local: FakeLocalStore | None = None,
    ) -> Host:
        store = FakeSharedStore(self.state)
        local = local or FakeLocalStore()
        journal = RecordingJournal()
        connector = LabConnector(self.whatsapp)
        clocks = FakeClocks()
        legacy = FakeLegacy()
        guard = RecordingGuard()
        ports = Ports(
            lease=store,
            accounts=store,
            outbox=store,
            inbox=store,
            local=local,
            codec=self.codec,
            connector=connector,
            legacy=legacy,
            journal=journal,
            clocks=clocks,
            rng=random.Random(f"{name}-{len(self.hosts)}"),
            guard=guard,
        )
        identity = Identity(name, f"{name}-{len(self.hosts)}", f"http://{name}")
        instance = Instance(
            identity, ports=ports, timing=timing, limits=limits, durability=durability
        )
        host = Host(name, instance, store, local, journal, connector, legacy, clocks, guard, ports)
        self.hosts.append(host)
        return host

    async def _run(self, host: Host) -> None:
        try:
            await host.instance.run()
        finally:
            host.ended.set()

    def start(self, host: Host) -> Host:
        self.nursery.start_soon(self._run, host)
        return host

    async def add_accounts(
        self, *account_ids: AccountId, status: AccountStatus = AccountStatus.CONNECTED
    ) -> None:
        """Paired accounts, as an earlier term left them in the shared store."""
        store = self.state
        view = store.read_lease()
        for account_id in account_ids:
            copy = self.copy(account_id, Version(0, 1), status=status)
            store.create_account(
                Grant(
                    view.fence.epoch, view.fence.holder, view.fence.incarnation, view.fence_stamp
                ),
                copy.account,
                copy.version,
                dict(copy.parts),
            )

    def copy(
        self,
        account_id: AccountId,
        version: Version,
        *,
        status: AccountStatus = AccountStatus.CONNECTED,
        mark: bytes = b"",
    ) -> AccountCopy:
        """A complete copy of a paired account at a version."""
        account = replace(
            new_account(account_id, f"{account_id}'s", 1.0),
            status=status,
            phone=self.whatsapp.phone(account_id),
            last_connected_at=1.0,
        )
        change = KeyChange({KeyName("creds"): b"paired", KeyName("mark"): mark or b"-"})
        parts = {
            name: part
            for name, part in self.codec.change(account_id, {}, change, version).items()
            if part is not None
        }
        return AccountCopy(account, version, parts, complete=True, stamp=Stamp(""))


@asynccontextmanager
async def open_lab(*, limit_s: float = 7200.0) -> AsyncIterator[Lab]:
    """A world whose group is initialised and whose instances are stopped at the end.

    Fails after `limit_s` of the test's own clock: what never comes would be waited for for ever.
    """
    with trio.fail_after(limit_s):
        async with _open_lab() as lab:
            yield lab


@asynccontextmanager
async def _open_lab() -> AsyncIterator[Lab]:
    async with trio.open_nursery() as nursery:
        lab = Lab(nursery)
        lab.state.initialise(0)
        yield lab
        nursery.cancel_scope.cancel()
