"""Time to read this host's copy of the accounts, against reading its bytes without meaning.

    python -m bench.disk_read [--json]

Two readings: the listing, which entering ACTIVE waits for, and the listing with every account's
bytes, which opening all of them adds up to. The second keeps all that it has read, as open
sessions do: compare it with reading the file into memory as well as with `cat`.

Warm: every row is run once before it is timed. Each figure is the median of five runs, taken in
turns with those it is compared to.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from daemon.sqlite.local import FILE_NAME, open_local
from machine.limits import Limits
from machine.ports import LocalStore
from machine.records import (
    MAIN_PART,
    Account,
    AccountCopy,
    AccountId,
    AccountStatus,
    PartName,
    Version,
)

RUNS = 5
READ_BYTES = 2**20
SIZES = ((1000, 15, 9000), (10_000, 3, 2500))
"""Accounts, parts of each beside the main one, bytes of a part: 150 keys an account are 135 KB."""


def a_copy(number: int, parts: int, part_bytes: int) -> AccountCopy:
    rng = random.Random(number)
    packed = {PartName(f"part-{n}"): rng.randbytes(part_bytes) for n in range(parts)}
    packed[MAIN_PART] = rng.randbytes(2500)
    account = Account(
        AccountId(f"account-{number:05}"),
        f"Account {number}",
        AccountStatus.CONNECTED,
        1.7e9,
        1.7e9,
        1.7e9,
        phone="4915112345678",
    )
    return AccountCopy(account, Version(3, number), packed, complete=True)


def cat(path: Path) -> None:
    subprocess.run(["cat", path], stdout=subprocess.DEVNULL, check=True)


def cat_to_reader(path: Path) -> None:
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.read(READ_BYTES):
            pass


def read_into_memory(path: Path) -> int:
    return len(path.read_bytes())


async def list_all(store: LocalStore, accounts: int) -> list[AccountCopy]:
    """What entering ACTIVE waits for."""
    copies = (await store.list_accounts()).copies
    assert len(copies) == accounts
    return list(copies)


async def read_everything(store: LocalStore, accounts: int) -> list[AccountCopy]:
    """The listing, then each account's bytes, as many at a time as are opened at a time."""
    listed = await list_all(store, accounts)
    whole: list[AccountCopy] = []

    async def fetch_some() -> None:
        while listed:
            copy = await store.fetch_account(listed.pop().account.account_id)
            assert copy is not None
            assert copy.fault is None
            assert copy.complete
            whole.append(copy)

    async with trio.open_nursery() as nursery:
        for _ in range(Limits().open_concurrency):
            nursery.start_soon(fetch_some)
    assert len(whole) == accounts
    return whole


class Turns:
    """How long the event loop was kept from turning, at most."""

    def __init__(self) -> None:
        self.longest_s = 0.0

    async def watch(self) -> None:
        last = time.perf_counter()
        while True:
            await trio.sleep(0.001)
            now = time.perf_counter()
            self.longest_s, last = max(self.longest_s, now - last - 0.001), now


async def ours_s(
    store: LocalStore, read: Callable[[LocalStore, int], Awaitable[object]], accounts: int
) -> tuple[float, float]:
    """The time that one reading takes, and the longest that the loop was kept by it."""
    turns = Turns()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.watch)
        begun = time.perf_counter()
        result = await read(store, accounts)
        took_s = time.perf_counter() - begun
        nursery.cancel_scope.cancel()
    del result
    return took_s, turns.longest_s


def timed_s(read: Callable[[Path], object], path: Path) -> float:
    begun = time.perf_counter()
    read(path)
    return time.perf_counter() - begun


async def measured(directory: Path, accounts: int) -> dict[str, float]:
    """Every reading in turns, so that whoever else uses the host slows all of them alike."""
    path = directory / FILE_NAME
    times: dict[str, list[float]] = {}
    longest: dict[str, float] = {"listed": 0.0, "everything": 0.0}
    ours = {"listed": list_all, "everything": read_everything}
    theirs = {"cat": cat, "cat_to_reader": cat_to_reader, "read_into_memory": read_into_memory}
    async with open_local(directory) as store:
        for run in range(RUNS + 1):
            for name, read in ours.items():
                took_s, kept_s = await ours_s(store, read, accounts)
                longest[name] = max(longest[name], kept_s if run else 0.0)
                times.setdefault(name, []).append(took_s)
            for name, read_bytes in theirs.items():
                # Nothing else of ours runs meanwhile, so it may keep the loop.
                times.setdefault(name, []).append(timed_s(read_bytes, path))
    return {
        "loop_blocked_s": longest["listed"],
        "everything_loop_blocked_s": longest["everything"],
        **{f"{name}_s": statistics.median(taken[1:]) for name, taken in times.items()},
    }


async def fill(directory: Path, accounts: int, parts: int, part_bytes: int) -> float:
    async with open_local(directory) as store:
        begun = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(accounts):
                nursery.start_soon(store.save_account, a_copy(number, parts, part_bytes))
        return time.perf_counter() - begun


def measure(accounts: int, parts: int, part_bytes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        filled_s = trio.run(fill, directory, accounts, parts, part_bytes)
        path = directory / FILE_NAME
        return {
            "accounts": accounts,
            "megabytes": path.stat().st_size / 1e6,
            "saved_s": filled_s,
            **trio.run(measured, directory, accounts),
        }


def main() -> None:
    results = [measure(*size) for size in SIZES]
    if "--json" in sys.argv:
        print(json.dumps(results))
        return
    for result in results:
        print(f"{result['accounts']:,.0f} accounts, {result['megabytes']:.1f} MB")
        print(f"  saved                              {result['saved_s'] * 1e3:9.1f} ms")
        for key, label, kept in (
            ("listed_s", "list (ACTIVE waits for it)", "loop_blocked_s"),
            ("everything_s", "list + every account's bytes", "everything_loop_blocked_s"),
        ):
            ratios = ", ".join(
                f"{result[key] / result[f'{other}_s']:.2f}x {other}"
                for other in ("cat", "cat_to_reader", "read_into_memory")
            )
            print(
                f"  {label:32}{result[key] * 1e3:9.1f} ms   {ratios}"
                f"   (loop kept {result[kept] * 1e3:.1f} ms at most)"
            )
        for key, label in (
            ("cat_s", "cat > /dev/null"),
            ("cat_to_reader_s", "cat | reader"),
            ("read_into_memory_s", "Python, into memory"),
        ):
            print(f"  {label:32}{result[key] * 1e3:9.1f} ms")


if __name__ == "__main__":
    main()
