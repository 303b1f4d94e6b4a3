"""The connector, with scripted peers as real children."""

from __future__ import annotations

import os
import signal
from collections import Counter
from contextlib import AsyncExitStack

import pytest
import trio

from daemon.bridge.connector import BaileysConnector, BridgeLimits
from machine.ports import (
    AuthUnreadable,
    Bridge,
    Connected,
    Connection,
    ConnectionClosed,
    ConnectorDown,
    KeysChanged,
    PairingScanned,
    QrShown,
    SendRefused,
)
from machine.records import AccountId, KeyChange, KeyName
from tests.bridge.steps import (
    ANNA,
    BERT,
    KEYS,
    TO,
    WITHIN_S,
    connected,
    connector,
    do,
    is_gone,
    message_id,
    plan,
)

SESSION = KeyName(f"session-{TO}.0")


def accounts(count: int) -> list[AccountId]:
    return [AccountId(f"account-{number}") for number in range(count)]


def spread(made: BaileysConnector) -> list[int]:
    """How many accounts each process has."""
    return sorted(len(process.connections) for process in made._processes)


def pids(made: BaileysConnector) -> list[int]:
    return sorted(process.pid for process in made._processes)


async def test_an_account_connects_sends_and_is_closed() -> None:
    with trio.fail_after(WITHIN_S):
        async with connector() as (made, _), made.open_bridge() as bridge:
            async with connected(bridge) as connection, trio.open_nursery() as nursery:
                nursery.start_soon(connection.next_event)
                assert await connection.is_on_whatsapp(TO)
                assert not await connection.is_on_whatsapp("4915100000000")
                assert await connection.is_on_whatsapp("4915100000999"), "the server did not say"
                ack = await connection.send_text(message_id(1), TO, "Grüße")
                assert ack.keys == KeyChange({SESSION: b"1"})
                nursery.cancel_scope.cancel()
            assert spread(made) == [0]
            assert made.process_count == 1


async def test_an_account_without_keys_is_paired() -> None:
    with trio.fail_after(WITHIN_S):
        async with (
            connector() as (made, _),
            made.open_bridge() as bridge,
            bridge.open_connection(ANNA, None) as connection,
        ):
            assert await connection.next_event() == QrShown("qr-anna", 2e9)
            assert await connection.request_pairing_code("49151") == ("ABCD1234", 2e9)
            with pytest.raises(ConnectionClosed, match="401"):
                await connection.log_out()


async def test_doubtful_sessions_are_told_as_dropped_before_the_account_is_connected() -> None:
    keys = {**KEYS, SESSION: b"7", KeyName("session-1.0"): b"3"}
    with trio.fail_after(WITHIN_S):
        async with connector() as (made, _), made.open_bridge() as bridge:
            async with bridge.open_connection(ANNA, keys, doubtful=[TO]) as connection:
                dropped = await connection.next_event()
                assert isinstance(dropped, KeysChanged)
                assert dropped.change == KeyChange({SESSION: None})
                assert isinstance(await connection.next_event(), Connected)
            async with bridge.open_connection(ANNA, keys, distrust_sessions=True) as connection:
                dropped = await connection.next_event()
                assert isinstance(dropped, KeysChanged)
                assert set(dropped.change.values) == {SESSION, KeyName("session-1.0")}


async def test_keys_that_cannot_be_used_are_unreadable_and_not_a_new_identity() -> None:
    with trio.fail_after(WITHIN_S):
        async with connector() as (made, _), made.open_bridge() as bridge:
            with pytest.raises(AuthUnreadable, match="anna: Baileys cannot use its keys"):
                async with bridge.open_connection(ANNA, {SESSION: b"1"}):
                    raise AssertionError
            with pytest.raises(AuthUnreadable, match="no text"):
                async with bridge.open_connection(ANNA, {KeyName("creds"): b"\xff"}):
                    raise AssertionError


async def test_a_refused_login_is_closed_with_its_code_and_expiry() -> None:
    with trio.fail_after(WITHIN_S):
        async with connector() as (made, _), made.open_bridge() as bridge:
            with pytest.raises(ConnectionClosed, match="402") as closed:
                async with bridge.open_connection(AccountId("stays-closed"), KEYS):
                    raise AssertionError
    assert closed.value.expire_s == 60


async def test_keys_over_the_frame_limit_close_the_account_and_nothing_else() -> None:
    with trio.fail_after(WITHIN_S):
        async with connector() as (made, _), made.open_bridge() as bridge, connected(bridge):
            keys = {**KEYS, SESSION: b"x" * 17 * 1024 * 1024}
            with pytest.raises(ConnectionClosed, match="too large"):
                async with bridge.open_connection(BERT, keys):
                    raise AssertionError
            async with connected(bridge, BERT):
                assert spread(made) == [2]


async def test_a_refused_send_is_final_and_the_connection_goes_on() -> None:
    refusal = {"error": {"kind": "refused", "code": 463, "message": "account restricted"}}
    with trio.fail_after(WITHIN_S):
        async with (
            connector() as (made, _),
            made.open_bridge() as bridge,
            connected(bridge) as connection,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(connection.next_event)
            with pytest.raises(SendRefused, match="restricted") as refused:
                await connection.send_text(message_id(1), TO, do({"reply": refusal}))
            assert refused.value.code == 463
            assert await connection.send_text(message_id(2), TO, "x")
            nursery.cancel_scope.cancel()


# --- how many processes ----------------------------------------------------------------------


async def test_accounts_over_the_cap_go_to_further_processes_evenly() -> None:
    with trio.fail_after(WITHIN_S):
        async with (
            connector(limits=BridgeLimits(accounts_max=4)) as (made, _),
            made.open_bridge() as bridge,
            AsyncExitStack() as stack,
        ):
            for account_id in accounts(10):
                await stack.enter_async_context(connected(bridge, account_id))
            assert spread(made) == [2, 4, 4]
            assert made.connection_count == 10


async def test_many_accounts_at_once_never_go_over_the_cap() -> None:
    limits = BridgeLimits(accounts_max=5)
    with trio.fail_after(WITHIN_S):
        async with connector(limits=limits) as (made, _), made.open_bridge() as bridge:
            opened = 0
            release = trio.Event()

            async def keep(account_id: AccountId) -> None:
                nonlocal opened
                async with connected(bridge, account_id):
                    opened += 1
                    if opened == 12:
                        release.set()
                    await release.wait()

            async with trio.open_nursery() as nursery:
                for account_id in accounts(12):
                    nursery.start_soon(keep, account_id)
                await release.wait()
                assert max(spread(made)) <= 5
                assert sum(spread(made)) == 12
                assert made.process_count == 3


async def test_a_spare_stands_by_before_a_term_and_a_while_after_it() -> None:
    with trio.fail_after(WITHIN_S):
        async with connector(limits=BridgeLimits(spare_after_s=0.5)) as (made, journal):
            await journal.wait_for("bridge.started")
            spare = pids(made)
            async with made.open_bridge() as bridge, connected(bridge):
                assert pids(made) == spare, "the term began with the spare"
            assert all(map(is_gone, spare))
            ended_at = trio.current_time()
            await trio.sleep(0.2)
            # Another term before the next spare is due: the waiting begins anew after it.
            async with made.open_bridge():
                assert len(pids(made)) == 1
            assert pids(made) == []
            await journal.wait_for("bridge.started", 3)
            assert trio.current_time() - ended_at > 0.7
            assert len(pids(made)) == 1
    assert "bridge.ended" not in journal.names()


async def test_a_spare_that_dies_is_replaced() -> None:
    with trio.fail_after(WITHIN_S):
        async with connector() as (made, journal):
            await journal.wait_for("bridge.started")
            os.kill(pids(made)[0], signal.SIGKILL)
            await journal.wait_for("bridge.started", 2)
    assert journal.names()[:3] == ["bridge.started", "bridge.ended", "bridge.started"]


# --- deaths ----------------------------------------------------------------------------------


async def test_a_death_closes_its_accounts_and_they_open_again_in_another_process() -> None:
    limits = BridgeLimits(accounts_max=2)
    closed: list[int] = []

    async def listen(connection: Connection) -> None:
        try:
            await connection.next_event()
        except ConnectionClosed as error:
            closed.append(error.code)

    with trio.fail_after(WITHIN_S):
        async with (
            connector(limits=limits) as (made, journal),
            made.open_bridge() as bridge,
            AsyncExitStack() as stack,
            trio.open_nursery() as nursery,
        ):
            for account_id in accounts(4):
                opened = await stack.enter_async_context(connected(bridge, account_id))
                nursery.start_soon(listen, opened)
            doomed = next(iter(made._processes))
            os.kill(doomed.pid, signal.SIGKILL)
            await doomed.wait_ended()
            await trio.testing.wait_all_tasks_blocked()
            assert closed == [503, 503]
            async with connected(bridge, ANNA):
                assert sorted(spread(made)) == [1, 2]
            nursery.cancel_scope.cancel()
    assert len(journal.of("bridge.ended")) == 1


async def test_too_many_deaths_bring_the_connector_down() -> None:
    limits = BridgeLimits(deaths_max=1, deaths_within_s=60)
    with trio.fail_after(WITHIN_S):
        async with connector(limits=limits) as (made, journal), made.open_bridge() as bridge:
            for _ in range(2):
                async with connected(bridge) as connection:
                    with pytest.raises(ConnectionClosed):
                        await connection.send_text(message_id(1), TO, do({"exit": 1}))
            with pytest.raises(ConnectorDown, match="2 bridge processes died within 60 s"):
                async with bridge.open_connection(BERT, KEYS):
                    raise AssertionError
    assert len(journal.of("bridge.down")) == 1


async def test_deaths_that_are_long_past_do_not_count() -> None:
    limits = BridgeLimits(deaths_max=1, deaths_within_s=0.2)
    with trio.fail_after(WITHIN_S):
        async with connector(limits=limits) as (made, journal), made.open_bridge() as bridge:
            for _ in range(3):
                async with connected(bridge) as connection:
                    with pytest.raises(ConnectionClosed):
                        await connection.send_text(message_id(1), TO, do({"exit": 1}))
                await trio.sleep(0.25)
    assert "bridge.down" not in journal.names()


async def test_a_program_that_never_starts_is_a_connector_that_is_down() -> None:
    limits = BridgeLimits(deaths_max=1)
    with trio.fail_after(WITHIN_S):
        async with connector(plan("refuse-hello"), limits) as (made, _):
            with pytest.raises(ConnectorDown, match="exit code 9"):
                async with made.open_bridge():
                    raise AssertionError


@pytest.mark.long
async def test_an_account_that_kills_its_processes_ends_up_alone_and_the_others_stay() -> None:
    limits = BridgeLimits(accounts_max=8)
    names = [*accounts(7), AccountId("poison")]
    closes: Counter[AccountId] = Counter()

    async def keep_open(bridge: Bridge, account_id: AccountId) -> None:
        while True:
            try:
                async with bridge.open_connection(account_id, KEYS) as connection:
                    while True:
                        await connection.next_event()
            except ConnectionClosed:
                closes[account_id] += 1
            await trio.sleep(0.05)

    with trio.fail_after(3 * WITHIN_S):
        async with (
            connector(limits=limits) as (made, journal),
            made.open_bridge() as bridge,
            trio.open_nursery() as nursery,
        ):
            for account_id in names:
                nursery.start_soon(keep_open, bridge, account_id)
            await journal.wait_for("bridge.account_isolated")
            before = Counter(closes)
            await journal.wait_for("bridge.ended", len(journal.of("bridge.ended")) + 2)
            nursery.cancel_scope.cancel()
    isolated = [fields["account_id"] for fields in journal.of("bridge.account_isolated")]
    assert isolated == ["poison"]
    assert "bridge.down" not in journal.names()
    # Three deaths: among eight, among two, alone. From then on nobody else is touched.
    assert max(before[account_id] for account_id in accounts(7)) <= 2
    assert all(closes[each] == before[each] for each in accounts(7))


# --- the end ---------------------------------------------------------------------------------


async def test_a_connection_whose_close_gets_no_answer_costs_its_process() -> None:
    with trio.fail_after(WITHIN_S):
        async with connector(plan(close_s=0.3)) as (made, journal), made.open_bridge() as bridge:
            async with connected(bridge) as connection, trio.open_nursery() as nursery:
                nursery.start_soon(connection.next_event)
                script = do({"close": "hangs"}, {"reply": {"ok": {"keys": {}}}})
                await connection.send_text(message_id(1), TO, script)
                pid = pids(made)[0]
                nursery.cancel_scope.cancel()
            await journal.wait_for("bridge.ended")
            assert is_gone(pid)
    assert len(journal.of("bridge.close_unanswered")) == 1


async def test_a_cancelled_term_kills_its_processes_without_waiting_for_their_accounts() -> None:
    with trio.fail_after(WITHIN_S):
        async with connector() as (made, _):
            with trio.CancelScope() as term:
                async with (
                    made.open_bridge() as bridge,
                    connected(bridge, ANNA) as connection,
                    connected(bridge, BERT),
                    trio.open_nursery() as nursery,
                ):
                    script = do({"hang": 60.0})
                    nursery.start_soon(connection.send_text, message_id(1), TO, script)
                    await trio.sleep(0.1)
                    term_pids = pids(made)
                    began = trio.current_time()
                    term.cancel()
            # The process hangs: each connection's own last word would have taken 5 s.
            assert trio.current_time() - began < 2
            assert all(map(is_gone, term_pids))


async def test_the_block_s_own_error_comes_out_as_it_is_and_nothing_is_left() -> None:
    term_pids: list[int] = []

    async def fail() -> None:
        async with connector() as (made, _), made.open_bridge() as bridge, connected(bridge):
            term_pids.extend(pids(made))
            raise KeyError("mine")

    with trio.fail_after(WITHIN_S), pytest.raises(KeyError, match="mine"):
        await fail()
    assert term_pids
    assert all(map(is_gone, term_pids))


async def test_a_connection_that_is_hung_up_tells_its_last_keys_before_its_end() -> None:
    last = {"session-1.0": "9"}
    with trio.fail_after(WITHIN_S):
        async with connector() as (made, _), made.open_bridge() as bridge:
            async with connected(bridge) as connection, trio.open_nursery() as nursery:
                nursery.start_soon(
                    send_closed, connection, do({"close": last}, {"frame": {"event": "scanned"}})
                )
                assert await connection.next_event() == PairingScanned()
                connection.hang_up()
                connection.hang_up()
                told = await connection.next_event()
                assert isinstance(told, KeysChanged)
                assert told.change == KeyChange({KeyName("session-1.0"): b"9"})
                with pytest.raises(ConnectionClosed, match="428"):
                    await connection.next_event()
            assert made.process_count == 1, "it was not killed for its end"


async def send_closed(connection: Connection, text: str) -> None:
    with pytest.raises(ConnectionClosed):
        await connection.send_text(message_id(1), TO, text)


async def test_a_process_that_does_not_hang_up_is_killed() -> None:
    with trio.fail_after(WITHIN_S):
        hanging = do({"close": "hangs"}, {"frame": {"event": "scanned"}})
        async with connector(plan(close_s=0.3)) as (made, _), made.open_bridge() as bridge:
            async with connected(bridge) as connection, trio.open_nursery() as nursery:
                nursery.start_soon(send_closed, connection, hanging)
                assert await connection.next_event() == PairingScanned()
                [killed] = pids(made)
                connection.hang_up()
                # Whoever asked for it waits for a while, and then no longer.
                nursery.cancel_scope.cancel()
            while not is_gone(killed):
                await trio.sleep(0.02)
