"""One bridge process: starting it, speaking with it, and seeing it dead.

Lives here: the child, its line, its calls and asks, its signs of life.
Never lives here: what a connection's frames mean (`connection`), and how many processes there are
(`connector`).
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Protocol, TypeAlias

import msgspec
import trio
from msgspec import UNSET

from daemon.bridge.frames import (
    FRAME_BYTES_MAX,
    Answer,
    AskFrame,
    Call,
    ConnectionEventFrame,
    Error,
    FrameInvalid,
    Hello,
    HelloDone,
    LogEvent,
    OkT,
    Options,
    Ping,
    PingDone,
    Reply,
    decode,
    encode,
    read_ok,
)
from machine.ports import ConnectionClosed, Journal, SendRefused

RECEIVE_BYTES = 256 * 1024
WRITE_BYTES = 256 * 1024
"""Frames that go to the socket in one call, about."""
OUT_BYTES_MAX = 64 * 1024 * 1024
"""Bytes that wait to be written; then calls wait. Answers do not: each is one of the process's own
asks, and a process that does not read is killed by its pings."""
CALL_S_MAX = 120.0
"""What a call whose caller has no deadline tells the process."""
REAP_S = 5.0
"""How long a killed process is waited for; then it is told, and left to the system."""
EXIT_S = 1.0
"""How long a process whose line has ended is waited for, so that its exit code can be told."""
LOG_LINE_BYTES_MAX = 4096
"""A longer line is cut."""
SERVER_AWAY = 503
LAUNCHER = Path(__file__).with_name("launch.py")

ENVIRONMENT = (
    *("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
    *("NODE_EXTRA_CA_CERTS", "SSL_CERT_DIR", "SSL_CERT_FILE"),
)
"""What a process inherits of our environment, which may hold a token or a key."""


class BridgeFailed(Exception):
    """A process did not start, or has ended."""


class CallFailed(Exception):
    """A call was answered that it could not be done, for no reason that has a code."""


class KeysUnusable(CallFailed):
    """The keys given to `Open` hold no credentials that can be read. Nothing was opened."""


class Receiver(Protocol):
    """One connection of a process, as the process sees it. Both are called in wire order."""

    def receive(self, frame: ConnectionEventFrame | AskFrame) -> None:
        """Take a frame of this connection."""
        ...

    def end(self, closed: ConnectionClosed) -> None:
        """Take note that no frame will follow."""
        ...


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """How a process is started and watched."""

    command: tuple[str, ...]
    """The program, by its path, and its arguments."""
    options: Options
    start_s: float = 20.0
    """From starting it to its answer to `hello`; then it is killed."""
    ping_every_s: float = 5.0
    ping_s: float = 10.0
    """How long it may take to answer a ping; then it hangs, and is killed."""
    close_s: float = 5.0
    """How long it may take to close a connection; then it is killed."""

    def __post_init__(self) -> None:
        """Refuse times that cannot work."""
        if min(self.start_s, self.ping_every_s, self.ping_s, self.close_s) <= 0:
            raise ValueError("all times of a bridge process must be positive")


Replied: TypeAlias = Callable[[Reply | None], None]
"""Called with a call's reply, in wire order, or with `None` when the process is gone."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A call that waits for its reply."""

    done: trio.Event = field(default_factory=trio.Event)
    reply: Reply | None = None

    def take(self, reply: Reply | None) -> None:
        self.reply = reply
        self.done.set()


class BridgeProcess:
    """One child process and its line, from `run` to `wait_ended`.

    Between calls: `connections` are those that its frames are handed to; once `reason` is set the
    process has been killed, or is dead already, and nothing is written to it any more.
    """

    def __init__(self, name: int, plan: ProcessPlan, journal: Journal) -> None:
        self.name = name
        self.pid = 0
        self.rss_bytes = 0
        self.connections: dict[int, Receiver] = {}
        self.reason: str | None = None
        self.stopped = False
        """Killed because it was not wanted any more."""
        self.plan = plan
        self._journal = journal
        self._child: subprocess.Popen[bytes] | None = None
        self._calls: dict[int, tuple[Call, Replied]] = {}
        self._call_ids = count(1)
        self._connection_numbers = count(1)
        self._out: deque[bytes] = deque()
        self._out_bytes = 0
        self._written = trio.Event()
        self._put = trio.Event()
        self._ready = trio.Event()
        self._killed = trio.Event()
        self._ended = trio.Event()

    def __repr__(self) -> str:
        return f"<BridgeProcess {self.name} pid {self.pid}>"

    # --- its life

    async def run(self) -> None:
        """Start the process, serve its line until that ends, and see the process dead.

        Never raises for what the process does: `reason` says why it ended.
        Cancelled: kills it, and waits for its end for up to `REAP_S`.
        """
        began = trio.current_time()
        if self.reason is not None:  # Nobody wants it any more.
            self._end()
            return
        try:
            line, printed = self._spawn()
        except OSError as error:
            self.reason = f"{self.plan.command[0]} could not be run: {error.strerror}"
            self._end()
            return
        try:
            async with line, printed, trio.open_nursery() as nursery:
                nursery.start_soon(self._read, line)
                nursery.start_soon(self._write, line)
                nursery.start_soon(self._read_printed, printed)
                nursery.start_soon(self._watch, began)
                await self._killed.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.kill("the daemon ends", stopped=True)
            await self._reap()
            self._end()

    def _spawn(self) -> tuple[trio.SocketStream, trio.lowlevel.FdStream]:
        """Start the child. Raises `OSError`.

        From this very thread, and not with `trio.open_process`, which starts it from a thread that
        ends soon: the child asks to be killed when the thread that made it ends.
        """
        if not os.access(self.plan.command[0], os.X_OK):
            raise PermissionError(0, "it is not there, or may not be run")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._child = subprocess.Popen(  # noqa: S603  # the program that the operator has set
                [
                    *(sys.executable, "-I", "-S", str(LAUNCHER)),
                    *(str(theirs.fileno()), str(os.getpid()), *self.plan.command),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self.pid = self._child.pid
        assert self._child.stdout is not None
        ours.setblocking(False)
        printed = trio.lowlevel.FdStream(os.dup(self._child.stdout.fileno()))
        self._child.stdout.close()
        return trio.SocketStream(trio.socket.from_stdlib_socket(ours)), printed

    async def wait_ready(self) -> None:
        """Wait until the process has said hello. Raises `BridgeFailed` when it never will."""
        await self._ready.wait()
        if self.reason is not None:
            raise BridgeFailed(self.reason)

    async def wait_ended(self) -> None:
        """Wait until the process is dead and reaped."""
        await self._ended.wait()

    @property
    def alive(self) -> bool:
        """Whether it may be given work."""
        return self.reason is None

    def kill(self, reason: str, *, stopped: bool = False) -> None:
        """Kill the process at once, unless it is dead. `stopped`: nothing is wrong with it."""
        if self.reason is not None:
            return
        self.reason, self.stopped = reason, stopped
        if self._child is not None:
            self._child.kill()
        self._killed.set()

    async def _reap(self) -> None:
        """Wait for the killed child's end: a short last word, even when cancelled."""
        with trio.CancelScope(shield=True):
            if not await self._wait_exit(REAP_S):
                self._note("bridge.not_gone", waited_s=REAP_S)

    async def _wait_exit(self, seconds: float) -> bool:
        """Wait until the child is dead and reaped; whether it is, after `seconds` at most."""
        assert self._child is not None
        if self._child.poll() is None:
            descriptor = os.pidfd_open(self._child.pid)
            try:
                with trio.move_on_after(seconds):
                    await trio.lowlevel.wait_readable(descriptor)
            finally:
                os.close(descriptor)
        return self._child.poll() is not None

    def _end(self) -> None:
        """Tell everyone who waits for the process that it is gone."""
        assert self.reason is not None
        open_count = len(self.connections)
        calls, self._calls = self._calls, {}
        for _, replied in calls.values():
            replied(None)
        for receiver in tuple(self.connections.values()):
            receiver.end(self.gone())
        self._out.clear()
        self._written.set()
        was_ready = self._ready.is_set()
        self._ready.set()
        self._ended.set()
        if self.stopped:
            self._note("bridge.stopped", reason=self.reason)
        elif was_ready:
            self._note("bridge.ended", reason=self.reason, connections=open_count)
        else:
            self._note("bridge.not_started", reason=self.reason)

    def gone(self) -> ConnectionClosed:
        """What a connection of this process ends with."""
        return ConnectionClosed(SERVER_AWAY, f"its bridge process ended: {self.reason}")

    def _note(self, event: str, **fields: object) -> None:
        self._journal.note(event, process=self.name, pid=self.pid, **fields)

    # --- signs of life

    async def _watch(self, began: float) -> None:
        """Say hello, then ping until the process does not answer in time."""
        with trio.move_on_after(self.plan.start_s) as starting:
            try:
                done = await self.call(Hello(options=self.plan.options), HelloDone)
            except (CallFailed, ConnectionClosed, SendRefused) as error:
                self.kill(f"it refused to start: {error}")
                return
        if starting.cancelled_caught:
            self.kill(f"it did not start within {self.plan.start_s:g} s")
            return
        self._ready.set()
        self._note(
            "bridge.started",
            duration_s=round(trio.current_time() - began, 3),
            node=done.node,
            baileys=done.baileys,
        )
        while self.alive:
            if not await self._ping():
                self.kill(f"it did not answer a ping within {self.plan.ping_s:g} s: it hangs")
                return
            await trio.sleep(self.plan.ping_every_s)

    async def _ping(self) -> bool:
        """Whether it answers in time.

        The time is taken in halves: after a pause of our own (SIGSTOP, a suspended host) the first
        is over at once, and the answer that has long been there is still read in the second.
        """
        waiting = _Waiting()
        self.post(Ping(), waiting.take, within_s=self.plan.ping_s)
        for _ in range(2):
            with trio.move_on_after(self.plan.ping_s / 2):
                await waiting.done.wait()
                break
        try:
            done = self.read_reply(Ping(), waiting.reply, PingDone)
        except (CallFailed, ConnectionClosed, SendRefused):
            return False
        self.rss_bytes = done.rss_bytes
        return True

    # --- calls

    def next_connection(self) -> int:
        """A number for a new connection in this process."""
        return next(self._connection_numbers)

    async def call(self, call: Call, kind: type[OkT]) -> OkT:
        """Ask for something, and wait for the reply. Our deadline is told to the process.

        Raises `ConnectionClosed` (also when the process is gone), `SendRefused`, `CallFailed`,
        `FrameTooLong`. Cancelled: it may be done all the same.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._out_bytes > OUT_BYTES_MAX and self.alive:
            await self._written.wait()
        waiting = _Waiting()
        call_id = self.post(call, waiting.take, within_s=seconds_left())
        try:
            await waiting.done.wait()
        finally:
            self._calls.pop(call_id, None)
        return self.read_reply(call, waiting.reply, kind)

    def post(self, call: Call, replied: Replied, *, within_s: float) -> int:
        """Ask for something without waiting: `replied` is called once, in wire order; its id.

        Raises `ConnectionClosed` when the process is gone, `FrameTooLong`; then it never is.
        """
        if not self.alive:
            raise self.gone()
        call_id = next(self._call_ids)
        numbered = msgspec.structs.replace(
            call, id=call_id, deadline_ms=max(1, math.ceil(within_s * 1000))
        )
        self._send(encode(numbered))
        self._calls[call_id] = (call, replied)
        return call_id

    def read_reply(self, call: Call, reply: Reply | None, kind: type[OkT]) -> OkT:
        """What a reply that `post` handed over says. Raises as `call` does."""
        if reply is None:
            raise self.gone()
        if reply.error is not UNSET:
            raise self._failure(call, reply.error)
        assert reply.ok is not UNSET
        try:
            return read_ok(reply.ok, kind)
        except FrameInvalid as error:
            self._refuse_frame(error)
            raise self.gone() from None

    def _failure(self, call: Call, error: Error) -> Exception:
        expire_s = None if error.expire_s is UNSET else error.expire_s
        message = without_secrets(error.message)
        match error.kind:
            case "closed":
                code = 428 if error.code is UNSET else error.code
                return ConnectionClosed(code, message, expire_s=expire_s)
            case "refused":
                return SendRefused(0 if error.code is UNSET else error.code, message)
            case "invalid":
                self._note("bridge.call_refused", call=type(call).__name__, error=message)
                return CallFailed(message)
            case "unusable":
                return KeysUnusable(message)
            case "failed":
                return CallFailed(message)

    def answer(self, ask_id: int, ok: Mapping[str, str | None]) -> None:
        """Answer an ask. Nothing when the process is gone."""
        self._answer(Answer(answer=ask_id, ok=dict(ok)))

    def _answer(self, answer: Answer) -> None:
        if self.alive:
            self._send(encode(answer))

    # --- the line

    def _send(self, line: bytes) -> None:
        self._out.append(line)
        self._out_bytes += len(line)
        self._put.set()

    async def _write(self, line: trio.SocketStream) -> None:
        """Write what is put out, whole frames in order, until the line breaks."""
        try:
            while True:
                await self._put.wait()
                self._put = trio.Event()
                while self._out:
                    await self._write_some(line)
        except trio.BrokenResourceError:
            # Its last frames may still be unread: the reader comes to the end and says why.
            return

    async def _write_some(self, line: trio.SocketStream) -> None:
        batch = [self._out.popleft()]
        size = len(batch[0])
        while self._out and size < WRITE_BYTES:
            batch.append(self._out.popleft())
            size += len(batch[-1])
        await line.send_all(b"".join(batch))
        self._out_bytes -= size
        self._written.set()
        self._written = trio.Event()

    async def _read(self, line: trio.SocketStream) -> None:
        """Hand on every frame in order until the line ends; then the process is over."""
        buffer = bytearray()
        try:
            while chunk := await line.receive_some(RECEIVE_BYTES):
                searched = len(buffer)
                buffer += chunk
                self._take_lines(buffer, searched)
        except trio.BrokenResourceError:
            pass
        except FrameInvalid as error:
            self._refuse_frame(error)
            return
        await self._wait_exit(EXIT_S)
        self.kill(self._describe_exit())

    def _take_lines(self, buffer: bytearray, searched: int) -> None:
        """Take every complete line off `buffer`. Raises `FrameInvalid`."""
        begin, end = 0, buffer.find(b"\n", searched)
        while end >= 0:
            self._dispatch(bytes(buffer[begin:end]))
            begin, end = end + 1, buffer.find(b"\n", end + 1)
        del buffer[:begin]
        if len(buffer) > FRAME_BYTES_MAX:
            raise FrameInvalid(f"it is longer than {FRAME_BYTES_MAX} bytes")

    def _refuse_frame(self, error: FrameInvalid) -> None:
        self._note("bridge.frame_refused", error=str(error))
        self.kill(f"it sent a frame that means nothing: {error}")

    def _describe_exit(self) -> str:
        code = self._child.returncode if self._child is not None else None
        if code is None:
            return "it closed its line"
        if code < 0:
            return f"it was ended by {_signal_name(-code)}"
        return f"it ended with exit code {code}"

    def _dispatch(self, line: bytes) -> None:
        frame = decode(line)
        if isinstance(frame, Reply):
            _, replied = self._calls.pop(frame.reply, (None, None))
            if replied is not None:  # Else whoever asked has left meanwhile.
                replied(frame)
        elif isinstance(frame, LogEvent):
            loud = frame.level in ("warning", "error")
            self._journal.note(
                "bridge.complained" if loud else "bridge.logged",
                process=self.name,
                line=without_secrets(frame.message[:LOG_LINE_BYTES_MAX]),
            )
        else:
            self._hand_over(frame)

    def _hand_over(self, frame: ConnectionEventFrame | AskFrame) -> None:
        receiver = self.connections.get(frame.connection)
        if receiver is not None:
            receiver.receive(frame)
            return
        self._note("bridge.frame_ignored", frame=type(frame).__name__)
        if isinstance(frame, AskFrame):
            self.refuse(frame, "this connection is closed")

    def refuse(self, ask: AskFrame, why: str) -> None:
        """Answer an ask with no: the process ends its connection."""
        self._answer(Answer(answer=ask.id, error=Error(kind="closed", message=why)))

    async def _read_printed(self, printed: trio.lowlevel.FdStream) -> None:
        """Log what the process, or its runtime, prints: it should not, so it matters."""
        rest = b""
        while chunk := await printed.receive_some(LOG_LINE_BYTES_MAX):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._note_printed(line)
            if len(rest) > LOG_LINE_BYTES_MAX:
                self._note_printed(rest)
                rest = b""
        self._note_printed(rest)

    def _note_printed(self, line: bytes) -> None:
        text = line[:LOG_LINE_BYTES_MAX].decode("utf-8", "replace").strip()
        if text:
            self._journal.note("bridge.printed", process=self.name, line=without_secrets(text))


def seconds_left() -> float:
    """Until the deadline of whoever calls, at most `CALL_S_MAX`: nobody waits any longer."""
    return min(CALL_S_MAX, trio.current_effective_deadline() - trio.current_time())


_LONG_WORD = re.compile(r"[A-Za-z0-9+/_=-]{20,}")
_HEX = re.compile(r"\b[0-9A-Fa-f]{16,}\b")
_BYTES = re.compile(r"(?:\b[0-9a-f]{2} ){4,}[0-9a-f]{2}\b|(?:\d{1,3}, ?){6,}\d{1,3}")
_DIGITS = re.compile(r"(?<![\d.:])\d{7,15}(?!\d)")


def without_secrets(text: str) -> str:
    """Mask what may be a key or a phone number in a text that a process has printed."""
    masked = _LONG_WORD.sub(lambda word: "***" if _is_mixed(word[0]) else word[0], text)
    return _DIGITS.sub("***", _BYTES.sub("***", _HEX.sub("***", masked)))


def _is_mixed(word: str) -> bool:
    """Whether a word has capitals, small letters and digits, as keys in base64 do."""
    kinds = (str.isupper, str.islower, str.isdigit)
    return all(any(kind(letter) for letter in word) for kind in kinds)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
