"""One torture from a seed: storms and calms, and in the end a store that has lost everything."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from tests.system.cluster import ROOT
from tests.torture.history import History
from tests.torture.nemesis import DISK_BYTES, Nemesis
from tests.torture.world import ACCOUNTS, LEASE_TTL_S, NAMES, World, open_world

EMPTY_S = 2 * LEASE_TTL_S
"""How long nobody may act on a store whose lease is missing."""
BACK_S = 60.0


@dataclass(frozen=True)
class Outcome:
    """How one torture went."""

    seed: int
    took_s: float
    violations: tuple[str, ...]
    counts: Counter[str]
    faults: Counter[str]
    exits: Counter[int]
    unanswered: Counter[str]
    calms_s: tuple[float, ...]
    """How long each calm took until somebody was ACTIVE."""
    left_out: tuple[str, ...]
    """Faults that this machine does not allow."""


@contextmanager
def small_disks(directory: Path) -> Iterator[dict[str, Path]]:
    """A small disk for each instance, where this process may mount one; else none."""
    disks: dict[str, Path] = {}
    try:
        if os.geteuid() == 0:
            for name in NAMES:
                place = directory / f"disk-{name}"
                place.mkdir()
                options = f"size={DISK_BYTES}"
                command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
                if subprocess.run(command, capture_output=True, check=False).returncode == 0:
                    disks[name] = place
        yield disks
    finally:
        for place in disks.values():
            subprocess.run(["umount", "--lazy", str(place)], capture_output=True, check=False)


@asynccontextmanager
async def running(world: World, history: History) -> AsyncIterator[None]:
    """Supervisors, paired accounts, callers and the watch over the store, for the block."""
    async with trio.open_nursery() as nursery:
        for seat in world.seats:
            nursery.start_soon(world.keep_running, seat)
        await world.wait_all_up()
        active = await world.wait_active(LEASE_TTL_S + 5)
        await world.cluster.add_paired(active.node, *ACCOUNTS)
        nursery.start_soon(history.keep_looking)
        yield
        nursery.cancel_scope.cancel()


async def torture(
    seed: int, minutes: float, *, directory: Path, warden: bool = True, tell: bool = False
) -> Outcome:
    """Run storms and calms for about `minutes`, then take the store away for good."""
    began = trio.current_time()
    calms: list[float] = []
    with small_disks(directory) as disks:
        async with open_world(directory, seed, disks) as world:
            if not warden:
                world.dismiss_wardens()
            history = History(world)
            nemesis = Nemesis(world, history, seed, disks, tell)
            async with running(world, history):
                async with trio.open_nursery() as callers:
                    callers.start_soon(world.keep_sending)
                    while trio.current_time() < began + 60 * minutes and not history.violations:
                        await nemesis.storm()
                        healed_at = trio.current_time()
                        await history.judge_calm()
                        calms.append(history.healed_at - healed_at)
                    world.stopping = True
                await history.judge_messages()
                await _lose_the_store(world, history)
            history.judge_logs()
    return Outcome(
        seed=seed,
        took_s=trio.current_time() - began,
        violations=tuple(history.violations),
        counts=history.counts,
        faults=nemesis.done,
        exits=sum((seat.ended for seat in world.seats), Counter()),
        unanswered=world.sent.unanswered,
        calms_s=tuple(calms),
        left_out=() if disks else ("full disks: no right to mount one",),
    )


async def _lose_the_store(world: World, history: History) -> None:
    """The store is back without a document: nobody acts, until somebody says from which epoch on.

    Then the accounts come back from the disks, under a higher epoch than there ever was.
    """
    epoch = history.epoch
    world.emulator.kill()
    world.emulator.start()
    await trio.sleep(LEASE_TTL_S)
    with trio.move_on_after(EMPTY_S):
        while True:
            if (seat := await world.active_seat()) is not None:
                history.violated(f"{seat.name} acts on a store that has no lease")
                return
            await trio.sleep(0.1)
    await trio.run_process(
        [sys.executable, "-m", "daemon", "init", "--epoch", str(epoch)],
        cwd=ROOT,
        env={**os.environ, **world.cluster.env},
        capture_stdout=True,
    )
    try:
        active = await world.wait_active(BACK_S)
        await world.cluster.wait_connected(active.node, *ACCOUNTS, within_s=BACK_S)
    except trio.TooSlowError:
        history.violated("not every account is back from the disks")
        return
    told = await world.cluster.json(active.node, "GET", "/api/status/dashboard")
    if told["instance"]["epoch"] <= epoch:
        history.violated(f"epoch {told['instance']['epoch']} was granted again")


def run(seed: int, minutes: float, *, warden: bool = True, tell: bool = False) -> Outcome:
    """Torture a group in a directory that is gone afterwards, unless a claim was violated."""
    directory = Path(tempfile.mkdtemp(prefix="watchkeeper-torture-"))
    outcome = trio.run(
        lambda: torture(seed, minutes, directory=directory, warden=warden, tell=tell)
    )
    if not outcome.violations:
        shutil.rmtree(directory)
    elif tell:
        print(f"The logs are in {directory}.")
    return outcome
