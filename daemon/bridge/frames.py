"""The frames between the daemon and a bridge process: what docs/bridge.md says, as types.

Lives here: their shapes, and turning bytes into them strictly. An unknown field, a missing one or
another version is refused with what is wrong and where, never with what the frame holds.
Never lives here: what a frame means, or the socket it came over.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal, TypeAlias, TypeVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

VERSION = 1

OTHER_RELEASE = (
    "the bridge's files are of another release: run `watchkeeper setup-whatsapp`, then restart "
    "this instance"
)

FRAME_BYTES_MAX = 16 * 1024 * 1024
"""A line without its line break. A longer one is never sent; met, it ends the line."""

Number: TypeAlias = Annotated[int, Meta(ge=0, le=2**53 - 1)]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error"]
Changes: TypeAlias = dict[str, str | None]
"""A change set: `None` for a key that is gone."""


class FrameInvalid(Exception):
    """A frame that means nothing to us. The message says why, without any of its contents."""


class FrameTooLong(Exception):
    """A frame of ours would be longer than `FRAME_BYTES_MAX`."""


class _Frame(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Every frame carries the version; `None` is never the same as missing."""

    v: Literal[1] = 1


# --- daemon to bridge --------------------------------------------------------------------------


class Options(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What all connections of a process have in common."""

    browser: tuple[str, str, str]
    """System, browser, version: what the phone lists the device as."""
    log_level: LogLevel
    connect_timeout_ms: Number
    url: str | UnsetType = UNSET
    """Another server than WhatsApp's, for tests."""
    url_insecure: Literal[True] | UnsetType = UNSET
    """Whether `url` may be another host than this one."""
    qr_timeout_ms: Number | UnsetType = UNSET
    keep_alive_ms: Number | UnsetType = UNSET
    silent_ms: Number | UnsetType = UNSET
    """How long the daemon may say nothing before the process ends by itself."""


class Call(_Frame, tag_field="call", frozen=True, kw_only=True):
    """Do this. Nobody waits for the reply longer than `deadline_ms`; `BridgeProcess` sets both."""

    id: Number = 0
    deadline_ms: Number = 0


class Hello(Call, tag="hello", frozen=True, kw_only=True):
    """The first call."""

    options: Options


class Open(Call, tag="open", frozen=True, kw_only=True):
    """Connect an account; `keys` `None` begins a pairing."""

    connection: Number
    account: str
    keys: dict[str, str] | None
    doubtful: tuple[str, ...]
    distrust_sessions: bool


class Send(Call, tag="send", frozen=True, kw_only=True):
    """Send a text."""

    connection: Number
    message_id: str
    to: str
    text: str


class OnWhatsApp(Call, tag="onWhatsApp", frozen=True, kw_only=True):
    """Ask whether a number is on WhatsApp."""

    connection: Number
    to: str


class PairingCode(Call, tag="pairingCode", frozen=True, kw_only=True):
    """Ask for a code to type on the phone."""

    connection: Number
    phone: str


class Logout(Call, tag="logout", frozen=True, kw_only=True):
    """Unlink the device."""

    connection: Number


class Close(Call, tag="close", frozen=True, kw_only=True):
    """Close the connection's socket."""

    connection: Number


class Ping(Call, tag="ping", frozen=True, kw_only=True):
    """Show that the process still turns."""


class Answer(_Frame, frozen=True, kw_only=True):
    """The answer to an ask: `ok`, or why not."""

    answer: Number
    ok: dict[str, str | None] | UnsetType = UNSET
    error: Error | UnsetType = UNSET


# --- bridge to daemon --------------------------------------------------------------------------


class Error(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """Why something was not done."""

    kind: Literal["closed", "refused", "unusable", "invalid", "failed"]
    message: str
    code: int | UnsetType = UNSET
    expire_s: float | UnsetType = UNSET


class Reply(_Frame, frozen=True, kw_only=True):
    """A call's reply: `ok` in the shape that the call promises, or why not."""

    reply: Number
    ok: Raw | UnsetType = UNSET
    error: Error | UnsetType = UNSET


class Ok(Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """What a reply's `ok` holds."""


class Done(Ok, frozen=True):
    """Nothing but that it was done."""


class HelloDone(Ok, frozen=True, kw_only=True):
    """Which programs run there."""

    node: str
    baileys: str
    pid: Number


class SendDone(Ok, frozen=True, kw_only=True):
    """The server acknowledged it; `keys` changed by it."""

    keys: Changes


class OnWhatsAppDone(Ok, frozen=True, kw_only=True):
    """Whether the number is on WhatsApp."""

    exists: bool


class PairingCodeDone(Ok, frozen=True, kw_only=True):
    """The code, and when it expires (seconds since 1970)."""

    code: str
    expires_at: float


class PingDone(Ok, frozen=True, kw_only=True):
    """What the process takes."""

    rss_bytes: Number
    cpu_s: float
    connections: Number


class Event(_Frame, tag_field="event", frozen=True, kw_only=True):
    """It happened."""


class ConnectedEvent(Event, tag="connected", frozen=True, kw_only=True):
    """Logged in."""

    connection: Number
    phone: str


class QrEvent(Event, tag="qr", frozen=True, kw_only=True):
    """A QR code to scan."""

    connection: Number
    qr: str
    expires_at: float


class ScannedEvent(Event, tag="scanned", frozen=True, kw_only=True):
    """The phone has scanned."""

    connection: Number


class ReceiptEvent(Event, tag="receipt", frozen=True, kw_only=True):
    """A message went further."""

    connection: Number
    message_id: str
    state: Literal["delivered", "read", "failed"]
    error: str | None = None


class ClosedEvent(Event, tag="closed", frozen=True, kw_only=True):
    """The connection is over."""

    connection: Number
    code: int
    message: str
    expire_s: float | None = None


class LogEvent(Event, tag="log", frozen=True, kw_only=True):
    """What the process would have printed."""

    level: LogLevel
    message: str


ConnectionEventFrame: TypeAlias = (
    ConnectedEvent | QrEvent | ScannedEvent | ReceiptEvent | ClosedEvent
)


class Ask(_Frame, tag_field="ask", frozen=True, kw_only=True):
    """Do this, and answer."""

    id: Number
    connection: Number


class KeysAsk(Ask, tag="keys", frozen=True, kw_only=True):
    """Keys changed outside a send."""

    values: Changes


class ReceivedMessage(
    Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True
):
    """A message that somebody sent."""

    message_id: str
    chat: str
    sender: str
    text: str
    sent_at: float
    sender_name: str | None = None


class ReceivedAsk(Ask, tag="received", frozen=True, kw_only=True):
    """A message arrived; `values` changed by reading it."""

    message: ReceivedMessage
    values: Changes


class BodyAsk(Ask, tag="body", frozen=True, kw_only=True):
    """A recipient asks for a message again."""

    message_id: str


AskFrame: TypeAlias = KeysAsk | ReceivedAsk | BodyAsk
Frame: TypeAlias = Reply | ConnectionEventFrame | LogEvent | AskFrame


# --- bytes -------------------------------------------------------------------------------------


class _Head(Struct, frozen=True):
    """Enough of a frame to tell what kind it is; the rest is checked by its own type."""

    v: int
    reply: Raw | UnsetType = UNSET
    event: Raw | UnsetType = UNSET
    ask: Raw | UnsetType = UNSET


_encoder = msgspec.json.Encoder()
OkT = TypeVar("OkT", bound=Ok)

_head = msgspec.json.Decoder(_Head)
_reply = msgspec.json.Decoder(Reply)
_event: msgspec.json.Decoder[ConnectionEventFrame | LogEvent] = msgspec.json.Decoder(
    ConnectedEvent | QrEvent | ScannedEvent | ReceiptEvent | ClosedEvent | LogEvent
)
_ask: msgspec.json.Decoder[AskFrame] = msgspec.json.Decoder(KeysAsk | ReceivedAsk | BodyAsk)

_QUOTED = re.compile(r"'.*'", re.DOTALL)
_UNKNOWN_FIELD = re.compile(r"unknown field `(?![A-Za-z]{1,20}`).*?`(?= - at|$)", re.DOTALL)


def encode(frame: Call | Answer) -> bytes:
    """One line, its line break included. Raises `FrameTooLong`."""
    line = _encoder.encode(frame)
    if len(line) > FRAME_BYTES_MAX:
        raise FrameTooLong(f"a frame of {len(line)} bytes, over the {FRAME_BYTES_MAX} that may be")
    return line + b"\n"


def decode(line: bytes) -> Frame:
    """Read one line of a bridge process. Raises `FrameInvalid`."""
    if len(line) > FRAME_BYTES_MAX:
        raise FrameInvalid(f"it is longer than {FRAME_BYTES_MAX} bytes")
    try:
        return _decode(line)
    except msgspec.ValidationError as error:
        raise FrameInvalid(_without_contents(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise FrameInvalid(f"its {len(line)} bytes are no JSON object") from None


def _decode(line: bytes) -> Frame:
    head = _head.decode(line)
    if head.v != VERSION:
        raise FrameInvalid(f"it is of version {head.v:.20g}, ours is {VERSION}: {OTHER_RELEASE}")
    words = sum(word is not UNSET for word in (head.reply, head.event, head.ask))
    if words != 1:
        raise FrameInvalid(f"it has {words} of the words reply, event and ask, not one")
    if head.event is not UNSET:
        return _event.decode(line)
    if head.ask is not UNSET:
        return _ask.decode(line)
    reply = _reply.decode(line)
    if (reply.ok is UNSET) is (reply.error is UNSET):
        raise FrameInvalid("a reply holds either ok or error")
    return reply


def read_ok(ok: Raw, kind: type[OkT]) -> OkT:
    """Read a reply's `ok`. Raises `FrameInvalid`."""
    try:
        return msgspec.json.decode(ok, type=kind)
    except msgspec.ValidationError as error:
        raise FrameInvalid(f"in its ok: {_without_contents(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise FrameInvalid("its ok is no JSON object") from None


def _without_contents(error: msgspec.ValidationError) -> str:
    """Keep where and what kind; values and strange names may be anybody's keys or text."""
    return _UNKNOWN_FIELD.sub("unknown field", _QUOTED.sub("…", str(error)))
