"""One store each to hold to the contract, with what a test must be able to do to it.

The Firestore world is imported only when asked for, since most runs have no emulator.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import pytest

from daemon.sqlite.local import open_local
from daemon.sqlite.shared import SCHEMA, open_sqlite_shared
from machine.ports import AccountStore, InboxStore, LeaseStore, LocalStore, OutboxStore
from machine.records import AccountId
from tests.fakes import FakeLocalStore, FakeSharedState, FakeSharedStore, applied_then_failing

Document = Literal["lease", "fence"]
Record = Literal["lease", "fence", "account", "message", "inbox"]

FIRESTORE = pytest.param("firestore", marks=pytest.mark.emulator)
SHARED_ADAPTERS = ["fake", "sqlite", FIRESTORE]
NETWORKED_ADAPTERS = ["fake", FIRESTORE]
"""Those between which and us an answer can be lost."""


@dataclass(frozen=True)
class SharedWorld:
    """A shared store and the powers over it that no port has.

    `age_lease(by_s)` lets the lease become that much older. `lost_replies()` is a block in which
    what is written is applied and its answer lost; `None` where no network is between.
    """

    lease: LeaseStore
    accounts: AccountStore
    outbox: OutboxStore
    inbox: InboxStore
    age_lease: Callable[[float], Awaitable[None]]
    delete_document: Callable[[Document], Awaitable[None]]
    damage_account: Callable[[AccountId], Awaitable[None]]
    make_newer: Callable[[Record, str], Awaitable[None]]
    """A newer release writes that record: the account or message with this id."""
    dump: Callable[[], Awaitable[object]]
    """All that is stored, byte for byte."""
    lost_replies: Callable[[], AbstractAsyncContextManager[None]] | None = None


def open_shared_world(
    adapter: str, directory: Path, host: str | None
) -> AbstractAsyncContextManager[SharedWorld]:
    """A world with an empty store, behind `adapter`."""
    if adapter == "fake":
        return _open_fake()
    if adapter == "sqlite":
        return _open_sqlite(directory / "shared.db")
    module = import_module("tests.firestore.contract_world")
    world: AbstractAsyncContextManager[SharedWorld] = module.open_firestore_world(host)
    return world


@asynccontextmanager
async def _open_fake() -> AsyncIterator[SharedWorld]:
    state = FakeSharedState()
    store = FakeSharedStore(state)

    async def age_lease(by_s: float) -> None:
        state.age_lease(by_s)

    async def delete_document(which: Document) -> None:
        setattr(state, which, None)

    async def damage_account(account_id: AccountId) -> None:
        state.damage_account(account_id)

    async def make_newer(record: Record, name: str) -> None:
        if record == "account":
            state.make_account_newer(AccountId(name))
        else:
            state.make_newer(name or record)

    async def dump() -> object:
        held = (state.lease, state.fence, state.accounts, state.messages, state.inbox)
        return deepcopy((*held, state.archive))

    @asynccontextmanager
    async def lost_replies() -> AsyncIterator[None]:
        calm = store.weather
        store.weather = lambda _operation: applied_then_failing()
        yield
        store.weather = calm

    yield SharedWorld(
        *(store, store, store, store, age_lease, delete_document, damage_account),
        make_newer,
        dump,
        lost_replies,
    )


@asynccontextmanager
async def _open_sqlite(path: Path) -> AsyncIterator[SharedWorld]:
    now_s = 1000.0

    async def age_lease(by_s: float) -> None:
        nonlocal now_s
        now_s += by_s

    async def execute(statement: str) -> None:
        connection = sqlite3.connect(path)
        with connection:
            connection.execute(statement)
        connection.close()

    async def delete_document(which: Document) -> None:
        await execute(f"DELETE FROM {which}")

    async def damage_account(account_id: AccountId) -> None:
        await execute(f"UPDATE accounts SET status = '?' WHERE account_id = '{account_id}'")

    async def make_newer(_record: Record, _name: str) -> None:
        # One number says it of everything in the file, and it is looked at in each transaction.
        await execute(f"PRAGMA user_version = {SCHEMA.version + 1}")

    async def dump() -> object:
        connection = sqlite3.connect(path)
        found = (connection.execute("PRAGMA user_version").fetchone(), [*connection.iterdump()])
        connection.close()
        return found

    async with open_sqlite_shared(path, boottime=lambda: now_s, boot_id="boot") as store:
        yield SharedWorld(
            *(store, store, store, store, age_lease, delete_document, damage_account),
            make_newer,
            dump,
        )


@dataclass(frozen=True)
class LocalWorld:
    """A local store, and how it looks after the instance has been started again."""

    open: Callable[[], AbstractAsyncContextManager[LocalStore]]
    damage_account: Callable[[AccountId], None]
    """Makes it unreadable altogether."""
    damage_rest: Callable[[AccountId], None]
    """Makes every part but the main one unreadable."""


def local_world(adapter: str, directory: Path) -> LocalWorld:
    """A world with an empty disk, behind `adapter`."""
    if adapter == "fake":
        store = FakeLocalStore()
        return LocalWorld(lambda: nullcontext(store), store.damage_account, store.damage_rest)

    def execute(statement: str, account_id: AccountId) -> None:
        connection = sqlite3.connect(directory / "local.db")
        with connection:
            connection.execute(statement, (account_id,))
        connection.close()

    def damage_account(account_id: AccountId) -> None:
        execute("UPDATE copies SET head = x'c1' WHERE account_id = ?", account_id)

    def damage_rest(account_id: AccountId) -> None:
        row = "(SELECT row FROM copies WHERE account_id = ?)"
        execute(f"UPDATE rests SET rest = x'c1' WHERE row = {row}", account_id)

    return LocalWorld(lambda: open_local(directory), damage_account, damage_rest)
