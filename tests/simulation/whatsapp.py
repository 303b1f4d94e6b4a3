"""WhatsApp as the simulation's processes meet it: who is behind each connection is known.

Lives here: telling `Checks` of every login and message, in the instant it is asked for and in the
one it happens. The ratchets, the evictions and the receipts are the fake's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from machine.ports import Bridge, Connection, ConnectionEvent, ServerAck
from machine.records import AccountId, KeyName, MessageId
from tests.fakes.connector import FakeBridge, FakeConnection, FakeConnector, FakeWhatsApp
from tests.simulation.checks import Checks
from tests.simulation.process import Process


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
        self._forgiven: set[tuple[AccountId, str]] = set()
        self.sends: dict[tuple[AccountId, MessageId], Asked] = {}

    def log_in(self, connection: FakeConnection) -> None:
        asked = self.asked[connection]
        others = [self.asked[other].process for other in self.open.values()]
        super().log_in(connection)
        what = f"login of {connection.account_id}"
        self.checks.happened(asked.process, what, asked.epoch, asked.pauses)
        if self.checks.wrong(asked.process, asked.epoch) is None:
            self.checks.connected(asked.process, connection.account_id, others)

    def _take_receipts(self, account_id: AccountId) -> None:
        before = self.mail.get(account_id, [])
        super()._take_receipts(account_id)
        for mail in before:
            if mail not in self.mail[account_id]:
                self.checks.receipt(account_id, mail.message_id)

    def show_qr(self, connection: FakeConnection) -> None:
        self.checks.violated(7, f"{connection.account_id} asks for a QR code: its identity is lost")
        super().show_qr(connection)

    def deliver(
        self,
        account_id: AccountId,
        to: str,
        message_id: MessageId,
        text: str,
        ratchet: tuple[int, int],
    ) -> None:
        pair = (account_id, to)
        if pair in self._forgiven and ratchet <= self._ratchets[pair]:
            self._forgiven.discard(pair)
            del self._ratchets[pair]
        super().deliver(account_id, to, message_id, text, ratchet)
        asked = self.sends[account_id, message_id]
        arrived = self.raw[-1]
        kind = "readable" if arrived.readable else "unreadable"
        kind = "duplicate" if arrived.duplicate else kind
        what = f"wire {account_id} {message_id} {kind}"
        self.checks.happened(asked.process, what, asked.epoch, asked.pauses)

    def forgive(self, account_id: AccountId) -> None:
        """Somebody's backup has put this account's keys back: each recipient asks again once.

        That is what a recipient's retry receipt brings about: a session begun anew.
        """
        self._forgiven |= {pair for pair in self._ratchets if pair[0] == account_id}

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

    def hang_up(self) -> None:
        self._connection.hang_up()

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
