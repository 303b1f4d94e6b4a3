"""What a bridge process needs on this host: Node.js, and Baileys beside the files it runs.

Lives here: finding both, saying what is missing and what to do, and setting Baileys up.
Never lives here: starting a process (`process`).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).with_name("node")
"""The files that ship with this package: the program, and what `npm ci` is to fetch."""
PROGRAM = "main.mjs"
NODE_MAJOR_MIN = 20
NODE_MAJOR_GOOD = 24
"""From here on many accounts in a process cost little more than few (WHATSAPP.md, fact 14)."""
NODE_ANSWER_S = 10.0
SETUP_S = 600.0
"""How long npm may take; it fetches about 40 MB."""
INSTALLED = Path("node_modules") / ".package-lock.json"
"""Where npm writes down what it has installed."""
BAILEYS = "node_modules/baileys"
LEFT_OUT = frozenset({"optional", "dev", "devOptional", "peer"})
"""Marks of packages that are not installed."""
SHIPPED = ("*.mjs", "*.json")


class BridgeUnusable(Exception):
    """Something is missing on this host. The message says what, and what to do."""


@dataclass(frozen=True, slots=True)
class Node:
    """A Node.js program."""

    path: str
    version: str

    @property
    def major(self) -> int:
        """The number that matters."""
        return int(self.version.split(".")[0])


def find_node(program: str) -> Node:
    """Find a Node.js that is new enough; asks it for its version, for up to `NODE_ANSWER_S`.

    Raises `BridgeUnusable`.
    """
    advice = f"install Node.js {NODE_MAJOR_GOOD} or later, or set WATCHKEEPER_NODE to its path"
    path = shutil.which(program)
    if path is None:
        raise BridgeUnusable(f"{program!r} is not there: {advice}")
    path = str(Path(path).absolute())
    try:
        answer = subprocess.run(  # noqa: S603  # the program that the operator has set
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=NODE_ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BridgeUnusable(f"{path} did not run ({type(error).__name__}): {advice}") from error
    match = re.fullmatch(r"v?(\d+\.\d+\.\d+\S*)", answer.stdout.strip())
    if answer.returncode or match is None:
        raise BridgeUnusable(f"{path} does not say its version: {advice}")
    node = Node(path, match[1])
    if node.major < NODE_MAJOR_MIN:
        raise BridgeUnusable(
            f"{path} is version {node.version}, and {NODE_MAJOR_MIN} is the least: {advice}"
        )
    return node


def check_install(directory: Path) -> str:
    """See that `directory` holds this version's program, and the packages locked for it.

    Returns Baileys' version. Raises `BridgeUnusable`.
    """
    mend = f"run `{setup_command(directory)}`"
    locked = _packages(SOURCES / "package-lock.json")
    if BAILEYS not in locked:
        raise BridgeUnusable(
            f"this installation lacks the bridge's files ({SOURCES}): reinstall it"
        )
    for source in shipped_files():
        copy = directory / source.name
        if not copy.is_file():
            raise BridgeUnusable(f"there is no {source.name} in {directory}: {mend}")
        if directory != SOURCES and copy.read_bytes() != source.read_bytes():
            raise BridgeUnusable(f"{copy} is not this version's: {mend}")
    installed = _packages(directory / INSTALLED)
    if BAILEYS not in installed:
        raise BridgeUnusable(f"Baileys is not installed in {directory}: {mend}")
    for package, version in locked.items():
        if installed.get(package) != version:
            name = package.removeprefix("node_modules/")
            raise BridgeUnusable(
                f"{name} {version} is locked, and {installed.get(package, 'none')} is in "
                f"{directory}: {mend}"
            )
    return locked[BAILEYS]


def setup_command(directory: Path) -> str:
    """What to run so that `directory` is set up."""
    where = "" if directory == SOURCES else f" --directory {directory}"
    return f"watchkeeper setup-whatsapp{where}"


def set_up(directory: Path) -> str:
    """Put the program into `directory`, and Baileys, as locked, beside it; Baileys' version.

    No package's own scripts are run. Takes up to `SETUP_S`. Raises `BridgeUnusable`.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise BridgeUnusable("npm is not there: install it (it comes with Node.js)")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if directory != SOURCES:
            for source in shipped_files():
                shutil.copyfile(source, directory / source.name)
        done = subprocess.run(  # noqa: S603  # npm, as found on the PATH
            [
                npm,
                "ci",
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
                "--omit=dev",
                "--omit=optional",
            ],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SETUP_S,
            check=False,
        )
    except OSError as error:
        raise BridgeUnusable(
            f"{directory} cannot be written ({error.strerror}): choose another with "
            "`watchkeeper setup-whatsapp --directory DIR`, and set WATCHKEEPER_BRIDGE_DIR to it"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise BridgeUnusable(
            f"npm did not end within {SETUP_S:g} s: is its registry reachable?"
        ) from error
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise BridgeUnusable(f"npm ci failed in {directory}:\n{last}")
    return check_install(directory)


def shipped_files() -> list[Path]:
    """The files of the program, as this package ships them."""
    return sorted(path for pattern in SHIPPED for path in SOURCES.glob(pattern))


def _packages(lock: Path) -> dict[str, str]:
    """The version of each package that one of npm's lock files lists, those left out aside."""
    try:
        packages = json.loads(lock.read_text("utf-8"))["packages"]
        return {
            name: package["version"]
            for name, package in packages.items()
            if name and not LEFT_OUT & package.keys()
        }
    except (OSError, ValueError, KeyError):
        return {}
