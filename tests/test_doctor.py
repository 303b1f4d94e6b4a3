from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path

import pytest
import trio

from daemon.doctor import (
    check_clocks,
    check_directories,
    check_files_limit,
    check_node,
    check_port,
    check_secrets,
    check_settings,
    check_store,
    examine,
)
from daemon.findings import Finding, Verdict
from daemon.initialise import initialise, open_lease_store
from daemon.settings import ConnectorKind, Loaded, Settings, StoreKind

TOKEN = "a-token-that-nobody-may-see"


def settings_in(tmp_path: Path, **values: object) -> Settings:
    given: dict[str, object] = {
        "state_dir": tmp_path / "state",
        "shared_dir": tmp_path / "shared",
        "admin_token": TOKEN,
        "http_bind": "127.0.0.1:0",
        **values,
    }
    return Settings.model_validate(given)


def verdicts(findings: Iterable[Finding]) -> list[Verdict]:
    return [finding.verdict for finding in findings]


async def test_fresh_directory_is_fine_and_stays_untouched(tmp_path: Path) -> None:
    loaded = Loaded(settings_in(tmp_path), {}, ())
    findings = await examine(loaded)
    assert set(verdicts(findings)) == {Verdict.OK}, findings
    assert list(await trio.Path(tmp_path).iterdir()) == []


async def test_every_trouble_comes_with_what_to_do(tmp_path: Path) -> None:
    settings = settings_in(
        tmp_path, admin_token=None, store=StoreKind.FIRESTORE, connector=ConnectorKind.BAILEYS,
        node="no-such-node", firestore_emulator_host="127.0.0.1:1",
    )  # fmt: skip
    findings = await examine(Loaded(settings, {}, ("doubtful",)))
    bad = [finding for finding in findings if finding.verdict is not Verdict.OK]
    assert {"settings", "node", "shared store"} <= {finding.check for finding in bad}
    assert all(finding.advice for finding in bad)


async def test_store_with_a_lease_is_read(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    assert await initialise(settings, epoch=7)
    assert not await initialise(settings)
    finding = await check_store(settings)
    assert (finding.verdict, finding.found) == (Verdict.OK, "answers; lease released, epoch 7")


async def test_store_without_a_lease_fails_and_points_at_init(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    async with open_lease_store(settings):
        pass
    finding = await check_store(settings)
    assert finding.verdict is Verdict.FAIL
    assert "watchkeeper init" in finding.advice


async def test_broken_store_fails_and_is_left_alone(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    settings.shared_dir.mkdir()
    (settings.shared_dir / "shared.db").write_text("precious")
    finding = await check_store(settings)
    assert finding.verdict is Verdict.FAIL
    assert finding.advice
    assert (settings.shared_dir / "shared.db").read_text() == "precious"


def test_settings_that_would_not_start_fail(tmp_path: Path) -> None:
    loaded = Loaded(settings_in(tmp_path, admin_token=None), {}, ())
    assert Verdict.FAIL in verdicts(check_settings(loaded))


def test_secret_file_that_others_can_read_is_told(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN)
    path.chmod(0o644)
    settings = settings_in(tmp_path, admin_token_file=path)
    (open_to_all,) = check_secrets(settings)
    path.chmod(0o600)
    (private,) = check_secrets(settings)
    assert (open_to_all.verdict, private.verdict) == (Verdict.WARN, Verdict.OK)
    assert open_to_all.advice == f"chmod 600 {path}"
    assert TOKEN not in open_to_all.found


def test_state_directory_must_be_a_private_directory(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    settings.state_dir.mkdir(mode=0o700)
    settings.shared_dir.mkdir(mode=0o755)
    assert verdicts(check_directories(settings)) == [Verdict.OK, Verdict.WARN]
    settings.shared_dir.rmdir()
    settings.shared_dir.write_text("a file")
    assert verdicts(check_directories(settings)) == [Verdict.OK, Verdict.FAIL]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_that_cannot_be_written_fails(tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    tmp_path.chmod(0o500)
    try:
        assert verdicts(check_directories(settings)) == [Verdict.FAIL, Verdict.FAIL]
    finally:
        tmp_path.chmod(0o700)


def test_taken_port_is_a_warning_and_a_foreign_address_a_failure(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        (finding,) = check_port(settings_in(tmp_path, http_bind=bind))
    assert finding.verdict is Verdict.WARN
    # An address of the documentation's network: no host has it.
    (finding,) = check_port(settings_in(tmp_path, http_bind="192.0.2.1:8080"))
    assert finding.verdict is Verdict.FAIL


@pytest.mark.parametrize(
    ("version", "verdict"),
    [
        ("v24.1.0", Verdict.OK),
        ("v20.1.0", Verdict.WARN),
        ("v18.20.0", Verdict.FAIL),
        ("what", Verdict.FAIL),
    ],
)
def test_node_must_be_new_enough(tmp_path: Path, version: str, verdict: Verdict) -> None:
    node = tmp_path / "node"
    node.write_text(f"#!/bin/sh\necho {version}\n")
    node.chmod(0o755)
    settings = settings_in(tmp_path, connector=ConnectorKind.BAILEYS, node=str(node))
    assert verdicts(check_node(settings)) == [verdict]
    assert verdicts(check_node(settings_in(tmp_path, node="no-such-node"))) == []


def test_clock_and_open_files_are_looked_at(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, http_connections_max=100)
    assert [finding.check for finding in check_clocks(settings)] == ["clock"]
    assert [finding.check for finding in check_files_limit(settings)] == ["open files"]
