"""A WhatsApp server of our own, for tests with the real Baileys: started, told what to do, ended.

`open_whatsapp()` starts it; what its `FakeWhatsApp` is told is documented in README.md beside this.
People are phone numbers, digits only. No call has a deadline: callers write `trio.fail_after`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import trio

MAIN = Path(__file__).parent / "fake" / "main.mjs"
START_S_MAX = 30.0
POLL_S = 30
"""How long the server keeps one question of `wait_for` open; then it is asked again."""
ANSWER_S_MAX = 90.0


class Refused(Exception):
    """The fake says that what was asked cannot be done, and why."""


@dataclass(frozen=True)
class LinkedDevice:
    """A linked device as the server knows it."""

    device: int
    connected: bool
    ready: bool
    foreign: bool
    logins: int
    conflicts: int
    pre_keys: int
    waiting: int
    """Stanzas on the way to it that it has not acknowledged."""


@dataclass(frozen=True)
class Person:
    """A phone number: what it has linked, and what the server holds for it."""

    number: str
    devices: tuple[LinkedDevice, ...]
    received: int
    held: int
    held_acks: int
    held_receipts: int


@dataclass(frozen=True)
class Shown:
    """A message as its recipient sees it: one an id, however often it came."""

    message_id: str
    sender: str
    text: str
    times: int


@dataclass(frozen=True)
class Arrival:
    """One time that a message came; `text` is `None` when it could not be read."""

    message_id: str
    sender: str
    type: str
    text: str | None
    error: str | None


@dataclass(frozen=True)
class Inbox:
    """What a phone has got."""

    shown: tuple[Shown, ...]
    unreadable: tuple[str, ...]
    """Ids of messages of which no copy could be read."""
    arrivals: tuple[Arrival, ...]

    @property
    def texts(self) -> list[str]:
        return [each.text for each in self.shown]

    @property
    def duplicates(self) -> list[str]:
        return [each.message_id for each in self.shown if each.times > 1]


@dataclass(frozen=True)
class Sent:
    """A message that a phone sent, and the receipts that came for it, by type."""

    message_id: str
    text: str
    receipts: tuple[str, ...]


class FakeWhatsApp:
    """The control API of a running server. Refusals raise `Refused`."""

    def __init__(self, url: str, client: httpx.AsyncClient) -> None:
        self.url = url
        """Where clients connect to."""
        self._client = client

    # --- phones ------------------------------------------------------------------------------

    async def scan(self, number: str, qr: str) -> LinkedDevice:
        """The phone scans a QR code. The client closes with 515 and must connect again."""
        return _device(await self._post(number, "scan", qr=qr))

    async def enter_code(self, number: str, code: str) -> LinkedDevice:
        """A pairing code is typed into the phone."""
        return _device(await self._post(number, "enter-code", code=code))

    async def send(
        self,
        sender: str,
        to: str,
        texts: Sequence[str],
        *,
        ids: Sequence[str] = (),
        twice: bool = False,
    ) -> list[str]:
        """A contact writes to an account; the ids. `twice`: each stanza goes out two times."""
        answer = await self._post(
            sender, "send", to=to, texts=list(texts), ids=list(ids), twice=twice
        )
        return list(answer["ids"])

    async def inbox(self, number: str) -> Inbox:
        """What the phone has got so far; a lazy one opens it now."""
        found = await self._get(f"/people/{number}/inbox")
        return Inbox(
            shown=tuple(
                Shown(each["id"], each["from"], each["text"], each["times"])
                for each in found["shown"]
            ),
            unreadable=tuple(each["id"] for each in found["unreadable"]),
            arrivals=tuple(
                Arrival(each["id"], each["from"], each["type"], each["text"], each["error"])
                for each in found["arrivals"]
            ),
        )

    async def wait_inbox(self, number: str, count: int) -> Inbox:
        """Wait until the phone shows at least so many messages."""
        while await self._post(number, "wait-inbox", count=count, seconds=POLL_S) is not True:
            pass
        return await self.inbox(number)

    async def sent(self, number: str) -> list[Sent]:
        """What the phone sent."""
        found = await self._get(f"/people/{number}/sent")
        return [
            Sent(each["id"], each["text"], tuple(receipt["type"] for receipt in each["receipts"]))
            for each in found["sent"]
        ]

    async def read(self, number: str, sender: str, ids: Sequence[str] | None = None) -> list[str]:
        """The person reads these messages of `sender`, or all: read receipts go out."""
        chosen = {} if ids is None else {"ids": list(ids)}
        return list((await self._post(number, "read", **{"from": sender}, **chosen))["ids"])

    async def forget(self, number: str, account: str) -> None:
        """The phone loses its session with the account: it cannot read the next message."""
        await self._post(number, "forget", session=account)

    async def change(self, number: str, **facts: bool | int | str | None) -> None:
        """Set `exists`, `spelledAs`, `decrypt`, `preKeyCount`: README.md."""
        await self._post(number, "", **facts)

    async def unlink(self, number: str) -> None:
        """The phone removes the device that was linked last (401, and at every later login)."""
        await self._post(number, "unlink")

    # --- the network and the server ----------------------------------------------------------

    async def close(
        self, number: str, code: int, *, expire_s: int | None = None, device_removed: bool = False
    ) -> int:
        """End the account's connections as that status code; how many there were."""
        how: dict[str, Any] = {} if expire_s is None else {"expireS": expire_s}
        answer = await self._post(number, "close", code=code, deviceRemoved=device_removed, **how)
        return int(answer["connections"])

    async def cut(self, number: str) -> int:
        """Drop the account's TCP connections; how many there were."""
        return int((await self._post(number, "cut"))["connections"])

    async def silence(self, number: str, *, on: bool) -> None:
        """Answer nothing and lose what comes, as a dead network."""
        await self._post(number, "silence", on=on)

    async def refuse(
        self,
        number: str,
        code: int | None,
        *,
        times: int | None = None,
        expire_s: int | None = None,
    ) -> None:
        """End the next logins with that code; `None`: no longer."""
        how = {"times": times, "expireS": expire_s}
        given = {name: value for name, value in how.items() if value is not None}
        await self._post(number, "refuse", code=code, **given)

    async def foreign_login(self, number: str, *, fights: int = 0, every_ms: int = 1000) -> None:
        """Somebody else logs in as the account's device, and again after being replaced."""
        await self._post(number, "foreign-login", fights=fights, everyMs=every_ms)

    async def acks(self, number: str, mode: str, **how: int | bool) -> None:
        """What becomes of the account's messages: 'good', 'error' (`error`), 'delay' (`delayMs`),
        'withhold'; `times`; `deliver`: whether the recipient gets them meanwhile."""
        await self._post(number, "acks", mode=mode, **how)

    async def receipts(self, number: str, mode: str, **how: int | bool) -> None:
        """What becomes of receipts to the account: as `acks`, without 'error'."""
        await self._post(number, "receipts", mode=mode, **how)

    async def hold(self, number: str) -> None:
        """Keep what the account sends on the wire: neither acknowledged nor delivered."""
        await self._post(number, "hold")

    async def release(self, number: str, *, drop: bool = False) -> dict[str, int]:
        """Let messages, acks and receipts go that were held, or lose them; how many of each."""
        return dict(await self._post(number, "release", drop=drop))

    async def settings(self, **settings: bool | int | str | None) -> None:
        """Set `decrypt`, `preKeys`, `lids`, `qrTtlMs`, `latencyMs`, `outage`: README.md."""
        await self._call("POST", "/settings", settings)

    async def reset(self) -> None:
        """Forget everybody and cut every connection."""
        await self._call("POST", "/reset", {})

    # --- what happened -----------------------------------------------------------------------

    async def person(self, number: str) -> Person:
        found = await self._get(f"/people/{number}")
        return Person(
            number=found["number"],
            devices=tuple(_device(each) for each in found["devices"]),
            received=found["received"],
            held=found["held"],
            held_acks=found["heldAcks"],
            held_receipts=found["heldReceipts"],
        )

    async def counts(self) -> dict[str, int]:
        """How often each event happened: `login`, `conflict`, `paired`, `message`, … (README)."""
        return dict((await self._get("/state"))["counts"])

    async def log(self) -> list[dict[str, Any]]:
        """The last events, oldest first."""
        return list((await self._get("/log"))["log"])

    async def wait_for(self, event: str, count: int = 1) -> None:
        """Wait until the event has happened at least so often since the start."""
        question = {"event": event, "count": count, "seconds": POLL_S}
        while (await self._call("POST", "/wait", question)) is not True:
            pass

    # --- the wire ----------------------------------------------------------------------------

    async def _post(self, number: str, verb: str, /, **body: Any) -> Any:
        return await self._call("POST", f"/people/{number}/{verb}".rstrip("/"), body)

    async def _get(self, path: str) -> Any:
        return await self._call("GET", path, None)

    async def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        answer = await self._client.request(method, path, json=body)
        if answer.status_code == 400:
            raise Refused(answer.json()["error"])
        answer.raise_for_status()
        return answer.json()


def _device(found: dict[str, Any]) -> LinkedDevice:
    return LinkedDevice(
        device=found["device"],
        connected=found["connected"],
        ready=found["ready"],
        foreign=found["foreign"],
        logins=found["logins"],
        conflicts=found["conflicts"],
        pre_keys=found["preKeys"],
        waiting=found["waiting"],
    )


class WhatsAppProcess:
    """The server's process, on free ports. It ends with whoever started it, however he ends."""

    def __init__(self, *arguments: str) -> None:
        """`arguments` are those of fake/main.mjs."""
        self._command = ["node", str(MAIN), *arguments]
        # Closed by `close`; a pipe would fill up, for nobody reads it meanwhile.
        self._words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - see above
        self._process: subprocess.Popen[bytes] | None = None
        self._control = ""

    def start(self) -> None:
        """Return when it is ready. RuntimeError, with what it printed: it did not start."""
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            start_new_session=True,
        )
        self.pid = self._process.pid
        ready = read_line(self._process, START_S_MAX)
        if ready is None:
            said = self._said()
            self.close()
            raise RuntimeError(f"the fake WhatsApp did not start:\n{said}")
        self.url = str(ready["url"])
        self._control = str(ready["control"])

    def close(self) -> None:
        """SIGKILL to the whole process group. What it complained of is printed."""
        if self._process is not None:
            end_group(self._process)
            self._process = None
        print(self._said(), end="", file=sys.stderr)
        self._words.close()

    def _said(self) -> str:
        self._words.seek(0)
        return self._words.read().decode(errors="replace")[-2000:]

    @asynccontextmanager
    async def open_control(self) -> AsyncIterator[FakeWhatsApp]:
        """Speak to the running server."""
        limits = httpx.Timeout(ANSWER_S_MAX)
        async with httpx.AsyncClient(base_url=self._control, timeout=limits) as client:
            yield FakeWhatsApp(self.url, client)


def read_line(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
    """The first line that the process prints, as JSON; `None` when none comes in time."""
    assert process.stdout is not None
    give_up_at = time.monotonic() + seconds
    line = b""
    while not line.endswith(b"\n"):
        left = give_up_at - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            return None
        some = os.read(process.stdout.fileno(), 4096)
        if not some:
            return None
        line += some
    return dict(json.loads(line))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started, and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


@asynccontextmanager
async def open_whatsapp(*arguments: str) -> AsyncIterator[FakeWhatsApp]:
    """A server of one's own, ended afterwards; `arguments` are those of fake/main.mjs."""
    process = WhatsAppProcess(*arguments)
    try:
        await trio.to_thread.run_sync(process.start)
        async with process.open_control() as server:
            yield server
    finally:
        process.close()
