"""Restore: reading every account from Firestore and from disk, and the machine's whole restore.

The readers are compared to what nobody can be faster than: the same documents as undecoded gRPC
bytes, and `cat` of the same file. The whole restore runs a real instance in this process, from
`lease.acquired` until every account is sealed; its event loop is watched meanwhile, for the lease
is renewed on it.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import trio

from bench import disk_read, firestore_read
from bench.firestore_read import watch_loop
from bench.places import CONTACTS, emulator_host, fresh_env
from bench.rows import Figure, Row, main, progress, seconds
from machine.instance import Instance
from machine.ports import Ports
from machine.records import AccountId, Identity
from machine.views import RestoreReport
from tests.in_process import open_ports, settings_of
from tests.seed import open_stores, seed_accounts

FIRESTORE_AIM = 2.0
DISK_AIM = 2.5
FLOOR = "gRPC bytes, undecoded (floor)"
STOCK = "stock client, stream()"
RESTORE_S_MAX = 300.0
WARM_IN_FLIGHT = 8
PHASES = {
    "the shared store": "shared store",
    "this disk": "disk",
    "reconcile": "reconcile",
    "seal": "seal",
}
"""The report's phases until every account is sealed, and how they are called here."""


@dataclass(frozen=True, slots=True)
class Size:
    """Accounts read from Firestore, from disk (accounts, parts, bytes of a part), and restored."""

    read: tuple[int, ...]
    disk: tuple[tuple[int, int, int], ...]
    whole: tuple[int, ...]


async def measure(size: Size, stores: Sequence[str], rows: list[Row]) -> None:
    """Measure the readers, then the whole restore on each store."""
    if "firestore" in stores:
        with emulator_host() as host:
            for count in size.read:
                rows.append(_firestore_row(await firestore_read.measure(host, count)))
                progress(rows[-1].measured)
    for accounts, parts, part_bytes in size.disk:
        # It runs Trio itself, for its reader without meaning must not share our event loop.
        result = await trio.to_thread.run_sync(disk_read.measure, accounts, parts, part_bytes)
        for row in (_disk_row(result), _everything_row(result)):
            rows.append(row)
            progress(row.measured)
    for store in stores:
        for count in size.whole:
            await _whole(store, count, rows)


def _firestore_row(found: Sequence[Mapping[str, object]]) -> Row:
    taken = {str(row["how"]): float(str(row["median_s"])) for row in found}
    ours, floor, stock = taken["list_accounts"], taken[FLOOR], taken[STOCK]
    blocked = taken["longest gap of the loop meanwhile"]
    accounts = int(str(found[0]["accounts"]))
    return Row(
        "restore",
        f"list {accounts:,} accounts from Firestore",
        f"{seconds(ours)}, {ours / floor:.2f}x; loop held up {seconds(blocked)} at most",
        f"undecoded gRPC bytes {seconds(floor)}; stock client {seconds(stock)}, "
        f"{stock / floor:.2f}x",
        f"<= {FIRESTORE_AIM:g}x the bytes",
        ours <= FIRESTORE_AIM * floor,
        {"accounts": accounts, **{f"{how} [s]": value for how, value in taken.items()}},
    )


def _disk_row(found: Mapping[str, float]) -> Row:
    ours, cat, reader = found["listed_s"], found["cat_s"], found["cat_to_reader_s"]
    return Row(
        "restore",
        f"list {found['accounts']:,.0f} accounts from disk, {found['megabytes']:.0f} MB, warm",
        f"{seconds(ours)}, {ours / cat:.2f}x; loop held up {seconds(found['loop_blocked_s'])} "
        "at most",
        f"cat > /dev/null {seconds(cat)}; cat | reader {seconds(reader)}, "
        f"{ours / reader:.2f}x of that",
        f"<= {DISK_AIM:g}x cat",
        ours <= DISK_AIM * cat,
        dict(found),
    )


def _everything_row(found: Mapping[str, float]) -> Row:
    """What opening all accounts adds up to; nothing waits for it as a whole."""
    ours, cat, memory = found["everything_s"], found["cat_s"], found["read_into_memory_s"]
    return Row(
        "restore",
        f"list {found['accounts']:,.0f} accounts and read all their bytes from disk, warm",
        f"{seconds(ours)}, {ours / cat:.2f}x",
        f"cat > /dev/null {seconds(cat)}; the file into Python's memory {seconds(memory)}, "
        f"{ours / memory:.2f}x of that",
        f"<= {DISK_AIM:g}x cat",
        ours <= DISK_AIM * cat,
        dict(found),
    )


# --- the whole restore -----------------------------------------------------------------------


@dataclass
class Watched:
    """One restore as it went."""

    report: RestoreReport
    until_known_s: float
    """From the first moment of the term until every account was in memory: sends are accepted."""
    until_sealed_s: float
    held_up_s: float
    """The longest that the event loop was kept from turning meanwhile."""


async def _whole(store: str, count: int, rows: list[Row]) -> None:
    """Restore `count` accounts with an empty disk, then with a warm one."""
    with fresh_env(store) as (directory, env):
        async with open_stores(env):
            pass  # makes the lease documents, as `watchkeeper init` does
        await seed_accounts(env, count, contacts=CONTACTS)
        for disk in ("empty disk", "warm disk"):
            watched = await _restore_once(directory, env, warm=disk == "warm disk")
            rows.append(_whole_row(store, count, disk, watched))
            progress(rows[-1].measured)


async def _restore_once(directory: Path, env: Mapping[str, str], *, warm: bool) -> Watched:
    settings = settings_of(env, directory)
    async with open_ports(settings, directory / "bench.log") as ports:
        if warm:
            await _warm(ports)
        instance = Instance(
            Identity("bench", "bench", "http://127.0.0.1:9"),
            ports=ports,
            timing=settings.lease_timing(),
            limits=settings.limits(),
        )
        return await _watch(instance)


async def _warm(ports: Ports) -> None:
    """Bring the disk copy up to date, as a standby does before it becomes ACTIVE."""
    limiter = trio.CapacityLimiter(WARM_IN_FLIGHT)

    async def fetch(account_id: AccountId) -> None:
        async with limiter:
            copy = await ports.accounts.fetch_account(account_id)
            assert copy is not None
            await ports.local.save_account(copy)

    listing = await ports.accounts.list_accounts()
    async with trio.open_nursery() as nursery:
        for copy in listing.copies:
            nursery.start_soon(fetch, copy.account.account_id)


async def _watch(instance: Instance) -> Watched:
    """Run the instance until every account is sealed; then drain it."""
    gc.collect()
    held_up: list[float] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(instance.run)
        with trio.fail_after(RESTORE_S_MAX):
            while instance.term is None:
                await trio.sleep(0.001)
            term, began = instance.term, trio.current_time()
            nursery.start_soon(watch_loop, held_up)
            # Answered when every account is in memory.
            await term.desk.list_accounts()
            known = trio.current_time()
            while "seal" not in term.restore_report.durations:
                await trio.sleep(0.001)
            sealed = trio.current_time()
            report = term.restore_report
        instance.request_drain("measured")
        while instance.alive:
            await instance.wait_changed()
        nursery.cancel_scope.cancel()
    return Watched(report, known - began, sealed - began, max(held_up))


def _whole_row(store: str, count: int, disk: str, watched: Watched) -> Row:
    report = watched.report
    assert report.total == count
    assert report.failures == ()
    phases = {name: report.durations[key] for key, name in PHASES.items()}
    split = ", ".join(f"{name} {seconds(took)}" for name, took in phases.items())
    listing_s = max(phases["shared store"], phases["disk"])
    return Row(
        "restore",
        f"the machine's whole restore of {count:,} accounts, {store}, {disk}",
        f"sends accepted after {seconds(watched.until_known_s)}, all sealed after "
        f"{seconds(watched.until_sealed_s)}; loop held up {seconds(watched.held_up_s)} at most",
        f"listing alone {seconds(listing_s)}; {split}",
        values={
            "accounts": count,
            "until_known_s": watched.until_known_s,
            "until_sealed_s": watched.until_sealed_s,
            "loop_held_up_s": watched.held_up_s,
            "phases_s": phases,
        },
    )


FIGURE = Figure(
    "restore",
    {
        "full": Size((1_000, 10_000), disk_read.SIZES, (1_000, 10_000)),
        "quick": Size((1_000,), ((200, 15, 9000),), (200,)),
        "tiny": Size((10,), ((10, 2, 100),), (10,)),
    },
    measure,
)

if __name__ == "__main__":
    main(FIGURE)
