"""An instance whose shared store answers late: `python -m bench.delayed SECONDS`.

Lives here: the delay, and the composition with it. Everything else is the daemon as it ships, but
for the warden, which is not what is measured.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from daemon.journal import LoguruJournal
from daemon.main import SharedStores, open_shared, serve
from daemon.settings import Settings, load_settings
from machine.ports import AccountStore
from machine.records import (
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    Grant,
    Listing,
    PartName,
    Stamp,
    Version,
)


class DelayedAccounts:
    """An `AccountStore` that takes `delay_s` longer for everything, each call by itself."""

    def __init__(self, accounts: AccountStore, delay_s: float) -> None:
        self._accounts = accounts
        self._delay_s = delay_s

    async def list_accounts(self) -> Listing:
        """See `AccountStore`, as with the others."""
        await trio.sleep(self._delay_s)
        return await self._accounts.list_accounts()

    async def fetch_account(self, account_id: AccountId) -> AccountCopy | None:
        """See the class."""
        await trio.sleep(self._delay_s)
        return await self._accounts.fetch_account(account_id)

    async def create_account(
        self, grant: Grant, account: Account, version: Version, parts: Mapping[PartName, bytes]
    ) -> Stamp:
        """See the class."""
        await trio.sleep(self._delay_s)
        return await self._accounts.create_account(grant, account, version, parts)

    async def commit(self, commit: AccountCommit) -> Stamp:
        """See the class."""
        await trio.sleep(self._delay_s)
        return await self._accounts.commit(commit)

    async def seal(self, commits: Sequence[AccountCommit]) -> Sequence[Stamp | None]:
        """See the class."""
        await trio.sleep(self._delay_s)
        return await self._accounts.seal(commits)

    async def remove_account(
        self, grant: Grant, account_id: AccountId, stamp: Stamp, *, purge: bool
    ) -> None:
        """See the class."""
        await trio.sleep(self._delay_s)
        await self._accounts.remove_account(grant, account_id, stamp, purge=purge)

    async def archive_parts(self, copy: AccountCopy, reason: str) -> None:
        """See the class."""
        await trio.sleep(self._delay_s)
        await self._accounts.archive_parts(copy, reason)


@asynccontextmanager
async def open_delayed(
    delay_s: float, settings: Settings, journal: LoguruJournal
) -> AsyncIterator[SharedStores]:
    """The configured store, whose accounts are late. Without a delay nothing stands before it."""
    async with open_shared(settings, journal) as stores:
        if delay_s:
            stores = replace(stores, accounts=DelayedAccounts(stores.accounts, delay_s))
        yield stores


def main() -> int:
    """Run an instance with the settings of the environment."""
    delay_s = float(sys.argv[1])
    settings = load_settings().settings
    return trio.run(partial(serve, settings, open_stores=partial(open_delayed, delay_s)))


if __name__ == "__main__":
    sys.exit(main())
