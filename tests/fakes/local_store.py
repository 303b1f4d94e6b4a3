"""The local disk in memory. It can fail, fill up and lose an account; it never waits for long."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

import trio

from machine.ports import StaleWrite, StoreUnavailable
from machine.records import (
    MAIN_PART,
    AccountCommit,
    AccountCopy,
    AccountId,
    Listing,
    Transition,
)

REPORTS_MAX = 100


class FakeLocalStore:
    """A `LocalStore`. It outlives the instance that uses it, as a disk does: hand it to the next.

    `fail_next(operation, count)` raises `StoreUnavailable` from the next calls; `delays[operation]`
    is how long, in seconds, each call takes; `hanging` operations wait until cancelled.
    """

    def __init__(self) -> None:
        self.copies: dict[AccountId, AccountCopy] = {}
        """Complete ones, and those that `damage_account` made unreadable."""
        self.damaged_rests: dict[AccountId, str] = {}
        """Of copies whose parts beside the main one are unreadable, what is said of them."""
        self.archive: list[AccountCopy] = []
        self.epoch = 0
        self.transitions: list[Transition] = []
        self.reports: deque[Mapping[str, object]] = deque(maxlen=REPORTS_MAX)
        self.listing_fault: str | None = None
        """When set, the listing is incomplete and says this."""
        self.delays: dict[str, float] = {}
        self.hanging: set[str] = set()
        self.calls: dict[str, int] = {}
        self._failures: dict[str, int] = {}

    def fail_next(self, operation: str, count: int = 1) -> None:
        self._failures[operation] = self._failures.get(operation, 0) + count

    def damage_account(self, account_id: AccountId, fault: str = "injected: unreadable") -> None:
        """Make the copy unreadable from now on; `save_account` replaces it."""
        copy = self.copies[account_id]
        self.copies[account_id] = replace(copy, parts={}, complete=False, fault=fault)

    def damage_rest(self, account_id: AccountId, fault: str = "injected: unreadable") -> None:
        """Make every part but the main one unreadable: it shows when the account is fetched."""
        self.damaged_rests[account_id] = fault

    async def _enter(self, operation: str) -> None:
        self.calls[operation] = self.calls.get(operation, 0) + 1
        await trio.sleep(self.delays.get(operation, 0.0))
        if operation in self.hanging:
            await trio.sleep_forever()
        if self._failures.get(operation, 0) > 0:
            self._failures[operation] -= 1
            raise StoreUnavailable(f"injected: {operation}", code="injected")

    async def list_accounts(self) -> Listing:
        await self._enter("list_accounts")
        copies = tuple(map(_head, self.copies.values()))
        return Listing(copies, complete=self.listing_fault is None, fault=self.listing_fault)

    async def fetch_account(self, account_id: AccountId) -> AccountCopy | None:
        await self._enter("fetch_account")
        return self._whole(account_id)

    def _whole(self, account_id: AccountId) -> AccountCopy | None:
        copy = self.copies.get(account_id)
        if copy is None or account_id not in self.damaged_rests:
            return copy
        return replace(copy, parts={}, complete=False, fault=self.damaged_rests[account_id])

    async def save_account(self, copy: AccountCopy) -> None:
        await self._enter("save_account")
        account_id = copy.account.account_id
        stored = self._whole(account_id)
        if stored is not None and stored.fault is None and stored.version > copy.version:
            raise StaleWrite(f"{stored.version} is here, {copy.version} is older")
        if stored is not None and stored.fault is not None:
            self.archive.append(self.copies[account_id])
        self.damaged_rests.pop(account_id, None)
        self.copies[account_id] = replace(copy, parts=dict(copy.parts), stamp=None)

    async def apply(self, commit: AccountCommit) -> None:
        await self._enter("apply")
        account_id = commit.account.account_id
        stored = self.copies.get(account_id)
        if stored is None or stored.fault is not None:
            raise StaleWrite("there is no copy to apply it to")
        if stored.version > commit.version:
            raise StaleWrite(f"{stored.version} is here, {commit.version} is older")
        merged = {**stored.parts, **commit.parts}
        parts = {name: data for name, data in merged.items() if data is not None}
        self.copies[account_id] = AccountCopy(
            commit.account, commit.version, parts, complete=True, commit_id=commit.commit_id
        )

    async def remove_account(self, account_id: AccountId, *, purge: bool) -> None:
        await self._enter("remove_account")
        copy = self.copies.pop(account_id, None)
        self.damaged_rests.pop(account_id, None)
        if purge:
            self.archive = [one for one in self.archive if one.account.account_id != account_id]
        elif copy is not None:
            self.archive.append(copy)

    async def highest_epoch(self) -> int:
        await self._enter("highest_epoch")
        return self.epoch

    async def raise_epoch(self, epoch: int) -> None:
        await self._enter("raise_epoch")
        self.epoch = max(self.epoch, epoch)

    async def append_transition(self, transition: Transition) -> None:
        await self._enter("append_transition")
        self.transitions.append(transition)

    async def list_transitions(self, count_max: int) -> Sequence[Transition]:
        await self._enter("list_transitions")
        return self.transitions[-count_max:] if count_max > 0 else []

    async def append_report(self, report: Mapping[str, object]) -> None:
        await self._enter("append_report")
        self.reports.append(dict(report))


def _head(copy: AccountCopy) -> AccountCopy:
    """The copy as it is listed."""
    parts = {name: data for name, data in copy.parts.items() if name == MAIN_PART}
    return replace(copy, parts=parts, complete=copy.fault is None and parts == copy.parts)
