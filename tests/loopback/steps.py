"""Steps that the tests of the loopback world have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from daemon.loopback import LoopbackWorld
from machine.ports import (
    Bridge,
    Connected,
    Connection,
    ConnectionClosed,
    KeysChanged,
    MessageProgressed,
    PairingScanned,
    QrShown,
)
from machine.records import AccountId, KeyChange, KeyName, MessageId

ANNA = AccountId("anna")
BERT = AccountId("bert")
TO = "4915187654321"

Keys = dict[KeyName, bytes]


def message_id(number: int) -> MessageId:
    return MessageId(f"3EB0{number:012X}")


def applied(keys: Keys, change: KeyChange | None) -> Keys:
    """The keys after a change: what a store would hold."""
    values: dict[KeyName, bytes | None] = {**keys, **(change.values if change else {})}
    return {name: value for name, value in values.items() if value is not None}


async def expect_closed(connection: Connection) -> ConnectionClosed:
    """Read events until the connection is closed."""
    try:
        while True:
            await connection.next_event()
    except ConnectionClosed as closed:
        return closed


async def pair(bridge: Bridge, world: LoopbackWorld, account_id: AccountId = ANNA) -> Keys:
    """Pair an account through its QR code; its keys."""
    async with bridge.open_connection(account_id, None) as connection:
        assert isinstance(await connection.next_event(), QrShown)
        await world.scan(account_id)
        assert isinstance(await connection.next_event(), PairingScanned)
        changed = await connection.next_event()
        assert isinstance(changed, KeysChanged)
        changed.stored.set()
        assert (await expect_closed(connection)).code == 515
    return applied({}, changed.change)


@asynccontextmanager
async def logged_in(
    bridge: Bridge,
    keys: Keys,
    account_id: AccountId = ANNA,
    *,
    doubtful: Collection[str] = (),
) -> AsyncIterator[Connection]:
    """A connection that has said that it is connected."""
    async with bridge.open_connection(account_id, keys, doubtful=doubtful) as connection:
        while not isinstance(await connection.next_event(), Connected):
            pass
        yield connection


async def progress(connection: Connection) -> MessageProgressed:
    event = await connection.next_event()
    assert isinstance(event, MessageProgressed)
    return event
