"""`send-message`: p50, p99 and sends a second on the loopback connector, to the server's ack.

Compared to the same route doing nothing: the same API process with a term that answers at once.
Every caller waits for its answer before it sends again; each has an account of its own.
"""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import trio

from bench.client import Line, send_request
from bench.places import open_group, start_holder, wait_ready
from bench.rows import Figure, Row, main, median, percentile, progress, seconds
from tests.ports import free_port
from tests.system.cluster import ROOT, TOKEN

NOTHING = "nothing"
START_S_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Size:
    """Callers at once, rounds of each, seconds of a round, and accounts in the group."""

    callers: tuple[int, ...]
    rounds: int
    round_s: float
    accounts: int


@dataclass(slots=True)
class Sent:
    """What the rounds of one place with so many callers came to."""

    took_s: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    codes: dict[int, int] = field(default_factory=dict)


async def measure(size: Size, stores: Sequence[str], rows: list[Row]) -> None:
    """Measure on each store, in turn with the route that does nothing."""
    async with AsyncExitStack() as stack:
        places: dict[str, tuple[int, list[str]]] = {}
        for store in stores:
            group = await stack.enter_async_context(open_group(store, size.accounts))
            node = await start_holder(group.cluster, "a", size.accounts)
            places[store] = (node.port, group.account_ids)
        some = next(iter(places.values()))[1]
        places[NOTHING] = (await stack.enter_async_context(_nothing()), some)
        seen: dict[tuple[str, int], Sent] = {}
        for number in range(size.rounds + 1):
            for place, (port, ids) in places.items():
                for callers in size.callers:
                    # The first round only warms up.
                    sent = seen.setdefault((place, callers), Sent()) if number else Sent()
                    await _send(port, ids, callers, size.round_s, sent)
            progress(f"round {number} of {size.rounds}")
    rows += [
        _row(store, callers, seen[store, callers], seen[NOTHING, callers])
        for store in stores
        for callers in size.callers
    ]


@asynccontextmanager
async def _nothing() -> AsyncIterator[int]:
    """The route that does nothing, in a process of its own; its port."""
    port = free_port()
    command = [sys.executable, "-m", "bench.nothing", str(port)]
    async with trio.open_nursery() as nursery:
        process = await nursery.start(partial(trio.run_process, command, cwd=ROOT, check=False))
        try:
            with trio.fail_after(START_S_MAX):
                await wait_ready(port)
            yield port
        finally:
            process.kill()


async def _send(port: int, ids: list[str], callers: int, round_s: float, sent: Sent) -> None:
    """One round: `callers` that send and wait, for `round_s`."""
    answered = 0
    began = time.perf_counter()

    async def keep_sending(account_id: str) -> None:
        nonlocal answered
        async with Line(port) as line:
            for number in count():
                asked_at = time.perf_counter()
                if asked_at - began > round_s:
                    return
                request = send_request(TOKEN, account_id, f"message {number}")
                answer = await line.ask(request)
                sent.took_s.append(time.perf_counter() - asked_at)
                sent.codes[answer.status] = sent.codes.get(answer.status, 0) + 1
                answered += 1

    async with trio.open_nursery() as nursery:
        for number in range(callers):
            nursery.start_soon(keep_sending, ids[number % len(ids)])
    sent.rates.append(answered / (time.perf_counter() - began))


def _row(store: str, callers: int, ours: Sent, nothing: Sent) -> Row:
    rate, rate_nothing = median(ours.rates), median(nothing.rates)
    others = sum(n for code, n in ours.codes.items() if code != 200)
    odd = f"; {others} not 200" if others else ""
    p50, p50_nothing = (percentile(sent.took_s, 50) for sent in (ours, nothing))
    return Row(
        "sends",
        f"{callers} caller{'s' if callers > 1 else ''}, {store}",
        f"{_told(ours)}, {rate:,.0f}/s{odd}",
        f"the route doing nothing: {_told(nothing)}, {rate_nothing:,.0f}/s "
        f"(p50 {p50 / p50_nothing:.1f}x)",
        values={
            "p50_s": p50,
            "p99_s": percentile(ours.took_s, 99),
            "sends_per_s": rate,
            "nothing_p50_s": p50_nothing,
            "nothing_p99_s": percentile(nothing.took_s, 99),
            "nothing_per_s": rate_nothing,
            "codes": {str(code): number for code, number in ours.codes.items()},
        },
    )


def _told(sent: Sent) -> str:
    took = sent.took_s
    return f"p50 {seconds(percentile(took, 50))}, p99 {seconds(percentile(took, 99))}"


FIGURE = Figure(
    "sends",
    {
        "full": Size((1, 32), 5, 3.0, 100),
        "quick": Size((1, 32), 2, 1.0, 50),
        "tiny": Size((1, 2), 1, 0.1, 2),
    },
    measure,
)

if __name__ == "__main__":
    main(FIGURE)
