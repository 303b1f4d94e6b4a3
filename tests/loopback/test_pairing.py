from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
import trio

from daemon.loopback import LoopbackConnector, LoopbackTiming, LoopbackWorld
from daemon.loopback.device import CREDS, PRE_KEYS
from machine.ports import Connected, ConnectionClosed, ConnectorDown, KeysChanged, QrShown
from machine.records import KeyName
from machine.refusals import NotAwaitingScan
from tests.loopback.conftest import QUICK
from tests.loopback.steps import ANNA, BERT, TO, expect_closed, logged_in, message_id, pair


async def test_a_scan_by_any_process_pairs_and_the_saved_keys_log_in(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        assert len(keys) == 1 + PRE_KEYS
        async with bridge.open_connection(ANNA, keys) as connection:
            event = await connection.next_event()
            assert isinstance(event, Connected)
            assert re.fullmatch(r"49151\d{8}", event.phone)
            assert await world.list_connected() == (ANNA,)
        assert await world.list_connected() == ()


async def test_the_restart_waits_until_the_keys_are_stored(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge, bridge.open_connection(ANNA, None) as connection:
        await connection.next_event()
        assert await world.scan(ANNA, "491234567") == "491234567"
        await connection.next_event()
        changed = await connection.next_event()
        assert isinstance(changed, KeysChanged)
        with trio.move_on_after(0.05) as waited:
            await connection.next_event()
        assert waited.cancelled_caught
        changed.stored.set()
        assert (await expect_closed(connection)).code == 515


async def test_qr_codes_rotate_and_run_out(directory: Path) -> None:
    timing = LoopbackTiming(qr_first_s=0.06, qr_next_s=0.02, qr_refs=3)
    connector = LoopbackConnector(directory, timing=timing)
    shown: list[QrShown] = []
    async with connector.open_bridge() as bridge, bridge.open_connection(ANNA, None) as connection:
        began_at, wall = trio.current_time(), time.time()
        for _ in range(3):
            event = await connection.next_event()
            assert isinstance(event, QrShown)
            shown.append(event)
        with pytest.raises(ConnectionClosed) as closed:
            await connection.next_event()
        assert trio.current_time() - began_at >= 0.1 - 0.01
    assert closed.value.code == 408
    assert len({event.qr for event in shown}) == 3
    assert shown[0].expires_at == pytest.approx(wall + 0.06, abs=0.05)
    assert LoopbackTiming().pairing_s == 60 + 5 * 20


async def test_a_scan_after_the_last_qr_code_is_refused(
    directory: Path, world: LoopbackWorld
) -> None:
    timing = LoopbackTiming(qr_first_s=0.01, qr_refs=1)
    connector = LoopbackConnector(directory, timing=timing)
    async with connector.open_bridge() as bridge, bridge.open_connection(ANNA, None):
        await trio.sleep(0.02)
        with pytest.raises(NotAwaitingScan):
            await world.scan(ANNA)


async def test_a_scan_without_a_qr_code_is_refused(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    with pytest.raises(NotAwaitingScan):
        await world.scan(ANNA)
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        async with logged_in(bridge, keys) as connection:
            with pytest.raises(NotAwaitingScan):
                await world.scan(ANNA)
            with pytest.raises(NotAwaitingScan):
                await connection.request_pairing_code("491234567")
        async with bridge.open_connection(BERT, None):
            pass
        with pytest.raises(NotAwaitingScan):
            await world.scan(BERT)


async def test_a_pairing_code_is_typed_on_the_phone_it_was_asked_for(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge, bridge.open_connection(ANNA, None) as connection:
        await connection.next_event()
        code, expires_at = await connection.request_pairing_code("491709999999")
        assert len(code) == 8
        assert expires_at > time.time() + QUICK.code_s - 5
        wrong = "A" * 8 if code != "A" * 8 else "B" * 8
        with pytest.raises(NotAwaitingScan):
            await world.scan(ANNA, code=wrong)
        assert await world.scan(ANNA, code=code) == "491709999999"


async def test_a_repaired_account_keeps_its_phone_and_gets_a_new_device(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    async with connector.open_bridge() as bridge:
        async with bridge.open_connection(ANNA, None) as connection:
            await connection.next_event()
            await world.scan(ANNA, "491234567")
        keys = await pair(bridge, world)
        other = await pair(bridge, world)
        assert keys[CREDS] != other[CREDS]
        async with bridge.open_connection(ANNA, other) as connection:
            assert await connection.next_event() == Connected("491234567")


@pytest.mark.parametrize(
    "creds",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"loopback":1}',
        b'{"loopback":1,"deviceId":"x","secret":"c2VjcmV0","me":{"id":"491:1@s.whatsapp.net"}}',
        b'{"noiseKey":{"private":1},"signedIdentityKey":{"private":2}}',
        b"[" * 100_000,
    ],
)
async def test_keys_of_no_linked_device_end_with_401(
    connector: LoopbackConnector, creds: bytes
) -> None:
    async with connector.open_bridge() as bridge:
        with pytest.raises(ConnectionClosed) as closed:
            async with bridge.open_connection(ANNA, {CREDS: creds}):
                pytest.fail("logged in")
        assert closed.value.code == 401
        with pytest.raises(ConnectionClosed):
            async with bridge.open_connection(ANNA, {}):
                pytest.fail("logged in")


async def test_keys_that_baileys_paired_are_adopted_until_their_device_is_removed(
    connector: LoopbackConnector, world: LoopbackWorld
) -> None:
    creds = (
        b'{"noiseKey":{"private":{"type":"Buffer","data":"AA=="}},"nextPreKeyId":%d,'
        b'"signedIdentityKey":{"private":{"type":"Buffer","data":"AQ=="}},'
        b'"me":{"id":"491711111111:7@s.whatsapp.net","name":"Anna"}}'
    )
    session = KeyName(f"session-{TO}.0")
    keys = {CREDS: creds % 1, session: b'{"_sessions":{},"version":"v1"}'}
    async with connector.open_bridge() as bridge:
        async with bridge.open_connection(ANNA, keys) as connection:
            assert await connection.next_event() == Connected("491711111111")
            await connection.send_text(message_id(1), TO, "to a contact of an old session")
        # The rest of Baileys' creds changes as it runs: it is the same device all the same.
        async with logged_in(bridge, {**keys, CREDS: creds % 2}) as connection:
            await connection.log_out()
            assert (await expect_closed(connection)).code == 401
        with pytest.raises(ConnectionClosed) as closed:
            async with bridge.open_connection(ANNA, keys):
                pytest.fail("logged in")
        assert closed.value.code == 401


async def test_the_database_holds_no_secret_of_a_device(
    connector: LoopbackConnector, world: LoopbackWorld, directory: Path
) -> None:
    async with connector.open_bridge() as bridge:
        keys = await pair(bridge, world)
        secret = json.loads(keys[CREDS])["secret"]
        kept = await trio.to_thread.run_sync(files_of, directory)
    assert set(kept) == {"loopback.db", "loopback.db-wal", "loopback.db-shm"}
    assert b"anna" in b"".join(kept.values())
    assert secret.encode() not in b"".join(kept.values())
    assert (await trio.Path(directory).stat()).st_mode & 0o777 == 0o700


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


async def test_an_unusable_directory_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConnectorDown, match="cannot open"):
        async with LoopbackConnector(tmp_path / "file" / "world").open_bridge():
            pytest.fail("opened")
    (tmp_path / "loopback.db").write_bytes(b"not a database" * 100)
    with pytest.raises(ConnectorDown, match="may be deleted"):
        async with LoopbackConnector(tmp_path).open_bridge():
            pytest.fail("opened")
