"""The Node side of the line: what it refuses, and that it ends with it."""

from __future__ import annotations

import signal

import pytest
import trio

from tests.bridge.node.harness import Account, CallFailed, open_node

pytestmark = pytest.mark.node

FRAME_BYTES_MAX = 16 * 1024 * 1024
NOBODY = "ws://127.0.0.1:9/ws/chat"


async def test_hello_says_who_is_there() -> None:
    async with open_node() as node:
        said = await node.hello()
        assert said["baileys"] == "7.0.0-rc14"
        assert said["pid"] == node.process.pid
        alive = await node.call("ping")
        assert alive["connections"] == 0
        assert alive["rssBytes"] > 20_000_000
        assert alive["cpuS"] > 0


async def test_anything_before_hello_and_a_second_hello_are_refused() -> None:
    async with open_node() as node:
        with pytest.raises(CallFailed, match=r"invalid .*hello is the first call"):
            await node.call("ping")
        await node.hello()
        with pytest.raises(CallFailed, match=r"invalid .*hello is the first call"):
            await node.hello()


SENSELESS_CALLS: list[tuple[str, dict[str, object], str]] = [
    ("dance", {}, "not known"),
    ("ping", {"connection": 1}, "1 unknown field"),
    ("send", {"connection": 1, "messageId": "A", "to": "+49 secret", "text": "x"}, "to is"),
    ("send", {"connection": 1, "messageId": "A", "to": "4915112345678"}, "text is missing"),
    ("open", {"connection": 1, "account": "a", "keys": []}, "keys is"),
    ("close", {"connection": -1}, "connection is"),
    ("ping", {"deadlineMs": 0}, "deadlineMs is"),
]


async def test_a_call_that_makes_no_sense_is_refused_without_its_contents() -> None:
    async with open_node() as node:
        await node.hello()
        for call, fields, names in SENSELESS_CALLS:
            with pytest.raises(CallFailed) as failed:
                await node.call(call, **fields)  # type: ignore[arg-type]  # some are wrong
            assert failed.value.kind == "invalid"
            assert names in str(failed.value)
            assert "secret" not in str(failed.value)
        assert (await node.call("ping"))["connections"] == 0


async def test_options_that_are_wrong_or_dangerous_are_refused() -> None:
    refused: list[dict[str, object]] = [
        {"url": "wss://elsewhere.example/ws/chat"},
        {"url": "ws://127.0.0.1.example/ws/chat"},
        {"url": "http://127.0.0.1/ws/chat"},
        {"url": "nonsense"},
        {"browser": ["one"]},
        {"logLevel": "loud"},
        {"logLevels": "debug"},
    ]
    async with open_node() as node:
        for options in refused:
            with pytest.raises(CallFailed, match="invalid"):
                await node.hello(**options)
        # Nothing was taken over: the right ones still can be.
        await node.hello(url="ws://[::1]:9/ws/chat")


async def test_another_host_is_allowed_only_where_a_test_says_so() -> None:
    async with open_node() as node:
        assert await node.hello(url="ws://elsewhere.example/ws/chat", urlInsecure=True)


@pytest.mark.parametrize("raw", [b"nonsense\n", b'{"v": 1, "answer": 1, "ok": {}}\n'])
async def test_a_frame_that_makes_no_sense_ends_the_process_and_is_not_quoted(raw: bytes) -> None:
    async with open_node() as node:
        await node.hello()
        node.write_bytes(raw)
        assert await node.wait_exit() == 1
        await node.until_ended()
        assert "the bridge ends" in node.logs[-1]["message"]
        assert "nonsense" not in node.logs[-1]["message"]


async def test_the_longest_frame_is_read_and_a_longer_one_ends_the_process() -> None:
    async with open_node() as node:
        await node.hello()
        frame = b'{"v":1,"call":"ping","id":999,"deadlineMs":1,"x":"%s"}'
        frame %= b"x" * (FRAME_BYTES_MAX - len(frame) + 2)
        assert len(frame) == FRAME_BYTES_MAX
        node.write_bytes(frame + b"\n")
        await node.call("ping")
        assert [each["error"]["kind"] for each in node.stray] == ["invalid"]
        node.write_bytes(b"x" * (FRAME_BYTES_MAX + 1))
        assert await node.wait_exit() == 1


async def test_frames_in_pieces_and_several_at_once_are_read() -> None:
    async with open_node() as node:
        await node.hello()
        for byte in b'{"v":1,"call":"ping","id":998,"deadline':
            node.write_bytes(bytes([byte]))
            await trio.lowlevel.checkpoint()
        node.write_bytes(b'Ms":1}\n{"v":1,"call":"ping","id":999,"deadlineMs":1}\n{"v":1')
        while len(node.stray) < 2:
            await node.news()
        assert [each["reply"] for each in node.stray] == [998, 999]
        assert node.process.poll() is None


async def test_a_signal_to_the_group_is_the_daemons_affair() -> None:
    async with open_node() as node:
        await node.hello()
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            node.process.send_signal(number)
            assert await node.call("ping")


async def test_an_address_where_nobody_is_closes_the_connection() -> None:
    async with open_node() as node:
        await node.hello(url=NOBODY)
        link = await node.open(Account())
        closed = await link.next("closed")
        assert closed["code"] == 408
        with pytest.raises(CallFailed) as failed:
            await link.call("onWhatsApp", to="4915112345678")
        assert (failed.value.kind, failed.value.code) == ("closed", 428)
        assert await link.call("close") == {}
        assert (await node.call("ping"))["connections"] == 0


async def test_keys_without_credentials_open_nothing_and_never_make_an_identity() -> None:
    unusable: list[dict[str, str]] = [
        {},
        {"creds": ""},
        {"creds": "{"},
        {"creds": "{}"},
        {"creds": "null"},
        {"creds": '{"noiseKey": {"private": "x", "public": "x"}, "registrationId": 1}'},
    ]
    async with open_node() as node:
        await node.hello(url=NOBODY)
        for keys in unusable:
            account = Account(keys=keys)
            with pytest.raises(CallFailed) as failed:
                await node.open(account)
            assert failed.value.kind == "unusable"
            assert account.change_sets == []
        assert (await node.call("ping"))["connections"] == 0
