"""The loopback world from outside: be the phone, see what arrived, command the weather.

Lives here: what tests, the HTTP routes and the command line may do. Works beside any number of
instances, in any process, whether or not one of them is ACTIVE.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import TypeVar, cast

import trio

from daemon.loopback.behaviour import CLOSE_CODES, Behaviour
from daemon.loopback.database import LoopbackUnusable
from daemon.loopback.server import Action, Eviction, LoopbackServer, Page
from machine.ports import Clocks, StoreUnavailable
from machine.records import AccountId

MESSAGES_PAGE_MAX = 10_000

T = TypeVar("T")


class LoopbackWorld:
    """The state in `directory`, made when first asked for. `close` it when nobody uses it.

    Every method raises `StoreUnavailable` when the database cannot be used.
    """

    def __init__(self, directory: Path, *, clocks: Clocks | None = None) -> None:
        self._directory = directory
        self._wall = time.time if clocks is None else clocks.wall
        self._limiter = trio.CapacityLimiter(1)
        self._server: LoopbackServer | None = None

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def scan(
        self, account_id: AccountId, phone: str | None = None, *, code: str | None = None
    ) -> str:
        """Be the phone: scan the account's QR code, or type `code` on it; the phone's number.

        The number is, in this order: `phone`, the one the code was asked for, the account's last,
        a made-up one. Raises `NotAwaitingScan`.
        """
        return await self._perform(lambda server: server.scan(account_id, phone, code))

    async def receive(
        self,
        account_id: AccountId,
        sender: str,
        text: str,
        *,
        sender_name: str | None = None,
        message_id: str | None = None,
        copies: int = 1,
    ) -> str:
        """Send an account a message, as `sender`; its id. See `LoopbackServer.receive`.

        Raises `AccountNotPaired`, `OutboxFull`.
        """
        return await self._perform(
            lambda server: server.receive(
                account_id,
                sender,
                text,
                sender_name=sender_name,
                message_id=message_id,
                copies=copies,
            )
        )

    async def count_waiting(self, account_id: AccountId) -> int:
        """How many messages the account was sent and has not acknowledged."""
        return await self._perform(lambda server: server.count_waiting(account_id), reading=True)

    async def unlink(self, account_id: AccountId) -> int:
        """Be the phone: remove the account's devices (401); how many there were."""
        return await self._perform(lambda server: server.unlink(account_id))

    async def cut(
        self, account_id: AccountId | None, code: int = 428, *, expire_s: float | None = None
    ) -> int:
        """Close an account's open connections (`None`: everyone's); how many there were.

        Raises `ValueError` for a code that WhatsApp does not have.
        """
        if code not in CLOSE_CODES:
            raise ValueError(f"code must be one of {sorted(CLOSE_CODES)}")
        return await self._perform(lambda server: server.cut(account_id, code, expire_s=expire_s))

    async def set_behaviour(
        self, account_id: AccountId | None, behaviour: Behaviour | None
    ) -> Behaviour:
        """Command one account, or all that have no command of their own; what holds for it now.

        `behaviour` replaces the earlier one whole; `None` takes it back. It holds for every
        process from the next login or send on.
        """

        def change(server: LoopbackServer) -> Behaviour:
            server.set_behaviour(account_id, behaviour)
            return server.behaviour(account_id)

        return await self._perform(change)

    async def behaviour(self, account_id: AccountId | None = None) -> Behaviour:
        """What holds for an account now (`None`: for those without a command of their own)."""
        return await self._perform(lambda server: server.behaviour(account_id), reading=True)

    async def list_messages(
        self,
        account_id: AccountId | None = None,
        *,
        raw: bool = False,
        after: int = 0,
        limit: int = MESSAGES_PAGE_MAX,
    ) -> Page:
        """What the recipients see, in order of arrival: one for each recipient and message id.

        `raw`: every arrival, also those that are duplicates or unreadable. `after` is the sequence
        number that the page before ended with. A page also ends when its texts get large; the
        world keeps the newest 100,000 arrivals.
        """
        if not 1 <= limit <= MESSAGES_PAGE_MAX:
            raise ValueError(f"limit must be between 1 and {MESSAGES_PAGE_MAX}")
        return await self._perform(
            lambda server: server.list_messages(account_id, raw=raw, after=after, limit=limit),
            reading=True,
        )

    async def list_evictions(self) -> tuple[int, tuple[Eviction, ...]]:
        """How often a second login ended a first that was alive, and the newest 1,000 times."""
        return await self._perform(LoopbackServer.list_evictions, reading=True)

    async def list_connected(self) -> tuple[AccountId, ...]:
        """The accounts that are logged in, by whichever process; sorted."""
        return tuple(sorted(await self._perform(LoopbackServer.list_connected, reading=True)))

    async def _perform(self, action: Action[T], *, reading: bool = False) -> T:
        answer = await trio.to_thread.run_sync(self._work, action, reading, limiter=self._limiter)
        return cast(T, answer)

    def _work(self, action: Action[object], reading: bool) -> object:
        """In the worker thread; the limiter lets in one at a time."""
        try:
            if self._server is None:
                self._server = LoopbackServer(self._directory, self._wall)
            ((result, refusal),) = self._server.perform([action], reading=reading)
        except (sqlite3.Error, LoopbackUnusable) as error:
            raise StoreUnavailable(f"the loopback world does not answer: {error}") from error
        if refusal is not None:
            raise refusal
        return result
