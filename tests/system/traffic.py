"""Callers: sends at a steady rate to whichever instance takes the connection, as behind a load
balancer. What every call was answered is kept, and compared with what recipients got."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import count

import httpx
import trio

from tests.system.cluster import Cluster, Node


@dataclass
class Traffic:
    """What was sent and answered. `failed` is every call without a 200 or 202."""

    cluster: Cluster
    account_ids: tuple[str, ...]
    every_s: float
    repeats: bool = False
    """Whether a call without any answer is made again, with its key, as docs/guarantees.md says.

    HTTP leaves that to callers: a kept-alive connection may be closed as a request is on its way.
    """
    repeated: int = 0
    sent: int = 0
    accepted: dict[str, str] = field(default_factory=dict)
    """Message id → text, of everything answered 200 or 202."""
    failed: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """How long each call took."""
    stopping: trio.Event = field(default_factory=trio.Event)

    async def keep_sending(self) -> None:
        """Start a send every `every_s`; returns when stopped and all are answered."""
        async with trio.open_nursery() as nursery:
            for number in count():
                if self.stopping.is_set():
                    return
                nursery.start_soon(self._send, number)
                await trio.sleep(self.every_s)

    async def _send(self, number: int) -> None:
        self.sent += 1
        text = f"message {number}"
        account_id = self.account_ids[number % len(self.account_ids)]
        began = trio.current_time()
        response = await self._ask_any(account_id, text, number)
        self.seconds.append(trio.current_time() - began)
        if response is not None and response.status_code in (200, 202):
            self.accepted[response.json()["messageId"]] = text
        elif response is not None:
            self.failed.append(f"{text}: {response.status_code} {response.text}")

    async def _ask_any(self, account_id: str, text: str, number: int) -> httpx.Response | None:
        """Ask the nodes in turn; one that takes no connection is passed over, for 10 s."""
        deadline = trio.current_time() + 10
        for turn in count(number):
            nodes: list[Node] = self.cluster.nodes
            try:
                return await self.cluster.send(
                    nodes[turn % len(nodes)], account_id, text, key=f"key-{number}"
                )
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if trio.current_time() > deadline:
                    self.failed.append(f"{text}: nobody listens")
                    return None
                await trio.sleep(0.01)
            except (httpx.RemoteProtocolError, httpx.ReadError) as error:
                if not self.repeats:
                    self.failed.append(f"{text}: {type(error).__name__} {error}")
                    return None
                self.repeated += 1
            except httpx.TransportError as error:
                self.failed.append(f"{text}: {type(error).__name__} {error}")
                return None
        return None


async def arrived_exactly_once(cluster: Cluster, node: Node, traffic: Traffic) -> None:
    """Every accepted message reaches its recipient, readable, and is shown once."""
    with trio.fail_after(20):
        while True:
            shown = Counter(m["messageId"] for m in await cluster.received(node))
            if not set(traffic.accepted) - set(shown):
                break
            await trio.sleep(0.1)
    assert {each: n for each, n in shown.items() if n > 1} == {}
    texts = Counter(m["text"] for m in await cluster.received(node))
    assert {text: n for text, n in texts.items() if n > 1} == {}
    unreadable = [m for m in await cluster.received(node, raw=True) if not m["readable"]]
    assert unreadable == []
