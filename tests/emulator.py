"""The Firestore emulator for tests: found, started once a session, ended with its process group.

`firestore_emulator` is its `host:port`. Tests isolate themselves by `new_project()`. Tests that
stop, kill or restart an emulator start one of their own with `start_emulator`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from tests.ports import free_port

START_S_MAX = 60.0
JAR = Path("platform/cloud-firestore-emulator/cloud-firestore-emulator.jar")
MAIN_CLASS = "com.google.cloud.datastore.emulator.firestore.CloudFirestore"
MISSING = (
    "no Firestore emulator: install Java and the Google Cloud CLI with its component "
    "cloud-firestore-emulator, or set WATCHKEEPER_TEST_EMULATOR=host:port"
)


def new_project() -> str:
    """A project id that no other test uses: emulated projects share nothing."""
    return f"test-{uuid.uuid4().hex[:16]}"


@dataclass(frozen=True)
class Place:
    """Where an emulator runs: this host, or whatever a subclass knows how to reach."""

    address: str = "127.0.0.1"
    within: tuple[str, ...] = ()
    """What a command begins with in order to run there."""

    def connect(self, port: int) -> socket.socket:
        """Connect to what listens there, and block meanwhile. Raises `OSError`."""
        return socket.create_connection((self.address, port), timeout=1)


HERE = Place()


class Emulator:
    """A Firestore emulator process on a port of its own. Its data dies with the process."""

    def __init__(self, command: list[str], port: int, place: Place = HERE) -> None:
        self.host = f"{place.address}:{port}"
        self._command = [*place.within, *command]
        self._port = port
        self._place = place
        self._process: subprocess.Popen[bytes] | None = None
        # Closed by `close`; a pipe would fill up, for nobody reads it meanwhile.
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - see above

    def start(self) -> None:
        """Start it, and return when its port answers."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        give_up_at = time.monotonic() + START_S_MAX
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > give_up_at:
                self._log.seek(0)
                words = self._log.read().decode(errors="replace")[-2000:]
                self.kill()
                raise RuntimeError(f"the Firestore emulator did not start:\n{words}")
            time.sleep(0.05)

    def pause(self) -> None:
        """SIGSTOP: connections stay open, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to the whole group; connections are reset, the data is gone."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        self._log.close()

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None, "the emulator is not running"
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _answers(self) -> bool:
        with suppress(OSError), self._place.connect(self._port):
            return True
        return False


def emulator_command(port: int, address: str = HERE.address) -> list[str] | None:
    """How to start the emulator on this machine, `None` where it is not installed."""
    java, jar = shutil.which("java"), emulator_jar()
    if java is None or jar is None:
        return None
    # Without gcloud's wrapper it starts in half the time; a JVM of modest appetite, for several may
    # run beside each other.
    flags = ["-Duser.language=en", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC"]
    start = [java, *flags, "-Xmx1g", "-cp", str(jar), MAIN_CLASS]
    return [*start, f"--host={address}", f"--port={port}"]


def emulator_jar() -> Path | None:
    """Where the emulator is on this machine, `None` where it is not installed."""
    return next((root / JAR for root in _sdk_roots() if (root / JAR).is_file()), None)


def _sdk_roots() -> Iterator[Path]:
    if configured := os.environ.get("CLOUDSDK_ROOT_DIR"):
        yield Path(configured)
    if gcloud := shutil.which("gcloud"):
        yield Path(gcloud).resolve().parent.parent
    yield Path("/usr/lib/google-cloud-sdk")
    yield Path("/usr/share/google-cloud-sdk")
    yield Path.home() / "google-cloud-sdk"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the marked tests where there is no emulator; in CI fail them.

    From here and not from a fixture: pytest then reports all of them in one line.
    """
    if item.get_closest_marker("emulator") is None or emulator_command(0) is not None:
        return
    if os.environ.get("WATCHKEEPER_TEST_EMULATOR") and "own_emulator" not in _fixtures_of(item):
        return
    if os.environ.get("CI"):
        pytest.fail(MISSING, pytrace=False)
    pytest.skip(MISSING)


def _fixtures_of(item: pytest.Item) -> tuple[str, ...]:
    names: tuple[str, ...] = tuple(getattr(item, "fixturenames", ()))
    return names


@contextmanager
def start_emulator(*flags: str, place: Place = HERE) -> Iterator[Emulator]:
    """An emulator of one's own, with these flags. Raises `RuntimeError` where there is none."""
    port = free_port()
    command = emulator_command(port, place.address)
    if command is None:
        raise RuntimeError(MISSING)
    emulator = Emulator([*command, *flags], port, place)
    try:
        emulator.start()
        yield emulator
    finally:
        emulator.close()


@pytest.fixture(scope="session")
def firestore_emulator() -> Iterator[str]:
    """The session's emulator, as `host:port`."""
    if host := os.environ.get("WATCHKEEPER_TEST_EMULATOR"):
        yield host
        return
    with start_emulator() as emulator:
        yield emulator.host


@pytest.fixture(scope="module")
def own_emulator() -> Iterator[Emulator]:
    """An emulator that the tests of one module may stop, kill and restart."""
    with start_emulator() as emulator:
        yield emulator
