from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.bridge.frames import (
    FRAME_BYTES_MAX,
    Answer,
    BodyAsk,
    ClosedEvent,
    ConnectedEvent,
    Done,
    Error,
    FrameInvalid,
    FrameTooLong,
    KeysAsk,
    Open,
    PingDone,
    ReceivedAsk,
    Reply,
    Send,
    SendDone,
    decode,
    encode,
    read_ok,
)

SECRET = "c2VjcmV0IGtleQ=="
MESSAGE = {
    "messageId": "A1",
    "chat": "49151",
    "sender": "49151",
    "text": "Grüße 🌍",
    "sentAt": 1.5,
}


def line(**fields: Any) -> bytes:
    return json.dumps({"v": 1, **fields}).encode()


def test_the_page_s_frames_are_read() -> None:
    assert decode(line(event="connected", connection=3, phone="49151")) == ConnectedEvent(
        connection=3, phone="49151"
    )
    assert decode(
        line(event="closed", connection=3, code=402, message="ban", expireS=60)
    ) == ClosedEvent(connection=3, code=402, message="ban", expire_s=60)
    assert decode(line(ask="keys", id=12, connection=3, values={"creds": "{}", "x": None})) == (
        KeysAsk(id=12, connection=3, values={"creds": "{}", "x": None})
    )
    received = decode(line(ask="received", id=1, connection=3, message=MESSAGE, values={}))
    assert isinstance(received, ReceivedAsk)
    assert (received.message.text, received.message.sender_name) == ("Grüße 🌍", None)
    assert isinstance(decode(line(ask="body", id=1, connection=3, messageId="A1")), BodyAsk)


def test_a_reply_is_read_as_what_its_call_promises() -> None:
    reply = decode(line(reply=7, ok={"keys": {"session-1.0": "{}"}}))
    assert isinstance(reply, Reply)
    assert read_ok(reply.ok, SendDone) == SendDone(keys={"session-1.0": "{}"})  # type: ignore[arg-type]
    with pytest.raises(FrameInvalid, match="unknown field `keys`"):
        read_ok(reply.ok, Done)  # type: ignore[arg-type]
    refused = decode(line(reply=7, error={"kind": "refused", "code": 463, "message": "no"}))
    assert refused == Reply(reply=7, error=Error(kind="refused", code=463, message="no"))


def test_calls_and_answers_are_written_as_the_page_shows() -> None:
    call = Send(id=7, deadline_ms=20, connection=3, message_id="3EB0", to="4915", text="ü")
    assert json.loads(encode(call)) == {
        "v": 1,
        "call": "send",
        "id": 7,
        "deadlineMs": 20,
        "connection": 3,
        "messageId": "3EB0",
        "to": "4915",
        "text": "ü",
    }
    assert encode(call).endswith(b"\n")
    assert encode(call).count(b"\n") == 1
    assert json.loads(encode(Answer(answer=12, ok={}))) == {"v": 1, "answer": 12, "ok": {}}


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", "no JSON"),
        (b'{"v": 1, "event": ' + b"[" * 200_000, "no JSON"),
        (b"[]", "Expected `object`"),
        (b"\xff\xfe", "no JSON"),
        (
            line(event="connected", connection=3, phone="1").replace(b"1", b"2", 1),
            "version 2.*setup-whatsapp",
        ),
        (line(), "0 of the words"),
        (line(event="connected", ask="keys"), "2 of the words"),
        (line(event="sang", connection=3), r"\$\.event"),
        (line(event="connected", connection=-1, phone="1"), r"\$\.connection"),
        (line(event="connected", connection=3), "missing required field `phone`"),
        (line(event="connected", connection=3, phone="1", more=2), "unknown field `more`"),
        (line(ask="keys", connection=3, values={}), "missing required field `id`"),
        (line(reply=3), "either ok or error"),
        (line(reply=3, ok={}, error={"kind": "failed", "message": ""}), "either ok or error"),
        (line(ask="keys", id=1, connection=3, values={"creds": 3}), r"\$\.values"),
    ],
)
def test_a_wrong_frame_is_refused_with_what_is_wrong(frame: bytes, why: str) -> None:
    with pytest.raises(FrameInvalid, match=why):
        decode(frame)


@pytest.mark.parametrize(
    "frame",
    [
        line(event=SECRET, connection=3),
        line(event="connected", connection=SECRET, phone="1"),
        line(event="connected", connection=3, phone="1", **{SECRET: 1}),
        line(ask="keys", id=1, connection=3, values={SECRET: 3}),
        line(ask="keys", id=1, connection=3, values=SECRET),
        line(reply=1, error={"kind": SECRET, "message": ""}),
        SECRET.encode(),
    ],
)
def test_a_refusal_holds_nothing_of_the_frame(frame: bytes) -> None:
    with pytest.raises(FrameInvalid) as refused:
        decode(frame)
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


def test_a_frame_over_the_limit_is_neither_read_nor_written() -> None:
    text = "x" * FRAME_BYTES_MAX
    with pytest.raises(FrameInvalid, match="longer than"):
        decode(line(event="connected", connection=3, phone=text))
    with pytest.raises(FrameTooLong, match="over the 16777216"):
        encode(
            Open(
                connection=1,
                account="a",
                keys={"creds": text},
                doubtful=(),
                distrust_sessions=False,
            )
        )
    just = FRAME_BYTES_MAX - len(line(event="connected", connection=3, phone=""))
    assert decode(line(event="connected", connection=3, phone="x" * just))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_frame_or_refused(data: bytes) -> None:
    with suppress(FrameInvalid):
        decode(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
words = st.sampled_from(["event", "ask", "reply", "call", "id", "connection", "values", "ok", "v"])


@given(st.dictionaries(words | st.text(max_size=8), json_values, max_size=6), st.booleans())
def test_any_json_is_a_frame_or_refused(fields: dict[str, Any], versioned: bool) -> None:
    frame = json.dumps({**fields, **({"v": 1} if versioned else {})}).encode()
    with suppress(FrameInvalid):
        decode(frame)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(st.dictionaries(texts, st.none() | texts), texts)
def test_a_change_set_comes_through_as_it_was(values: dict[str, str | None], text: str) -> None:
    asked = decode(line(ask="keys", id=1, connection=2, values=values))
    assert isinstance(asked, KeysAsk)
    assert asked.values == values
    message = {**MESSAGE, "text": text, "senderName": text}
    received = decode(line(ask="received", id=1, connection=2, message=message, values=values))
    assert isinstance(received, ReceivedAsk)
    assert (received.message.text, received.message.sender_name) == (text, text)


def test_a_ping_s_figures_are_numbers() -> None:
    reply = decode(line(reply=1, ok={"rssBytes": 5, "cpuS": 1, "connections": 0}))
    assert isinstance(reply, Reply)
    assert read_ok(reply.ok, PingDone).rss_bytes == 5  # type: ignore[arg-type]
