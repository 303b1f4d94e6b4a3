"""Redeploys under traffic, with the real Baileys and no phone: `make demo-whatsapp`.

Starts a WhatsApp server of our own and instances of Watchkeeper, pairs an account, and replaces
the instance that holds it three times while a shop and a customer write to each other. Says what
happens while it happens, and at the end whether anything was lost. Exits with 1 if so.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import trio

from tests.system.cluster import Cluster, Node, open_cluster, sqlite_env
from tests.whatsapp.server import FakeWhatsApp, open_whatsapp

SHOP = "4915550000001"
ANNA = "4915112345678"
ACCOUNT = "shop"
EVERY_S = 0.1
"""Between two messages of the shop."""
CALM_S = 1.5
"""Traffic before and after each redeploy."""
SETTLE_S = 30.0
"""For what is still on its way when the traffic ends."""
ALL_S = 240.0


def say(text: str = "") -> None:
    print(text, flush=True)


def quote(node: Node, *words: str) -> None:
    """Show the lines of an instance's log with one of these words."""
    for line in node.log().splitlines():
        if any(word in line for word in words):
            say(f"     | {line}")


@dataclass
class Traffic:
    """A backend that writes through whichever instance answers, as behind a load balancer."""

    cluster: Cluster
    nodes: list[Node] = field(default_factory=list)
    """Those a load balancer would offer now."""
    texts: list[str] = field(default_factory=list)
    """What was accepted, in order."""
    slowest_s: float = 0.0
    repeated: int = 0

    async def keep_writing(self) -> None:
        """One message after the other, each until an instance has taken it."""
        for number in range(1, 100_000):
            text = f"Order {number} is on its way ☕"
            started = time.monotonic()
            while not await self._write(text, f"demo-{number}"):
                self.repeated += 1
                await trio.sleep(0.05)
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            self.texts.append(text)
            await trio.sleep(EVERY_S)

    async def _write(self, text: str, key: str) -> bool:
        for node in list(self.nodes):
            with contextlib.suppress(httpx.TransportError):
                # The same key however often it is asked: the customer gets it once.
                if (await self.cluster.send(node, ACCOUNT, text, key=key)).status_code < 300:
                    return True
        return False


async def keep_answering(whatsapp: FakeWhatsApp, answers: list[str]) -> None:
    """Anna writes back, whoever is there to hear it."""
    while True:
        text = f"Thanks, that was number {len(answers) + 1}!"
        await whatsapp.send(ANNA, SHOP, [text])
        answers.append(text)
        await trio.sleep(3 * EVERY_S)


async def pair(cluster: Cluster, node: Node, whatsapp: FakeWhatsApp) -> None:
    """Add the account over the API, and scan its QR code with the shop's phone."""
    body = {"accountId": ACCOUNT, "name": "The shop"}
    await cluster.json(node, "POST", "/api/whatsapp/accounts", json=body)
    while (
        answer := await cluster.ask(node, "GET", f"/api/whatsapp/accounts/{ACCOUNT}/qr")
    ).status_code != 200:
        await trio.sleep(0.1)
    await whatsapp.scan(SHOP, answer.json()["qr"])
    await cluster.wait_connected(node, ACCOUNT)


async def replace(cluster: Cluster, traffic: Traffic, old: Node, new: Node, *, crash: bool) -> None:
    """End the holder and wait until the standby has its account connected."""
    await trio.sleep(CALM_S)
    accepted = len(traffic.texts)
    started = time.monotonic()
    # A load balancer takes an instance out that is about to end, or that does not answer.
    traffic.nodes = [new]
    if crash:
        await old.crash()
    else:
        await old.stop()
    await cluster.wait_state(new, "ACTIVE")
    await cluster.wait_connected(new, ACCOUNT)
    seconds = time.monotonic() - started
    quote(new, "lease acquired:", "account shop connected", "restore finished")
    await trio.sleep(CALM_S)
    around = len(traffic.texts) - accepted
    say(f"   {seconds:.1f} s from the signal until the account was connected at {new.name}.")
    say(f"   The shop wrote on: {around} messages were accepted around it.")


async def tell(cluster: Cluster, whatsapp: FakeWhatsApp) -> bool:
    """The story; whether everything came out as promised."""
    say("A WhatsApp server of our own runs on this machine. Baileys, unmodified, takes it for")
    say("the real one; behind it are people whose phones read and write with libsignal.")
    say()
    say("1. Instance a starts. Nobody else is there: it takes the lease and becomes ACTIVE.")
    a = await cluster.start("a", state="ACTIVE")
    say("2. An account is added over its API, and the shop's phone scans the QR code.")
    await pair(cluster, a, whatsapp)
    quote(a, "account shop")
    say("3. Instance b starts. It stays PASSIVE, for a holds the lease, and restores nothing.")
    b = await cluster.start("b", state="PASSIVE")
    quote(b, "account restore skipped")
    traffic = Traffic(cluster, [a])
    answers: list[str] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(traffic.keep_writing)
        nursery.start_soon(keep_answering, whatsapp, answers)
        say("4. The shop now writes to Anna all the time, and she writes back.")
        say("5. A redeploy: a is asked to stop (SIGTERM), b takes over.")
        await replace(cluster, traffic, a, b, crash=False)
        say("6. The next one right after: instance c starts, b is asked to stop.")
        c = await cluster.start("c", state="PASSIVE")
        await replace(cluster, traffic, b, c, crash=False)
        say("7. A crash: d starts, and c is killed (SIGKILL). Its warden sees to the lease.")
        d = await cluster.start("d", state="PASSIVE")
        await replace(cluster, traffic, c, d, crash=True)
        nursery.cancel_scope.cancel()
    return await judge(whatsapp, traffic, answers, await read_mail(cluster, d, len(answers)))


async def read_mail(cluster: Cluster, node: Node, count: int) -> list[str]:
    """What the backend reads of Anna's messages, page by page; waits for so many."""
    texts: list[str] = []
    path, cursor = f"/api/whatsapp/messages?accountId={ACCOUNT}&direction=in", ""
    with trio.move_on_after(SETTLE_S):
        while len(texts) < count:
            page = await cluster.json(node, "GET", path + cursor)
            texts += [each["text"] for each in page["messages"]]
            cursor = f"&cursor={page['cursor']}"
            await trio.sleep(0 if page["more"] else 0.2)
    return texts


async def judge(
    whatsapp: FakeWhatsApp, traffic: Traffic, answers: list[str], mail: list[str]
) -> bool:
    """Look at Anna's phone, at what the backend read, and at what WhatsApp has seen."""
    with trio.move_on_after(SETTLE_S):
        await whatsapp.wait_inbox(ANNA, len(traffic.texts))
    inbox = await whatsapp.inbox(ANNA)
    missing = [text for text in traffic.texts if text not in inbox.texts]
    twice = len(inbox.texts) - len(set(inbox.texts))
    unheard = [text for text in answers if text not in mail]
    heard_twice = len(mail) - len(set(mail))
    counts = await whatsapp.counts()
    conflicts, pairings = counts.get("conflict", 0), counts["paired"]
    say()
    say("On Anna's phone:")
    say(
        f"   {len(traffic.texts)} messages were accepted from the shop. {len(missing)} are missing,"
    )
    say(f"   {twice} are there twice, {len(inbox.unreadable)} cannot be read. The slowest took")
    say(f"   {traffic.slowest_s:.1f} s to be accepted; {traffic.repeated} requests were repeated.")
    say("At the shop:")
    say(f"   Anna wrote {len(answers)} messages. {len(unheard)} are missing,")
    say(f"   {heard_twice} are there twice.")
    say("On the WhatsApp server:")
    say(f"   {counts['login']} logins; two clients at the same time: {conflicts} times.")
    say(f"   QR codes scanned: {pairings}.")
    say()
    failures = [missing, twice, inbox.unreadable, unheard, heard_twice, conflicts, pairings > 1]
    well = not any(failures)
    say("Nothing was lost." if well else "This is not what we promise: please report it.")
    return well


async def main() -> int:
    if shutil.which("node") is None:
        say("The real Baileys needs Node.js 20 or later on the PATH: install it, and try again.")
        return 2
    with tempfile.TemporaryDirectory(prefix="watchkeeper-demo-") as name:
        directory = Path(name)
        async with open_whatsapp() as whatsapp:
            env = {
                **sqlite_env(directory),
                "WATCHKEEPER_CONNECTOR": "baileys",
                "WATCHKEEPER_WHATSAPP_URL": whatsapp.url,
                "WATCHKEEPER_LOG_LEVEL": "info",
            }
            async with open_cluster(directory, env) as cluster:
                with trio.fail_after(ALL_S):
                    return 0 if await tell(cluster, whatsapp) else 1


if __name__ == "__main__":
    raise SystemExit(trio.run(main))
