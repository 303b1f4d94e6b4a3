"""The fence's listener while its server is away. In real time, with an emulator of its own."""

from __future__ import annotations

import time

import pytest
import trio

from daemon.firestore.client import open_firestore
from daemon.firestore.lease import FirestoreLeaseStore
from tests.contracts.samples import acquire
from tests.emulator import Emulator, new_project
from tests.fault_proxy import Fault, open_fault_proxy

pytestmark = pytest.mark.emulator

AWAY_S = 30.0
CPU_SHARE_MAX = 0.03
LIVE_AGAIN_S_MAX = 5.0


@pytest.mark.long
async def test_while_the_server_is_dead_the_listener_rests_and_then_is_live_again(
    own_emulator: Emulator,
) -> None:
    troubles: list[str] = []
    async with open_firestore(new_project(), emulator_host=own_emulator.host) as client:
        store = FirestoreLeaseStore(client, "g", note_trouble=troubles.append)
        await store.initialise()
        async with store.watch_fence() as changes:
            with trio.fail_after(10):
                await changes.receive()
            own_emulator.kill()
            cpu_before_s = time.process_time()
            await trio.sleep(AWAY_S)
            cpu_s = time.process_time() - cpu_before_s
            await trio.to_thread.run_sync(own_emulator.start)
            back_at = trio.current_time()
            async with open_firestore(
                client.database.split("/")[1], emulator_host=own_emulator.host
            ) as other:
                # Its memory died with it.
                with trio.fail_after(LIVE_AGAIN_S_MAX):
                    again = FirestoreLeaseStore(other, "g")
                    await again.initialise()
                    await acquire(again, "somebody")
                    while (await changes.receive()).holder != "somebody":
                        pass
            live_after_s = trio.current_time() - back_at
    assert cpu_s / AWAY_S < CPU_SHARE_MAX
    assert live_after_s < LIVE_AGAIN_S_MAX
    assert troubles
    assert store.listen_restarts <= 6


async def test_a_listener_goes_on_where_it_was_after_its_connection_broke(
    firestore_emulator: str,
) -> None:
    async with (
        open_fault_proxy(firestore_emulator) as proxy,
        open_firestore(new_project(), emulator_host=proxy.host) as client,
    ):
        store = FirestoreLeaseStore(client, "g")
        await store.initialise()
        with trio.fail_after(20):
            async with store.watch_fence() as changes:
                for number in range(3):
                    await acquire(store, f"h{number}")
                    while (await changes.receive()).holder != f"h{number}":
                        pass
                    await proxy.set_fault(Fault.RESET)
                    await proxy.set_fault(Fault.PASS)
                    await _until_it_answers(store)
            assert store.listen_restarts >= 2


async def test_a_slow_server_does_not_end_the_listener(firestore_emulator: str) -> None:
    async with (
        open_fault_proxy(firestore_emulator) as proxy,
        open_firestore(new_project(), emulator_host=proxy.host) as client,
    ):
        store = FirestoreLeaseStore(client, "g")
        await store.initialise()
        proxy.delay_s = 0.2
        with trio.fail_after(20):
            async with store.watch_fence() as changes:
                await changes.receive()
                await acquire(store, "late")
                while (await changes.receive()).holder != "late":
                    pass
        assert store.listen_restarts == 0


async def _until_it_answers(store: FirestoreLeaseStore) -> None:
    while True:
        try:
            await store.read()
        except Exception:  # noqa: BLE001 - whatever a broken connection looks like
            await trio.sleep(0.05)
        else:
            return
