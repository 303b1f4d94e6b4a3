"""Accounts of another backend, taken over once: created here, or quarantined with the reason.

Never lives here: how such a directory is read (`LegacySource`). Its files are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

import trio

from machine.lease import describe_error
from machine.ledger import Ledger
from machine.limits import Limits
from machine.ports import (
    AccountExists,
    AccountStore,
    AuthTooLarge,
    LegacyAccount,
    LegacyFault,
    Ports,
    StaleWrite,
    StoreUnavailable,
)
from machine.records import (
    Account,
    AccountCopy,
    AccountId,
    AccountStatus,
    Grant,
    KeyChange,
    Version,
)
from machine.session import Session

Failed = Callable[[AccountId | None, str, str], None]
"""Told of each account (or of the whole scan, `None`) that was not taken over: cause, advice."""


class LegacyTerm(Protocol):
    """What the import needs of its term."""

    grant: Grant
    sessions: dict[AccountId, Session]

    def make_ledger(
        self, copy: AccountCopy, *, push: bool = False, saved: bool = False
    ) -> Ledger: ...
    def make_session(self, account: Account, ledger: Ledger | None) -> Session: ...


def new_account(account_id: AccountId, name: str, now: float) -> Account:
    """An account that has just been made: nothing is known of it yet."""
    return Account(
        account_id=account_id,
        name=name,
        status=AccountStatus.AWAITING_SCAN,
        created_at=now,
        updated_at=now,
        since=now,
    )


async def first_version(accounts: AccountStore, account_id: AccountId, epoch: int) -> Version:
    """The version a new account starts at: above the mark of a removed one of the same id.

    Raises `StoreUnavailable`.
    """
    found = await accounts.fetch_account(account_id)
    if found is not None and found.removed:
        return Version(epoch, found.version.revision + 1)
    return Version(epoch, 1)


class LegacyImport:
    """Takes accounts over from directories of another backend."""

    def __init__(self, term: LegacyTerm, *, ports: Ports, limits: Limits, failed: Failed) -> None:
        self._term = term
        self._ports = ports
        self._limits = limits
        self._failed = failed
        # Listed because of a directory alone: there is nothing of them in any store.
        self._broken: set[AccountId] = set()

    async def take_over(
        self, directory: str | None, *, except_for: Collection[AccountId] = ()
    ) -> list[Session]:
        """Create an account for each directory that has none; the sessions to open.

        `directory` `None`: the configured one. Accounts in memory and those in `except_for` are
        passed over without being read. What fails is told to `failed`, and tried again next time:
        somebody may have mended it.
        """
        known = ({*self._term.sessions} - self._broken).union(except_for)
        try:
            with trio.fail_after(self._limits.import_try_s):
                found = await self._ports.legacy.scan(directory, known=known)
        except (StoreUnavailable, trio.TooSlowError) as error:
            self._failed(
                None,
                f"legacy sessions: {describe_error(error)}",
                "check the directory; nothing in it was changed",
            )
            return []
        created: list[Session] = []
        for item in found:
            session = self._term.sessions.get(item.account_id)
            if item.account_id in known or not (session is None or self._is_broken(session)):
                continue
            if isinstance(item, LegacyFault):
                self._quarantine(item)
            else:
                session = await self._create(item)
                if session is not None:
                    self._broken.discard(item.account_id)
                    created.append(session)
        return created

    def _is_broken(self, session: Session) -> bool:
        """Whether nothing but a directory that could not be read is known of it."""
        return session.account_id in self._broken and session.ledger is None

    def _quarantine(self, fault: LegacyFault) -> None:
        """List the account, so that nobody wonders where it is; there is nothing to open."""
        self._ports.journal.note(
            "import.failed", directory=fault.directory, cause=fault.cause, advice=fault.advice
        )
        self._failed(fault.account_id, fault.cause, fault.advice)
        account = replace(
            new_account(fault.account_id, fault.account_id, self._ports.clocks.wall()),
            status=AccountStatus.QUARANTINED,
            last_error=fault.cause,
        )
        self._broken.add(fault.account_id)
        self._term.make_session(account, None).quarantine(fault.cause, fault.advice)

    async def _create(self, item: LegacyAccount) -> Session | None:
        ports = self._ports
        for cause, advice in item.notes:
            ports.journal.note(
                "import.noted", account_id=item.account_id, cause=cause, advice=advice
            )
        try:
            with trio.fail_after(self._limits.store_try_s):
                copy = await self._write(item)
        except (
            AuthTooLarge,
            AccountExists,
            StaleWrite,
            StoreUnavailable,
            trio.TooSlowError,
        ) as error:
            self._failed(
                item.account_id,
                f"not imported: {describe_error(error)}",
                "it is tried again at the next restore, or with watchkeeper import",
            )
            return None
        session = self._term.make_session(copy.account, self._term.make_ledger(copy))
        session.load_outbox(())
        ports.journal.note("account.imported", account_id=item.account_id)
        return session

    async def _write(self, item: LegacyAccount) -> AccountCopy:
        ports, grant = self._ports, self._term.grant
        version = await first_version(ports.accounts, item.account_id, grant.epoch)
        account = replace(
            new_account(item.account_id, item.name, ports.clocks.wall()),
            phone=item.phone,
            status=AccountStatus.CONNECTING,
        )
        changed = ports.codec.change(item.account_id, {}, KeyChange(item.keys), version)
        parts = {name: part for name, part in changed.items() if part is not None}
        stamp = await ports.accounts.create_account(grant, account, version, parts)
        return AccountCopy(account, version, parts, complete=True, stamp=stamp)
