"""The shared copy of every account on Firestore: read at one moment, written under a fence.

Never lives here: what a packed part means, and which copy wins (`machine.restore`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import trio

from daemon.firestore.client import FirestoreClient
from daemon.firestore.documents import (
    DocumentName,
    Fields,
    MalformedDocument,
    Moment,
    bytes_of,
    delete_write,
    stamp_from,
    stamp_of,
    text_of,
)
from daemon.firestore.errors import Refused
from daemon.firestore.fencing import FencedWriter
from daemon.firestore.layout import (
    PARTS,
    Layout,
    account_write,
    commit_id_of,
    inbound_write,
    mark_write,
    message_write,
    other_parts,
    part_writes,
    read_account,
    read_message,
    read_parts,
)
from daemon.firestore.protos import Proto, Write
from daemon.firestore.queries import all_accounts, archived
from machine.ports import (
    AccountExists,
    AccountStore,
    MessageExists,
    StaleWrite,
    StoreMisconfigured,
    StoreUnavailable,
    check_fits,
)
from machine.records import (
    COMMIT_BYTES_MAX,
    COMMIT_WRITES_MAX,
    MAIN_PART,
    Account,
    AccountCommit,
    AccountCopy,
    AccountId,
    Grant,
    InboxPlace,
    Listing,
    PartName,
    Stamp,
    Version,
)

SEAL_COMMITS_IN_FLIGHT_MAX = 4

FETCH_TRIES_MAX = 3
"""How often an account is read again because it was written between its document and its parts."""


class FirestoreAccountStore(AccountStore):
    """`AccountStore` on Firestore, on the data line."""

    def __init__(self, client: FirestoreClient, group: str) -> None:
        self._client = client
        self._layout = Layout(client, group)
        self._writer = FencedWriter(client, group)

    # --- reading

    async def list_accounts(self) -> Listing:
        copies: list[AccountCopy] = []

        def take(documents: list[Proto]) -> None:
            copies.extend(map(read_account, documents))

        await self._client.run_query(all_accounts(self._layout), take)
        return Listing(tuple(copies))

    async def fetch_account(self, account_id: AccountId) -> AccountCopy | None:
        # Every change of an account or its parts changes the account's stamp. So parts read
        # between two sights of the same stamp are those of that stamp.
        name = self._layout.account(account_id)
        for _ in range(FETCH_TRIES_MAX):
            document = await self._client.get(name)
            if document is None:
                mark = await self._client.get(self._layout.mark(account_id))
                return None if mark is None else read_account(mark)
            copy = read_account(document)
            if copy.complete:
                return copy
            parts = await self._client.list_documents(name, PARTS)
            after = await self._client.get(name, fields=("commitId",))
            if after is not None and stamp_of(after) == copy.stamp:
                return _with_parts(copy, document, parts)
        raise StoreUnavailable(
            f"account {account_id} is written faster than it can be read", code="aborted"
        )

    # --- writing one account

    async def create_account(
        self, grant: Grant, account: Account, version: Version, parts: Mapping[PartName, bytes]
    ) -> Stamp:
        """Write a new account, in the place of its mark if it was removed.

        Raises `AccountExists`; `StaleWrite` when the epoch has moved on.
        """
        name = self._layout.account(account.account_id)
        created_by = f"{grant.incarnation} {version}"
        write = account_write(name, account, version, "", parts, exists=False)
        write.update.fields["createdBy"].string_value = created_by
        write.update_mask.field_paths.append("createdBy")
        writes = [
            write,
            delete_write(self._layout.mark(account.account_id)),
            *part_writes(self._layout, name, parts),
        ]
        try:
            response = await self._writer.commit(grant, writes)
        except Refused as refused:
            document = await self._client.get(name)
            if document is None:
                raise StoreUnavailable(str(refused), code=refused.code) from refused
            if _is_unchanged(document, account, created_by, parts):
                # An unanswered attempt of ours: packed parts are never the same by accident.
                return stamp_of(document)
            raise AccountExists(f"account {account.account_id} exists") from refused
        return stamp_from(response.write_results[0].update_time)

    async def commit(self, commit: AccountCommit) -> Stamp:
        check_fits(commit)
        try:
            response = await self._client.commit(self._writes_of(commit))
        except Refused as refused:
            stamp = await self._after_refusal(commit, refused)
            if stamp is not None:
                return stamp
            return await self._commit_what_is_new(commit, refused)
        return stamp_from(response.write_results[0].update_time)

    async def remove_account(
        self, grant: Grant, account_id: AccountId, stamp: Stamp, *, purge: bool
    ) -> None:
        """Archive an account's bytes and leave a mark in its place; with `purge` destroy them.

        `purge` also destroys what was archived of it before.
        Raises `StaleWrite`; also when the account is not there (any more).
        """
        name = self._layout.account(account_id)
        document = await self._client.get(name)
        if document is None or stamp_of(document) != stamp:
            raise StaleWrite(f"account {account_id} is not at {stamp}")
        parts = await self._client.list_documents(name, PARTS)
        if purge:
            await self._purge_archive(grant, account_id)
        else:
            await self._archive(document, parts, {}, str(stamp), "removed", grant)
        copy = read_account(document)
        mark = Version(grant.epoch, copy.version.revision + 1)
        writes = [
            delete_write(name, stamp=stamp),
            mark_write(self._layout, copy.account, mark),
            *(delete_write(DocumentName(part.name)) for part in parts),
        ]
        try:
            await self._writer.commit(grant, writes)
        except Refused as refused:
            raise StaleWrite(f"account {account_id} is not at {stamp}") from refused

    async def archive_parts(self, copy: AccountCopy, reason: str) -> None:
        """Keep a copy's bytes aside, for `repair` and logouts, before they are replaced.

        What the store itself has of the account is kept along with the copy's parts. Archiving
        the same copy for the same reason again changes nothing.
        """
        account_id = copy.account.account_id
        name = self._layout.account(account_id)
        document = await self._client.get(name)
        parts: list[Proto] = []
        if document is None:
            document = account_write(name, copy.account, copy.version, copy.commit_id, {}).update
        else:
            parts = await self._client.list_documents(name, PARTS)
        which = f"{copy.stamp or copy.version}-{reason}"
        await self._archive(document, parts, copy.parts, which, reason, None)

    # --- sealing many

    async def seal(self, commits: Sequence[AccountCommit]) -> Sequence[Stamp | None]:
        """Commit many accounts' plain fields and versions, in as few calls as the store allows.

        One answer for each, in order: the new stamp, or `None` where the account was not as
        expected (that one was not written).
        Raises `StoreUnavailable` when that is not known for all of them. The same commits may
        then be sealed again: what was applied is recognised.
        """
        for commit in commits:
            check_fits(commit)
        answers: list[Stamp | None] = [None] * len(commits)
        failures: list[Exception] = []
        places = trio.Semaphore(SEAL_COMMITS_IN_FLIGHT_MAX)

        async def seal_batch(batch: Sequence[_Item]) -> None:
            try:
                for index, stamp in await self._seal_batch(batch):
                    answers[index] = stamp
            except (StoreUnavailable, StoreMisconfigured) as error:
                failures.append(error)
            finally:
                places.release()

        async with trio.open_nursery() as nursery:
            for batch in _batches_of(commits, self._writes_of):
                # Also what keeps the encoding of 10,000 accounts from blocking the loop: each
                # batch is made when there is a place for it.
                await places.acquire()
                nursery.start_soon(seal_batch, batch)
        if failures:
            raise failures[0]
        return answers

    async def _seal_batch(self, batch: Sequence[_Item]) -> list[tuple[int, Stamp | None]]:
        """Commit `batch`; where it is refused, without those that are the reason."""
        answers: list[tuple[int, Stamp | None]] = []
        waiting: list[Sequence[_Item]] = [batch]
        while waiting:
            items = waiting.pop()
            writes = [write for item in items for write in item.writes]
            try:
                response = await self._client.commit(writes)
            except Refused:
                answered, rest = await self._sort_out(items)
                answers += answered
                if len(rest) == len(items):
                    # Every stamp is right, so a message was the reason. Halves find whose.
                    if len(items) == 1:
                        answers.append((items[0].index, None))
                        continue
                    waiting += [items[: len(items) // 2], items[len(items) // 2 :]]
                elif rest:
                    waiting.append(rest)
                continue
            position = 0
            for item in items:
                result = response.write_results[position]
                answers.append((item.index, stamp_from(result.update_time)))
                position += len(item.writes)
        return answers

    async def _sort_out(
        self, items: Sequence[_Item]
    ) -> tuple[list[tuple[int, Stamp | None]], list[_Item]]:
        """Answers for those that are applied or stale, and the others, to be tried again."""
        names = [self._layout.account(item.commit.account.account_id) for item in items]
        found = await self._client.batch_get(names, fields=("commitId",))
        present = {answer.found.name: answer.found for answer in found if answer.HasField("found")}
        answers: list[tuple[int, Stamp | None]] = []
        rest: list[_Item] = []
        for item, name in zip(items, names, strict=True):
            document = present.get(name)
            if document is None:
                answers.append((item.index, None))
            elif commit_id_of(document) == item.commit.commit_id:
                answers.append((item.index, stamp_of(document)))
            elif stamp_of(document) != item.commit.stamp:
                answers.append((item.index, None))
            else:
                rest.append(item)
        return answers, rest

    # --- writes

    def _writes_of(self, commit: AccountCommit) -> list[Proto]:
        """A commit's writes, the account's first: it carries the precondition."""
        name = self._layout.account(commit.account.account_id)
        return [
            account_write(
                name,
                commit.account,
                commit.version,
                commit.commit_id,
                commit.parts,
                stamp=commit.stamp,
            ),
            *part_writes(self._layout, name, commit.parts),
            *(message_write(self._layout, message, new=True) for message in commit.new_messages),
            *(message_write(self._layout, message, new=False) for message in commit.messages),
            *self._inbound_writes(commit),
        ]

    def _inbound_writes(self, commit: AccountCommit) -> Iterator[Proto]:
        version = commit.version
        for number, message in enumerate(commit.inbound):
            place = InboxPlace(version.epoch, version.revision, number)
            yield inbound_write(self._layout, message, place)

    async def _commit_what_is_new(self, commit: AccountCommit, refused: Refused) -> Stamp:
        """Commit again without the received messages that are stored already.

        Nothing else can have been the reason: the account was as the commit expects.
        """
        names = [self._layout.inbound(message) for message in commit.inbound]
        found = await self._client.batch_get(names, fields=("place",)) if names else []
        there = {answer.found.name for answer in found if answer.HasField("found")}
        new = [
            message
            for name, message in zip(names, commit.inbound, strict=True)
            if name not in there
        ]
        if not there:
            # Refused, and nothing to be seen any more of why.
            raise StoreUnavailable(str(refused), code=refused.code) from refused
        return await self.commit(replace(commit, inbound=tuple(new)))

    async def _after_refusal(self, commit: AccountCommit, refused: Refused) -> Stamp | None:
        """What a refused commit means: applied before, stale, or a message that exists.

        `None`: none of these.
        """
        name = self._layout.account(commit.account.account_id)
        document = await self._client.get(name, fields=("commitId",))
        if document is None:
            raise StaleWrite(f"account {commit.account.account_id} is gone") from refused
        if commit_id_of(document) == commit.commit_id:
            return stamp_of(document)
        if stamp_of(document) != commit.stamp:
            raise StaleWrite(
                f"account {commit.account.account_id} has changed since {commit.stamp}"
            ) from refused
        for message in commit.new_messages:
            there = await self._client.get(self._layout.message(message.message_id))
            if there is not None:
                try:
                    raise MessageExists(read_message(there)) from refused
                except MalformedDocument as error:
                    raise StoreMisconfigured(
                        f"message {message.message_id} is not of our format: {error}"
                    ) from error
        return None

    async def _archive(
        self,
        document: Proto,
        parts: Iterable[Proto],
        packed: Mapping[PartName, bytes],
        which: str,
        reason: str,
        grant: Grant | None,
    ) -> None:
        """Copy an account's document and parts, as they are, below `archive/`; `packed` wins."""
        account_id = AccountId(text_of(document.name))
        target = self._layout.archived(account_id, which)
        main = _copied(document, target)
        main.update.fields["accountId"].string_value = account_id
        main.update.fields["archivedFor"].string_value = reason
        if MAIN_PART in packed:
            main.update.fields["packed"].bytes_value = packed[MAIN_PART]
        stamped = main.update_transforms.add(field_path="archivedAt")
        stamped.set_to_server_value = type(stamped).REQUEST_TIME
        writes = [main]
        for part in parts:
            part_name = PartName(text_of(part.name))
            if part_name not in packed:
                writes.append(_copied(part, self._layout.part(target, part_name)))
        writes += part_writes(self._layout, target, packed)
        for chunk in _chunks(writes):
            if grant is None:
                await self._client.commit(chunk)
            else:
                await self._writer.commit(grant, chunk)

    async def _purge_archive(self, grant: Grant, account_id: AccountId) -> None:
        """Destroy everything that was ever archived of an account."""
        found: list[Proto] = []
        await self._client.run_query(archived(self._layout, account_id), found.extend)
        doomed: list[Proto] = []
        for document in found:
            doomed += await self._client.list_documents(document.name, PARTS)
            doomed.append(document)
        for chunk in _chunks([delete_write(DocumentName(one.name)) for one in doomed]):
            await self._writer.commit(grant, chunk)


class _Item:
    """One commit of a seal: its place in the answer, and its writes."""

    __slots__ = ("commit", "index", "writes")

    def __init__(self, index: int, commit: AccountCommit, writes: list[Proto]) -> None:
        self.index = index
        self.commit = commit
        self.writes = writes


def _batches_of(
    commits: Sequence[AccountCommit], writes_of: Callable[[AccountCommit], list[Proto]]
) -> Iterator[list[_Item]]:
    """Cut commits into batches that one call may hold; none is cut in two.

    Two commits of one account never share a batch: Firestore refuses two stamps for a document.
    """
    batch: list[_Item] = []
    writes_count = bytes_count = 0
    for index, commit in enumerate(commits):
        writes = writes_of(commit)
        size = bytes_of(writes)
        full = writes_count + len(writes) > COMMIT_WRITES_MAX or any(
            item.commit.account.account_id == commit.account.account_id for item in batch
        )
        if batch and (full or bytes_count + size > COMMIT_BYTES_MAX):
            yield batch
            batch, writes_count, bytes_count = [], 0, 0
        batch.append(_Item(index, commit, writes))
        writes_count += len(writes)
        bytes_count += size
    if batch:
        yield batch


def _chunks(writes: Sequence[Proto]) -> Iterator[list[Proto]]:
    """Cut independent writes into commits, with room for a verify write in each."""
    chunk: list[Proto] = []
    bytes_count = 0
    for write in writes:
        size = bytes_of([write])
        if chunk and (len(chunk) >= COMMIT_WRITES_MAX - 1 or bytes_count + size > COMMIT_BYTES_MAX):
            yield chunk
            chunk, bytes_count = [], 0
        chunk.append(write)
        bytes_count += size
    if chunk:
        yield chunk


def _with_parts(copy: AccountCopy, document: Proto, documents: Sequence[Proto]) -> AccountCopy:
    fault = copy.fault
    parts: dict[PartName, bytes] = {}
    try:
        parts = read_parts(documents, other_parts(document))
    except MalformedDocument as error:
        fault = fault or str(error)
    return replace(copy, parts={**parts, **copy.parts}, complete=fault is None, fault=fault)


def _is_unchanged(
    document: Proto, account: Account, created_by: str, parts: Mapping[PartName, bytes]
) -> bool:
    """Whether an account is just as the creation `created_by` of `account` left it."""
    copy = read_account(document)
    return (
        copy.fault is None
        and copy.commit_id == ""
        and Fields(document).raw("createdBy") == created_by
        and Moment(copy.account.created_at).micros == Moment(account.created_at).micros
        and copy.parts.get(MAIN_PART) == parts.get(MAIN_PART)
    )


def _copied(document: Proto, name: DocumentName) -> Proto:
    """A write that makes `name` hold exactly what `document` holds, whatever that is."""
    write = Write()
    write.update.CopyFrom(document)
    write.update.name = name
    for times in ("create_time", "update_time"):
        write.update.ClearField(times)
    return write
