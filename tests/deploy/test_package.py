"""The wheel in an empty environment: the command works, and the bridge's files came along."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import daemon
from daemon.bridge.install import SOURCES

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.system, pytest.mark.long]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, with the locked setuptools: nothing is written into the sources."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, source, cwd=directory)
    build = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(sys.executable, *build, "--wheel-dir", directory, source, cwd=directory)
    [built] = directory.glob("*.whl")
    return built


def test_the_wheel_is_of_this_version_and_holds_what_runs(wheel: Path) -> None:
    assert wheel.name == f"watchkeeper-{daemon.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {f"daemon/bridge/node/{path.name}" for path in SOURCES.glob("*.mjs")} <= names
    assert {"daemon/bridge/node/package.json", "daemon/bridge/node/package-lock.json"} <= names
    assert not [name for name in names if name.startswith(("tests/", "bench/"))]
    assert not [name for name in names if "node_modules" in name or "__pycache__" in name]
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_command_works_where_nothing_else_is_installed(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    run(*pip, "--require-hashes", "-r", ROOT / "requirements.lock", cwd=tmp_path)
    run(*pip, "--no-deps", wheel, cwd=tmp_path)
    command = tmp_path / "env" / "bin" / "watchkeeper"
    assert "setup-whatsapp" in run(command, "--help", cwd=tmp_path)
    run(command, "setup-whatsapp", "--directory", tmp_path / "bridge", cwd=tmp_path)
    assert (tmp_path / "bridge" / "node_modules" / "baileys").is_dir()
    assert (tmp_path / "bridge" / "main.mjs").is_file()
