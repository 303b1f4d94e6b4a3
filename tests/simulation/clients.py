"""People: callers who send messages through whichever instance, and contacts who write back.

Some callers name each request with a key and ask again until they are sure; the others have no key,
and ask again only where nothing can have been done.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import trio

from daemon.http.edge import Answer
from daemon.http.errors import ApiError, ErrorCode
from daemon.http.links import NOT_STARTED
from machine.records import AccountId, MessageId
from tests.fakes.connector import FakeWhatsApp
from tests.simulation.checks import Checks
from tests.simulation.front import Front, send_request

RECIPIENTS = ("4915100001", "4915100002")
ANSWER_S = 30.0
TRIES_MAX = 30
LOST = frozenset({"account_not_found", "account_not_paired"})
"""Answers that mean an account is gone, which none of ours ever is."""
SAFE = frozenset({ErrorCode.NO_ACTIVE_INSTANCE.value, ErrorCode.NOT_ACTIVE.value, "not_started"})
"""Answers after which nothing was done: also a caller without a key may ask again."""


class Clients:
    """The callers. `accepted` is what they were promised: the recipient of each message."""

    def __init__(
        self,
        seed: int,
        checks: Checks,
        accounts: tuple[AccountId, ...],
        fronts: Callable[[], list[Front]],
        *,
        every_s: float,
    ) -> None:
        self.accepted: dict[MessageId, str] = {}
        self.forgotten: set[MessageId] = set()
        """What somebody's backup has lost before it could be sent."""
        self.excused: set[AccountId] = set()
        """Accounts that somebody has made unreadable on purpose, for now."""
        self._checks = checks
        self._accounts = accounts
        self._fronts = fronts
        self._every_s = every_s
        self._rng = random.Random(f"{seed} clients")
        self._sent = 0

    async def run(self) -> None:
        """Send a message every so often until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(self._rng.expovariate(1 / self._every_s))
                self._sent += 1
                nursery.start_soon(self._send, self._sent)

    async def _send(self, number: int) -> None:
        """One message, asked for again until it is accepted or nobody wants to wait any more."""
        account_id = self._rng.choice(self._accounts)
        to = self._rng.choice(RECIPIENTS)
        key = f"key {number}" if self._rng.random() < 0.7 else None
        for _ in range(TRIES_MAX):
            code = await self._ask_once(account_id, to, f"message {number}", key)
            if code == "accepted":
                return
            if key is None and code not in SAFE:
                self._checks.counts["unsure"] += 1
                return
            await trio.sleep(self._rng.uniform(0.3, 1.0))
        self._checks.counts["given up"] += 1

    async def _ask_once(self, account_id: AccountId, to: str, text: str, key: str | None) -> str:
        fronts = self._fronts()
        if not fronts:
            return "not_started"
        visit = self._rng.choice(fronts).knock(send_request(account_id, to, text, key))
        with trio.move_on_after(ANSWER_S):
            await visit.done.wait()
        match visit.outcome:
            case Answer(status=202, body=body):
                message_id = MessageId(json.loads(body)["messageId"])
                if message_id not in self.forgotten:
                    self.accepted[message_id] = to
                self._checks.counts["accepted"] += 1
                return "accepted"
            case Answer(body=body):
                code = str(json.loads(body)["error"])
            case ApiError(code=refused):
                code = refused.value
            case outcome:
                return "not_started" if outcome is NOT_STARTED else "unknown"
        self._checks.counts[f"answered {code}"] += 1
        if code in LOST and account_id not in self.excused:
            self._checks.violated(7, f"a caller is told {code} for {account_id}")
        return code


class Contacts:
    """Those who write to the accounts. `sent` is what each account must have in the end."""

    def __init__(
        self, seed: int, whatsapp: FakeWhatsApp, accounts: tuple[AccountId, ...], *, every_s: float
    ) -> None:
        self.sent: dict[MessageId, AccountId] = {}
        self._whatsapp = whatsapp
        self._accounts = accounts
        self._every_s = every_s
        self._rng = random.Random(f"{seed} contacts")

    async def run(self) -> None:
        """Write every so often until cancelled, now and then delivered twice."""
        while True:
            await trio.sleep(self._rng.expovariate(1 / self._every_s))
            account_id = self._rng.choice(self._accounts)
            message_id = MessageId(f"mail-{len(self.sent) + 1}")
            self.sent[message_id] = account_id
            self._whatsapp.post(
                account_id,
                message_id,
                sender=self._rng.choice(RECIPIENTS),
                twice=self._rng.random() < 0.1,
            )
