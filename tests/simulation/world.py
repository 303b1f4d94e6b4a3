"""The world's parts on the fakes: each tells `Checks` what happens, in the instant it happens."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import trio

from machine.ports import Bridge, Connection, ConnectionEvent, ServerAck
from machine.records import (
    Account,
    AccountCommit,
    AccountId,
    Grant,
    KeyName,
    LeaseStamps,
    LeaseWrite,
    MessageId,
    PartName,
    Stamp,
    Version,
)
from tests.fakes.connector import FakeBridge, FakeConnection, FakeConnector, FakeWhatsApp
from tests.fakes.shared_store import (
    FakeSharedState,
    FakeSharedStore,
    Passage,
    applied_then_failing,
    failing,
)
from tests.simulation.checks import Checks
from tests.simulation.process import Process

UNTRACED = frozenset({"lease.renewed", "message.accepted", "message.acked", "account.found"})
"""Events that say nothing which an effect in the trace does not say already."""


# --- the store -----------------------------------------------------------------------------------


class SimulatedState(FakeSharedState):
    """The server: tells each write that it applies."""

    checks: Checks

    def write_lease(self, write: LeaseWrite) -> LeaseStamps:
        assert self.fence is not None
        old = self.fence[0]
        stamps = super().write_lease(write)
        if write.fence is not None:
            self.checks.fence_written(old, write.fence)
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
            self.checks.account_written(commit.account.account_id, commit.version, commit.grant)
        return stamp

    def deliver_all(self) -> None:
        """Let everything that is still on its way arrive now, in its order."""
        now = trio.current_time()
        self._wire[:] = [(min(due, now), number, request) for due, number, request in self._wire]
        self._wire.sort(key=lambda sent: sent[:2])
        self.settle()


@dataclass
class Link:
    """One host's way to the store. Counts, because faults may overlap."""

    rng: random.Random
    cut: int = 0
    deaf: int = 0
    """Nothing of the listener comes through."""
    requests_lost: int = 0
    replies_lost: int = 0
    slow: int = 0
    """Requests arrive soon, and the answers take their time."""
    rough: float = 0.0
    """The chance that a call meets one of the small faults."""

    def weather(self, operation: str) -> Passage:
        """How the next call travels."""
        rng = self.rng
        request_s = rng.uniform(*(SLOW_REQUEST_S if self.slow else CALM_S))
        reply_s = rng.uniform(*(SLOW_REPLY_S if self.slow else CALM_S))
        delivered = not self.requests_lost
        answered = not self.replies_lost
        error_before = error_after = None
        again_after_s = None
        if self.rough and rng.random() < self.rough:
            match rng.randrange(7):
                case 0:
                    delivered = False
                case 1:
                    answered = False
                case 2:
                    return failing()
                case 3:
                    error_after = applied_then_failing().error_after
                case 4:
                    again_after_s = rng.uniform(0.0, 20.0)
                case 5:
                    request_s = rng.uniform(1.0, LATE_MAX_S)
                case _:
                    reply_s = rng.uniform(1.0, 4.0)
        return Passage(
            request_s, reply_s, delivered, answered, error_before, error_after, again_after_s
        )


CALM_S = (0.002, 0.03)
SLOW_REQUEST_S = (0.01, 0.5)
SLOW_REPLY_S = (0.4, 2.4)
LATE_MAX_S = 25.0


class SimulatedStore(FakeSharedStore):
    """One process's client: asks `Checks` at each write, and travels by its host's link."""

    def __init__(self, state: SimulatedState, link: Link, process: Process, checks: Checks) -> None:
        super().__init__(state)
        self.link = link
        self.process = process
        self.checks = checks
        self.weather = link.weather

    @property
    def partitioned(self) -> bool:
        """For the listener only: a call asks the link itself."""
        return bool(self.link.cut or self.link.deaf)

    @partitioned.setter
    def partitioned(self, cut: bool) -> None:
        raise NotImplementedError("the link is cut, not the client")

    async def _cross(self, through: bool) -> None:
        if self.link.cut or not through:
            await trio.sleep_forever()

    async def create_account(
        self, grant: Grant, account: Account, version: Version, parts: Mapping[PartName, bytes]
    ) -> Stamp:
        self.checks.asked(self.process, f"creating {account.account_id}", grant.epoch)
        return await super().create_account(grant, account, version, parts)

    async def commit(self, commit: AccountCommit) -> Stamp:
        what = f"a commit of {commit.account.account_id}"
        self.checks.asked(self.process, what, commit.grant.epoch)
        return await super().commit(commit)

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


# --- WhatsApp ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """An act on its way: who asked, under which epoch, and its pauses until then."""

    process: Process
    epoch: int
    pauses: int


class SimulatedWhatsApp(FakeWhatsApp):
    """The server: knows which process is behind each connection."""

    def __init__(self, checks: Checks) -> None:
        super().__init__()
        self.checks = checks
        self.asked: dict[FakeConnection, Asked] = {}
        self.sends: dict[tuple[AccountId, MessageId], Asked] = {}

    def log_in(self, connection: FakeConnection) -> None:
        asked = self.asked[connection]
        others = [self.asked[other].process for other in self.open.values()]
        super().log_in(connection)
        what = f"login of {connection.account_id}"
        self.checks.happened(asked.process, what, asked.epoch, asked.pauses)
        if self.checks.may_act(asked.process, asked.epoch):
            self.checks.connected(asked.process, connection.account_id, others)

    def show_qr(self, connection: FakeConnection) -> None:
        self.checks.violated(f"{connection.account_id} asks for a QR code: its identity is lost")
        super().show_qr(connection)

    def deliver(
        self,
        account_id: AccountId,
        to: str,
        message_id: MessageId,
        text: str,
        ratchet: tuple[int, int],
    ) -> None:
        super().deliver(account_id, to, message_id, text, ratchet)
        asked = self.sends[account_id, message_id]
        arrived = self.raw[-1]
        kind = "readable" if arrived.readable else "unreadable"
        kind = "duplicate" if arrived.duplicate else kind
        what = f"wire {account_id} {message_id} {kind}"
        self.checks.happened(asked.process, what, asked.epoch, asked.pauses)

    def connections_of(self, process: Process) -> list[FakeConnection]:
        return [one for one in self.open.values() if self.asked[one].process is process]

    def process_died(self, process: Process) -> None:
        """Its sockets are closed by the kernel, those not logged in yet too."""
        for connection, asked in self.asked.items():
            if asked.process is process:
                self.forget(connection)


class SimulatedConnector(FakeConnector):
    """One process's way to WhatsApp."""

    def __init__(self, world: SimulatedWhatsApp, process: Process, checks: Checks) -> None:
        super().__init__(world)
        self.process = process
        self.checks = checks
        self.whatsapp = world

    def open_bridge(self) -> AbstractAsyncContextManager[Bridge]:
        return self._open_watched_bridge()

    @asynccontextmanager
    async def _open_watched_bridge(self) -> AsyncIterator[Bridge]:
        async with super()._open_bridge() as bridge:
            assert isinstance(bridge, FakeBridge)
            yield WatchedBridge(bridge, self)


class WatchedBridge:
    """A bridge whose every act is told in the instant it is asked for."""

    def __init__(self, bridge: FakeBridge, connector: SimulatedConnector) -> None:
        self._bridge = bridge
        self._connector = connector

    def ask(self, what: str) -> Asked:
        process = self._connector.process
        epoch = process.instance.epoch
        self._connector.checks.asked(process, what, epoch)
        return Asked(process, epoch, process.pauses)

    def open_connection(
        self,
        account_id: AccountId,
        keys: Mapping[KeyName, bytes] | None,
        *,
        doubtful: Collection[str] = (),
        distrust_sessions: bool = False,
    ) -> AbstractAsyncContextManager[Connection]:
        asked = self.ask(f"opening {account_id}")
        inner = self._bridge.open_connection(
            account_id, keys, doubtful=doubtful, distrust_sessions=distrust_sessions
        )
        return self._open_connection(inner, asked)

    @asynccontextmanager
    async def _open_connection(
        self, inner: AbstractAsyncContextManager[Connection], asked: Asked
    ) -> AsyncIterator[Connection]:
        whatsapp = self._connector.whatsapp
        async with inner as connection:
            assert isinstance(connection, FakeConnection)
            whatsapp.asked[connection] = asked
            try:
                yield WatchedConnection(connection, self)
            finally:
                # The server forgets it a moment later, when the fake's own block ends.
                whatsapp.forget(connection)
                del whatsapp.asked[connection]


class WatchedConnection:
    """A connection whose sends are told in the instant they are asked for."""

    def __init__(self, connection: FakeConnection, bridge: WatchedBridge) -> None:
        self._connection = connection
        self._bridge = bridge

    async def next_event(self) -> ConnectionEvent:
        return await self._connection.next_event()

    async def send_text(self, message_id: MessageId, to: str, text: str) -> ServerAck:
        asked = self._bridge.ask(f"sending {message_id}")
        whatsapp = self._connection.world
        assert isinstance(whatsapp, SimulatedWhatsApp)
        whatsapp.sends[self._connection.account_id, message_id] = asked
        return await self._connection.send_text(message_id, to, text)

    async def is_on_whatsapp(self, to: str) -> bool:
        return await self._connection.is_on_whatsapp(to)

    async def request_pairing_code(self, phone: str) -> tuple[str, float]:
        return await self._connection.request_pairing_code(phone)

    async def log_out(self) -> None:
        await self._connection.log_out()


# --- telling -------------------------------------------------------------------------------------


@dataclass
class SimulatedJournal:
    """A journal that goes into the trace."""

    process: Process
    checks: Checks
    term_ended: Callable[[], None]

    def note(self, event: str, /, **fields: object) -> None:
        if event in UNTRACED:
            return
        shown = " ".join(f"{name}={value}" for name, value in fields.items())
        self.checks.tell(self.process.name, f"{event} {shown}")
        if (event, fields.get("dest")) == ("transition.made", "PASSIVE"):
            # The instance drains inside its term, but is PASSIVE only after it.
            self.term_ended()
