"""Bringing every account back on entering ACTIVE: read both copies, choose, seal, open, report.

The choice between two copies is a pure function, `reconcile`: the newest readable copy wins by
number, nothing older ever replaces anything newer, and what cannot be read is kept and listed.

Never lives here: how one account is opened (`machine.session`) or written (`machine.ledger`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import trio

from machine.doubt import LastTerm, SharedCopy, Source, doubt_sessions
from machine.lease import describe_error
from machine.ledger import AccountVanished, Ledger
from machine.legacy import LegacyImport
from machine.limits import Durability, Limits
from machine.places import last_used_at
from machine.ports import (
    AuthCodec,
    Ports,
    StoreUnavailable,
)
from machine.records import (
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    AccountStatus,
    Grant,
    Listing,
    Message,
)
from machine.refusals import StoreAway
from machine.retry import Backoff, TryTimedOut, retry
from machine.session import Outcome, Session, is_opened
from machine.views import RestoreFailure, RestoreReport

T = TypeVar("T")

READ_BACKOFF = Backoff(first_s=0.2, factor=2.0, cap_s=5.0, jitter=0.5)
LATE_BACKOFF = Backoff(first_s=1.0, factor=2.0, cap_s=15.0, jitter=0.5)
SEAL_BATCH = 200
SEALS_IN_FLIGHT = 4
TURN = 100
"""Accounts handled in one go: 10,000 of them held every renewal and caller up for 2 s."""
LATE_GATHER_S = 0.2

ADVICE_UNREADABLE = (
    "nothing was changed; give the encryption key it was written with, or restore this account "
    "from a backup, then reconnect it"
)
ADVICE_NEWER = (
    "nothing was changed; start an instance of the release that wrote it, or of a later one"
)

SHARED = "the shared store"
DISK = "this disk"
OUTBOX = "the outbox"


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one account.

    `copy` is the one to go on with; with `Source.NEITHER` its bytes are not used. `push`: it is
    newer than the shared one and is written there first. `fault` says why an account is
    quarantined; `removed` that it is gone, and its copy on disk is to be archived.
    """

    account_id: AccountId
    source: Source
    copy: AccountCopy
    push: bool = False
    fault: str | None = None
    removed: bool = False


def fault_of(copy: AccountCopy, codec: AuthCodec) -> str | None:
    """What keeps an account from being opened with this copy's credentials, or `None`."""
    if copy.fault is None and copy.parts:
        return codec.check(copy.account.account_id, copy.parts)
    if copy.fault is None and copy.account.status is AccountStatus.CONNECTED:
        # Opened without keys it would be paired anew, and its keys may still be somewhere.
        return "it was connected, and this copy has no credentials"
    return copy.fault


def reconcile(shared: AccountCopy | None, local: AccountCopy | None) -> Choice:
    """Choose between the copies of one account; at least one must be given.

    The highest `(epoch, revision)` wins. An unreadable copy never loses to an older one, nor one of
    a newer release to any: the account is quarantined, because going on from older keys would
    destroy what is newer.
    """
    if local is None:
        assert shared is not None
        return _take(shared, Source.SHARED)
    if shared is None:
        return replace(_take(local, Source.DISK), push=local.fault is None)
    if shared.newer:
        # Where its version is may have changed as well: it says nothing about which is newer.
        return _take(shared, Source.SHARED)
    if shared.version == local.version:
        if local.fault is None and not shared.removed:
            # Same version, same bytes: the ones that are here need not be fetched. The stamp is
            # the shared store's: it is what the next commit must expect.
            return Choice(
                local.account.account_id,
                Source.EQUAL,
                replace(local, stamp=shared.stamp, commit_id=shared.commit_id),
                push=shared.fault is not None,
            )
        return _take(shared, Source.SHARED)
    if shared.version > local.version:
        return _take(shared, Source.SHARED)
    if local.fault is not None:
        return _take(local, Source.DISK)
    return Choice(
        local.account.account_id,
        Source.DISK,
        replace(local, stamp=shared.stamp, commit_id=shared.commit_id),
        push=True,
    )


def _take(copy: AccountCopy, source: Source) -> Choice:
    account_id = copy.account.account_id
    if copy.removed:
        return Choice(account_id, source, copy, removed=True)
    if copy.fault is not None:
        return Choice(account_id, Source.NEITHER, copy, fault=copy.fault)
    return Choice(account_id, source, copy)


def reconcile_all(shared: Listing | None, local: Listing | None) -> list[Choice]:
    """Choose for every account that either listing names.

    With `shared` unreadable (`None`), or incomplete, an account that only the disk knows is not
    pushed: nobody can say that the shared store has nothing newer. Its ledger reads that one
    account first.
    """
    by_shared = {c.account.account_id: c for c in (shared.copies if shared else ())}
    by_local = {c.account.account_id: c for c in (local.copies if local else ())}
    certain = shared is not None and shared.complete
    choices = []
    for account_id in {**by_shared, **by_local}:
        choice = reconcile(by_shared.get(account_id), by_local.get(account_id))
        if account_id not in by_shared and not certain:
            choice = replace(choice, push=False)
        choices.append(choice)
    return choices


class RestoreTerm(Protocol):
    """What the restore needs of its term."""

    grant: Grant
    sessions: dict[AccountId, Session]
    durability: Durability
    last: LastTerm
    """How the term before this one ended."""

    def check(self) -> None: ...
    def make_ledger(
        self, copy: AccountCopy, *, push: bool = False, saved: bool = False
    ) -> Ledger: ...
    def make_session(self, account: Account, ledger: Ledger | None) -> Session: ...
    def start_session(self, session: Session) -> None: ...
    def spawn(self, work: Callable[[], Awaitable[None]]) -> None: ...
    def lose(self, reason: str, *, epoch_seen: int = 0) -> None: ...
    def known(self) -> None:
        """Every account is in memory now: who is not, does not exist."""
        ...


class RestoreImpossible(Exception):
    """Neither the shared store nor the disk could be read: let another instance try."""


class Restore:
    """One restore, from reading to report. `report` is true at every moment of it."""

    def __init__(self, term: RestoreTerm, *, ports: Ports, limits: Limits) -> None:
        self._term = term
        self._ports = ports
        self._limits = limits
        self._started = trio.current_time()
        self._failures: list[RestoreFailure] = []
        self._removed: set[AccountId] = set()
        self._without_outbox: list[Session] = []
        self._legacy = LegacyImport(term, ports=ports, limits=limits, failed=self._fail)
        self.report = RestoreReport(
            epoch=term.grant.epoch, started_at=ports.clocks.wall(), durations={}
        )

    async def run(self) -> None:
        """Restore every account; returns when the first pass over all of them is over.

        Raises `RestoreImpossible`. Cancelled (lease lost, drain): the report says how far it came.
        """
        self._ports.journal.note("restore.started", epoch=self._term.grant.epoch)
        shared, local = await self._read_both()
        if shared is None and local is None:
            raise RestoreImpossible("neither the shared store nor this disk could be read")
        choices = await self._choose(shared, local)
        self._check_epoch(choices)
        quarantined = await self._bring_to_memory(choices, shared, local)
        self._term.known()
        await self._tell_found(shared, local, choices, quarantined)
        await self._seal_all()
        await self._load_outbox()
        await self._open_all()
        self._finish()
        if shared is None:
            self._term.spawn(self._bring_late)

    @property
    def certain(self) -> bool:
        """Whether an account that is not in memory does not exist.

        Not while only the disk could be read: the shared store may know accounts that it does not.
        """
        return self.report.found_shared is not None

    # --- reading

    async def _read_both(self) -> tuple[Listing | None, Listing | None]:
        """Both listings, side by side; `None` for one that could not be read.

        Once one has answered the other has `restore_try_s` left: nobody waits for a dead disk, or
        for a dead store, until both are given up.
        """
        found: dict[str, Listing | None] = {}
        bound = trio.CancelScope(deadline=self._started + self._limits.restore_give_up_s)
        bounds = {SHARED: bound, DISK: trio.CancelScope(deadline=bound.deadline)}

        async def read(name: str, list_accounts: Callable[[], Awaitable[Listing]]) -> None:
            found[name] = await self._read_one(name, list_accounts, bounds[name])
            if found[name] is not None:
                soon = trio.current_time() + self._limits.restore_try_s
                for other in bounds.values():
                    other.deadline = min(other.deadline, soon)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, SHARED, self._ports.accounts.list_accounts)
            nursery.start_soon(read, DISK, self._ports.local.list_accounts)
        shared, local = found[SHARED], found[DISK]
        self._update(
            found_shared=None if shared is None else len(shared.copies),
            found_disk=None if local is None else len(local.copies),
        )
        return shared, local

    async def _read_one(
        self, name: str, list_accounts: Callable[[], Awaitable[Listing]], bound: trio.CancelScope
    ) -> Listing | None:
        """One listing, tried again until `bound` is over."""
        began = trio.current_time()
        journal = self._ports.journal

        error: Exception = TryTimedOut(self._limits.restore_try_s)

        def noted(tries: int, failure: Exception, pause_s: float) -> None:
            nonlocal error
            error = failure
            self._update(retries={**self.report.retries, name: tries})
            journal.note(
                "restore.source_retried",
                source=name,
                tries=tries,
                error=describe_error(failure),
                retry_s=round(pause_s, 3),
            )

        with bound:
            listing = await retry(
                list_accounts,
                on=(StoreUnavailable,),
                backoff=READ_BACKOFF,
                try_s=self._limits.restore_try_s,
                rng=self._ports.rng,
                noted=noted,
            )
            journal.note(
                "restore.source_read",
                source=name,
                found=len(listing.copies),
                duration_s=self._took(name, began),
            )
            if listing.fault is not None:
                self._fail(None, f"{name}: {listing.fault}", "its bytes are kept")
            return listing
        advice = "check that it is reachable; accounts are read one by one as soon as it is"
        self._took(name, began)
        journal.note(
            "restore.source_failed", source=name, error=describe_error(error), advice=advice
        )
        self._fail(None, f"{name} could not be read: {describe_error(error)}", advice)
        return None

    async def _bring_late(self) -> None:
        """Restore what only the shared store knows, as soon as it can be listed after all.

        Accounts that the disk had are in memory by now; each has read its own shared copy.
        """
        began = trio.current_time()
        shared = await retry(
            self._ports.accounts.list_accounts,
            on=(StoreUnavailable,),
            backoff=LATE_BACKOFF,
            try_s=self._limits.restore_try_s,
            rng=self._ports.rng,
        )
        self._ports.journal.note(
            "restore.source_read",
            source=SHARED,
            found=len(shared.copies),
            duration_s=round(trio.current_time() - began, 3),
        )
        known = set(self._term.sessions)
        missing = [c for c in shared.copies if c.account.account_id not in known]
        choices = await self._choose(replace(shared, copies=tuple(missing)), None)
        self._check_epoch(choices, written=True)
        await self._bring_to_memory(choices, shared, None)
        self._update(found_shared=len(shared.copies), total=len(self._term.sessions))
        added = [s for account_id, s in self._term.sessions.items() if account_id not in known]
        late = [session for session in added if session.ledger is not None]
        self._term.spawn(lambda: self._load_late(late))
        for session in late:
            if is_opened(session.account):
                self._term.start_session(session)
                self._term.spawn(lambda s=session: self._await_first_pass(s, began))  # type: ignore[misc]

    # --- choosing

    async def _choose(self, shared: Listing | None, local: Listing | None) -> list[Choice]:
        began = trio.current_time()
        choices = reconcile_all(await self._checked(shared), await self._checked(local))
        self._took("reconcile", began)
        return choices

    async def _checked(self, listing: Listing | None) -> Listing | None:
        """The listing with a fault on every copy whose credentials do not open."""
        if listing is None:
            return None
        codec = self._ports.codec
        copies: list[AccountCopy] = []
        async for copy in _in_turns(listing.copies):
            fault = None if copy.removed else fault_of(copy, codec)
            copies.append(copy if fault is None else replace(copy, fault=fault))
        return replace(listing, copies=tuple(copies))

    def _check_epoch(self, choices: Sequence[Choice], *, written: bool = False) -> None:
        """End the term when an account was written under our epoch, or a higher one.

        The lease documents were then restored from an older backup. The next term starts above.
        `written`: this term may have written accounts itself by now.
        """
        epoch = self._term.grant.epoch
        highest = max((choice.copy.version.epoch for choice in choices), default=0)
        if highest > epoch or (highest == epoch and not written):
            self._ports.journal.note("epoch.fell", found=highest, where="the accounts", epoch=epoch)
            self._term.lose(
                f"accounts carry epoch {highest} already, the lease has {epoch}",
                epoch_seen=highest,
            )
            self._term.check()

    async def _bring_to_memory(
        self, choices: Sequence[Choice], shared: Listing | None, local: Listing | None
    ) -> int:
        """Make a session for every account; how many are quarantined."""
        copies = local.copies if local else ()
        saved = {copy.account.account_id: copy.version for copy in copies}
        readable = {copy.account.account_id for copy in copies if copy.fault is None}
        known = _names_of(shared)
        quarantined = 0
        async for choice in _in_turns(choices):
            copy = choice.copy
            if choice.account_id in self._term.sessions:
                continue  # It was created here since the listing.
            if choice.removed:
                self._removed.add(choice.account_id)
                self._term.spawn(lambda copy=copy: self._archive(copy.account.account_id))  # type: ignore[misc]
                continue
            if choice.fault is not None:
                quarantined += 1
                self._quarantine(choice)
                continue
            ledger = self._term.make_ledger(
                copy, push=choice.push, saved=saved.get(choice.account_id) == copy.version
            )
            self._doubt(choice, ledger, known, on_disk=choice.account_id in readable)
            session = self._term.make_session(ledger.account, ledger)
            if choice.push:
                self._ports.journal.note(
                    "account.pushed", account_id=choice.account_id, version=str(copy.version)
                )
            if is_opened(copy.account):
                session.show(AccountStatus.RESTORING)
        return quarantined

    def _doubt(
        self, choice: Choice, ledger: Ledger, known: frozenset[AccountId] | None, *, on_disk: bool
    ) -> None:
        """Have the sessions dropped of an account whose copy may be older than the wire."""
        if known is None:
            shared = SharedCopy.UNKNOWN
        else:
            shared = SharedCopy.LISTED if choice.account_id in known else SharedCopy.MISSING
        cause = doubt_sessions(
            choice.source,
            shared=shared,
            on_disk=on_disk,
            durability=self._term.durability,
            last=self._term.last,
        )
        if cause is not None and ledger.parts:
            ledger.doubt_sessions(cause)
        if ledger.account.sessions_doubtful:
            self._update(doubted=self.report.doubted + 1)

    def _quarantine(self, choice: Choice) -> None:
        assert choice.fault is not None
        advice = ADVICE_NEWER if choice.copy.newer else ADVICE_UNREADABLE
        account = replace(
            choice.copy.account, status=AccountStatus.QUARANTINED, last_error=choice.fault
        )
        self._term.make_session(account, None).quarantine(choice.fault, advice)
        self._fail(choice.account_id, choice.fault, advice)

    async def _archive(self, account_id: AccountId) -> None:
        with trio.move_on_after(self._limits.store_try_s):
            try:
                await self._ports.local.remove_account(account_id, purge=False)
            except StoreUnavailable as error:
                self._ports.journal.note(
                    "disk.failed", what=f"account {account_id}", error=describe_error(error)
                )

    # --- importing

    async def _import_and_open(self) -> None:
        """Take over what the legacy directory has and we do not; beside the opening of the rest."""
        sessions = await self._legacy.take_over(None, except_for=self._removed)
        await self._open(sessions)

    async def import_directory(self, directory: str) -> dict[str, object]:
        """Import a directory on request, and open what was imported."""
        before = len(self._failures)
        sessions = await self._legacy.take_over(directory)
        for session in sessions:
            self._term.start_session(session)
        return {
            "imported": [session.account_id for session in sessions],
            "failed": [
                {"accountId": f.account_id, "cause": f.cause, "advice": f.advice}
                for f in self._failures[before:]
            ],
        }

    # --- sealing, the outbox, opening

    async def _seal_all(self) -> None:
        """Write this epoch to every account, many in a commit, most recently used first.

        What a batch cannot seal (a late write of the old holder, no answer) is sealed by its own
        session before it is opened.
        """
        began = trio.current_time()
        ledgers = [s.ledger for s in self._by_recency() if s.ledger is not None]
        limiter = trio.Semaphore(SEALS_IN_FLIGHT)
        async with trio.open_nursery() as nursery:
            for start in range(0, len(ledgers), SEAL_BATCH):
                await limiter.acquire()
                nursery.start_soon(self._seal_batch, ledgers[start : start + SEAL_BATCH], limiter)
        self._took("seal", began)

    async def _seal_batch(self, ledgers: Sequence[Ledger], limiter: trio.Semaphore) -> None:
        sealing: list[tuple[Ledger, AccountCommit]] = []
        for ledger in ledgers:
            commit = ledger.begin_seal()
            if commit is not None:
                sealing.append((ledger, commit))
        done: list[tuple[Ledger, AccountCommit]] = []
        answered = not sealing
        try:
            if answered:
                return
            self._term.check()
            with trio.fail_after(self._limits.restore_try_s):
                stamps = await self._ports.accounts.seal([commit for _, commit in sealing])
            answered = True
            for (ledger, commit), stamp in zip(sealing, stamps, strict=True):
                if ledger.end_seal(commit, stamp):
                    done.append((ledger, commit))
        except (StoreUnavailable, trio.TooSlowError) as error:
            self._ports.journal.note(
                "restore.source_retried",
                source=SHARED,
                tries=1,
                error=f"sealing {len(sealing)} accounts: {describe_error(error)}",
                retry_s=0,
            )
        finally:
            if not answered:
                # Also when this is cancelled: a drain waits for ledgers that are busy.
                for ledger, _ in sealing:
                    ledger.abandon_seal()
            limiter.release()
        self._term.spawn(lambda: _save_seals(done))

    async def _load_outbox(self) -> None:
        """Hand every pending message to its account. Only after the seal: nothing can come late."""
        sessions = [s for s in self._term.sessions.values() if s.ledger is not None]
        late = [s for s in sessions if s.ledger is not None and not s.ledger.sealed]
        if late:
            # Their own outboxes are only certain once they are sealed themselves.
            self._term.spawn(lambda: self._load_late(late))
        if len(late) < len(sessions):
            held_back = {session.account_id for session in late}
            await self._load([s for s in sessions if s.account_id not in held_back])

    async def _load(self, sessions: Sequence[Session]) -> None:
        """Give accounts their pending messages, or let them open without.

        An outbox that cannot be listed (a right is missing, or there is too much for one try)
        must not keep every account away: after `restore_give_up_s` they are opened, with Signal
        sessions begun anew, since nobody can say whose were in use. What waits in the outbox
        stays there, and goes out as soon as it can be read.
        """
        if not self._without_outbox:
            with trio.move_on_after(self._limits.restore_give_up_s):
                await self._hand_out(sessions)
                return
        if not self._without_outbox:
            advice = "accounts are opened without it; what waits in it goes out when it is read"
            self._ports.journal.note(
                "restore.source_failed", source=OUTBOX, error="given up", advice=advice
            )
            self._fail(None, "the outbox could not be read", advice)
            self._term.spawn(self._load_whenever)
        self._without_outbox += sessions
        for session in sessions:
            session.open_without_outbox()

    async def _load_whenever(self) -> None:
        """Hand out what waits, as soon as it can be listed after all."""
        while self._without_outbox:
            sessions = tuple(self._without_outbox)
            await self._hand_out(sessions)
            del self._without_outbox[: len(sessions)]

    async def _hand_out(self, sessions: Sequence[Session]) -> None:
        """Give each account its pending messages, in order."""
        pending = await self._list_pending()
        if pending:
            self._ports.journal.note("outbox.loaded", count=len(pending))
        by_account: dict[AccountId, list[Message]] = {}
        for message in pending:
            by_account.setdefault(message.account_id, []).append(message)
        for session in sessions:
            session.load_outbox(by_account.get(session.account_id, ()))

    async def _load_late(self, sessions: Sequence[Session]) -> None:
        """Load the outboxes of accounts that a batch could not seal, as they are sealed.

        One listing serves all that were sealed within `LATE_GATHER_S`; an account that cannot be
        sealed keeps nobody waiting.
        """
        tell, sealed = trio.open_memory_channel[Session](len(sessions))
        async with trio.open_nursery() as nursery:
            for session in sessions:
                nursery.start_soon(self._tell_sealed, session, tell)
            left = len(sessions)
            while left:
                ready = [await sealed.receive()]
                await trio.sleep(LATE_GATHER_S)
                with suppress(trio.WouldBlock):
                    while True:
                        ready.append(sealed.receive_nowait())
                await self._load(ready)
                left -= len(ready)

    async def _tell_sealed(self, session: Session, tell: trio.MemorySendChannel[Session]) -> None:
        assert session.ledger is not None
        while not session.ledger.sealed:
            try:
                await session.ledger.ensure_sealed()
            except AccountVanished:
                # Told when its session opens it. It is never sealed, and never sends.
                break
            except StoreAway:
                await trio.sleep(self._limits.store_try_s)
        tell.send_nowait(session)

    async def _list_pending(self) -> Sequence[Message]:
        def noted(tries: int, error: Exception, pause_s: float) -> None:
            self._ports.journal.note(
                "restore.source_retried",
                source=OUTBOX,
                tries=tries,
                error=describe_error(error),
                retry_s=round(pause_s, 3),
            )

        return await retry(
            self._ports.outbox.list_pending,
            on=(StoreUnavailable,),
            backoff=READ_BACKOFF,
            try_s=self._limits.restore_try_s,
            rng=self._ports.rng,
            noted=noted,
        )

    async def _open_all(self) -> None:
        """Open every session that is to be open, most recently used first."""
        began = trio.current_time()
        sessions = [s for s in self._by_recency() if s.ledger is not None]
        opened = [s for s in sessions if is_opened(s.account)]
        self._update(listed=len(sessions) - len(opened))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._import_and_open)
            await self._open(opened)
        self._took("open", began)

    async def _open(self, sessions: Sequence[Session]) -> None:
        """Start sessions, and wait for the first answer of each."""
        began = trio.current_time()
        for session in sessions:
            self._term.start_session(session)
        with trio.move_on_after(self._limits.restore_first_pass_s):
            async with trio.open_nursery() as nursery:
                for session in sessions:
                    nursery.start_soon(self._await_first_pass, session, began)
        for session in sessions:
            if not session.first_pass.is_set():
                self._count_failed(session, "not connected yet", "it is tried again by itself")

    async def _await_first_pass(self, session: Session, began: float) -> None:
        await session.first_pass.wait()
        if session.outcome is Outcome.FAILED:
            self._count_failed(session, session.cause, session.advice)
            return
        if session.outcome is Outcome.PAIRING:
            self._update(pairing=self.report.pairing + 1)
        else:
            self._update(restored=self.report.restored + 1)
        self._ports.journal.note(
            "session.restored",
            account_id=session.account_id,
            status=session.status,
            duration_s=round(trio.current_time() - began, 3),
        )

    def _count_failed(self, session: Session, cause: str, advice: str) -> None:
        self._fail(session.account_id, cause, advice)
        self._ports.journal.note(
            "session.failed", account_id=session.account_id, cause=cause, advice=advice
        )

    def _by_recency(self) -> list[Session]:
        """Sessions, most recently used first."""
        return sorted(
            self._term.sessions.values(),
            key=lambda s: last_used_at(s.account),
            reverse=True,
        )

    # --- reporting

    def _update(self, **fields: object) -> None:
        self.report = replace(self.report, **fields)  # type: ignore[arg-type]

    def _took(self, phase: str, began: float) -> float:
        took_s = round(trio.current_time() - began, 3)
        self._update(durations={**self.report.durations, phase: took_s})
        return took_s

    def _fail(self, account_id: AccountId | None, cause: str, advice: str) -> None:
        self._failures.append(RestoreFailure(account_id, cause, advice))
        self._update(failures=tuple(self._failures))

    async def _tell_found(
        self,
        shared: Listing | None,
        local: Listing | None,
        choices: Sequence[Choice],
        quarantined: int,
    ) -> None:
        async for choice in _in_turns(choices):
            if not choice.removed and choice.fault is None:
                self._ports.journal.note(
                    "account.found",
                    account_id=choice.account_id,
                    name=choice.copy.account.name,
                    status=choice.copy.account.status,
                    source=choice.source.value,
                )
        sessions = self._term.sessions.values()
        to_open = sum(1 for s in sessions if s.ledger and is_opened(s.account))
        taken_from = Counter(c.source.value for c in choices if not c.removed)
        self._update(total=len(sessions), taken_from=dict(taken_from))
        self._ports.journal.note(
            "restore.found",
            total=len(sessions),
            shared="unreadable" if shared is None else len(shared.copies),
            disk="unreadable" if local is None else len(local.copies),
            to_open=to_open,
            listed=len(sessions) - to_open - quarantined,
            quarantined=quarantined,
        )

    def _finish(self) -> None:
        self._update(finished_at=self._ports.clocks.wall(), total=len(self._term.sessions))
        report = self.report
        self._ports.journal.note(
            "restore.finished",
            duration_s=round(trio.current_time() - self._started, 3),
            restored=report.restored,
            pairing=report.pairing,
            listed=report.listed,
            failed=len(self._failures),
            total=report.total,
        )


def _names_of(listing: Listing | None) -> frozenset[AccountId] | None:
    """The accounts that a complete listing has; `None`: it is not known which there are."""
    if listing is None or not listing.complete:
        return None
    return frozenset(copy.account.account_id for copy in listing.copies)


async def _in_turns(items: Sequence[T]) -> AsyncIterator[T]:
    """The items one by one, letting other tasks (renewals, callers) run in between."""
    for number, item in enumerate(items):
        if number % TURN == 0:
            await trio.lowlevel.checkpoint()
        yield item


async def _save_seals(done: Sequence[tuple[Ledger, AccountCommit]]) -> None:
    """Bring the disk copies up to their seals, a few at a time (the disk groups its commits)."""
    limiter = trio.CapacityLimiter(32)

    async def save(ledger: Ledger, commit: AccountCommit) -> None:
        async with limiter:
            await ledger.save_seal(commit)

    async with trio.open_nursery() as nursery:
        for ledger, commit in done:
            nursery.start_soon(save, ledger, commit)
