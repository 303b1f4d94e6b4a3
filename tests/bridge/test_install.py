"""What is missing on a host is named, with what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.bridge.install import (
    INSTALLED,
    PROGRAM,
    SOURCES,
    BridgeUnusable,
    check_install,
    find_node,
    set_up,
    shipped_files,
)

WANTED = json.loads((SOURCES / "package.json").read_text())["dependencies"]["baileys"]


def node_that_says(tmp_path: Path, text: str) -> str:
    node = tmp_path / "node"
    node.write_text(f"#!/bin/sh\necho {text}\n")
    node.chmod(0o755)
    return str(node)


def copy_program(directory: Path, *, installed: bool = True) -> None:
    """What `set_up` leaves behind, as far as it is looked at."""
    directory.mkdir()
    for source in shipped_files():
        shutil.copyfile(source, directory / source.name)
    if installed:
        (directory / "node_modules").mkdir()
        shutil.copyfile(SOURCES / "package-lock.json", directory / INSTALLED)


def test_a_node_is_found_with_its_version(tmp_path: Path) -> None:
    node = find_node(node_that_says(tmp_path, "v24.3.1"))
    assert (node.version, node.major) == ("24.3.1", 24)
    assert Path(node.path).is_absolute()


@pytest.mark.parametrize(
    ("says", "why"),
    [("v18.20.0", "18.20.0, and 20 is the least"), ("hello", "does not say its version")],
)
def test_a_node_that_will_not_do_is_refused_with_advice(
    tmp_path: Path, says: str, why: str
) -> None:
    with pytest.raises(BridgeUnusable, match=f"{why}.*install Node.js 24"):
        find_node(node_that_says(tmp_path, says))


def test_a_node_that_is_not_there_is_refused_with_advice() -> None:
    with pytest.raises(BridgeUnusable, match="'no-such-node' is not there: install"):
        find_node("no-such-node")


def test_a_complete_directory_is_accepted_with_its_baileys(tmp_path: Path) -> None:
    copy_program(tmp_path / "bridge")
    assert check_install(tmp_path / "bridge") == WANTED


def test_what_is_missing_in_a_directory_is_named_with_the_command_to_run(tmp_path: Path) -> None:
    directory = tmp_path / "bridge"
    advice = f"run `watchkeeper setup-whatsapp --directory {directory}`"
    with pytest.raises(BridgeUnusable, match=rf"no \S+\.mjs in .*{advice}"):
        check_install(directory)
    copy_program(directory, installed=False)
    with pytest.raises(BridgeUnusable, match=f"Baileys is not installed in .*{advice}"):
        check_install(directory)
    shutil.rmtree(directory)
    copy_program(directory)
    lock = (directory / INSTALLED).read_text()
    (directory / INSTALLED).write_text(lock.replace(f'"version": "{WANTED}"', '"version": "6.0.0"'))
    with pytest.raises(
        BridgeUnusable, match=f"baileys {WANTED} is locked, and 6.0.0 is .*{advice}"
    ):
        check_install(directory)


def test_a_program_of_another_version_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "bridge"
    copy_program(directory)
    (directory / "line.mjs").write_text("// an older one\n")
    with pytest.raises(BridgeUnusable, match=r"line\.mjs is not this version's: run"):
        check_install(directory)


def test_every_module_of_the_program_ships() -> None:
    shipped = {path.name for path in shipped_files()}
    assert {PROGRAM, "package.json", "package-lock.json"} <= shipped
    below = {
        path.name
        for path in SOURCES.rglob("*")
        if path.is_file() and "node_modules" not in path.parts
    }
    assert below == shipped, "package data and `set_up` take the directory's own files only"


@pytest.mark.node
@pytest.mark.long
def test_a_directory_elsewhere_is_set_up_as_locked(tmp_path: Path) -> None:
    directory = tmp_path / "prefix" / "bridge"
    assert set_up(directory) == WANTED
    assert check_install(directory) == WANTED


def test_a_directory_that_cannot_be_written_is_named_with_another_way(tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("without npm the first complaint is another")
    (tmp_path / "file").write_text("")
    with pytest.raises(BridgeUnusable, match=r"cannot be written .*WATCHKEEPER_BRIDGE_DIR"):
        set_up(tmp_path / "file" / "bridge")


def run_command(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daemon", *arguments],
        env={"PATH": os.environ["PATH"], **settings},
        cwd=SOURCES.parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.system
def test_an_instance_without_baileys_does_not_start_and_says_what_to_run(tmp_path: Path) -> None:
    ended = run_command(
        "run",
        WATCHKEEPER_ADMIN_TOKEN="a-token-for-this-test",
        WATCHKEEPER_HTTP_BIND="127.0.0.1:0",
        WATCHKEEPER_STATE_DIR=str(tmp_path / "state"),
        WATCHKEEPER_SHARED_DIR=str(tmp_path / "shared"),
        WATCHKEEPER_CONNECTOR="baileys",
        WATCHKEEPER_NODE=node_that_says(tmp_path, "v24.0.0"),
        WATCHKEEPER_BRIDGE_DIR=str(tmp_path / "nothing"),
    )
    assert ended.returncode == 2
    refusal = ended.stderr.splitlines()[-1]
    assert "not started: there is no" in refusal
    assert f"run `watchkeeper setup-whatsapp --directory {tmp_path / 'nothing'}`" in refusal


def test_setting_up_without_node_says_what_to_install() -> None:
    ended = run_command("setup-whatsapp", WATCHKEEPER_NODE="no-such-node")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "'no-such-node' is not there: install Node.js" in ended.stderr
    assert "Traceback" not in ended.stderr
