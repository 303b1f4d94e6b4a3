"""The installed services under a real systemd: start, stop, hang, crash, refuse, reload."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bridge.node.install import skip_or_fail
from tests.deploy.host import Host, boot, missing, wait_until

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "deploy" / "systemd" / "install.sh"
PORTS = {"a": 8081, "b": 8082}
LISTENING = "0100007F:1F90"
"""127.0.0.1:8080, as the kernel shows it."""

pytestmark = [pytest.mark.system, pytest.mark.long]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host on which `make install-systemd` was run, with loopback for WhatsApp."""
    lacking = missing()
    if lacking is not None:
        skip_or_fail(lacking)
    work = tmp_path_factory.mktemp("host")
    installed = work / "installed"
    # The host's own Python: that of a version manager is not to be seen from in there.
    python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else shutil.which("python3")
    done = subprocess.run(
        ["make", "install-systemd", f"DESTDIR={installed}", f"PYTHON={python}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    config = installed / "etc" / "watchkeeper"
    (config / "watchkeeper.env").write_text(
        "WATCHKEEPER_CONNECTOR=loopback\nWATCHKEEPER_HTTP_BIND=127.0.0.1:8080\n"
        "WATCHKEEPER_LEASE_TTL_S=6\nWATCHKEEPER_LEASE_RENEW_S=1\nWATCHKEEPER_LEASE_ATTEMPT_S=1\n"
    )
    for name, port in PORTS.items():
        (config / f"{name}.env").write_text(f"WATCHKEEPER_HTTP_BIND=127.0.0.1:{port}\n")
    with boot(
        work,
        program=installed / "opt" / "watchkeeper",
        config=config,
        units=installed / "etc" / "systemd" / "system",
    ) as booted:
        yield booted


@pytest.fixture
def service(host: Host) -> Iterator[str]:
    """The service, started; `systemctl start` returns once it said READY."""
    host.systemctl("start", "watchkeeper")
    yield "watchkeeper.service"
    host.systemctl("stop", "watchkeeper")
    host.systemctl("reset-failed", "watchkeeper", check=False)


@pytest.fixture
def pair(host: Host) -> Iterator[None]:
    """Whatever becomes of them, neither of the two holds the lease when the next test begins."""
    yield
    for name in PORTS:
        host.systemctl("stop", f"watchkeeper@{name}")
        host.systemctl("reset-failed", f"watchkeeper@{name}", check=False)


def is_active_holder(host: Host, unit: str) -> bool:
    return host.show(unit, "StatusText").startswith("ACTIVE")


def daemon_of(host: Host, unit: str) -> int:
    """The process that serves: the newest Python of the service (the warden is older)."""
    found = host.processes(unit)
    return max(pid for pid, line in found.items() if "python" in line)


def test_a_started_service_is_ready_and_says_how_it_is(host: Host, service: str) -> None:
    assert host.systemctl("is-active", service) == "active"
    wait_until("ACTIVE in the status line", lambda: is_active_holder(host, service))
    assert re.fullmatch(
        r"ACTIVE, epoch \d+, 0 of 0 accounts connected", host.show(service, "StatusText")
    )
    assert host.show(service, "NRestarts") == "0"


def test_the_service_runs_as_nobody_special_and_writes_only_its_state(
    host: Host, service: str
) -> None:
    pid = daemon_of(host, service)
    status = host.run("cat", f"/proc/{pid}/status").stdout
    assert not re.search(r"^Uid:\s+0\b", status, re.MULTILINE)
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    modes = host.run("stat", "-c", "%a", "/var/lib/private/watchkeeper").stdout.strip()
    assert modes == "700"
    secrets = host.run("cat", "/etc/watchkeeper/secrets/admin-token").stdout.strip()
    seen = "".join(host.run("sh", "-c", f"cat /proc/{pid}/environ /proc/{pid}/cmdline").stdout)
    assert secrets not in seen


@pytest.mark.usefixtures("pair")
def test_stopping_one_of_two_services_hands_its_accounts_to_the_other(host: Host) -> None:
    host.systemctl("start", "watchkeeper@a")
    wait_until("a is ACTIVE", lambda: is_active_holder(host, "watchkeeper@a"))
    host.systemctl("start", "watchkeeper@b")
    # READY comes with PASSIVE; who holds the lease is known a moment later.
    held_by_a = "PASSIVE, lease held by a, epoch"
    wait_until(held_by_a, lambda: host.show("watchkeeper@b", "StatusText").startswith(held_by_a))
    account = {"accountId": "anna", "name": "Anna"}
    host.ask(PORTS["a"], "/api/whatsapp/accounts", method="POST", body=account)
    host.ask(PORTS["a"], "/api/loopback/scan/anna", method="POST")
    wait_until("the account is connected", lambda: status_of(host, "a", "anna") == "connected")

    host.systemctl("stop", "watchkeeper@a")
    took_s = wait_until("b is ACTIVE", lambda: is_active_holder(host, "watchkeeper@b"), 10)
    assert took_s < 5.0
    wait_until("the account is back", lambda: status_of(host, "b", "anna") == "connected")
    message = {"accountId": "anna", "to": "4915112345678", "message": "Still here"}
    answer = host.ask(PORTS["b"], "/api/whatsapp/send-message", method="POST", body=message)
    assert answer["success"] is True
    assert host.systemctl("is-failed", "watchkeeper@a", check=False) == "inactive"


def status_of(host: Host, instance: str, account_id: str) -> Any:
    listed = host.ask(PORTS[instance], "/api/whatsapp/accounts")["accounts"]
    return next(account["status"] for account in listed if account["accountId"] == account_id)


def test_a_hung_daemon_is_killed_and_started_again(host: Host, service: str) -> None:
    wait_until("ACTIVE", lambda: is_active_holder(host, service))
    pid = daemon_of(host, service)
    host.kill(signal.SIGSTOP, pid)
    took_s = wait_until(
        "another process serves",
        lambda: (
            pid not in host.processes(service)
            and int(host.show(service, "NRestarts")) >= 1
            and host.systemctl("is-active", service, check=False) == "active"
            and is_active_holder(host, service)
        ),
        90,
    )
    print(f"hung -> ACTIVE again: {took_s:.1f} s")


@pytest.mark.usefixtures("pair")
def test_a_hung_standby_is_killed_and_started_again(host: Host) -> None:
    for name in PORTS:
        host.systemctl("start", f"watchkeeper@{name}")
    standby = next(
        unit
        for unit in (f"watchkeeper@{name}.service" for name in PORTS)
        if host.show(unit, "StatusText").startswith("PASSIVE")
    )
    host.kill(signal.SIGSTOP, daemon_of(host, standby))
    took_s = wait_until(
        "the standby is back",
        lambda: (
            int(host.show(standby, "NRestarts")) >= 1
            and host.systemctl("is-active", standby, check=False) == "active"
        ),
        90,
    )
    print(f"standby hung -> ready again: {took_s:.1f} s")


def entries(host: Host, *matches: str) -> list[dict[str, Any]]:
    """What the journal has of them, oldest first."""
    told = host.run("journalctl", "--no-pager", "-o", "json", *matches).stdout
    return [json.loads(line) for line in told.splitlines()]


def test_the_journal_finds_lines_by_event_account_and_how_bad_they_are(
    host: Host, service: str
) -> None:
    wait_until("ACTIVE", lambda: is_active_holder(host, service))
    account = {"accountId": "bert", "name": "Bert"}
    host.ask(8080, "/api/whatsapp/accounts", method="POST", body=account)
    (created,) = entries(host, "WATCHKEEPER_ACCOUNT_ID=bert", "WATCHKEEPER_EVENT=account.created")
    assert created["MESSAGE"].startswith("account bert created [request ")
    assert created["PRIORITY"] == "6"
    assert int(created["WATCHKEEPER_EPOCH"]) >= 1
    assert created["WATCHKEEPER_REQUEST_ID"]
    # Journald's own word for whose it is, not ours.
    assert created["_SYSTEMD_UNIT"] == service
    assert created["SYSLOG_IDENTIFIER"] == "watchkeeper"

    host.kill(signal.SIGKILL, daemon_of(host, service))
    wait_until("started again", lambda: int(host.show(service, "NRestarts")) >= 1, 90)
    wait_until("ACTIVE again", lambda: is_active_holder(host, service), 90)
    errors = entries(host, "-u", service, "-p", "err")
    assert "warden.daemon_died" in {entry.get("WATCHKEEPER_EVENT") for entry in errors}
    warnings = entries(host, "-u", service, "-p", "warning")
    assert {entry["PRIORITY"] for entry in warnings} <= {"3", "4"}
    assert "account.created" not in {entry.get("WATCHKEEPER_EVENT") for entry in warnings}


def test_the_last_words_of_a_service_are_its_own_in_the_journal(host: Host, service: str) -> None:
    wait_until("ACTIVE", lambda: is_active_holder(host, service))
    invocation = host.show(service, "InvocationID")
    host.systemctl("stop", service)
    told = entries(host, "-u", service, f"_SYSTEMD_INVOCATION_ID={invocation}")
    events = [entry["WATCHKEEPER_EVENT"] for entry in told if "WATCHKEEPER_EVENT" in entry]
    assert "lease.released" in events
    # A refusal to start is the first and the last that a process says.
    taken = "import socket,time;s=socket.create_server(('127.0.0.1',8080));time.sleep(60)"
    host.run("systemd-run", "--unit=squatter", "/usr/bin/python3", "-c", taken)
    try:
        wait_until(
            "the port is taken", lambda: LISTENING in host.run("cat", "/proc/net/tcp").stdout
        )
        host.systemctl("start", service, check=False)
        wait_until(
            "the refusal",
            lambda: entries(host, "-u", service, "WATCHKEEPER_EVENT=instance.refused"),
        )
    finally:
        host.systemctl("stop", "squatter", check=False)
        host.systemctl("reset-failed", service, check=False)
        host.systemctl("start", service)


def test_a_killed_service_is_back_by_itself(host: Host, service: str) -> None:
    wait_until("ACTIVE", lambda: is_active_holder(host, service))
    before = host.processes(service)
    host.kill(signal.SIGKILL, *before)
    took_s = wait_until(
        "another process serves",
        lambda: (
            not before.keys() & host.processes(service).keys()
            and host.systemctl("is-active", service, check=False) == "active"
            and is_active_holder(host, service)
        ),
        90,
    )
    print(f"killed -> ACTIVE again: {took_s:.1f} s")


def test_a_reload_applies_the_log_level_and_refuses_what_cannot_work(
    host: Host, service: str
) -> None:
    settings = "/etc/watchkeeper/watchkeeper.env"
    pid = host.show(service, "MainPID")
    before = host.run("cat", settings).stdout
    try:
        host.write(settings, before + "WATCHKEEPER_LOG_LEVEL=debug\n", mode="644")
        host.systemctl("reload", service)
        wait_until(
            "the new level", lambda: "changed now: WATCHKEEPER_LOG_LEVEL" in host.log(service)
        )
        host.write(settings, before + "WATCHKEEPER_LEASE_TTL_S=2\n", mode="644")
        host.systemctl("reload", service)
        wait_until("the refusal", lambda: "refused, the former ones stay" in host.log(service))
        assert host.show(service, "MainPID") == pid
    finally:
        host.write(settings, before, mode="644")


def test_settings_that_cannot_work_fail_the_unit_once_and_the_log_says_what_to_do(
    host: Host,
) -> None:
    # 5 + 2 x 1 + 1.5 s do not fit into a ttl of 6 s.
    host.write(
        "/etc/systemd/system/watchkeeper.service.d/bad.conf",
        "[Service]\nEnvironment=WATCHKEEPER_LEASE_RENEW_S=5\n",
    )
    host.systemctl("daemon-reload")
    try:
        host.systemctl("start", "watchkeeper", check=False)
        wait_until(
            "failed", lambda: host.systemctl("is-failed", "watchkeeper", check=False) == "failed"
        )
        assert host.show("watchkeeper", "NRestarts") == "0"
        assert host.show("watchkeeper", "ExecMainStatus") == "2"
        assert "Raise WATCHKEEPER_LEASE_TTL_S" in host.log("watchkeeper")
    finally:
        host.run("rm", "-r", "/etc/systemd/system/watchkeeper.service.d")
        host.systemctl("daemon-reload")
        host.systemctl("reset-failed", "watchkeeper", check=False)
