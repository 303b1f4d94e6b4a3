"""A network of our own: a store and instances, each in a network namespace, on one bridge.

Cables are pulled and packets dropped by the kernel: TCP, gRPC and HTTP see of it what they would
see of a real one. Nothing of it touches this machine's own interfaces, and nothing is left of it.

The tests, which stay outside, come in by doors: ports of 127.0.0.1 that this process carries on
from inside the namespace, whatever becomes of its cable.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.emulator import Place

COMMAND_S_MAX = 20.0
CHUNK_BYTES = 64 * 1024
NAMESPACES = Path("/run/netns")
CLONE_NEWNET = 0x40000000
SUBNET = "192.0.2"
"""For documentation (RFC 5737): no host has it, and no namespace but ours would notice."""
STORE = "store"


def missing() -> str | None:
    """What keeps a network from being made here, in one line, or `None`."""
    if os.geteuid() != 0:
        return "no network namespaces: needs root"
    for program in ("ip", "unshare"):
        if shutil.which(program) is None:
            return f"no network namespaces: needs {program} (Debian: iproute2, util-linux)"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode:
        return "no network namespaces: the kernel lets us make none"
    return None


def missing_filter() -> str | None:
    """What keeps packets of one direction from being dropped here, or `None`."""
    if shutil.which("iptables") is None:
        return "no one-way partitions: needs iptables (Debian: iptables)"
    return None


@dataclass(frozen=True, kw_only=True)
class Host(Place):
    """A network namespace with one cable, at whose other end is the bridge."""

    name: str
    namespace: str

    def run(self, *command: str) -> None:
        """Run a command in the namespace; what it said is in the error when it fails."""
        _run(*self.within, *command)

    def connect(self, port: int) -> socket.socket:
        """As `Place.connect`, from inside: an open cable or none makes no difference."""
        with self._inside():
            return super().connect(port)

    async def open_stream(self, port: int) -> trio.SocketStream:
        """The same, without blocking. Raises `OSError`."""
        with self._inside():
            connection = trio.socket.socket()
        try:
            await connection.connect((self.address, port))
        except BaseException:
            connection.close()
            raise
        return trio.SocketStream(connection)

    @contextmanager
    def _inside(self) -> Iterator[None]:
        """What this thread opens in the block is the namespace's. No checkpoint may lie in it."""
        outside = Path("/proc/thread-self/ns/net")
        with outside.open("rb") as home, (NAMESPACES / self.namespace).open("rb") as there:
            _enter(there.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())


@dataclass(frozen=True)
class Network:
    """The store's host, where the bridge is, and those that are plugged into it."""

    store: Host
    hosts: Mapping[str, Host]

    @contextmanager
    def unplugged(self, host: Host) -> Iterator[None]:
        """The host's cable is out: its interface has no carrier, and nothing gets through.

        At the bridge's end, for the host itself has no part in it.
        """
        self.store.run("ip", "link", "set", "dev", host.name, "down")
        try:
            yield
        finally:
            self.store.run("ip", "link", "set", "dev", host.name, "up")


@contextmanager
def deaf(hearer: Host, speaker: Host) -> Iterator[None]:
    """What `speaker` sends to `hearer` is dropped without a word; the other way nothing is."""
    rule = ("INPUT", "-s", speaker.address, "-j", "DROP")
    hearer.run("iptables", "-w", "-A", *rule)
    try:
        yield
    finally:
        hearer.run("iptables", "-w", "-D", *rule)


@contextmanager
def open_network(*names: str) -> Iterator[Network]:
    """Make the network, with a host for each name, and remove it however the block ends.

    Raises `AssertionError` with what `ip` said where that cannot be done; see `missing`.
    """
    mark = secrets.token_hex(4)
    with ExitStack() as made:
        store = _make_host(made, mark, STORE, 1)
        store.run("ip", "link", "add", "name", "bridge", "type", "bridge")
        store.run("ip", "addr", "add", f"{store.address}/24", "dev", "bridge")
        store.run("ip", "link", "set", "dev", "bridge", "up")
        hosts = {}
        for number, name in enumerate(names, start=2):
            host = hosts[name] = _make_host(made, mark, name, number)
            # Both ends are born where they stay: this machine never sees them.
            pair = ("name", name, "type", "veth", "peer", "name", "cable", "netns", host.namespace)
            store.run("ip", "link", "add", *pair)
            store.run("ip", "link", "set", "dev", name, "master", "bridge", "up")
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", "cable")
            host.run("ip", "link", "set", "dev", "cable", "up")
        yield Network(store, hosts)


@asynccontextmanager
async def open_doors(doors: Mapping[int, Host]) -> AsyncIterator[None]:
    """Carry connections to these ports of 127.0.0.1 on to the same ports of those hosts."""
    async with trio.open_nursery() as nursery:
        for port, host in doors.items():
            listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
            nursery.start_soon(_keep_door, listeners, host, port)
        yield
        nursery.cancel_scope.cancel()


async def _keep_door(listeners: list[trio.SocketListener], host: Host, port: int) -> None:
    async def carry(caller: trio.SocketStream) -> None:
        with suppress(OSError):
            async with await host.open_stream(port) as inside, trio.open_nursery() as nursery:
                nursery.start_soon(_pump, caller, inside, nursery.cancel_scope)
                nursery.start_soon(_pump, inside, caller, nursery.cancel_scope)

    await trio.serve_listeners(carry, listeners)


async def _pump(
    source: trio.SocketStream, sink: trio.SocketStream, carrying: trio.CancelScope
) -> None:
    with suppress(trio.BrokenResourceError):
        while chunk := await source.receive_some(CHUNK_BYTES):
            await sink.send_all(chunk)
    carrying.cancel()


def _make_host(made: ExitStack, mark: str, name: str, number: int) -> Host:
    namespace = f"watchkeeper-{mark}-{name}"
    _run("ip", "netns", "add", namespace)
    made.callback(_run, "ip", "netns", "delete", namespace)
    within = ("ip", "netns", "exec", namespace)
    host = Host(f"{SUBNET}.{number}", within, name=name, namespace=namespace)
    host.run("ip", "link", "set", "dev", "lo", "up")
    return host


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _run(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=COMMAND_S_MAX, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
