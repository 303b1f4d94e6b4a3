"""What the fakes add to their ports: faults, and a world that notices double logins."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from machine.ports import (
    Connected,
    ConnectionClosed,
    ConnectorDown,
    KeysChanged,
    LeaseRefused,
    PairingScanned,
    QrShown,
    StoreUnavailable,
)
from machine.records import (
    MAIN_PART,
    AccountId,
    KeyChange,
    KeyName,
    Lease,
    LeaseState,
    LeaseWrite,
    MessageId,
    PartName,
    Stamp,
    Version,
)
from tests.fakes import (
    BROKEN,
    FakeCodec,
    FakeConnector,
    FakeSharedStore,
    FakeWhatsApp,
    Passage,
)

ANNA = AccountId("anna")
CREDS = {KeyName("creds"): b"creds"}


def a_lease(nonce: str) -> Lease:
    return Lease("a", "a-1", 1, nonce, 15.0, LeaseState.HELD)


async def opened() -> tuple[FakeSharedStore, Stamp]:
    store = FakeSharedStore()
    await store.initialise()
    return store, (await store.read()).lease_stamp


async def test_request_is_applied_though_its_caller_gave_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, stamp = await opened()
    store.delay(3.0)
    with trio.move_on_after(1.0) as scope:
        await store.write(LeaseWrite(lease=a_lease("late"), lease_stamp=stamp))
    assert scope.cancelled_caught
    other = store.client()
    assert (await other.read()).lease.nonce == ""
    await trio.sleep(2.0)
    assert (await other.read()).lease.nonce == "late"


async def test_duplicated_request_is_refused_the_second_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, stamp = await opened()
    store.schedule("write", Passage(again_after_s=1.0))
    stamps = await store.write(LeaseWrite(lease=a_lease("once"), lease_stamp=stamp))
    await trio.sleep(2.0)
    assert (await store.read()).lease_stamp == stamps.lease_stamp


async def test_partition_cuts_one_client_and_not_the_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, _ = await opened()
    other = store.client()
    store.partitioned = True
    with pytest.raises(trio.TooSlowError), trio.fail_after(5.0):
        await store.read()
    await other.read()
    store.partitioned = False
    await store.read()


async def test_partition_between_request_and_reply_loses_the_reply(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    store, stamp = await opened()
    store.delay(1.0, 1.0)

    async def cut() -> None:
        await trio.sleep(1.5)
        store.partitioned = True

    nursery.start_soon(cut)
    with pytest.raises(trio.TooSlowError), trio.fail_after(5.0):
        await store.write(LeaseWrite(lease=a_lease("mine"), lease_stamp=stamp))
    assert (await store.client().read()).lease.nonce == "mine"


async def test_frozen_store_handles_what_arrived_once_it_thaws(
    autojump_clock: trio.testing.MockClock,
) -> None:
    store, stamp = await opened()
    store.state.freeze()
    with trio.move_on_after(1.0):
        await store.write(LeaseWrite(lease=a_lease("frozen"), lease_stamp=stamp))
    store.state.thaw()
    assert (await store.read()).lease.nonce == "frozen"


async def test_planned_faults_come_once_each() -> None:
    store, stamp = await opened()
    store.fail_next("write")
    store.apply_then_fail("write")
    write = LeaseWrite(lease=a_lease("mine"), lease_stamp=stamp)
    with pytest.raises(StoreUnavailable):
        await store.write(write)
    assert (await store.read()).lease.nonce == ""
    with pytest.raises(StoreUnavailable):
        await store.write(write)
    assert (await store.read()).lease.nonce == "mine"
    with pytest.raises(LeaseRefused):
        await store.write(write)


async def test_second_login_evicts_the_first_with_440() -> None:
    world = FakeWhatsApp()
    async with (
        world.connector().open_bridge() as here,
        world.connector().open_bridge() as there,
        here.open_connection(ANNA, CREDS) as first,
    ):
        assert isinstance(await first.next_event(), Connected)
        async with there.open_connection(ANNA, CREDS) as second:
            assert isinstance(await second.next_event(), Connected)
            with pytest.raises(ConnectionClosed) as closed:
                await first.next_event()
            assert closed.value.code == 440
            assert world.evictions == [ANNA]
            assert list(world.open) == [ANNA]
    assert not world.open
    assert world.connections == 0
    assert world.bridges == 0


async def test_pairing_ends_with_515_once_the_creds_are_stored() -> None:
    world = FakeWhatsApp()
    async with world.connector().open_bridge() as bridge:
        async with bridge.open_connection(ANNA, None) as connection:
            assert isinstance(await connection.next_event(), QrShown)
            world.scan(ANNA, "4915100")
            assert isinstance(await connection.next_event(), PairingScanned)
            changed = await connection.next_event()
            assert isinstance(changed, KeysChanged)
            with trio.move_on_after(0.01) as scope:
                await connection.next_event()
            assert scope.cancelled_caught
            changed.stored.set()
            with pytest.raises(ConnectionClosed) as closed:
                await connection.next_event()
            assert closed.value.code == 515
        keys = {name: data for name, data in changed.change.values.items() if data is not None}
        async with bridge.open_connection(ANNA, keys) as connection:
            assert await connection.next_event() == Connected("4915100")


async def test_rolled_back_keys_make_unreadable_messages_unless_doubted() -> None:
    world = FakeWhatsApp()
    keys = dict(CREDS)
    async with FakeConnector(world).open_bridge() as bridge:
        async with bridge.open_connection(ANNA, keys) as connection:
            await connection.next_event()
            ack = await connection.send_text(MessageId("m1"), "49170", "one")
            assert ack.keys is not None
            keys |= {name: data for name, data in ack.keys.values.items() if data is not None}
            await connection.send_text(MessageId("m2"), "49170", "two")
        async with bridge.open_connection(ANNA, keys) as connection:
            await connection.send_text(MessageId("m3"), "49170", "three")
        assert [one.message_id for one in world.unreadable()] == ["m3"]
        async with bridge.open_connection(ANNA, keys, doubtful=["49170"]) as connection:
            await connection.send_text(MessageId("m2"), "49170", "two")
    assert len(world.unreadable()) == 1
    assert [one.message_id for one in world.inbox()] == ["m1", "m2"]


async def test_distrusted_sessions_are_dropped_told_and_begun_anew() -> None:
    world = FakeWhatsApp()
    keys = {**CREDS, KeyName("session-49170.0"): b"7:7", KeyName("session-49171.0"): b"8:8"}
    async with (
        FakeConnector(world).open_bridge() as bridge,
        bridge.open_connection(ANNA, keys, distrust_sessions=True) as connection,
    ):
        dropped = await connection.next_event()
        assert isinstance(dropped, KeysChanged)
        assert dict(dropped.change.values) == {"session-49170.0": None, "session-49171.0": None}
        ack = await connection.send_text(MessageId("m1"), "49170", "one")
        assert ack.keys is not None
        assert ack.keys.values[KeyName("session-49170.0")] != b"7:8"


async def test_lost_ack_keeps_the_sender_until_the_connection_ends(
    autojump_clock: trio.testing.MockClock, nursery: trio.Nursery
) -> None:
    world = FakeWhatsApp()
    world.script(ANNA).acks_lost = 1
    async with (
        world.connector().open_bridge() as bridge,
        bridge.open_connection(ANNA, CREDS) as connection,
    ):
        await connection.next_event()

        async def cut() -> None:
            await trio.sleep(7.0)
            world.cut(ANNA, 428)

        nursery.start_soon(cut)
        with pytest.raises(ConnectionClosed):
            await connection.send_text(MessageId("m1"), "49170", "one")
        assert trio.current_time() >= 7.0
    assert [one.message_id for one in world.raw] == ["m1"]


async def test_dead_bridge_ends_its_connections_and_opens_no_other() -> None:
    connector = FakeConnector()
    async with connector.open_bridge() as bridge:
        async with bridge.open_connection(ANNA, CREDS) as connection:
            await connection.next_event()
            connector.bridges[0].kill()
            with pytest.raises(ConnectionClosed):
                await connection.next_event()
        with pytest.raises(ConnectorDown):
            async with bridge.open_connection(ANNA, CREDS):
                raise AssertionError


async def test_error_in_a_connections_block_leaves_it_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with (
            FakeConnector().open_bridge() as bridge,
            bridge.open_connection(ANNA, CREDS),
        ):
            raise KeyError


def test_codec_gives_back_what_it_packed_and_refuses_broken_parts() -> None:
    codec = FakeCodec()
    session = KeyName("session-49170.0")
    first = codec.change(ANNA, {}, KeyChange({**CREDS, session: b"1"}), Version(1, 1))
    parts = {name: data for name, data in first.items() if data is not None}
    assert codec.unpack(ANNA, parts) == {**CREDS, session: b"1"}
    assert codec.check(ANNA, parts) is None
    second = codec.change(ANNA, parts, KeyChange({session: None}), Version(1, 2))
    assert second[PartName("sessions")] is None
    assert codec.check(ANNA, {MAIN_PART: BROKEN}) is not None
    assert codec.check(AccountId("bela"), parts) is not None
