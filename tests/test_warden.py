"""The warden, with real processes: what it forwards, whom it kills, what it gives back."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

from daemon import warden
from daemon.warden import RELEASE_S, State
from tests.warden_scenes import DEADLINE_S

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform != "linux", reason="the warden is Linux only"),
]

ROOT = Path(__file__).resolve().parents[1]
WAIT_S = 10.0
SCENE_S_MAX = 20.0
START_S_MAX = 0.5
"""Five times what is promised: these tests share their machine. The figure is in docs/design.md."""
RSS_BYTES_MAX = 20 * 2**20


class Scene:
    """A warden at work. `lines` are what it and its daemon have printed so far."""

    def __init__(self, process: subprocess.Popen[bytes], output: IO[bytes]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._output = output

    def wait_line(self, start: str) -> list[str]:
        """The words of the next line that begins so."""
        for raw in iter(self._output.readline, b""):
            self.lines.append(raw.decode().strip())
            if self.lines[-1].startswith(start):
                return self.lines[-1].split()
        raise AssertionError(f"no {start!r} in {self.lines}")

    def end(self) -> int:
        """The exit code, once everything is printed."""
        with suppress(OSError):  # a terminal whose other side is gone
            for raw in iter(self._output.readline, b""):
                self.lines.append(raw.decode().strip())
        return self.process.wait(WAIT_S)

    def has(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines)


@contextmanager
def scene(
    name: str, *before: str, stdin: int = subprocess.DEVNULL, **popen: object
) -> Iterator[Scene]:
    """A scene for the block; `before` is a command that starts it."""
    process = subprocess.Popen(
        [*before, sys.executable, "-m", "tests.warden_scenes", name],
        cwd=ROOT,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        **popen,  # type: ignore[call-overload]
    )
    assert process.stdout is not None
    # A line that never comes would be waited for for ever.
    giving_up = threading.Timer(SCENE_S_MAX, process.kill)
    giving_up.start()
    with process.stdout:
        try:
            yield Scene(process, process.stdout)
        finally:
            giving_up.cancel()
            # Its own death takes the daemon with it: that is tested below.
            process.kill()
            process.wait()


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def pid_inside(pid: int) -> int:
    """A process's number in its own namespace."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.findall(r"^NSpid:.*\s(\d+)$", status, re.MULTILINE)[0])


def wait_dead(pid: int) -> None:
    give_up_at = time.monotonic() + WAIT_S
    while alive(pid):
        assert time.monotonic() < give_up_at, f"process {pid} still runs"
        time.sleep(0.01)


# --- what it passes on


def test_the_exit_code_is_the_daemons() -> None:
    with scene("ends") as played:
        assert played.end() == 3
    assert played.lines == []


def test_a_daemon_that_a_signal_ended_gives_128_and_the_signal() -> None:
    with scene("listens_to_nothing") as played:
        played.wait_line("ready")
        played.process.send_signal(signal.SIGTERM)
        assert played.end() == 128 + signal.SIGTERM
    assert played.has("ended by SIGTERM")


def test_a_signal_without_a_name_is_one_too() -> None:
    with scene("listens_to_nothing") as played:
        daemon = int(played.wait_line("ready")[1])
        os.kill(daemon, signal.SIGRTMIN + 3)
        assert played.end() == 128 + signal.SIGRTMIN + 3
    assert played.has(f"ended by signal {signal.SIGRTMIN + 3}")


def test_signals_are_forwarded_each_once_and_in_order() -> None:
    with scene("listens") as played:
        played.wait_line("ready")
        for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGTERM"):
            played.process.send_signal(signal.Signals[name])
            played.wait_line(name)
        assert played.end() == 0
    assert played.lines[1:] == ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGTERM"]


def test_the_daemon_leads_a_group_of_its_own_below_the_warden() -> None:
    with scene("listens") as played:
        _, daemon, parent, group = played.wait_line("ready")
        assert int(parent) == played.process.pid
        assert daemon == group


def test_ctrl_c_in_a_terminal_reaches_the_daemon_once() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.warden_scenes", "listens"],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        # A session whose terminal this is: its foreground group is the warden's.
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    with os.fdopen(ours, "r+b", buffering=0) as terminal:
        played = Scene(process, terminal)
        played.wait_line("ready")
        terminal.write(b"\x03")
        played.wait_line("^CSIGINT")
        # Ctrl+Z: neither is stopped, and the next keys are still heard.
        terminal.write(b"\x1a")
        terminal.write(b"\x03")
        assert played.end() == 0
    assert sum("SIGINT" in line for line in played.lines) == 2


def test_a_terminal_that_is_closed_asks_for_a_drain() -> None:
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    with scene("listens", stdin=theirs, preexec_fn=take_terminal) as played:
        os.close(theirs)
        played.wait_line("ready")
        # While it is there, a hang-up is what somebody sent.
        played.process.send_signal(signal.SIGHUP)
        played.wait_line("SIGHUP")
        os.close(ours)
        played.wait_line("SIGTERM")
        played.process.send_signal(signal.SIGTERM)
        assert played.end() == 0


def test_orphans_are_reaped() -> None:
    with scene("leaves_orphans") as played:
        orphan = int(played.wait_line("orphan")[1])
        played.wait_line("ready")
        assert parent_of(orphan) == played.process.pid
        wait_dead(orphan)
        give_up_at = time.monotonic() + WAIT_S
        while Path(f"/proc/{orphan}").exists():
            assert time.monotonic() < give_up_at, "it is a zombie"
            time.sleep(0.01)
        assert alive(played.process.pid)


NEW_PIDS = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run([*NEW_PIDS, "true"], capture_output=True, check=False).returncode != 0,
    reason="no right to make a process namespace",
)
def test_as_process_1_of_a_container_it_takes_signals_and_orphans() -> None:
    with scene("leaves_orphans", *NEW_PIDS) as played:
        orphan = int(played.wait_line("orphan")[1])
        _, daemon, parent, _ = played.wait_line("ready")
        assert int(parent) == 1
        (init,) = children(played.process.pid)
        assert {pid_inside(child) for child in children(init)} == {int(daemon), orphan}
        give_up_at = time.monotonic() + WAIT_S
        while len(children(init)) > 1:
            assert time.monotonic() < give_up_at, "the orphan is a zombie"
            time.sleep(0.01)
        # What has no handler in process 1 is not even delivered.
        for _ in range(2):
            os.kill(init, signal.SIGTERM)
            played.wait_line("SIGTERM")
        assert played.end() == 0


# --- whom it kills


def test_a_wedged_daemon_is_killed_at_its_deadline_and_its_lease_released() -> None:
    with scene("spins") as played:
        held_at = float(played.wait_line("holds")[1])
        played.wait_line("release 7")
        took_s = time.monotonic() - held_at
        assert played.end() == 128 + signal.SIGKILL
    assert DEADLINE_S - 0.05 < took_s < DEADLINE_S + 0.5
    assert played.has("neither renewed its lease nor ended its term in time.*epoch 7")
    assert played.has("nobody is left")
    assert played.has(r"released in the dead daemon's name")
    assert not played.has("ended by")


def test_a_stopped_daemon_is_killed_at_its_deadline_and_its_bridge_too() -> None:
    with scene("stops") as played:
        bridge = int(played.wait_line("bridge")[1])
        assert played.end() == 128 + signal.SIGKILL
    assert not alive(bridge)
    assert not played.has("went on")
    assert played.has("release 7 nobody is left")


def test_a_daemon_that_renews_or_ends_its_term_is_left_alone() -> None:
    with scene("renews") as played:
        assert played.end() == 0
    assert played.lines == ["holds"]


def test_later_deadlines_are_read_before_an_earlier_one_is_enforced() -> None:
    """A warden that did not run meanwhile must not kill for a deadline that was moved."""
    with scene("renews") as played:
        played.wait_line("holds")
        time.sleep(DEADLINE_S / 8)
        played.process.send_signal(signal.SIGSTOP)
        # Stopped past the deadline that it knew, while the daemon renews.
        time.sleep(DEADLINE_S * 1.2)
        played.process.send_signal(signal.SIGCONT)
        assert played.end() == 0
    assert played.lines == ["holds"]


def test_nothing_of_the_daemon_outlives_it_even_when_it_ends_in_order() -> None:
    with scene("ends_before_its_bridge") as played:
        bridge = int(played.wait_line("bridge")[1])
        assert played.end() == 0
    assert not alive(bridge)


# --- what it gives back


def test_a_crash_releases_the_lease_when_nothing_of_the_daemon_runs_any_more() -> None:
    with scene("leaves_a_stubborn_bridge") as played:
        bridge = int(played.wait_line("bridge")[1])
        assert played.end() == 128 + signal.SIGKILL
    assert not alive(bridge)
    assert played.has("release 7 nobody is left")
    assert played.has("ended by SIGKILL")


def test_a_drain_without_an_answered_release_is_made_good() -> None:
    with scene("ends_without_a_release") as played:
        assert played.end() == 0
    assert played.has("release 7")


def test_a_lease_that_was_released_is_not_released_again() -> None:
    with scene("dies_after_it_released") as played:
        assert played.end() == 128 + signal.SIGKILL
    assert not played.has("release")


def test_anothers_lease_is_left_alone_without_a_word() -> None:
    with scene("dies_of_another_epoch") as played:
        played.end()
    assert not played.has("in the dead daemon's name")


def test_a_release_that_fails_is_told_and_the_exit_code_stays() -> None:
    with scene("dies_unreleasable") as played:
        assert played.end() == 128 + signal.SIGKILL
    assert played.has("releasing met a bug: RuntimeError")
    assert played.has("not released in the dead daemon's name")
    assert not played.has("the store is away")


@pytest.mark.long
def test_a_release_that_hangs_is_bounded() -> None:
    with scene("dies_and_the_release_hangs") as played:
        began = time.monotonic()
        played.wait_line("release")
        assert played.end() == 128 + signal.SIGKILL
        took_s = time.monotonic() - began
    assert took_s < RELEASE_S + 2
    assert played.has(f"no answer within {RELEASE_S:g} s")


# --- its own death, and what it takes


def test_kill_9_of_the_warden_ends_the_daemon() -> None:
    with scene("listens_to_nothing") as played:
        daemon = int(played.wait_line("ready")[1])
        played.process.kill()
        wait_dead(daemon)


def test_kill_9_of_the_warden_ends_the_bridges_too_with_what_they_read() -> None:
    with scene("has_a_bridge") as played:
        bridge = int(played.wait_line("bridge")[1])
        assert alive(bridge)
        played.process.kill()
        wait_dead(bridge)


def test_a_child_whose_parent_died_before_it_could_ask_does_not_live() -> None:
    # The daemon's first look at its parent finds another one than the warden.
    code = (
        "import os\n"
        "from daemon import warden\n"
        "os.getppid = lambda: 1\n"
        "child = warden.fork(warden.Signals())\n"
        "if child == 0: os._exit(0)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, timeout=WAIT_S
    )
    assert int(done.stdout) == -signal.SIGKILL


def test_it_is_light() -> None:
    starts: list[float] = []
    status = ""
    while len(starts) < 5:
        began = time.monotonic()
        with scene("listens") as played:
            played.wait_line("ready")
            starts.append(time.monotonic() - began)
            status = Path(f"/proc/{played.process.pid}/status").read_text()
    resident = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    assert resident is not None
    print(f"warden: {min(starts):.3f} s to its daemon's first line, {resident[1]} KiB")
    assert int(resident[1]) * 1024 < RSS_BYTES_MAX
    assert min(starts) < START_S_MAX


def test_run_reaches_the_warden_before_anything_heavy_is_imported() -> None:
    code = (
        "import sys\n"
        "import daemon.__main__\n"
        "import daemon.warden\n"
        "own = ('daemon', 'daemon.__main__', 'daemon.warden', 'daemon.journald')\n"
        "foreign = {n for n in sys.modules if n.split('.')[0] not in sys.stdlib_module_names}\n"
        "print(sorted(n for n in foreign if n not in own and not n.startswith('__')))\n"
    )
    # Isolated from what this environment's site-packages import by themselves.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, check=True
    )
    assert done.stdout.decode().strip() == "[]"


# --- what it is told, and what it tells


def test_a_state_survives_the_pipe() -> None:
    state = State(12.5, {"epoch": 3, "path": "/ä"}, "a", json_lines=True)
    assert State.decode(state.encode()) == state
    assert state.encode().endswith(b"\n")
    assert b"\n" not in state.encode()[:-1]


def test_a_line_in_json_has_the_daemons_fields(capfd: pytest.CaptureFixture[str]) -> None:
    warden.tell(State(instance="a", json_lines=True), "warden.released", {"epoch": 4})
    (line,) = capfd.readouterr().err.splitlines()
    assert re.fullmatch(
        r'\{"ts": "\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", "level": "warning", '
        r'"event": "warden.released", "message": ".*", "instance": "a", "fields": \{"epoch": 4\}\}',
        line,
    )
