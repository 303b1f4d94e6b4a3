"""The benches still run, at a size that says nothing; and what they say of numbers is right."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from bench import whatsapp
from bench.client import (
    Answer,
    ConnectionBroke,
    Line,
    NobodyListens,
    make_request,
    send_request,
)
from bench.delayed import DelayedAccounts
from bench.places import Log
from bench.probe import Probe, Prober, gap_s
from bench.rows import Row, percentile, read_rows, seconds, show, write_rows
from tests.bridge.node.install import install_node_side
from tests.fakes.shared_store import FakeSharedStore
from tests.http.asking import served
from tests.http.fakes import TOKEN, FakeInstance, World, an_account
from tests.ports import free_port
from tests.system.cluster import ROOT, Node
from tests.whatsapp.file_clients import Sends

# --- numbers


def accepted(*moments: float) -> list[Probe]:
    return [Probe(moment - 0.001, moment) for moment in moments]


def test_a_gap_is_the_longest_wait_beyond_the_usual_spacing() -> None:
    probes = accepted(0.0, 0.1, 0.2, 0.3, 1.0, 1.1)
    assert gap_s(probes, 0.35, 1.2) == pytest.approx(0.6)


def test_a_gap_begins_at_the_last_answer_before_the_span() -> None:
    assert gap_s(accepted(0.0, 0.1, 2.0), 1.0, 2.1) == pytest.approx(1.8)


def test_who_never_accepts_again_has_a_gap_until_the_end() -> None:
    assert gap_s(accepted(0.0, 0.1, 0.2), 0.25, 5.2) == pytest.approx(4.9)


def test_a_refused_send_does_not_end_a_gap() -> None:
    refused = Probe(0.4, 0.5, fault="503")
    assert gap_s([*accepted(0.0, 0.1, 1.1), refused], 0.2, 1.2) == pytest.approx(0.9)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile([7.0], 99)) == (50, 99, 7)
    assert math.isnan(percentile([], 50))


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.0004, "0.4 ms"),
        (0.0996, "100 ms"),
        (0.5, "500 ms"),
        (0.9996, "1.00 s"),
        (12.3, "12.30 s"),
    ],
)
def test_lengths_of_time_read_well(value: float, told: str) -> None:
    assert seconds(value) == told


def test_rows_survive_the_file_they_are_handed_on_in(tmp_path: Path) -> None:
    row = Row("f", "n", "1 s", "2 s", "<= 3 s", True, {"all": [1.0, 2.0]})
    write_rows(tmp_path / "rows.json", [row], {"cores": 2})
    assert read_rows(tmp_path / "rows.json") == [row]


def test_the_table_shows_an_aim_that_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    show([Row("handoff", "gap", "0.7 s", "7 s", "<= 0.5 s", False), Row("a", "b", "c", "d")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if "gap" in line] == ["NO"]


# --- logs


def node_with_log(directory: Path, *lines: str) -> Node:
    node = Node("a", 0, directory, {})
    node.log_path.write_text("".join(lines))
    return node


def a_line(at: str, event: str, **fields: object) -> str:
    return (
        json.dumps({"ts": f"2025-01-01T00:00:{at}+00:00", "event": event, "fields": fields}) + "\n"
    )


def test_a_log_is_read_on_from_where_it_was(tmp_path: Path) -> None:
    node = node_with_log(tmp_path, a_line("01.000", "drain.asked"))
    log = Log(node)
    whole, cut = a_line("02.000", "lease.released", epoch=3), a_line("03.000", "drain.asked")
    with node.log_path.open("a") as file:
        file.write("Traceback (most recent call last):\n" + whole + cut[:20])
    log.read()
    assert [(event, fields) for _, event, fields in log.events] == [
        ("lease.released", {"epoch": 3})
    ]
    with node.log_path.open("a") as file:
        file.write(cut[20:])
    log.read()
    assert log.at("drain.asked") - log.at("lease.released") == pytest.approx(1.0)
    with pytest.raises(LookupError):
        log.at("lease.released", since=log.at("drain.asked"))


# --- the load generator


async def test_a_line_is_kept_and_reopened_when_the_other_side_has_closed_it() -> None:
    closed, connections = trio.Event(), 0

    async def answer_twice(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        for _ in range(2):
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await stream.aclose()
        closed.set()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, answer_twice, 0, host="127.0.0.1"))
        async with Line(listeners[0].socket.getsockname()[1]) as line:
            for _ in range(2):
                assert await line.ask(b"ask") == Answer(200, b"ok")
            await closed.wait()
            assert await line.ask(b"ask") == Answer(200, b"ok")
        nursery.cancel_scope.cancel()
    assert connections == 2


async def test_an_answer_that_is_cut_short_is_no_answer() -> None:
    async def cut(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\nhalf")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, cut, 0, host="127.0.0.1"))
        async with Line(listeners[0].socket.getsockname()[1]) as line:
            with pytest.raises(ConnectionBroke, match="a new connection"):
                await line.ask(b"ask")
        nursery.cancel_scope.cancel()


async def test_a_refused_connection_is_told_from_a_broken_one() -> None:
    async with Line(free_port()) as line:
        with pytest.raises(NobodyListens):
            await line.ask(b"ask")


async def test_probes_pass_over_who_does_not_listen_and_keep_what_was_refused() -> None:
    world = World()
    world.add(an_account("ann"))
    instance = FakeInstance(world)
    async with served(instance) as api:
        world.activate(instance)
        port = int(api.url.rpartition(":")[2])
        prober = Prober([free_port(), port], ["ann", "nobody"], TOKEN, 0.005)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(prober.run)
            while len(prober.probes) < 8:
                await trio.sleep(0.001)
            prober.stop()
    assert [p.accepted for p in prober.probes[:4]] == [True, False, True, False]
    assert all("account_not_found" in fault for fault in prober.faults)
    assert len(prober.faults) == len(prober.probes) // 2


async def test_the_api_takes_the_requests_that_are_made_here() -> None:
    world = World()
    world.add(an_account("ann"))
    instance = FakeInstance(world)
    async with served(instance) as api:
        world.activate(instance)
        async with Line(int(api.url.rpartition(":")[2])) as line:
            assert (await line.ask(make_request("GET", "/active"))).status == 200
            sent = await line.ask(send_request(TOKEN, "ann", "hello", "key"))
    assert sent.status == 200
    assert json.loads(sent.body)["status"] == "server_ack"


# --- WhatsApp


def test_a_round_is_told_by_what_each_send_took() -> None:
    rounds = whatsapp.Rounds()
    rounds.add(Sends([0.1] * 20, 2.0), {"daemon": 0.08})
    rounds.add(Sends([0.1] * 10, 2.0), {"daemon": 0.08})
    assert rounds.rates == [10, 5]
    assert rounds.cpu_s == {"daemon": [0.004, 0.008]}


@pytest.mark.parametrize(("ours", "met"), [(8.0, True), (7.9, False)])
def test_the_aim_is_a_share_of_what_bare_baileys_sends(ours: float, met: bool) -> None:
    sides = whatsapp.Rounds([ours], [0.1]), whatsapp.Rounds([10.0], [0.1])
    assert whatsapp.sends_row(1, 0, *sides).met is met


async def test_a_delayed_store_is_late_with_its_answer(autojump_clock: MockClock) -> None:
    accounts = DelayedAccounts(FakeSharedStore(), 0.02)
    asked_at = trio.current_time()
    await accounts.list_accounts()
    assert trio.current_time() - asked_at == pytest.approx(0.02)


@pytest.mark.system
@pytest.mark.node
@pytest.mark.long
def test_sends_through_baileys_and_a_handoff_can_be_measured(tmp_path: Path) -> None:
    install_node_side()
    path = tmp_path / "rows.json"
    command = [sys.executable, "-m", "bench.whatsapp", "--size", "tiny", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [row.figure for row in read_rows(path)] == ["whatsapp sends", "whatsapp handoff"]


# --- the figures


def run_tiny(name: str, store: str, directory: Path) -> list[Row]:
    path = directory / "rows.json"
    command = [sys.executable, "-m", f"bench.{name}", "--size", "tiny", "--quiet"]
    command += ["--store", store, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    return read_rows(path)


FAILS_HALFWAY = """
from bench.rows import Figure, Row, main

async def measure(size, stores, rows):
    rows.append(Row("half", "the first", "1 s", "2 s"))
    raise LookupError("what the second waits for never comes")

main(Figure("half", {"full": 1}, measure))
"""


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    command = [sys.executable, "-c", FAILS_HALFWAY, "--store", "sqlite", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "never comes" in done.stderr
    assert [row.name for row in read_rows(path)] == ["the first"]


@pytest.mark.system
@pytest.mark.long
@pytest.mark.parametrize("name", ["startup", "sends", "restore"])
def test_a_figure_can_be_taken(name: str, tmp_path: Path) -> None:
    rows = run_tiny(name, "sqlite", tmp_path)
    assert rows
    assert {row.figure for row in rows} == {name}
    assert all(row.measured and row.against and row.values for row in rows)


@pytest.mark.system
@pytest.mark.long
def test_idle_processes_can_be_measured(tmp_path: Path) -> None:
    rows = run_tiny("idle", "sqlite", tmp_path)
    assert [row.name.partition(",")[0] for row in rows] == ["ACTIVE", "PASSIVE"]


@pytest.mark.system
@pytest.mark.long
@pytest.mark.parametrize(("name", "count"), [("handoff", 1), ("crash", 2)])
def test_a_change_of_holder_can_be_measured(name: str, count: int, tmp_path: Path) -> None:
    rows = run_tiny(name, "sqlite", tmp_path)
    assert len(rows) == count
    for row in rows:
        gaps = row.values["gaps_s"]
        assert isinstance(gaps, list)
        assert len(gaps) == 1
        assert 0 < gaps[0] < 30
