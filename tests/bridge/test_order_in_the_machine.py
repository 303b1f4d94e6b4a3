"""The machine keeps keys in order too: real sessions, real ledgers, a scripted bridge process."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from daemon.bridge.connection import BridgeConnection
from daemon.bridge.frames import (
    AskFrame,
    Call,
    Close,
    ConnectedEvent,
    KeysAsk,
    OkT,
    OnWhatsApp,
    OnWhatsAppDone,
    ReceivedAsk,
    ReceivedMessage,
    Reply,
    Send,
    decode,
    read_ok,
)
from machine.instance import Instance
from machine.limits import Durability
from machine.ports import Bridge, Connection, ConnectionClosed
from machine.records import AccountId, Identity, KeyChange, KeyName, PartName, Version
from tests.fakes.clocks import FakeClocks
from tests.fakes.codec import FakeCodec
from tests.fakes.journal import RecordingJournal
from tests.machine.lab import ANN, LIMITS, TIMING, Lab, open_lab

TO = "4915112345678"
RATCHET = KeyName(f"session-{TO}.0")
MESSAGES = 12


class RatchetProcess:
    """A bridge process and its one account: a `Wire` that moves one ratchet, and tells each step.

    It tells them in the acks of what is sent, in asks, and with received messages, as it likes.
    """

    def __init__(self, rng: random.Random) -> None:
        self.position = 0
        self.answered = 0
        self.asked = 0
        self.connection: BridgeConnection | None = None
        self._rng = rng
        self._sends: list[Callable[[Reply | None], None]] = []
        self._closed: Callable[[Reply | None], None] | None = None

    @property
    def alive(self) -> bool:
        return True

    async def call(self, call: Call, kind: type[OkT]) -> OkT:
        await trio.sleep(self._rng.random() / 10)
        if isinstance(call, OnWhatsApp):
            return read_ok(b'{"exists":true}', OnWhatsAppDone)  # type: ignore[arg-type, return-value]
        return kind()

    def post(self, call: Call, replied: Callable[[Reply | None], None], *, within_s: float) -> int:
        if isinstance(call, Close):
            self._closed = replied
        else:
            assert isinstance(call, Send)
            self._sends.append(replied)
        return 1

    def read_reply(self, call: Call, reply: Reply | None, kind: type[OkT]) -> OkT:
        assert reply is not None
        return read_ok(reply.ok, kind)  # type: ignore[arg-type]

    def answer(self, ask_id: int, ok: Mapping[str, str | None]) -> None:
        self.answered += 1

    def refuse(self, ask: AskFrame, why: str) -> None:
        """It ends its connection; here the term is over anyway."""

    def kill(self, reason: str) -> None:
        raise AssertionError(reason)

    def gone(self) -> ConnectionClosed:
        raise AssertionError

    async def live(self, connection: BridgeConnection) -> None:
        """Tell one step after the other, several in an instant, until the connection is closed."""
        connection.receive(ConnectedEvent(connection=1, phone="49151"))
        while True:
            await trio.sleep(self._rng.choice([0, 0, 0.01, 0.2]))
            for _ in range(self._rng.randrange(4)):
                self._step(connection)
            if self._closed is not None:
                self._closed(_reply(b"{}"))
                return

    def _step(self, connection: BridgeConnection) -> None:
        choice = self._rng.random()
        if choice < 0.5 and self._sends:
            self.position += 1
            keys = b'{"%s":"%d"}' % (RATCHET.encode(), self.position)
            self._sends.pop(0)(_reply(b'{"keys":%s}' % keys))
        elif choice > 0.8 and self.asked < 40:
            self.asked += 1
            self.position += 1
            values: dict[str, str | None] = {RATCHET: str(self.position)}
            if choice > 0.9:
                connection.receive(KeysAsk(id=self.asked, connection=1, values=values))
                return
            message = ReceivedMessage(
                message_id=f"A{self.asked}", chat=TO, sender=TO, text="x", sent_at=1.0
            )
            connection.receive(
                ReceivedAsk(id=self.asked, connection=1, message=message, values=values)
            )


def _reply(ok: bytes) -> Reply:
    reply = decode(b'{"v":1,"reply":1,"ok":%s}' % ok)
    assert isinstance(reply, Reply)
    return reply


class RatchetConnector:
    """A `Connector` of one `RatchetProcess`."""

    def __init__(self, process: RatchetProcess) -> None:
        self.process = process

    def open_bridge(self) -> AbstractAsyncContextManager[Bridge]:
        return self._open_bridge()

    @asynccontextmanager
    async def _open_bridge(self) -> AsyncIterator[Bridge]:
        yield self

    def open_connection(
        self,
        account_id: AccountId,
        keys: Mapping[KeyName, bytes] | None,
        *,
        doubtful: Collection[str] = (),
        distrust_sessions: bool = False,
    ) -> AbstractAsyncContextManager[Connection]:
        return self._open_connection(account_id)

    @asynccontextmanager
    async def _open_connection(self, account_id: AccountId) -> AsyncIterator[Connection]:
        connection = BridgeConnection(1, account_id, self.process, RecordingJournal(), FakeClocks())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.keep_answering)
            nursery.start_soon(self.process.live, connection)
            yield connection
            nursery.cancel_scope.cancel()


class WatchfulCodec(FakeCodec):
    """Remembers every position of the ratchet that the ledger has packed, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.positions: list[int] = []

    def change(
        self,
        account_id: AccountId,
        parts: Mapping[PartName, bytes],
        change: KeyChange,
        version: Version,
    ) -> dict[PartName, bytes | None]:
        value = change.values.get(RATCHET)
        if value is not None:
            self.positions.append(int(value))
        return super().change(account_id, parts, change, version)


async def run_seed(lab: Lab, seed: int, durability: Durability) -> None:
    codec = lab.codec = WatchfulCodec()
    await lab.add_accounts(ANN)
    host = lab.make("a", durability=durability)
    process = RatchetProcess(random.Random(seed))
    ports = replace(host.ports, connector=RatchetConnector(process))
    identity = Identity("a", f"a-{seed}", "http://a")
    host.instance = Instance(
        identity, ports=ports, timing=TIMING, limits=LIMITS, durability=durability
    )
    lab.start(host)
    await host.journal.wait_for("session.connected")
    async with trio.open_nursery() as nursery:
        for number in range(MESSAGES):
            nursery.start_soon(host.send, ANN, f"text {number}")
    await host.journal.wait_for("message.acked", MESSAGES)
    host.instance.request_drain("done")
    await host.ended.wait()
    assert codec.positions == sorted(codec.positions), f"seed {seed}"
    stored = codec.unpack(ANN, lab.state.accounts[ANN].parts)
    # To the last step: what was told while the connection was closed in good order, too.
    assert int(stored[RATCHET]) == process.position, f"seed {seed}"


@pytest.mark.parametrize("durability", list(Durability), ids=lambda one: one.value)
@pytest.mark.parametrize("seeds", range(2))
async def test_no_older_ratchet_is_ever_stored_over_a_newer_one(
    seeds: int, durability: Durability, autojump_clock: MockClock
) -> None:
    for seed in range(seeds * 15, seeds * 15 + 15):
        async with open_lab() as lab:
            await run_seed(lab, seed, durability)
