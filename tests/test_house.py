"""The house: lock files, the Makefile, and what must not be committed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>\S+) \\$", re.MULTILINE)
LOCKS = ("requirements.lock", "requirements-dev.lock")


def committed() -> list[Path]:
    """What is in the checkout and not ignored; every file, where this is not a checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / line for line in listed.stdout.splitlines()]
    return [path for path in paths if path.is_file()]


def pins(lock: str) -> dict[str, str]:
    return dict(PIN.findall((ROOT / lock).read_text(encoding="utf-8")))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted(extra: str | None) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {normal(re.split(r"[\[<>=~! ;]", line)[0]) for line in lines}


# --- lock files ------------------------------------------------------------------------------


ADDRESS = re.compile(r"[a-z]+://|--(extra-)?index-url|--find-links")


@pytest.mark.parametrize("lock", LOCKS)
def test_no_lock_file_names_an_address(lock: str) -> None:
    assert ADDRESS.findall((ROOT / lock).read_text(encoding="utf-8")) == []


def test_no_node_lock_file_names_an_address_and_each_has_integrity() -> None:
    for path in committed():
        if path.name != "package-lock.json":
            continue
        packages = json.loads(path.read_text(encoding="utf-8"))["packages"]
        for name, package in packages.items():
            # Whom to thank, for people: npm fetches nothing from there.
            package.pop("funding", None)
            assert not ADDRESS.search(json.dumps(package)), f"{path}: {name}"
            assert not name or package.get("link") or "integrity" in package, f"{path}: {name}"


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_hashes(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    entries = re.findall(r"^\S+==\S+.*(?:\n {4}--hash=sha256:[0-9a-f]{64}.*)*", text, re.MULTILINE)
    assert len(entries) == len(pins(lock)) > 20
    assert [entry for entry in entries if "--hash=sha256:" not in entry] == []


def test_the_lock_files_hold_what_pyproject_asks_for() -> None:
    base, dev = ({normal(name) for name in pins(lock)} for lock in LOCKS)
    assert wanted(None) - base == set()
    assert wanted("dev") - dev == set()
    assert "setuptools" in base, "the editable install builds with the locked one"


def test_the_two_lock_files_agree() -> None:
    base, dev = (pins(lock) for lock in LOCKS)
    assert {name: version for name, version in base.items() if dev.get(name) != version} == {}


def test_a_package_with_compiled_code_is_locked_for_more_than_one_platform() -> None:
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    cryptography = text.split("\ncryptography==")[1].split("# via")[0]
    # One hash would be the one wheel that this lock file happened to be made with.
    assert cryptography.count("--hash") > 10


# --- what must not be committed ------------------------------------------------------------------


def test_no_private_key_token_or_state_is_committed() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in committed()
        if path.relative_to(ROOT).parts[0] in (".run", ".venv", ".watchkeeper")
        or path.name == ".env"
        or b"PRIVATE KEY-----" in path.read_bytes().replace(b'b"PRIVATE KEY-----"', b"")
    ]
    assert not wrong


# --- the Makefile ----------------------------------------------------------------------------


def make(*arguments: str) -> str:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        # Without what a `make test ARGS=…` above us handed down.
        env={k: v for k, v in os.environ.items() if k not in {"ARGS", "MAKEFLAGS", "MAKELEVEL"}},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_make_help_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = set(text.split(".PHONY:")[1].split())
    shown = set(re.findall(r"^  make (\S+)", make("help"), re.MULTILINE))
    assert shown == phony


def test_every_file_and_module_that_the_makefile_names_is_there() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    scripts = re.findall(r"(?:deploy/dev/\w+\.sh|\.ci/run)", text)
    modules = re.findall(r"-m ((?:daemon|bench)[\w.]*)", text)
    assert [name for name in scripts if not (ROOT / name).stat().st_mode & 0o100] == []
    missing = []
    for module in modules:
        place = ROOT / module.replace(".", "/")
        if not (place.with_suffix(".py").is_file() or (place / "__main__.py").is_file()):
            missing.append(module)
    assert not missing


def test_what_make_test_leaves_out_is_what_make_test_long_runs() -> None:
    recipes = make("--always-make", "--dry-run", "test", "test-long")
    assert re.search(r"^deploy/dev/test\.sh *$", recipes, re.MULTILINE)
    script = (ROOT / "deploy" / "dev" / "test.sh").read_text(encoding="utf-8")
    runs = [re.findall(r'pytest -m ("[a-z ]+"|[a-z]+) (.*)', text) for text in (script, recipes)]
    assert [{mark for mark, _rest in of} for of in runs] == [{'"not long"'}, {"long"}]
    asked_for, with_node, others = (rest for _mark, rest in runs[0])
    assert asked_for.startswith('"$@"')
    assert with_node.startswith("$with_node ")
    assert others.startswith("$(printf ' --ignore=%s' $with_node)")


# --- the shell scripts -----------------------------------------------------------------------


SCRIPTS = sorted((ROOT / "deploy" / "dev").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses_and_stops_at_the_first_failure(script: Path) -> None:
    assert subprocess.run(["sh", "-n", script], check=False).returncode == 0
    assert "\nset -eu\n" in script.read_text(encoding="utf-8")


def test_a_python_that_is_too_old_is_refused_with_what_to_do(tmp_path: Path) -> None:
    old = tmp_path / "bin" / "python3"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    refused = subprocess.run(
        ["/bin/sh", ROOT / "deploy/dev/setup.sh", "requirements.lock"],
        cwd=tmp_path,
        env={"PATH": str(old.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 1
    assert "Python 3.11 or later" in refused.stderr
    assert "make PYTHON=" in refused.stderr
