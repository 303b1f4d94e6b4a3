"""Three hosts of one group, and the clients that send through them all the time.

Lives here: starting and ending processes, requests and their answers. Never lives here: what goes
wrong (`tests.simulation.faults`).
"""

from __future__ import annotations

import random
import traceback
from dataclasses import dataclass, field, replace

import trio

from machine.instance import Instance
from machine.lease import LeaseTiming
from machine.legacy import new_account
from machine.limits import Limits
from machine.outbox import make_message_id
from machine.ports import Ports
from machine.records import (
    AccountId,
    AccountStatus,
    Grant,
    Identity,
    KeyChange,
    KeyName,
    MessageId,
    Version,
)
from machine.refusals import AccountNotFound, AccountNotPaired, Refusal
from machine.states import State
from tests.fakes.clocks import FakeClocks
from tests.fakes.codec import FakeCodec
from tests.fakes.local_store import FakeLocalStore
from tests.machine.lab import FakeLegacy
from tests.simulation.checks import Checks
from tests.simulation.gate import Gate
from tests.simulation.process import Process
from tests.simulation.world import (
    Link,
    SimulatedConnector,
    SimulatedJournal,
    SimulatedState,
    SimulatedStore,
    SimulatedWhatsApp,
)

ACCOUNTS = tuple(AccountId(name) for name in ("ann", "ben", "cho"))
RECIPIENTS = ("4915100001", "4915100002")
CREDS = b"paired once and never again"
TIMING = LeaseTiming()
# Short enough that what has backed off for long comes back within a calm.
LIMITS = Limits(reconnect_cap_s=8.0, warm_every_s=120.0, settle_s=8.0)
WALL_SKEW_S = 5.0
MESSAGE_EVERY_S = 2.0
ANSWER_S = 10.0
TRIES_MAX = 30
HOPS_MAX = 2
RESTART_S = (0.2, 20.0)


@dataclass(eq=False)
class Request:
    """One request on its way: `answer` is `accepted` or a refusal's code, once `done`."""

    message_id: MessageId
    account_id: AccountId
    to: str
    text: str
    hops: int = 0
    answer: str = ""
    done: trio.Event = field(default_factory=trio.Event)

    def reply(self, answer: str) -> None:
        if not self.done.is_set():
            self.answer = answer
            self.done.set()


@dataclass(eq=False)
class Host:
    """What outlives a process: the disk, the way to the store, the error of the wall clock."""

    name: str
    link: Link
    disk: FakeLocalStore
    wall_offset_s: float
    lives: int = 0
    process: Process | None = None
    store: SimulatedStore | None = None
    connector: SimulatedConnector | None = None
    inbox: trio.MemorySendChannel[Request] | None = None

    @property
    def running(self) -> Process | None:
        """Its process, unless that is dead or stopped."""
        process = self.process
        return process if process is not None and not process.gate.closed else None


class Group:
    """The world: hosts, store, WhatsApp, clients."""

    def __init__(
        self, seed: int, checks: Checks, nursery: trio.Nursery, state: SimulatedState
    ) -> None:
        self.seed = seed
        self.checks = checks
        self.nursery = nursery
        self.state = state
        state.checks = checks
        checks.state = state
        state.initialise(0)
        self.whatsapp = SimulatedWhatsApp(checks)
        self.accepted: dict[MessageId, str] = {}
        self._codec = FakeCodec()
        self._rng = random.Random(f"{seed} clients")
        self._sent = 0
        self._processes: list[Process] = []
        self._add_accounts()
        self.hosts = [self._make_host(name) for name in ("a", "b", "c")]

    def _make_host(self, name: str) -> Host:
        rng = random.Random(f"{self.seed} host {name}")
        offset_s = rng.uniform(-WALL_SKEW_S, WALL_SKEW_S)
        disk = FakeLocalStore()
        disk.delays = {"apply": 0.003, "save_account": 0.003, "raise_epoch": 0.003}
        return Host(name, Link(rng), disk, offset_s)

    def _add_accounts(self) -> None:
        version = Version(0, 1)
        for account_id in ACCOUNTS:
            account = replace(
                new_account(account_id, f"{account_id}'s", 1.0),
                status=AccountStatus.CONNECTED,
                phone=self.whatsapp.phone(account_id),
                last_connected_at=1.0,
            )
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
        process = host.process = Process(host.name, incarnation, Gate(incarnation))
        store = host.store = SimulatedStore(self.state, host.link, process, self.checks)
        connector = host.connector = SimulatedConnector(self.whatsapp, process, self.checks)
        ports = Ports(
            lease=store,
            accounts=store,
            outbox=store,
            inbox=store,
            local=host.disk,
            codec=self._codec,
            connector=connector,
            legacy=FakeLegacy(),
            journal=SimulatedJournal(
                process, self.checks, lambda: self._check_nothing_left(process, connector)
            ),
            clocks=FakeClocks(wall_offset_s=host.wall_offset_s),
            rng=random.Random(f"{self.seed} {incarnation}"),
        )
        identity = Identity(host.name, incarnation, f"http://{host.name}")
        process.instance = Instance(identity, ports=ports, timing=TIMING, limits=LIMITS)
        host.inbox, inbox = trio.open_memory_channel[Request](1000)
        self.checks.tell(host.name, f"starts as {incarnation}")
        self._processes.append(process)
        process.gate.spawn(self.nursery, lambda: self._live(host, process, inbox))

    def _check_nothing_left(self, process: Process, connector: SimulatedConnector) -> None:
        connections = len(self.whatsapp.connections_of(process))
        self.checks.term_ended(process, connections, len(connector.bridges))

    async def _live(
        self, host: Host, process: Process, inbox: trio.MemoryReceiveChannel[Request]
    ) -> None:
        """A process's life: the instance, and whoever asks it."""
        connector = host.connector
        assert connector is not None
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve, process, inbox)
                await process.instance.run()
                self._check_nothing_left(process, connector)
                nursery.cancel_scope.cancel()
        except Exception as error:  # noqa: BLE001 - a bug, and told as one
            self.checks.violated(f"{process.name} ended with a bug: {_describe(error)}")
        self.checks.tell(host.name, "has ended")
        if host.process is process:
            host.process = None
            self.nursery.start_soon(self._restart, host)

    async def _restart(self, host: Host) -> None:
        """What a supervisor does: start the next process after a while."""
        await trio.sleep(self._rng.uniform(*RESTART_S))
        if host.process is None:
            self.start(host)

    def crash(self, host: Host) -> None:
        """End a host's process between two of its steps, without any last word."""
        process = host.process
        assert process is not None
        self.checks.tell(host.name, "crashes")
        process.dead = True
        process.gate.close()
        self.whatsapp.process_died(process)
        host.process = None
        self.nursery.start_soon(self._restart, host)

    def holder(self) -> Host | None:
        """The host whose process the fence names."""
        assert self.state.fence is not None
        fence = self.state.fence[0]
        for host in self.hosts:
            if host.process is not None and host.process.incarnation == fence.incarnation:
                return host
        return None

    def serving(self) -> Process | None:
        """A process that is ACTIVE and takes requests."""
        for host in self.hosts:
            process = host.running
            if process is None or process.instance.state is not State.ACTIVE:
                continue
            if process.instance.term is not None:
                return process
        return None

    def end(self) -> None:
        """Let every process go on to its end, the dead too, without any store to reach."""
        for host in self.hosts:
            host.link.cut += 1
        for process in self._processes:
            process.gate.open()

    # --- requests

    async def _serve(self, process: Process, inbox: trio.MemoryReceiveChannel[Request]) -> None:
        async with trio.open_nursery() as nursery:
            async for request in inbox:
                nursery.start_soon(self._answer, process, request)

    async def _answer(self, process: Process, request: Request) -> None:
        """Answer a request here, or ask the holder, as the HTTP layer does."""
        instance = process.instance
        term = instance.term
        if term is None:
            self._forward(instance, request)
            return
        try:
            await term.desk.accept(
                message_id=request.message_id,
                account_id=request.account_id,
                to=request.to,
                text=request.text,
                idempotency_key=str(request.message_id),
            )
            request.reply("accepted")
            with trio.move_on_after(5.0):
                await term.desk.wait_progress(request.message_id)
        except (AccountNotFound, AccountNotPaired) as lost:
            self.checks.violated(f"{process.name} answers {lost.code}: {lost}")
        except Refusal as refusal:
            self.checks.counts[f"answered {refusal.code}"] += 1
            request.reply(refusal.code)

    def _forward(self, instance: Instance, request: Request) -> None:
        request.hops += 1
        holder = instance.holder
        for host in self.hosts:
            if holder is None or request.hops > HOPS_MAX or host.process is None:
                continue
            if host.process.incarnation == holder.incarnation and host.inbox is not None:
                host.inbox.send_nowait(request)
                return
        request.reply("no_active_instance")

    async def keep_sending(self) -> None:
        """Send a message every so often, to whichever instance, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(self._rng.expovariate(1 / MESSAGE_EVERY_S))
                self._sent += 1
                nursery.start_soon(self._send, self._sent)

    async def _send(self, number: int) -> None:
        """One message, asked for again until it is accepted or nobody wants to wait any more."""
        account_id = self._rng.choice(ACCOUNTS)
        message_id = make_message_id(account_id, f"key {number}", self._rng)
        to = self._rng.choice(RECIPIENTS)
        for _ in range(TRIES_MAX):
            host = self._rng.choice(self.hosts)
            request = Request(message_id, account_id, to, f"message {number}")
            if host.process is not None and host.inbox is not None:
                host.inbox.send_nowait(request)
                with trio.move_on_after(ANSWER_S):
                    await request.done.wait()
            if request.answer == "accepted":
                self.accepted[message_id] = to
                self.checks.counts["accepted"] += 1
                return
            await trio.sleep(self._rng.uniform(0.3, 1.0))
        self.checks.counts["given up"] += 1

    # --- what must be true in the end

    def undelivered(self) -> list[MessageId]:
        """Accepted messages that no recipient can read yet."""
        read = {one.message_id for one in self.whatsapp.inbox()}
        return [message_id for message_id in self.accepted if message_id not in read]

    def check_end(self) -> None:
        """Every accepted message arrived once, readable; every account is there, and itself."""
        seen: set[tuple[str, MessageId]] = set()
        for one in self.whatsapp.inbox():
            if (one.to, one.message_id) in seen:
                self.checks.violated(f"{one.message_id} was shown twice")
            seen.add((one.to, one.message_id))
        for message_id in self.undelivered():
            stored = self.state.messages.get(message_id)
            self.checks.violated(f"{message_id} was accepted and never arrived: {stored}")
        for account_id in ACCOUNTS:
            copy = self.state.fetch_account(account_id)
            keys = {} if copy is None else self._codec.unpack(account_id, copy.parts)
            if keys.get(KeyName("creds")) != CREDS:
                self.checks.violated(f"{account_id} is not itself any more: {copy}")
            if account_id not in self.whatsapp.open:
                self.checks.violated(f"{account_id} is not connected")


def _describe(error: Exception) -> str:
    return "".join(traceback.format_exception(error))
