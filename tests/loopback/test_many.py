from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import trio

from daemon.loopback import LoopbackConnector, LoopbackWorld
from daemon.loopback.database import Presence
from daemon.loopback.device import NewDevice, make_keys, new_device
from daemon.loopback.server import Action, LoopbackServer, Place
from machine.ports import Bridge
from machine.records import AccountId
from tests.loopback.steps import TO, Keys, expect_closed, logged_in, message_id

ACCOUNTS = 1000


def link(place: Place, device: NewDevice, phone: str) -> Action[object]:
    """Link a device as its phone would, without the QR code's way through a connection."""

    def act(server: LoopbackServer) -> None:
        server.begin_pairing(place, device.device_id, device.proof, time.time() + 60)
        server.scan(place.account_id, phone, None)

    return act


def pair_many(directory: Path) -> dict[AccountId, Keys]:
    server = LoopbackServer(directory, time.time)
    presence = Presence(directory)
    paired: dict[AccountId, Keys] = {}
    actions = []
    for number in range(ACCOUNTS):
        account_id, device, phone = AccountId(f"a-{number}"), new_device(), f"49{number:09d}"
        place = Place(account_id, presence.bridge_id, device.device_id)
        actions.append(link(place, device, phone))
        paired[account_id] = make_keys(device, phone)
    server.perform(actions)
    presence.close()
    server.close()
    return paired


async def test_a_thousand_connections_cost_next_to_nothing_and_all_hear_of_their_eviction(
    connector: LoopbackConnector, world: LoopbackWorld, directory: Path
) -> None:
    paired = pair_many(directory)
    codes: Counter[int] = Counter()
    opened = 0
    all_open = trio.Event()

    async def hold(bridge: Bridge, account_id: AccountId) -> None:
        nonlocal opened
        async with logged_in(bridge, paired[account_id], account_id) as connection:
            opened += 1
            if opened == ACCOUNTS:
                all_open.set()
            codes[(await expect_closed(connection)).code] += 1

    async def steal(bridge: Bridge, account_id: AccountId) -> None:
        async with logged_in(bridge, paired[account_id], account_id) as connection:
            await connection.send_text(message_id(1), TO, "mine now")

    # The default timing: what is measured is what ships.
    shipped = LoopbackConnector(directory)
    async with (
        shipped.open_bridge() as first,
        connector.open_bridge() as second,
        trio.open_nursery() as nursery,
    ):
        for account_id in paired:
            nursery.start_soon(hold, first, account_id)
        with trio.fail_after(10):
            await all_open.wait()
        assert len(await world.list_connected()) == ACCOUNTS
        async with trio.open_nursery() as thieves:
            for account_id in paired:
                thieves.start_soon(steal, second, account_id)
    assert codes == {440: ACCOUNTS}
    assert (await world.list_evictions())[0] == ACCOUNTS
    assert len((await world.list_messages()).arrivals) == ACCOUNTS


async def test_a_thousand_idle_connections_wake_nobody(directory: Path) -> None:
    paired = pair_many(directory)
    waiting = set(paired)
    opened = trio.Event()
    async with (
        LoopbackConnector(directory).open_bridge() as bridge,
        trio.open_nursery() as nursery,
    ):

        async def hold(account_id: AccountId) -> None:
            async with logged_in(bridge, paired[account_id], account_id):
                waiting.discard(account_id)
                if not waiting:
                    opened.set()
                await trio.sleep_forever()

        for account_id in paired:
            nursery.start_soon(hold, account_id)
        await opened.wait()
        began, used = time.monotonic(), time.process_time()
        await trio.sleep(0.5)
        share = (time.process_time() - used) / (time.monotonic() - began)
        nursery.cancel_scope.cancel()
    # Measured 0.3 % of a core. A watcher that looks 20 times a second takes 1 %.
    assert share < 0.03
