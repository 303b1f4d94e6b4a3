"""One process, against a scripted peer that runs as a real child."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from typing import Any

import pytest
import trio

from daemon.bridge.frames import Done, Error, Open, Ping, PingDone, Send, SendDone
from daemon.bridge.process import (
    BridgeFailed,
    BridgeProcess,
    CallFailed,
    KeysUnusable,
    ProcessPlan,
    without_secrets,
)
from machine.ports import ConnectionClosed, SendRefused
from tests.bridge.steps import OPTIONS, TO, WITHIN_S, do, is_gone, plan, running
from tests.fakes.journal import RecordingJournal


def make(given: ProcessPlan | None = None) -> tuple[BridgeProcess, RecordingJournal]:
    journal = RecordingJournal()
    return BridgeProcess(1, given or plan(), journal), journal


def opening(**fields: Any) -> Open:
    given = {"keys": {"creds": "{}"}, "doubtful": (), "distrust_sessions": False, **fields}
    return Open(connection=1, account="anna", **given)


async def script(process: BridgeProcess, *actions: dict[str, Any]) -> SendDone:
    """Have the peer do something, as the body of a send."""
    call = Send(connection=1, message_id="A", to=TO, text=do(*actions))
    return await process.call(call, SendDone)


async def test_a_process_says_hello_answers_and_is_gone_after_a_kill() -> None:
    process, journal = make()
    with trio.fail_after(WITHIN_S):
        async with running(process):
            assert (await process.call(Ping(), PingDone)).connections == 0
    assert journal.names() == ["bridge.started", "bridge.stopped"]
    assert is_gone(process.pid)


async def test_the_child_has_the_line_and_no_other_descriptor_and_no_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WATCHKEEPER_ADMIN_TOKEN", "a-secret-that-is-long")
    monkeypatch.setenv("LANG", "C.UTF-8")
    process, _ = make()
    ours = os.open(__file__, os.O_RDONLY)
    os.set_inheritable(ours, True)
    with trio.fail_after(WITHIN_S):
        async with running(process):
            await process.call(opening(), Done)
            told = json.loads((await script(process, {"tell": "environment"})).keys["told"] or "")
    os.close(ours)
    assert set(told["environment"]) <= {
        *("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
        *("NODE_EXTRA_CA_CERTS", "SSL_CERT_DIR", "SSL_CERT_FILE"),
    }
    assert told["environment"]["LANG"] == "C.UTF-8"
    # The last one is the directory that is being listed.
    assert told["descriptors"] == [0, 1, 2, 3, 4]
    assert told["group"] == os.getpgid(0), "whoever kills our group kills the bridges"
    assert told["parent"] == os.getpid()
    assert told["arguments"] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_to_the_group_is_not_the_child_s_end(number: int) -> None:
    process, _ = make()
    with trio.fail_after(WITHIN_S):
        async with running(process):
            os.kill(process.pid, number)
            await process.call(Ping(), PingDone)


@pytest.mark.parametrize(
    ("actions", "reason"),
    [
        ([{"exit": 7}], "exit code 7"),
        ([{"signal": 9}], "SIGKILL"),
        ([{"close": "line"}], "closed its line"),
        ([{"raw": "no json\n"}], "no JSON"),
        ([{"raw": '{"v": 2, "event": "log"}\n'}], "version 2"),
        ([{"long": 17 * 1024 * 1024}], "longer than"),
        ([{"reply": {"ok": {"keys": 3}}}], "means nothing"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
async def test_a_process_that_breaks_is_dead_and_its_callers_know(
    actions: list[dict[str, Any]], reason: str
) -> None:
    process, journal = make()
    with trio.fail_after(WITHIN_S):
        async with running(process):
            await process.call(opening(), Done)
            with pytest.raises(ConnectionClosed, match=reason) as closed:
                await script(process, *actions)
            assert closed.value.code == 503
            await process.wait_ended()
    assert is_gone(process.pid)
    assert reason in str(journal.of("bridge.ended")[0]["reason"])
    with pytest.raises(ConnectionClosed):
        await process.call(Ping(), PingDone)


async def test_what_was_written_before_a_death_is_read() -> None:
    process, _ = make()
    with trio.fail_after(WITHIN_S):
        async with running(process):
            await process.call(opening(), Done)
            done = await script(process, {"reply": {"ok": {"keys": {"a": "1"}}}}, {"exit": 1})
    assert done.keys == {"a": "1"}


async def test_a_process_that_does_not_answer_pings_is_killed() -> None:
    process, journal = make(plan(ping_every_s=0.05, ping_s=0.4))
    with trio.fail_after(WITHIN_S):
        async with running(process):
            await process.call(opening(), Done)
            with pytest.raises(ConnectionClosed, match="hangs"):
                await script(process, {"hang": 60.0})
            await process.wait_ended()
    assert is_gone(process.pid)
    assert journal.names().count("bridge.ended") == 1


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (plan("refuse-hello"), "exit code 9"),
        (plan("mute", start_s=0.3), "did not start within 0.3 s"),
        (ProcessPlan(("/nowhere/node",), OPTIONS), "/nowhere/node could not be run"),
    ],
    ids=["exits", "says nothing", "is not there"],
)
async def test_a_process_that_does_not_start_says_why(given: ProcessPlan, reason: str) -> None:
    process, journal = make(given)
    with trio.fail_after(WITHIN_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.run)
            with pytest.raises(BridgeFailed, match=reason):
                await process.wait_ready()
    assert journal.names() == ["bridge.not_started"]
    assert not process.pid or is_gone(process.pid)


@pytest.mark.parametrize(
    ("error", "raised", "shown"),
    [
        (Error(kind="closed", code=440, message="m"), ConnectionClosed, "440"),
        (Error(kind="closed", message="m"), ConnectionClosed, "428"),
        (Error(kind="refused", code=463, message="restricted"), SendRefused, "restricted"),
        (Error(kind="unusable", message="no creds"), KeysUnusable, "no creds"),
        (Error(kind="failed", message="it was so"), CallFailed, "it was so"),
        (Error(kind="invalid", message="what?"), CallFailed, "what?"),
    ],
    ids=lambda given: given.kind if isinstance(given, Error) else "",
)
async def test_an_error_is_what_its_kind_says(
    error: Error, raised: type[Exception], shown: str
) -> None:
    process, journal = make()
    plain = {"kind": error.kind, "message": error.message}
    if isinstance(error.code, int):
        plain["code"] = error.code  # type: ignore[assignment]
    with trio.fail_after(WITHIN_S):
        async with running(process):
            await process.call(opening(), Done)
            with pytest.raises(raised, match=shown) as caught:
                await script(process, {"reply": {"error": plain}})
    if isinstance(caught.value, SendRefused):
        assert caught.value.code == 463
    assert ("bridge.call_refused" in journal.names()) is (error.kind == "invalid")


async def test_a_caller_that_left_leaves_no_reply_to_trip_over() -> None:
    process, _ = make()
    with trio.fail_after(WITHIN_S):
        async with running(process):
            await process.call(opening(), Done)
            with trio.move_on_after(0.05) as left:
                await script(process, {"hang": 0.3}, {"reply": {"ok": {"keys": {}}}})
            assert left.cancelled_caught
            assert (await process.call(Ping(), PingDone)).connections == 1


async def test_the_deadline_of_the_caller_is_told() -> None:
    process, _ = make()
    with trio.fail_after(WITHIN_S):
        async with running(process):
            await process.call(opening(), Done)
            with trio.fail_after(3.5):
                done = await script(process, {"tell": "deadline"})
            assert 3000 < int(done.keys["deadlineMs"] or 0) <= 3500


async def test_what_a_process_prints_is_logged_without_keys_and_numbers() -> None:
    process, journal = make()
    key = "yAeB3k/0Zq9xVt7nMBQ1cW5sLr8uXh2jFd4gTpOiK0E="
    with trio.fail_after(WITHIN_S):
        async with running(process):
            await process.call(opening(), Done)
            with suppress(ConnectionClosed):
                await script(
                    process,
                    {"print": f"Closing session: {key} of 4915112345678\nx" + "y" * 10_000},
                    {"exit": 1},
                )
    lines = [str(fields["line"]) for fields in journal.of("bridge.printed")]
    assert lines[0] == "Closing session: *** of ***"
    assert max(len(one) for one in lines) <= 2 * 4096


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("TypeError: x is undefined at main.mjs:12:34", None),
        ("Buffer <05 6a 3f ff 00 1b> of 491511234567", "Buffer <***> of ***"),
        ("key: deadbeefdeadbeefdeadbeefdeadbeef", "key: ***"),
        ("[12, 250, 3, 4, 5, 6, 77, 8]", "[***]"),
        ("on port 8080, pid 12345, in 0.12345678 s", None),
    ],
)
def test_secrets_are_masked_and_the_rest_is_legible(text: str, shown: str | None) -> None:
    assert without_secrets(text) == (shown or text)


async def test_cancelling_it_kills_the_process_and_waits_for_its_end() -> None:
    process, _ = make()
    with trio.fail_after(WITHIN_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.run)
            await process.wait_ready()
            nursery.cancel_scope.cancel()
    assert is_gone(process.pid)
    with pytest.raises(BridgeFailed):
        await process.wait_ready()
