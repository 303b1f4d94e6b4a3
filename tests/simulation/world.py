"""The hosts of one group, their processes, and what stands around them.

Lives here: starting and ending processes, and what must be true in the end. Never lives here: what
goes wrong (`tests.simulation.faults`, `tests.simulation.disasters`).
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import trio

from machine.instance import Instance
from machine.lease import LeaseTiming
from machine.legacy import new_account
from machine.limits import Durability, Limits
from machine.ports import Ports, Unguarded
from machine.records import (
    AccountId,
    AccountStatus,
    Grant,
    Identity,
    KeyChange,
    KeyName,
    MessageId,
    MessageState,
    Version,
)
from machine.refusals import Refusal
from machine.states import State
from tests.fakes.codec import FakeCodec
from tests.machine.lab import FakeLegacy
from tests.simulation.checks import Checks
from tests.simulation.clients import Clients, Contacts
from tests.simulation.clock import HostClock, SimulatedClocks, WorldClock, on_clock_of
from tests.simulation.front import Front
from tests.simulation.gate import Gate
from tests.simulation.network import Link, Network
from tests.simulation.process import Process
from tests.simulation.stores import SimulatedDisk, SimulatedState, SimulatedStore
from tests.simulation.warden import SimulatedWarden
from tests.simulation.whatsapp import SimulatedConnector, SimulatedWhatsApp

ACCOUNTS = tuple(AccountId(name) for name in ("ann", "ben", "cho"))
CREDS = b"paired once and never again"
TIMINGS = (
    LeaseTiming(),
    LeaseTiming(ttl_s=12.0, renew_s=3.0),
    LeaseTiming(ttl_s=20.0, renew_s=6.0, attempt_s=3.0, margin_s=2.0),
    LeaseTiming(ttl_s=9.0, renew_s=2.0, attempt_s=1.5, margin_s=1.0),
)
"""What an upgrade may change: each process may have other times than the one before."""
TTL_MAX_S = max(timing.ttl_s for timing in TIMINGS)
RATE_ERROR = 500e-6
WALL_SKEW_S = 5.0
UPTIME_MAX_S = 100_000.0
MESSAGE_EVERY_S = 2.0
UNTRACED = frozenset(
    {"lease.renewed", "message.accepted", "message.acked", "account.found", "outbox.purged"}
)
"""Events that say nothing which an effect in the trace does not say already."""


def make_limits(rng: random.Random) -> Limits:
    """Settings of one process; what has backed off for long comes back within a calm."""
    return Limits(
        reconnect_cap_s=8.0,
        warm_every_s=rng.choice((20.0, 120.0)),
        settle_s=rng.choice((1.0, 8.0)),
        read_concurrency=rng.choice((1, 16)),
        open_concurrency=rng.choice((1, 2, 50)),
        commit_messages_max=rng.choice((1, 3, 100)),
        purge_every_s=30.0,
        message_retention_s=300.0,
        transitions_kept=20,
    )


@dataclass(frozen=True)
class Kind:
    """What a world is made of. `mixed`: upgrades change the settings."""

    hosts: int = 3
    durability: Durability = Durability.REMOTE
    mixed: bool = False
    message_every_s: float = MESSAGE_EVERY_S
    rate_error: float = RATE_ERROR
    warden: bool = True


Wiring = Callable[[Ports, Process], Ports]
"""Puts something between the machine and its ports, for one process."""


@dataclass(eq=False)
class Host:
    """What outlives a process: the disk, the clock, the way to the store."""

    name: str
    link: Link
    disk: SimulatedDisk
    clock: HostClock
    lives: int = 0
    process: Process | None = None
    store: SimulatedStore | None = None
    connector: SimulatedConnector | None = None
    front: Front | None = None
    warden: SimulatedWarden | None = None

    @property
    def running(self) -> Process | None:
        """Its process, unless that is dead or stopped."""
        process = self.process
        return process if process is not None and not process.gate.closed else None

    @property
    def acting(self) -> Instance | None:
        """Its instance, if it runs and has a term."""
        process = self.running
        if process is None or process.instance.state is not State.ACTIVE:
            return None
        with on_clock_of(self.clock):
            return process.instance if process.instance.desk is not None else None


class World:
    """Hosts, store, WhatsApp, clients."""

    def __init__(
        self,
        seed: int,
        kind: Kind,
        checks: Checks,
        clock: WorldClock,
        nursery: trio.Nursery,
        *,
        state: SimulatedState,
        wire: Wiring = lambda ports, _process: ports,
    ) -> None:
        self.seed = seed
        self.kind = kind
        self.checks = checks
        self.clock = clock
        self.nursery = nursery
        self.network = Network(clock)
        self.state = state
        state.connect(checks, self.network, random.Random(f"{seed} store"))
        state.initialise(0)
        self.whatsapp = SimulatedWhatsApp(checks)
        checks.on_rollback = self.whatsapp.forgive
        self.clients = Clients(
            seed, checks, ACCOUNTS, self._open_fronts, every_s=kind.message_every_s
        )
        self.restart_s = (0.0, 0.0)
        self.ttl_s = TIMINGS[0].ttl_s
        self.lease_put_back = False
        self.contacts = Contacts(seed, self.whatsapp, ACCOUNTS, every_s=2 * kind.message_every_s)
        self._wire = wire
        self._codec = FakeCodec()
        self._rng = random.Random(f"{seed} restarts")
        self._processes: list[Process] = []
        self._add_accounts()
        self.hosts = [self._make_host(name) for name in "abcde"[: kind.hosts]]
        nursery.start_soon(self.network.run)

    def _make_host(self, name: str) -> Host:
        rng = random.Random(f"{self.seed} host {name}")
        error = self.kind.rate_error
        clock = HostClock(
            rate=1.0 + rng.uniform(-error, error),
            began_at=rng.uniform(0.0, UPTIME_MAX_S),
            wall_offset_s=rng.uniform(-WALL_SKEW_S, WALL_SKEW_S),
        )
        return Host(name, Link(rng), SimulatedDisk(rng), clock)

    def _add_accounts(self) -> None:
        version = Version(0, 1)
        for account_id in ACCOUNTS:
            account = replace(
                new_account(account_id, f"{account_id}'s", 1.0),
                status=AccountStatus.CONNECTED,
                phone=self.whatsapp.phone(account_id),
                last_connected_at=1.0,
            )
            self.whatsapp.script(account_id).receipts = (MessageState.DELIVERED, MessageState.READ)
            change = KeyChange({KeyName("creds"): CREDS})
            packed = self._codec.change(account_id, {}, change, version)
            parts = {name: part for name, part in packed.items() if part is not None}
            fence, stamp = self.state.fence or (None, None)
            assert fence is not None
            assert stamp is not None
            grant = Grant(fence.epoch, fence.holder, fence.incarnation, stamp)
            self.state.create_account(grant, account, version, parts)

    # --- processes

    def start(self, host: Host) -> None:
        """Start a process on a host that has none; it has the disk of the one before."""
        assert host.process is None
        host.lives += 1
        incarnation = f"{host.name}{host.lives}"
        rng = random.Random(f"{self.seed} {incarnation}")
        timing = rng.choice(TIMINGS) if self.kind.mixed else TIMINGS[0]
        gate = Gate(incarnation, host.clock)
        process = host.process = Process(host.name, incarnation, gate, timing, host.disk)
        self.checks.processes[incarnation] = process
        store = host.store = SimulatedStore(self.state, host.link, process, self.checks)
        connector = host.connector = SimulatedConnector(self.whatsapp, process, self.checks)
        clocks = SimulatedClocks(self.clock, host.clock)
        host.warden = None
        if self.kind.warden:
            kill = partial(self._kill, host, process)
            host.warden = SimulatedWarden(process, clocks, self.network, self.checks, kill)
        ports = Ports(
            lease=store,
            accounts=store,
            outbox=store,
            inbox=store,
            local=host.disk,
            codec=self._codec,
            connector=connector,
            legacy=FakeLegacy(),
            journal=_Telling(self, process, connector),
            clocks=clocks,
            rng=rng,
            guard=host.warden or Unguarded(),
        )
        limits = make_limits(rng) if self.kind.mixed else make_limits(random.Random(0))
        process.instance = Instance(
            Identity(host.name, incarnation, f"http://{host.name}"),
            ports=self._wire(ports, process),
            timing=timing,
            limits=limits,
            durability=self.kind.durability,
        )
        host.front = Front(process.instance, host.link, self.network, rng, self._find_front)
        self.checks.tell(host.name, f"starts as {incarnation}, ttl {timing.ttl_s:g}")
        self._processes.append(process)
        process.gate.spawn(self.nursery, lambda: self._live(host, process, connector))

    def check_nothing_left(self, process: Process, connector: SimulatedConnector) -> None:
        connections = len(self.whatsapp.connections_of(process))
        self.checks.term_ended(process, connections, len(connector.bridges))

    def check_closed(self, process: Process) -> None:
        self.checks.still_open(process, len(self.whatsapp.connections_of(process)))

    async def _live(self, host: Host, process: Process, connector: SimulatedConnector) -> None:
        """A process's life: the instance, and whoever asks it."""
        front = host.front
        assert front is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(front.serve)
                await process.instance.run()
                self.check_nothing_left(process, connector)
                nursery.cancel_scope.cancel()
        except Exception as error:  # noqa: BLE001 - a bug, and told as one
            self.checks.violated(0, f"{process.name} ended with a bug: {_describe(error)}")
        self.network.post(0.0, lambda: self._ended(host, process, front))

    def _ended(self, host: Host, process: Process, front: Front) -> None:
        """In the world: a process is gone, and a supervisor starts the next."""
        front.die()
        if host.process is process:
            self.checks.tell(host.name, "has ended")
            host.process = None
            self.nursery.start_soon(self._restart, host)

    async def _restart(self, host: Host) -> None:
        await trio.sleep(self._rng.uniform(*self.restart_s))
        if host.process is None:
            self.start(host)

    def _kill(self, host: Host, process: Process) -> None:
        if host.process is process:
            self.crash(host, host_lives=True)

    def crash(self, host: Host, *, host_lives: bool = False) -> None:
        """End a host's process between two of its steps, without any last word.

        `host_lives`: so does its warden, who gives the lease back in the process's name.
        """
        process, front = host.process, host.front
        assert process is not None
        assert front is not None
        self.checks.tell(host.name, "crashes")
        process.dead = True
        process.gate.close()
        self.whatsapp.process_died(process)
        self.state.process_died(process)
        self._ended(host, process, front)
        if host_lives and host.warden is not None and host.store is not None:
            self.nursery.start_soon(host.warden.release, host.store)

    def holder(self) -> Host | None:
        """The host whose process the fence names."""
        if self.state.fence is None:
            return None
        fence = self.state.fence[0]
        for host in self.hosts:
            if host.process is not None and host.process.incarnation == fence.incarnation:
                return host
        return None

    def acting(self) -> Instance | None:
        """An instance that is ACTIVE and takes requests."""
        for host in self.hosts:
            if host.acting is not None:
                return host.acting
        return None

    def end(self) -> None:
        """Let every process go on to its end, the dead too, without any store to reach."""
        for host in self.hosts:
            host.link.cut += 1
        for process in self._processes:
            process.gate.open_for_good()

    @property
    def tears(self) -> bool:
        """Whether a crash may tear what the disk was writing: not where it is the only copy."""
        return self.kind.durability is Durability.REMOTE

    def reconnect_excused(self) -> None:
        """The operator takes accounts out of quarantine, now that they can be read again."""
        for host in self.hosts:
            instance, process = host.acting, host.running
            if instance is None or process is None:
                continue
            for account_id in sorted(self.clients.excused):
                process.gate.spawn(self.nursery, partial(_reconnect, instance, account_id))

    # --- requests

    def _open_fronts(self) -> list[Front]:
        """Where callers can connect to."""
        fronts = [host.front for host in self.hosts if host.process is not None]
        return [front for front in fronts if front is not None and not front.dead]

    def _find_front(self, address: str) -> Front | None:
        for host in self.hosts:
            if address == f"http://{host.name}" and host.process is not None:
                return host.front
        return None

    # --- what must be true in the end

    def unconnected(self) -> list[AccountId]:
        return [account_id for account_id in ACCOUNTS if account_id not in self.whatsapp.open]

    def undelivered(self) -> list[MessageId]:
        """Accepted messages that no recipient can read yet."""
        read = {one.message_id for one in self.whatsapp.inbox()}
        return [message_id for message_id in self.clients.accepted if message_id not in read]

    def unreceived(self) -> list[MessageId]:
        """Messages to accounts of which WhatsApp has no receipt yet."""
        return [one for account_id in ACCOUNTS for one in self.whatsapp.waiting(account_id)]

    def check_end(self) -> None:
        """Every accepted message arrived once, readable; every account is there, and itself."""
        for message_id in self.unreceived():
            self.checks.violated(6, f"{message_id} was sent to an account and is not received")
        seen: dict[tuple[str, str], MessageId] = {}
        for one in self.whatsapp.inbox():
            # By its text: a message that is sent under two ids is two messages to who gets them.
            other = seen.setdefault((one.to, one.text), one.message_id)
            if other != one.message_id:
                self.checks.violated(
                    6, f"{one.text} was shown twice, as {other} and {one.message_id}"
                )
        for message_id in self.undelivered():
            stored = self.state.messages.get(message_id)
            self.checks.violated(6, f"{message_id} was accepted and never arrived: {stored}")
        for account_id in ACCOUNTS:
            copy = self.state.fetch_account(account_id)
            keys = {} if copy is None else self._codec.unpack(account_id, copy.parts)
            if keys.get(KeyName("creds")) != CREDS:
                self.checks.violated(7, f"{account_id} is not itself any more: {copy}")
        for account_id in self.unconnected():
            self.checks.violated(8, f"{account_id} is not connected in the end")


async def _reconnect(instance: Instance, account_id: AccountId) -> None:
    if instance.desk is not None:
        with suppress(Refusal):
            await instance.desk.reconnect(account_id)


class _Telling:
    """A journal that goes into the trace."""

    def __init__(self, world: World, process: Process, connector: SimulatedConnector) -> None:
        self._world = world
        self._process = process
        self._connector = connector

    def note(self, event: str, /, **fields: object) -> None:
        if event in UNTRACED:
            return
        shown = " ".join(f"{name}={value}" for name, value in fields.items())
        self._world.checks.tell(self._process.name, f"{event} {shown}")
        if (event, fields.get("dest")) == ("transition.made", "PASSIVE"):
            # The instance drains inside its term, but is PASSIVE only after it.
            self._world.check_nothing_left(self._process, self._connector)


def _describe(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
