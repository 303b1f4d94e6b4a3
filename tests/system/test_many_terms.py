"""One instance through many terms, on real stores: what a term had is gone when it is over."""

from __future__ import annotations

import gc
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio

from machine.instance import Instance
from machine.ports import Ports
from machine.records import Identity, LeaseState, LeaseWrite
from tests.in_process import open_ports, settings_of
from tests.seed import open_stores, seed_accounts

ACCOUNTS = 3
SETTLE_S = 10.0
TERMS = 100
OBJECTS_MAX = 1000
"""Trio keeps up to a thousand deadlines that are over until it tidies up."""
OBJECTS_A_TERM_MAX = 10
"""Of a term that leaks at least one account, hundreds are left."""


@dataclass(frozen=True, slots=True)
class Held:
    """What the process has, while a term serves and nothing else is going on."""

    descriptors: int
    tasks: int
    threads: int


def held() -> Held:
    return Held(
        len(list(Path("/proc/self/fd").iterdir())),
        trio.lowlevel.current_statistics().tasks_living,
        threading.active_count(),
    )


def objects() -> int:
    gc.collect()
    return len(gc.get_objects())


async def begin_term(instance: Instance, after: int) -> int:
    """Wait until a term later than `after` serves; its epoch."""
    with trio.fail_after(SETTLE_S):
        while instance.epoch <= after or instance.term is None:
            await instance.wait_changed()
    return instance.epoch


async def wait_restored(instance: Instance) -> None:
    with trio.fail_after(SETTLE_S):
        while instance.restore_report is None or instance.restore_report.finished_at is None:
            await trio.sleep(0.01)
    assert instance.restore_report.restored == ACCOUNTS


async def force(ports: Ports) -> None:
    """End the term as an operator's force does: a higher epoch, at once."""
    view = await ports.lease.read()
    epoch = view.fence.epoch + 1
    lease = replace(view.lease, epoch=epoch, nonce=f"forced-{epoch}", state=LeaseState.RELEASED)
    fence = replace(view.fence, epoch=epoch, state=LeaseState.RELEASED, incarnation="")
    await ports.lease.write(LeaseWrite(lease, fence, fence_stamp=view.fence_stamp))


async def run_terms(instance: Instance, ports: Ports, count: int) -> None:
    """End `count` terms: handed over or lost, when all is restored or while it is."""
    for number in range(count):
        if number % 4 < 2:
            await wait_restored(instance)
        epoch = instance.epoch
        if number % 2:
            instance.request_step_down("the next term")
        else:
            await force(ports)
        await begin_term(instance, epoch)
    await wait_restored(instance)


@pytest.mark.long
async def test_descriptors_tasks_and_memory_are_back_after_many_terms(
    store_env: dict[str, str], tmp_path: Path
) -> None:
    async with open_stores(store_env):
        pass  # makes the lease documents, as `watchkeeper init` does
    await seed_accounts(store_env, ACCOUNTS, contacts=5)
    settings = settings_of(store_env, tmp_path)
    async with open_ports(settings, tmp_path / "log") as ports, trio.open_nursery() as nursery:
        limits = replace(settings.limits(), stand_back_s=0.01, transitions_kept=20)
        instance = Instance(
            Identity("a", "a-1", "http://127.0.0.1:9"),
            ports=ports,
            timing=settings.lease_timing(),
            limits=limits,
        )
        nursery.start_soon(instance.run)
        # Caches, threads and connections that are made once are made by then.
        await begin_term(instance, 0)
        await run_terms(instance, ports, 8)
        await trio.sleep(0.5)
        before, objects_before = held(), objects()
        await run_terms(instance, ports, TERMS)
        assert instance.epoch > TERMS
        with trio.move_on_after(SETTLE_S):
            while held() != before:
                await trio.sleep(0.05)
        assert held() == before
        assert objects() - objects_before <= OBJECTS_MAX + OBJECTS_A_TERM_MAX * TERMS
        instance.request_drain("done")
        while instance.alive:
            await instance.wait_changed()
        nursery.cancel_scope.cancel()
