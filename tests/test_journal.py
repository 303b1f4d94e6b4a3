from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import trio
import trio.testing

from daemon.journal import (
    MASK,
    Line,
    LineWriter,
    LoguruJournal,
    Metrics,
    Redaction,
    answering,
    open_journal,
    present_request,
)
from machine.events import EVENTS
from machine.ports import Journal, Level
from machine.states import State, Trigger

SECRET = "a-secret-that-was-in-the-settings"


@contextmanager
def opened(
    *, json_lines: bool = False, level: Level = Level.INFO
) -> Iterator[tuple[LoguruJournal, io.StringIO]]:
    stream = io.StringIO()
    with open_journal(
        "a", json_lines=json_lines, level=level, secrets=[SECRET], stream=stream
    ) as journal:
        yield journal, stream


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def transition(source: State, dest: State, trigger: Trigger, epoch: int) -> dict[str, object]:
    return {
        "source": source,
        "dest": dest,
        "trigger": trigger,
        "reason": "lease acquired",
        "epoch": epoch,
    }


def test_it_is_the_machine_s_journal() -> None:
    with opened() as (journal, _):
        port: Journal = journal
        port.note("instance.booted", address="http://a", epoch=0)


def test_text_line_tells_the_event_in_its_sentence() -> None:
    with opened() as (journal, stream):
        journal.note("restore.skipped", holder="b", epoch=3)
    line = stream.getvalue()
    assert "INFO    a | PASSIVE: account restore skipped, lease held by b (epoch 3)\n" in line
    assert line.count("\n") == 1


async def test_a_task_that_a_request_began_carries_its_id_no_longer_than_it_lasts() -> None:
    seen: list[str | None] = []

    async def look(at: trio.Event) -> None:
        await at.wait()
        seen.append(present_request())

    during, after = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        with answering("r1"):
            nursery.start_soon(look, during)
            nursery.start_soon(look, after)
            during.set()
            await trio.testing.wait_all_tasks_blocked()
        after.set()
    assert seen == ["r1", None]


def test_json_line_has_what_a_script_needs() -> None:
    with opened(json_lines=True) as (journal, stream):
        journal.note(
            "transition.made", **transition(State.PASSIVE, State.ACTIVE, Trigger.ACTIVATE, 4)
        )
        with answering("r1"):
            journal.note("account.created", account_id="sales")
    made, created = lines_of(stream)
    assert made["message"] == "PASSIVE -> ACTIVE (activate): lease acquired"
    assert created | {"ts": ""} == {
        "ts": "",
        "level": "info",
        "event": "account.created",
        "message": "account sales created",
        "instance": "a",
        "epoch": 4,
        "accountId": "sales",
        "requestId": "r1",
        "fields": {"account_id": "sales"},
    }


@pytest.mark.parametrize("event", list(EVENTS))
def test_no_event_can_break_the_journal(event: str) -> None:
    with opened(json_lines=True, level=Level.DEBUG) as (journal, stream):
        journal.note(event)
    (line,) = lines_of(stream)
    assert line["event"] == event


def test_unknown_event_is_told_and_counted() -> None:
    with opened() as (journal, stream):
        journal.note("cat.seen", colour="black")
        assert b"watchkeeper_journal_faults_total 1.0" in journal.metrics.render()
    assert "WARNING a | cat.seen colour=black" in stream.getvalue()


def test_quiet_events_are_counted_and_not_written() -> None:
    with opened(level=Level.WARNING) as (journal, stream):
        journal.note("account.created", account_id="sales")
        metrics = journal.metrics.render()
    assert stream.getvalue() == ""
    assert b'watchkeeper_events_total{event="account.created"} 1.0' in metrics


@pytest.mark.parametrize("json_lines", [False, True])
def test_no_secret_reaches_the_log(json_lines: bool) -> None:
    with opened(json_lines=json_lines) as (journal, stream):
        inner = {"encryptionKey": "hidden-value", "list": [{"creds": "hidden-value"}]}
        journal.note("lease.lost", epoch=1, reason=f"Authorization: Bearer {SECRET[:20]}")
        journal.note("lease.lost", epoch=1, reason=f"said {SECRET} aloud")
        journal.note("cat.seen", admin_token="hidden-value", blob=b"hidden-value", inner=inner)
        logging.getLogger("grpc").error("call with %s and Bearer hidden-value", SECRET)
        try:
            raise ValueError(f"{SECRET} is wrong")
        except ValueError:
            logging.getLogger("hypercorn.error").exception("broke")
    written = stream.getvalue()
    assert "hidden-value" not in written
    assert SECRET not in written
    assert SECRET[:20] not in written
    assert written.count(MASK) >= 5


def test_traceback_shows_no_local_variables() -> None:
    def broken() -> None:
        local = "value-of-a-local"
        raise RuntimeError(f"length {len(local)}")

    with opened() as (_, stream):
        try:
            broken()
        except RuntimeError:
            logging.getLogger("x").exception("broke")
    assert "RuntimeError: length 16" in stream.getvalue()
    assert "= 'value-of-a-local'" not in stream.getvalue()


def test_values_that_only_sound_like_secrets_are_shown() -> None:
    redaction = Redaction()
    assert redaction.value("key_id", "k7") == "k7"
    assert redaction.value("keys", 12) == 12
    assert redaction.value("author", "Ann") == "Ann"
    assert redaction.value("monkey", "Bo") == "Bo"
    assert redaction.value("idempotencyKey", "abc") == MASK


def test_line_breaks_from_outside_make_no_second_line() -> None:
    with opened() as (journal, stream):
        journal.note("drain.asked", reason="x\n2026-01-01 INFO a | all is well\x1b[2J\u2028")
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_a_very_long_value_is_cut() -> None:
    with opened() as (journal, stream):
        journal.note("drain.asked", reason="x" * 1_000_000)
    assert len(stream.getvalue()) < 3000


def test_library_records_come_in_from_warning_on() -> None:
    with opened(json_lines=True) as (_, stream):
        logging.getLogger("hypercorn.access").info("quiet")
        logging.getLogger("hypercorn.error").warning("loud %d", 7)
    (line,) = lines_of(stream)
    assert (line["logger"], line["message"]) == ("hypercorn.error", "hypercorn.error: loud 7")


def test_two_journals_keep_to_themselves() -> None:
    with opened() as (one, first), opened() as (two, second):
        one.note("drain.asked", reason="first")
        two.note("drain.asked", reason="second")
    assert "second" not in first.getvalue()
    assert "first" not in second.getvalue()


def test_stuck_stream_stops_nobody_and_what_is_dropped_is_counted() -> None:
    stuck, reached = threading.Event(), threading.Event()
    written: list[str] = []

    def write(lines: Sequence[Line]) -> None:
        reached.set()
        stuck.wait(10)
        written.extend(line.text for line in lines)

    writer = LineWriter(write, lines_max=10)
    writer.put(Line("first"))
    assert reached.wait(5)
    begun = time.perf_counter()
    for number in range(100):
        writer.put(Line(f"line {number}"))
    assert time.perf_counter() - begun < 0.5
    assert writer.dropped == 90
    stuck.set()
    writer.close()
    assert "90 log lines were dropped" in "".join(written)


def test_full_pipe_that_nobody_reads_does_not_stop_the_journal() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        begun = time.perf_counter()
        with open_journal("a", stream=stream) as journal:
            for _ in range(3000):
                journal.note("drain.asked", reason="y" * 100)
            took_s = time.perf_counter() - begun
            # Let the thread end: what is left of the pipe's reader makes its write fail.
            os.close(reading)
    assert took_s < 3


def test_closed_stream_is_no_error() -> None:
    stream = io.StringIO()
    with open_journal("a", stream=stream) as journal:
        stream.close()
        journal.note("drain.asked", reason="x")


def test_transitions_show_in_the_metrics() -> None:
    with opened() as (journal, _):
        journal.note(
            "transition.made", **transition(State.PASSIVE, State.ACTIVE, Trigger.ACTIVATE, 9)
        )
        shown = journal.metrics.render().decode()
    labels = 'dest="ACTIVE",source="PASSIVE",trigger="activate"'
    assert f"watchkeeper_transitions_total{{{labels}}} 1.0" in shown
    assert 'watchkeeper_state{state="ACTIVE"} 1.0' in shown
    assert 'watchkeeper_state{state="BOOTING"} 0.0' in shown
    assert "watchkeeper_epoch 9.0" in shown


def test_renewals_losses_and_acknowledgements_show_in_the_metrics() -> None:
    with opened() as (journal, _):
        journal.note("lease.renewed", epoch=3, renewals=1)
        for cause in ("timeout", "unavailable", "timeout"):
            journal.note("lease.renewal_failed", epoch=3, failures=1, cause=cause, remaining_s=2.0)
        journal.note("lease.lost", epoch=3, reason="its deadline has passed")
        for duration_s in (0.2, 400.0):
            journal.note("message.acked", account_id="a", message_id="m", duration_s=duration_s)
        shown = journal.metrics.render().decode()
    for line in (
        "watchkeeper_lease_renewals_total 1.0",
        'watchkeeper_lease_renewal_failures_total{cause="timeout"} 2.0',
        'watchkeeper_lease_renewal_failures_total{cause="unavailable"} 1.0',
        "watchkeeper_lease_losses_total 1.0",
        'watchkeeper_send_seconds_bucket{le="0.25"} 1.0',
        'watchkeeper_send_seconds_bucket{le="3600.0"} 2.0',
    ):
        assert line in shown, line


def test_what_others_count_is_a_counter() -> None:
    metrics = Metrics()
    count = 2.0
    metrics.watch_count("fence_listener_restarts", "Restarts.", lambda: count)
    count = 7.0
    shown = metrics.render().decode()
    assert "# TYPE watchkeeper_fence_listener_restarts_total counter" in shown
    assert "watchkeeper_fence_listener_restarts_total 7.0" in shown


def test_gauges_are_read_when_they_are_asked_for() -> None:
    metrics = Metrics()
    depth = 1.0
    metrics.watch("outbox_messages", "Pending.", lambda: depth)
    metrics.watch_labelled("accounts", "By status.", "status", lambda: {"connected": depth})
    depth = 5.0
    shown = metrics.render().decode()
    assert "watchkeeper_outbox_messages 5.0" in shown
    assert 'watchkeeper_accounts{status="connected"} 5.0' in shown


async def test_listener_gets_events_below_the_log_s_level_masked() -> None:
    with opened(level=Level.ERROR) as (journal, stream), journal.subscribe() as subscription:
        journal.note("message.acked", message_id="m", account_id="sales", token="hidden-value")
        noted = await subscription.events.receive()
    assert (noted.event, noted.fields["token"]) == ("message.acked", MASK)
    assert stream.getvalue() == ""


async def test_slow_listener_loses_events_and_knows_it() -> None:
    with opened() as (journal, _), journal.subscribe(events_max=2) as subscription:
        for _ in range(5):
            journal.note("account.created", account_id="sales")
        assert subscription.dropped == 3
        await subscription.events.receive()
        await subscription.events.receive()
        with pytest.raises(trio.WouldBlock):
            subscription.events.receive_nowait()


async def test_event_of_another_thread_reaches_the_listener() -> None:
    with opened() as (journal, _), journal.subscribe() as subscription:
        await trio.to_thread.run_sync(lambda: journal.note("drain.asked", reason="thread"))
        with trio.fail_after(5):
            assert (await subscription.events.receive()).fields["reason"] == "thread"


def test_root_logger_is_given_back() -> None:
    before = (list(logging.getLogger().handlers), logging.getLogger().level)
    with opened():
        pass
    assert (list(logging.getLogger().handlers), logging.getLogger().level) == before
