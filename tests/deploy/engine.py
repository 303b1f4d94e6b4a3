"""Containers without an engine: podman with runc, and buildah, on a storage of their own.

No base image can be fetched where the tests run, so stand-ins take the names that the Dockerfile
asks for: a minimal Debian with its Python, and the same with this machine's Node. A build that
works on them shows the Dockerfile's own steps; it does not show the real base images.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.emulator import MAIN_CLASS

ROOT = Path(__file__).resolve().parents[2]
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
PYTHON_IMAGE = "localhost/stand-in-python"
NODE_IMAGE = "localhost/stand-in-node"
IMAGE = "localhost/watchkeeper"
BUILD_S_MAX = 900.0
COMMAND_S_MAX = 120.0

CONTAINERS = """\
[containers]
default_ulimits = ["nofile=20000:20000","nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
NETWORKS = """\
[network]
network_backend = "netavark"
network_config_dir = "{work}/networks"
"""
"""Only where netavark is: the tests of a single container need no network."""
NETAVARK = ("/usr/lib/podman", "/usr/libexec/podman")

EMULATOR = """\
#!/bin/sh
# Stands for `gcloud emulators firestore start --host-port=HOST:PORT`; knows nothing else.
set -eu
[ "$1 $2 $3" = "emulators firestore start" ]
address=${4#--host-port=}
exec java -Duser.language=en -XX:TieredStopAtLevel=1 -XX:+UseSerialGC -cp /emulator.jar \
    MAIN_CLASS "--host=${address%:*}" "--port=${address#*:}"
"""

PACKAGES = "python3,python3-venv,ca-certificates,libstdc++6,libatomic1"
"""Of the stand-in for the Python image; the last two are what a Node from elsewhere links to."""


def missing() -> str | None:
    """What keeps containers from being built and run here, in one line, or `None`."""
    if os.geteuid() != 0:
        return "no containers: needs root"
    for program in ("podman", "buildah", "runc", "mmdebstrap", "npm"):
        if shutil.which(program) is None:
            return f"no containers: needs {program} (Debian: podman buildah runc mmdebstrap npm)"
    node = shutil.which("node")
    return None if node else "no containers: needs Node.js"


def missing_networks() -> str | None:
    """What keeps containers from being run in a network of their own, or `None`."""
    for program in ("netavark", "aardvark-dns"):
        if not any((Path(each) / program).is_file() for each in NETAVARK):
            return f"no networks of containers: needs {program} (Debian: netavark aardvark-dns)"
    return None


class Engine:
    """Podman and buildah, with everything they keep in one directory."""

    def __init__(self, work: Path) -> None:
        self.work = work
        networks = "" if missing_networks() else NETWORKS.format(work=work)
        (work / "containers.conf").write_text(CONTAINERS + networks)
        (work / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{work}/graph"\nrunroot = "{work}/run"\n'
        )
        # What pip in a container asks is what pip asks here, trusted by the same certificates.
        (work / "pip.conf").write_text(f"[global]\ncert = {CERTIFICATES}\n")
        self.env = {
            **os.environ,
            "CONTAINERS_CONF": str(work / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(work / "storage.conf"),
        }

    def run(
        self, *command: str, check: bool = True, within_s: float = COMMAND_S_MAX
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on this storage, to its end."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout[-3000:]}{done.stderr}"
        return done

    def podman(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("podman", *words, check=check)

    def build(self, context: Path, dockerfile: Path, tag: str, *options: str) -> str:
        """Build an image from what is here; what the build printed."""
        mounts = [f"{CERTIFICATES}:{CERTIFICATES}:ro", f"{self.work}/pip.conf:/etc/pip.conf:ro"]
        return self.run(
            *("buildah", "bud", "--isolation", "chroot", "--pull-never", "--format", "docker"),
            *(word for mount in mounts for word in ("-v", mount)),
            *("-f", str(dockerfile), "-t", tag, *options, str(context)),
            within_s=BUILD_S_MAX,
        ).stdout

    def build_stand_ins(self) -> None:
        """The base images that cannot be fetched here."""
        files = self.work / "stand-in"
        files.mkdir()
        self.run(
            *("mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}", "bookworm"),
            *(str(files / "base.tar"), str(_package_sources())),
            within_s=BUILD_S_MAX,
        )
        node = shutil.which("node")
        assert node is not None
        shutil.copy(Path(node).resolve(), files / "node")
        npm = Path(shutil.which("npm") or "").resolve().parents[1]
        shutil.copytree(npm, files / "npm", symlinks=True)
        (files / "Python").write_text(
            "FROM scratch\nADD base.tar /\nRUN ln -s python3 /usr/bin/python\n"
        )
        self.build(files, files / "Python", PYTHON_IMAGE)
        (files / "Node").write_text(
            f"FROM {PYTHON_IMAGE}\nCOPY node /usr/local/bin/node\n"
            "COPY npm /usr/local/lib/node_modules/npm\n"
            f"ENV NODE_EXTRA_CA_CERTS={CERTIFICATES}\n"
            "RUN ln -s ../lib/node_modules/npm/bin/npm-cli.js /usr/local/bin/npm\n"
        )
        self.build(files, files / "Node", NODE_IMAGE)
        (files / "base.tar").unlink()

    def build_emulator(self, tag: str, jar: Path) -> None:
        """A stand-in for Google's image: the same emulator, started by the same command."""
        files = self.work / "emulator"
        files.mkdir()
        shutil.copy(jar, files / "emulator.jar")
        (files / "gcloud").write_text(EMULATOR.replace("MAIN_CLASS", MAIN_CLASS))
        (files / "gcloud").chmod(0o755)
        (files / "Emulator").write_text(
            f"FROM {PYTHON_IMAGE}\n"
            "RUN apt-get update"
            " && apt-get install --yes --no-install-recommends openjdk-17-jre-headless\n"
            "COPY emulator.jar /\n"
            "COPY gcloud /usr/local/bin/\n"
        )
        self.build(files, files / "Emulator", tag)

    def image_size(self, tag: str) -> int:
        return int(self.podman("image", "inspect", "--format", "{{.Size}}", tag).stdout)


def _package_sources() -> Path:
    """Where this machine gets its Debian packages from."""
    names = ("sources.list.d/debian.sources", "sources.list")
    return next(path for name in names if (path := Path("/etc/apt") / name).is_file())


class Container:
    """One container that was started in the background."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name

    def stop_with(self, signal: str, within_s: float = 30.0) -> tuple[int, float]:
        """Send a signal and wait for the end; the exit code, and how long it took."""
        began = time.monotonic()
        self.engine.podman("kill", "--signal", signal, self.name, check=False)
        return self.wait(within_s), time.monotonic() - began

    def wait(self, within_s: float = 30.0) -> int:
        done = self.engine.run("podman", "wait", self.name, within_s=within_s)
        return int(done.stdout)

    def execute(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.engine.podman("exec", self.name, *command, check=check)

    def inspect(self, template: str) -> str:
        return self.engine.podman("inspect", "--format", template, self.name).stdout.strip()

    def log(self) -> str:
        done = self.engine.podman("logs", self.name, check=False)
        return done.stdout + done.stderr


@contextmanager
def open_engine(work: Path) -> Iterator[Engine]:
    """An engine in `work`; at the end no container is left, and nothing is mounted there."""
    engine = Engine(work)
    try:
        yield engine
    finally:
        engine.podman("rm", "--all", "--force", "--time", "0", check=False)
        engine.run("buildah", "rm", "--all", check=False)
        subprocess.run(
            ["umount", str(work / "graph" / "overlay")], check=False, capture_output=True
        )
