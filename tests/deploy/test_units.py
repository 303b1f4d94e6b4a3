"""The unit files: what systemd says of them, and the numbers they share with the settings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from daemon.main import EXIT_SETTINGS
from daemon.settings import Settings

UNITS = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
NAMES = ("watchkeeper.service", "watchkeeper@.service")
EXPOSURE_MAX = 1.5
ENV_FILE = "Environment=WATCHKEEPER_ENV_FILE="
COMMON = "@SYSCONFDIR@/watchkeeper/watchkeeper.env"

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None and not os.environ.get("CI"),
    reason="no systemd-analyze: install systemd",
)


@pytest.fixture(params=NAMES)
def installed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit as the installation writes it, with a program that exists."""
    name: str = request.param
    content = (UNITS / name).read_text()
    content = content.replace("@PREFIX@/bin/watchkeeper", "/bin/true")
    path = tmp_path / name.replace("@.", "@a.")
    path.write_text(content.replace("@PREFIX@", "/opt/x").replace("@SYSCONFDIR@", "/etc"))
    return path


def settings_of(name: str) -> list[str]:
    lines = (UNITS / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def value_of(name: str, key: str) -> str:
    found = [line.partition("=")[2] for line in settings_of(name) if line.startswith(key + "=")]
    assert len(found) == 1, f"{key} in {name}: {found}"
    return found[0]


@needs_analyze
def test_systemd_knows_every_line_of_a_unit(installed: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--recursive-errors=yes", "--man=no", str(installed)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_analyze
def test_a_service_is_exposed_to_little(installed: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", str(installed)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= EXPOSURE_MAX, done.stdout


def test_the_two_units_differ_only_in_whose_they_are() -> None:
    single, template = (settings_of(name) for name in NAMES)
    assert [line for line in single if line not in template] == [
        "Description=Watchkeeper, keeps WhatsApp accounts connected through redeploys",
        f"{ENV_FILE}{COMMON}",
        "Environment=WATCHKEEPER_STATE_DIR=%S/watchkeeper/instance",
    ]
    assert [line for line in template if line not in single] == [
        "Description=Watchkeeper instance %i, keeps WhatsApp accounts connected through redeploys",
        f"{ENV_FILE}{COMMON}:@SYSCONFDIR@/watchkeeper/%i.env",
        "Environment=WATCHKEEPER_INSTANCE_NAME=%i",
        "Environment=WATCHKEEPER_STATE_DIR=%S/watchkeeper/%i",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_is_given_the_time_that_a_drain_may_take(name: str) -> None:
    assert float(value_of(name, "TimeoutStopSec")) > Settings().stop_s()


@pytest.mark.parametrize("name", NAMES)
def test_a_hung_holder_is_left_to_its_warden_which_releases_the_lease(name: str) -> None:
    assert float(value_of(name, "WatchdogSec")) > Settings().lease_timing().ttl_s


@pytest.mark.parametrize("name", NAMES)
def test_only_settings_that_cannot_work_keep_a_service_from_being_restarted(name: str) -> None:
    assert value_of(name, "Restart") == "always"
    assert value_of(name, "StartLimitIntervalSec") == "0"
    assert int(value_of(name, "RestartPreventExitStatus")) == EXIT_SETTINGS
