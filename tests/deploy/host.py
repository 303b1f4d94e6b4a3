"""A host of our own: a real systemd, booted in a container on an overlay of this machine's root.

Nothing that happens in it is left behind. It needs root, `systemd-nspawn` (Debian:
`systemd-container`) and a kernel that lets us mount; `missing()` says what is not there.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAME = "watchkeeper-test-host"
BOOT_S_MAX = 30.0
COMMAND_S_MAX = 90.0
CGROUPS = Path("/sys/fs/cgroup")

BOOT = r"""
set -e
work=$1 program=$2 config=$3 units=$4 name=$5
for tree in systemd unified; do
    if [ -d /sys/fs/cgroup/$tree ]; then
        mkdir -p /sys/fs/cgroup/$tree/$name
        echo $$ >/sys/fs/cgroup/$tree/$name/cgroup.procs
    fi
done
exec unshare -m --propagation private bash -ec '
    work=$1 program=$2 config=$3 units=$4 name=$5
    mount -t tmpfs -o size=1g tmpfs "$work"
    mkdir "$work/up" "$work/work" "$work/root"
    mount -t overlay overlay -o "lowerdir=/,upperdir=$work/up,workdir=$work/work" "$work/root"
    : >"$work/root/etc/machine-id"
    rm -f "$work"/root/etc/systemd/system/multi-user.target.wants/*
    cp "$units"/* "$work/root/etc/systemd/system/"
    cp -a "$config" "$work/root/etc/watchkeeper"
    printf "[Unit]\nRequires=basic.target\nAfter=basic.target\n" \
        >"$work/root/etc/systemd/system/test.target"
    exec systemd-nspawn --boot -D "$work/root" --register=no --keep-unit --private-network \
        --link-journal=no --console=pipe "--machine=$name" "--bind-ro=$program:/opt/watchkeeper" \
        -- systemd.unit=test.target
' - "$work" "$program" "$config" "$units" "$name"
"""
"""The cgroup of its own matters: a systemd that saw this machine's would move all its processes."""


def missing() -> str | None:
    """What keeps a host from being booted here, in one line, or `None`."""
    if os.geteuid() != 0:
        return "no systemd host: needs root"
    for program in ("systemd-nspawn", "unshare", "nsenter", "curl"):
        if shutil.which(program) is None:
            return f"no systemd host: needs {program} (Debian: systemd-container, util-linux, curl)"
    if not any((CGROUPS / tree).is_dir() for tree in ("systemd", "unified")):
        return "no systemd host: needs cgroup mounts that can be written"
    return None


class Host:
    """The booted host: commands run in it as its root."""

    def __init__(self, leader: int) -> None:
        self._enter = ["nsenter", "-t", str(leader), "-m", "-u", "-i", "-n", "-p", "-C"]

    def run(
        self, *command: str, check: bool = True, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; its output is in the error when it fails."""
        done = subprocess.run(
            [*self._enter, *command],
            capture_output=True,
            text=True,
            timeout=COMMAND_S_MAX,
            check=False,
            input=text,
        )
        assert done.returncode == 0 or not check, f"{command}: {done.stdout}{done.stderr}"
        return done

    def systemctl(self, *words: str, check: bool = True) -> str:
        return self.run("systemctl", *words, check=check).stdout.strip()

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit)

    def log(self, unit: str) -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout

    def write(self, path: str, content: str, mode: str = "600") -> None:
        """Put a file there, readable by its root alone unless told otherwise."""
        into = f"mkdir -p $(dirname {path}); cat >{path}; chmod {mode} {path}"
        self.run("sh", "-c", into, text=content)

    def ask(self, port: int, path: str, *, method: str = "GET", body: object = None) -> Any:
        """One request to an instance in there, with the installed token; the JSON answer."""
        header = "printf 'Authorization: Bearer '; cat /etc/watchkeeper/secrets/admin-token"
        data = (
            "" if body is None else f"-H 'Content-Type: application/json' -d '{json.dumps(body)}'"
        )
        done = self.run(
            "sh",
            "-c",
            f"{{ {header}; }} >/run/test-header; curl -sS --max-time 20 -H @/run/test-header "
            f"-X {method} {data} http://127.0.0.1:{port}{path}",
        )
        return json.loads(done.stdout)

    def processes(self, unit: str) -> dict[int, str]:
        """The service's processes, with their command lines; ids as the host itself sees them."""
        group = self.show(unit, "ControlGroup")
        listing = (
            f"for tree in /sys/fs/cgroup/systemd /sys/fs/cgroup/unified /sys/fs/cgroup; do "
            f"cat $tree{group}/cgroup.procs 2>/dev/null; done | sort -un | "
            f"while read pid; do printf '%s ' $pid; tr '\\0' ' ' </proc/$pid/cmdline; echo; done"
        )
        lines = self.run("sh", "-c", listing).stdout.splitlines()
        return {int(line.split()[0]): line for line in lines if line.strip()}

    def kill(self, number: signal.Signals, *pids: int) -> None:
        self.run("kill", f"-{int(number)}", *map(str, pids))


def wait_until(what: str, seen: Callable[[], object], within_s: float = 30.0) -> float:
    """Look until it is so; how many seconds that took."""
    began = time.monotonic()
    while not seen():
        assert time.monotonic() - began < within_s, f"waited {within_s:g} s in vain for: {what}"
        time.sleep(0.05)
    return time.monotonic() - began


@contextmanager
def boot(work: Path, *, program: Path, config: Path, units: Path) -> Iterator[Host]:
    """Boot a host with this program, these settings and these units; end it with the block."""
    console = (work / "console").open("wb")
    (work / "disk").mkdir()
    arguments = [str(path) for path in (work / "disk", program, config, units)]
    container = subprocess.Popen(
        ["bash", "-c", BOOT, "boot", *arguments, NAME],
        stdin=subprocess.DEVNULL,
        stdout=console,
        stderr=console,
        start_new_session=True,
    )
    try:
        wait_until("the host's systemd", lambda: _leader(container.pid) is not None, BOOT_S_MAX)
        leader = _leader(container.pid)
        assert leader is not None
        host = Host(leader)
        wait_until(
            "the host to be up",
            lambda: host.systemctl("is-active", "test.target", check=False) == "active",
            BOOT_S_MAX,
        )
        yield host
    except BaseException:
        print((work / "console").read_text(errors="replace")[-4000:])
        raise
    finally:
        with suppress(ProcessLookupError):
            os.killpg(container.pid, signal.SIGTERM)
        try:
            container.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(container.pid, signal.SIGKILL)
            container.wait(20)
        console.close()
        for tree in ("systemd", "unified"):
            _remove_groups(CGROUPS / tree / NAME)


def _leader(nspawn: int) -> int | None:
    """The container's first process: the only child of `systemd-nspawn`, once that runs."""
    with suppress(OSError, ValueError):
        if Path(f"/proc/{nspawn}/comm").read_text().strip() == "systemd-nspawn":
            for child in Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text().split():
                if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                    return int(child)
    return None


def _remove_groups(group: Path) -> None:
    for directory, _, _ in os.walk(group, topdown=False):
        with suppress(OSError):
            Path(directory).rmdir()
