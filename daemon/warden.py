"""The daemon's parent: it kills a daemon that outlives its lease, and gives the lease back for it.

Standard library only (`daemon.journald` is, too), one thread, no event loop of its own: whatever
wedges the daemon must not be able to wedge this. The daemon runs in a process group of its own, and
tells over a pipe until when it may run (`State`); when that moment passes without a later one, the
whole group gets SIGKILL, which stopped processes obey too. When the daemon dies while it holds the
lease, its group is killed and awaited first, and then a short-lived process releases the lease in
its name.

In a container this is process 1: signals are taken from its first instant on and forwarded, and
orphans are reaped. It never restarts the daemon: it ends with the daemon's exit code (128 + n for
signal n), and whoever started it decides.

Linux only: elsewhere a child cannot be made to die with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from daemon import journald

FORWARDED = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
IGNORED = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
"""A terminal's job control: a warden that Ctrl+Z stopped would kill nobody."""

GONE_S = 5.0
"""How long a killed group may take to be gone. Longer: it hangs in the kernel; nothing is released,
and the others wait for the ttl."""
RELEASE_S = 6.0
"""How long releasing the lease in the daemon's name may take."""
WAIT_STEP_S = 0.05
LINE_BYTES_MAX = select.PIPE_BUF
"""A line of this size is written to a pipe whole or not at all (pipe(7))."""
READ_BYTES = 64 * 1024

EVENTS = {
    "warden.killed": (
        "error",
        (
            "the daemon neither renewed its lease nor ended its term in time (epoch {epoch}): "
            "killed, with its bridges, so that no two act; look for what kept it from running"
        ),
    ),
    "warden.daemon_died": ("error", "the daemon was ended by {signal}"),
    "warden.released": (
        "warning",
        "the lease (epoch {epoch}) was released in the dead daemon's name: no ttl to wait for",
    ),
    "warden.not_released": (
        "error",
        (
            "the lease (epoch {epoch}) was not released in the dead daemon's name: {error}; the "
            "others wait for its ttl"
        ),
    ),
}
"""What the warden tells: event, level, sentence. Its lines look like the daemon's own."""


class State(NamedTuple):
    """What the daemon last told. Each line replaces all that was told before.

    `kill_at` is on CLOCK_BOOTTIME; `None`: nothing of a term runs. `lease` is what `release` needs
    to give the lease back; `None`: there is nothing to give back.
    """

    kill_at: float | None = None
    lease: Mapping[str, Any] | None = None
    instance: str = "-"
    json_lines: bool = False

    def encode(self) -> bytes:
        """One line, for the pipe."""
        return json.dumps(self._asdict(), separators=(",", ":")).encode() + b"\n"

    @classmethod
    def decode(cls, line: bytes) -> State:
        """Read what `encode` wrote."""
        return cls(**json.loads(line))


Serve = Callable[[int], int]
"""Runs the daemon; given the file descriptor on which it tells its state. Its exit code."""
Release = Callable[[Mapping[str, Any]], int]
"""Gives the lease back that `State.lease` describes. 0: released; 1: not the dead one's any more.
Anything else, and what it raises: it did not work."""

RELEASED, NOT_OURS, FAILED = 0, 1, 2


def keep(serve: Serve, release: Release) -> int:
    """Run `serve` in a child process and watch over it; the exit code to end with.

    Returns in the child too, with the child's own exit code.
    """
    signals = Signals()
    adopt_orphans()
    report, told = os.pipe()
    daemon = fork(signals)
    if daemon == 0:
        os.close(report)
        return serve(told)
    os.close(told)
    return Warden(signals, daemon, report, release).watch()


# --- what Python has no word for ---------------------------------------------------------------


PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
CLOCK_BOOTTIME = 7
TFD_TIMER_ABSTIME = 1

libc = ctypes.CDLL(None, use_errno=True)


class TimeSpec(ctypes.Structure):
    """`struct timespec`."""

    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class TimerSpec(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = (("interval", TimeSpec), ("value", TimeSpec))


def prctl(option: int, value: int | bytes) -> None:
    """Call prctl(2). Raises `OSError`."""
    argument = value if isinstance(value, bytes) else ctypes.c_ulong(value)
    if libc.prctl(ctypes.c_int(option), argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) was refused")


def boottime() -> float:
    """CLOCK_BOOTTIME in seconds: it goes on in a suspend. macOS has it under another name."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class BootTimer:
    """A timer on CLOCK_BOOTTIME, as a file descriptor that becomes readable (timerfd(2)).

    poll's own timeout stands still in a suspend; a lease does not.
    """

    def __init__(self) -> None:
        self.fd: int = libc.timerfd_create(CLOCK_BOOTTIME, os.O_CLOEXEC | os.O_NONBLOCK)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create was refused")

    def set(self, at: float | None) -> None:
        """Ring at `at`; at once when that is over, never when it is `None`."""
        # A value of 0 would disarm it.
        nanoseconds = 0 if at is None else max(1, int(at * 1e9))
        spec = TimerSpec(TimeSpec(0, 0), TimeSpec(*divmod(nanoseconds, 10**9)))
        if libc.timerfd_settime(self.fd, TFD_TIMER_ABSTIME, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime was refused")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, as process 1 is anyway."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_NAME, b"wk-warden")


class Signals:
    """Every signal that this process takes, in order, from a file descriptor.

    Made before anything else: process 1 has no default actions, so that what comes earlier is lost.
    """

    def __init__(self) -> None:
        self.fd, self._wakeup = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, _take)
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)

    def read(self) -> bytes:
        """Take the numbers of the signals that came since."""
        try:
            return os.read(self.fd, READ_BYTES)
        except BlockingIOError:
            return b""

    def forget(self) -> None:
        """In a child: take none of them any more."""
        signal.set_wakeup_fd(-1)
        for number in (*FORWARDED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.close(self.fd)
        os.close(self._wakeup)


def _take(number: int, frame: object) -> None:
    """Let the wakeup descriptor have it."""


def fork(signals: Signals) -> int:
    """Fork a child that leads a process group of its own and dies with this process.

    0 in the child, else the child's process id. The child stays in its parent's session and takes
    no keys from its terminal: Ctrl+C reaches the parent, and what that forwards, once.
    """
    parent = os.getpid()
    # Between the fork and `forget` the child would take the parent's signals.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    child = os.fork()
    if child == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            # It died before we asked to die with it.
            os.kill(os.getpid(), signal.SIGKILL)
        prctl(PR_SET_NAME, b"watchkeeper")
        os.setpgid(0, 0)
        signals.forget()
    else:
        # Both do it, so that the group is there whoever runs first. One that is dead has done it.
        with suppress(OSError):
            os.setpgid(child, child)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return child


def name_of(number: int) -> str:
    """A signal's name; real-time signals have none in Python."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def kill_group(group: int) -> bool:
    """Kill whoever is in a process group; false when nobody is left, not even unreaped."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


# --- the watch ---------------------------------------------------------------------------------


class Warden:
    """One daemon, from its fork to its end and, if need be, to its lease's release.

    Between calls: `_state` is the last that the daemon told, and the timer rings at its `kill_at`.
    """

    def __init__(self, signals: Signals, daemon: int, report: int, release: Release) -> None:
        self._signals = signals
        self._daemon = daemon
        self._report = report
        self._release = release
        self._state = State()
        self._unread = b""
        self._killed = False
        self._on_terminal = os.isatty(0)
        self._timer = BootTimer()
        os.set_blocking(report, False)

    def watch(self) -> int:
        """Watch until the daemon is dead and its lease cared for; the exit code to end with."""
        poll = select.poll()
        for descriptor in (self._signals.fd, self._report, self._timer.fd):
            poll.register(descriptor, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            # First what the daemon tells: if we did not run for a while, a later deadline is there.
            if self._report in ready and not self._read_report():
                poll.unregister(self._report)
            self._enforce_deadline()
            for number in self._signals.read():
                if number != signal.SIGCHLD:
                    self._forward(number)
            if self._reap():
                return self._end()

    def _read_report(self) -> bool:
        """Take over the last state that was told; false at the pipe's end."""
        while True:
            try:
                told = os.read(self._report, READ_BYTES)
            except BlockingIOError:
                return True
            *lines, self._unread = (self._unread + told).split(b"\n")
            if lines:
                self._state = State.decode(lines[-1])
                self._timer.set(None if self._killed else self._state.kill_at)
            if not told:
                return False

    def _enforce_deadline(self) -> None:
        """Kill the daemon and its bridges when their time is over."""
        kill_at = self._state.kill_at
        if self._killed or kill_at is None or boottime() < kill_at:
            return
        kill_group(self._daemon)
        self._killed = True
        self._timer.set(None)
        # First the deed, then the word: whoever reads our log may be stuck too.
        self._tell("warden.killed", epoch=self._epoch)

    def _forward(self, number: int) -> None:
        """Pass a signal on. The daemon is not reaped yet, so its number is still its own.

        A hang-up asks to read the settings again, unless there really was a terminal that is gone.
        """
        if number == signal.SIGHUP and self._on_terminal and not os.isatty(0):
            number = signal.SIGTERM
        os.kill(self._daemon, number)

    def _reap(self) -> bool:
        """Reap every dead child but the daemon; whether the daemon is dead."""
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return False
            if dead is None:
                return False
            if dead.si_pid == self._daemon:
                return True
            os.waitpid(dead.si_pid, 0)

    def _end(self) -> int:
        """Stop, then release: what is left of the group is killed and awaited first."""
        # Not reaped yet: until then nobody else can have got its number, or its group's.
        kill_group(self._daemon)
        status = os.waitstatus_to_exitcode(os.waitpid(self._daemon, 0)[1])
        self._read_report()
        if status < 0 and not self._killed:
            self._tell("warden.daemon_died", signal=name_of(-status))
        if self._state.lease is not None:
            if self._wait_gone():
                self._release_lease(self._state.lease)
            else:
                self._tell_not_released("a process of the daemon's cannot be killed")
        return 128 - status if status < 0 else status

    def _wait_gone(self) -> bool:
        """Wait until nobody is left in the daemon's group; false when it takes too long."""
        give_up_at = time.monotonic() + GONE_S
        while kill_group(self._daemon):
            if time.monotonic() >= give_up_at:
                return False
            self._wait_signal(WAIT_STEP_S)
            self._reap()
        return True

    def _wait_signal(self, at_most_s: float) -> None:
        """Wait for a dead child, or a moment. Other signals have nobody to go to any more."""
        poll = select.poll()
        poll.register(self._signals.fd, select.POLLIN)
        poll.poll(at_most_s * 1000)
        self._signals.read()

    def _release_lease(self, lease: Mapping[str, Any]) -> None:
        """Have a process of its own give the lease back, in bounded time."""
        releaser = fork(self._signals)
        if releaser == 0:
            os._exit(self._try_release(lease))
        give_up_at = time.monotonic() + RELEASE_S
        while (ended := os.waitpid(releaser, os.WNOHANG)) == (0, 0):
            if time.monotonic() >= give_up_at:
                kill_group(releaser)
                os.waitpid(releaser, 0)
                self._tell_not_released(f"no answer within {RELEASE_S:g} s")
                return
            self._wait_signal(WAIT_STEP_S)
        code = os.waitstatus_to_exitcode(ended[1])
        if code == RELEASED:
            self._tell("warden.released", epoch=self._epoch)
        elif code != NOT_OURS:
            self._tell_not_released("see above")

    def _try_release(self, lease: Mapping[str, Any]) -> int:
        """Release, in the releaser; never raises, for it must not come back into the watch."""
        try:
            return self._release(lease)
        except Exception as error:  # noqa: BLE001 - a bug, of which only the kind is told
            os.write(2, f"watchkeeper: releasing met a bug: {type(error).__name__}\n".encode())
            return FAILED

    @property
    def _epoch(self) -> object:
        return (self._state.lease or {}).get("epoch")

    def _tell_not_released(self, error: str) -> None:
        self._tell("warden.not_released", epoch=self._epoch, error=error)

    def _tell(self, event: str, **fields: object) -> None:
        tell(self._state, event, fields)


def tell(
    state: State,
    event: str,
    fields: Mapping[str, object],
    *,
    system_journal: str = journald.SOCKET,
) -> None:
    """Write a line to stderr that looks like the daemon's own; never waits, drops it instead.

    To systemd's journal where stderr leads there, as the daemon does.
    """
    level, sentence = EVENTS[event]
    now = time.time()
    stamp = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now % 1 * 1000):03}"
    message = sentence.format(**fields)
    if state.json_lines:
        told = {
            "ts": f"{stamp}+00:00",
            "level": level,
            "event": event,
            "message": message,
            "instance": state.instance,
            "fields": fields,
        }
        shown = line = json.dumps(told, ensure_ascii=False)
    else:
        moment = stamp.replace("T", " ")
        shown, line = message, f"{moment}Z {level.upper():<7} {state.instance} | {message}"
    if journald.is_behind(2):
        named = {"EVENT": event, "INSTANCE": state.instance, "EPOCH": fields.get("epoch")}
        if _tell_journal(system_journal, journald.encode(level, shown, named)):
            return
        line = journald.prefixed(level, line)
    poll = select.poll()
    poll.register(2, select.POLLOUT)
    if any(ready & select.POLLOUT for _, ready in poll.poll(0)):
        os.write(2, line.encode()[: LINE_BYTES_MAX - 1] + b"\n")


def _tell_journal(path: str, entry: bytes) -> bool:
    system = journald.Journald(path)
    try:
        return system.send(entry, wait=False)
    finally:
        # Often our last word: the journal must find the process that said it.
        system.close()
