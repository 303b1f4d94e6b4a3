"""The connector: how many bridge processes there are, and which account is in which.

A bridge is the processes of one term. They are killed and seen dead before its block ends, and at
once when it is cancelled. Between terms one process stands by without an account: it can do
nothing, so it may live outside of a term, and the next term begins without waiting for Node.

Never lives here: what a connection does (`connection`), what a process says (`process`).
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from random import Random

import trio

from daemon.bridge.connection import BridgeConnection
from daemon.bridge.process import BridgeFailed, BridgeProcess, ProcessPlan
from daemon.bridge.suspects import Suspects
from machine.ports import (
    Bridge,
    Clocks,
    Connection,
    ConnectorDown,
    Journal,
)
from machine.records import AccountId, KeyName
from machine.retry import Backoff

STARTING_MAX = 2
"""Processes being started at once: each takes a processor for about a second."""
RESTART_BACKOFF = Backoff(first_s=0.5, factor=2.0, cap_s=10.0, jitter=0.5)
"""Before a process is started in the place of one that died: by how many did of late."""
SPARE_BACKOFF = Backoff(first_s=1.0, factor=2.0, cap_s=60.0, jitter=0.5)
"""Between tries to have a spare process."""
ALONE_BACKOFF = Backoff(first_s=1.0, factor=2.0, cap_s=20.0, jitter=0.5)
"""Before an account whose processes die gets its next one: each start takes a processor's time."""
PROCESSES_MAX = 100
"""Processes of one bridge, far above what there is memory for; then accounts wait for room."""
GONE_S = 6.0
"""How long a bridge's end waits for its killed processes. Each is given up after a second less."""


@dataclass(frozen=True, slots=True)
class BridgeLimits:
    """How many accounts a process takes, and how many processes may die."""

    accounts_max: int = 50
    """Accounts in one process; the next one opens another process."""
    deaths_max: int = 5
    """Processes that may die within `deaths_within_s`; with one more the connector is down, and
    the instance lets another try."""
    deaths_within_s: float = 60.0
    spare_after_s: float = 3.0
    """From the end of a term to the next spare process: longer than a drained instance lingers, for
    starting one takes a processor from whoever restores the accounts just then."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.accounts_max < 1 or self.deaths_max < 0 or self.deaths_within_s <= 0:
            raise ValueError(
                "accounts_max must be at least 1, deaths_max 0, deaths_within_s over 0"
            )


class BaileysConnector:
    """Makes bridges of Node processes. `open_baileys` makes it, and sees everything dead."""

    def __init__(
        self,
        nursery: trio.Nursery,
        plan: ProcessPlan,
        limits: BridgeLimits,
        *,
        journal: Journal,
        clocks: Clocks,
        rng: Random,
    ) -> None:
        self.limits = limits
        self.journal = journal
        self.clocks = clocks
        self.rng = rng
        self.started = 0
        """Processes started so far."""
        self._nursery = nursery
        self._plan = plan
        self._names = count(1)
        self._processes: set[BridgeProcess] = set()
        self._spare: BridgeProcess | None = None
        self._bridges = 0
        self._idle = trio.Event()
        self._idle.set()

    # --- what it shows

    @property
    def process_count(self) -> int:
        """Processes that exist."""
        return len(self._processes)

    @property
    def connection_count(self) -> int:
        """Accounts that are open, or being opened."""
        return sum(len(process.connections) for process in self._processes)

    @property
    def rss_bytes(self) -> int:
        """Memory of all processes, as of their last pings."""
        return sum(process.rss_bytes for process in self._processes)

    # --- processes

    async def start_process(self) -> BridgeProcess:
        """A process that has said hello: the spare, or a new one. Raises `BridgeFailed`.

        Cancelled: what was being started is killed.
        """
        process, self._spare = self._spare, None
        if process is None or not process.alive:
            process = self._launch()
        try:
            await process.wait_ready()
        except BaseException:
            process.kill("nobody waits for it any more", stopped=True)
            raise
        return process

    def _launch(self) -> BridgeProcess:
        process = BridgeProcess(next(self._names), self._plan, self.journal)
        self.started += 1
        self._nursery.start_soon(self._run, process)
        return process

    async def _run(self, process: BridgeProcess) -> None:
        self._processes.add(process)
        try:
            await process.run()
        finally:
            self._processes.discard(process)

    async def keep_spare(self) -> None:
        """Have one process stand by whenever there is no bridge.

        One that is taken for a term ends with that term, and a while later another is wanted.
        """
        failures, wait_s = 0, 0.0
        while True:
            await self._wait_idle(wait_s)
            began = trio.current_time()
            process = self._spare = self._launch()
            await process.wait_ended()
            if self._spare is process:
                self._spare = None
            well = process.stopped or trio.current_time() - began > SPARE_BACKOFF.cap_s
            failures = 0 if well else failures + 1
            wait_s = self.limits.spare_after_s
            if failures:
                wait_s = SPARE_BACKOFF.wait_s(failures, self.rng)

    async def _wait_idle(self, seconds: float) -> None:
        """Wait until there has been no bridge for so long."""
        while True:
            idle = self._idle
            await idle.wait()
            await trio.sleep(seconds)
            if idle is self._idle:  # It is another one since a bridge was opened.
                return

    # --- bridges

    def open_bridge(self) -> AbstractAsyncContextManager[Bridge]:
        """See `machine.ports.Connector`. A process is up when the block is entered.

        Raises `ConnectorDown` when too many died before one was.
        """
        return self._open_bridge()

    @asynccontextmanager
    async def _open_bridge(self) -> AsyncIterator[Bridge]:
        failure: Exception | None = None
        bridge: BaileysBridge | None = None
        self._bridges += 1
        self._idle = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                bridge = BaileysBridge(self, nursery)
                nursery.start_soon(bridge.keep_until_cancelled)
                try:
                    await bridge.wait_ready()
                    yield bridge
                except Exception as error:  # noqa: BLE001 (raised below, outside of the nursery)
                    # The block's own errors reach the caller as they are, not in a group.
                    failure = error
                nursery.cancel_scope.cancel()
        finally:
            if bridge is not None:
                await bridge.end()
            self._bridges -= 1
            if not self._bridges:
                self._idle.set()
        if failure is not None:
            raise failure


class BaileysBridge:
    """The processes of one term.

    Between calls: an account is in at most one process, no process has more than `accounts_max`,
    and accounts of different levels (`suspects`) share none; once `_down` is set nothing is opened
    any more.
    """

    def __init__(self, connector: BaileysConnector, nursery: trio.Nursery) -> None:
        self._connector = connector
        self._nursery = nursery
        self._limits = connector.limits
        # Each process with its level, and the account that has it to itself for being suspected.
        self._processes: dict[BridgeProcess, int] = {}
        self._alone: dict[BridgeProcess, AccountId] = {}
        self._suspects = Suspects(self._limits.accounts_max)
        self._starting = 0
        self._waiting: Counter[int] = Counter()
        self._changed = trio.Event()
        self._deaths: deque[tuple[float, AccountId | None]] = deque()
        self._down: str | None = None

    # --- its life

    async def wait_ready(self) -> None:
        """Wait for the first process. Raises `ConnectorDown`."""
        await self._wait_room()

    async def keep_until_cancelled(self) -> None:
        """Kill every process in the very moment in which the term may not act any more.

        Only that: connections that are still closing, each with its short last word, would
        otherwise go on for longer than the term.
        """
        try:
            await trio.sleep_forever()
        finally:
            self._kill_all()

    def _kill_all(self) -> None:
        self._down = self._down or "its term is over"
        for process in self._processes:
            process.kill("its term is over", stopped=True)

    async def end(self) -> None:
        """Kill what is left, and wait until it is dead: a short last word, even when cancelled."""
        self._kill_all()
        with trio.move_on_after(GONE_S, shield=True):
            for process in tuple(self._processes):
                await process.wait_ended()

    # --- processes

    async def _wait_room(self, level: int = 0) -> BridgeProcess:
        """The process with the fewest accounts, once one has room. Raises `ConnectorDown`."""
        self._waiting[level] += 1
        try:
            while True:
                if self._down is not None:
                    raise ConnectorDown(self._down)
                process = self._roomiest(level)
                if process is not None:
                    self._processes[process] = level
                    return process
                self._start_if_needed()
                await self._changed.wait()
        finally:
            self._waiting[level] -= 1

    def _roomiest(self, level: int) -> BridgeProcess | None:
        suitable = [
            process
            for process, its_level in self._processes.items()
            if process.alive and (its_level == level or not process.connections)
        ]
        process = min(suitable, key=lambda one: len(one.connections), default=None)
        if process is None or len(process.connections) >= self._suspects.cap(level):
            return None
        return process

    def _start_if_needed(self) -> None:
        """Start another process, if those that are coming will not have room for all who wait."""
        needed = sum(
            math.ceil(count / self._suspects.cap(level)) for level, count in self._waiting.items()
        )
        room = len(self._processes) + self._starting < PROCESSES_MAX
        if self._starting < min(needed, STARTING_MAX) and room:
            self._starting += 1
            self._nursery.start_soon(self._start_one)

    async def _start_one(self) -> None:
        try:
            recent = self._recent_deaths()
            if recent:
                await trio.sleep(RESTART_BACKOFF.wait_s(recent, self._connector.rng))
            process = await self._connector.start_process()
        except BridgeFailed as failed:
            self._count_death(str(failed))
        else:
            self._processes[process] = 0
            self._nursery.start_soon(self._watch, process)
        finally:
            self._starting -= 1
            self._stir()

    async def _watch(self, process: BridgeProcess) -> None:
        await process.wait_ended()
        del self._processes[process]
        self._count_death(process.reason or "", self._alone.pop(process, None))
        self._stir()

    def _recent_deaths(self) -> int:
        """Deaths of late. Those of one suspect's own processes are one: they harm nobody else."""
        since = trio.current_time() - self._limits.deaths_within_s
        while self._deaths and self._deaths[0][0] <= since:
            self._deaths.popleft()
        whose = [account_id for _, account_id in self._deaths]
        return whose.count(None) + len(set(whose) - {None})

    def _count_death(self, reason: str, account_id: AccountId | None = None) -> None:
        self._deaths.append((trio.current_time(), account_id))
        deaths = self._recent_deaths()
        if deaths > self._limits.deaths_max and self._down is None:
            within_s = self._limits.deaths_within_s
            self._down = f"{deaths} bridge processes died within {within_s:g} s, the last: {reason}"
            self._connector.journal.note(
                "bridge.down", deaths=deaths, within_s=within_s, reason=reason
            )

    def _stir(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    # --- connections

    def open_connection(
        self,
        account_id: AccountId,
        keys: Mapping[KeyName, bytes] | None,
        *,
        doubtful: Collection[str] = (),
        distrust_sessions: bool = False,
    ) -> AbstractAsyncContextManager[Connection]:
        """See `machine.ports.Bridge`. There is a socket when the block is entered."""
        return self._open_connection(account_id, keys, doubtful, distrust_sessions)

    @asynccontextmanager
    async def _open_connection(
        self,
        account_id: AccountId,
        keys: Mapping[KeyName, bytes] | None,
        doubtful: Collection[str],
        distrust_sessions: bool,
    ) -> AsyncIterator[Connection]:
        process = await self._take_place(account_id)
        number = process.next_connection()
        connection = BridgeConnection(
            number, account_id, process, self._connector.journal, self._connector.clocks
        )
        process.connections[number] = connection
        try:
            self._nursery.start_soon(connection.keep_answering)
            await connection.open(keys, doubtful, distrust_sessions=distrust_sessions)
            yield connection
        finally:
            await connection.close(process.plan.close_s)
            del process.connections[number]
            self._left(process, account_id)

    async def _take_place(self, account_id: AccountId) -> BridgeProcess:
        """A process for this account: with others, or its own if it is suspected.

        Whoever asks attaches the account before his next await. Raises `ConnectorDown`.
        """
        level = self._suspects.level(account_id)
        alone = level == self._suspects.level_max
        if alone:
            tries = self._suspects.blames(account_id) - level + 1
            await trio.sleep(ALONE_BACKOFF.wait_s(tries, self._connector.rng))
        process = await self._wait_room(level)
        if alone:
            self._alone[process] = account_id
        return process

    def _left(self, process: BridgeProcess, account_id: AccountId) -> None:
        """An account is not in this process any more: it was closed, or the process died."""
        if process.alive:
            self._alone.pop(process, None)
        elif not process.stopped:
            self._suspects.blame(account_id)
            if self._suspects.is_convicted(account_id):
                self._connector.journal.note("bridge.account_isolated", account_id=account_id)
        self._stir()


@asynccontextmanager
async def open_baileys(
    plan: ProcessPlan, limits: BridgeLimits, *, journal: Journal, clocks: Clocks, rng: Random
) -> AsyncIterator[BaileysConnector]:
    """Open the connector, with a spare process on its way. After the block no process is left."""
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        connector = BaileysConnector(nursery, plan, limits, journal=journal, clocks=clocks, rng=rng)
        nursery.start_soon(connector.keep_spare)
        try:
            yield connector
        except Exception as error:  # noqa: BLE001 (raised below, outside of the nursery)
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
