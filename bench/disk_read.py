"""Time to list every account of this host's copy, against reading the same bytes without meaning.

    python -m bench.disk_read [--json]

Warm: every row is run once before it is timed. Each figure is the median of five runs.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio

from daemon.sqlite.local import FILE_NAME, open_local
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


def median_s(run: Callable[[], object]) -> float:
    run()
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


async def list_s(directory: Path, accounts: int) -> tuple[float, float]:
    """The listing's time, and the longest that the event loop was kept from turning by it."""
    times, longest = [], 0.0
    async with open_local(directory) as store, trio.open_nursery() as nursery:

        async def turn() -> None:
            nonlocal longest
            last = time.perf_counter()
            while True:
                await trio.sleep(0.001)
                now = time.perf_counter()
                longest, last = max(longest, now - last - 0.001), now

        await store.list_accounts()
        nursery.start_soon(turn)
        for _ in range(RUNS):
            begun = time.perf_counter()
            listing = await store.list_accounts()
            times.append(time.perf_counter() - begun)
            assert len(listing.copies) == accounts
            del listing
        nursery.cancel_scope.cancel()
    return statistics.median(times), longest


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
        ours_s, longest_s = trio.run(list_s, directory, accounts)
        cat_s = median_s(lambda: cat(path))
        return {
            "accounts": accounts,
            "megabytes": path.stat().st_size / 1e6,
            "saved_s": filled_s,
            "listed_s": ours_s,
            "loop_blocked_s": longest_s,
            "cat_s": cat_s,
            "cat_to_reader_s": median_s(lambda: cat_to_reader(path)),
            "read_into_memory_s": median_s(lambda: read_into_memory(path)),
        }


def main() -> None:
    results = [measure(*size) for size in SIZES]
    if "--json" in sys.argv:
        print(json.dumps(results))
        return
    for result in results:
        listed_s = result["listed_s"]
        print(f"{result['accounts']:,.0f} accounts, {result['megabytes']:.1f} MB")
        print(f"  saved                 {result['saved_s'] * 1e3:9.1f} ms")
        print(
            f"  listed                {listed_s * 1e3:9.1f} ms"
            f"   (loop kept {result['loop_blocked_s'] * 1e3:.1f} ms at most)"
        )
        for key, label in (
            ("cat_s", "cat > /dev/null"),
            ("cat_to_reader_s", "cat | reader"),
            ("read_into_memory_s", "Python, into memory"),
        ):
            print(
                f"  {label:22}{result[key] * 1e3:9.1f} ms   listed is {listed_s / result[key]:.2f}x"
            )


if __name__ == "__main__":
    main()
