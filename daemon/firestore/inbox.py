"""Received messages on Firestore: one document each. They are written by the account's commits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from daemon.firestore.client import FirestoreClient
from daemon.firestore.documents import (
    DocumentName,
    MalformedDocument,
    delete_write,
    text_of,
)
from daemon.firestore.errors import Refused
from daemon.firestore.fencing import FencedWriter
from daemon.firestore.layout import Layout, inbox_place, inbox_range, read_inbound
from daemon.firestore.protos import Proto
from daemon.firestore.queries import PURGE_BATCH_MAX, inbox_page, old_inbox
from machine.ports import InboxStore, StoreUnavailable
from machine.records import AccountId, Grant, InboxEntry, InboxPlace


class FirestoreInboxStore(InboxStore):
    """`InboxStore` on Firestore, on the data line.

    `note_trouble` gets a sentence for each message that cannot be read; it must not raise.
    """

    def __init__(
        self,
        client: FirestoreClient,
        group: str,
        *,
        note_trouble: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._client = client
        self._layout = Layout(client, group)
        self._writer = FencedWriter(client, group)
        self._note_unreadable = note_trouble

    async def list_inbox(
        self, account_id: AccountId, *, after: InboxPlace | None, count_max: int
    ) -> Sequence[InboxEntry]:
        entries: list[InboxEntry] = []
        lowest, highest = inbox_range(account_id)
        if after is not None:
            lowest = inbox_place(account_id, after)
        # One that cannot be read hides none: others are read in its stead until there are enough.
        while len(entries) < count_max:
            wanted = count_max - len(entries)
            page: list[Proto] = []
            query = inbox_page(self._layout, lowest, highest, wanted)
            await self._client.run_query(query, page.extend)
            for document in page:
                lowest = document.fields["place"].string_value
                try:
                    entries.append(read_inbound(document))
                except MalformedDocument as error:
                    self._note_unreadable(
                        f"received message {text_of(document.name)} cannot be read and stays: "
                        f"{error}"
                    )
            if len(page) < wanted:
                break
        return entries

    async def purge_inbox(self, grant: Grant, *, before: float, count_max: int) -> int:
        purged = 0
        while purged < count_max:
            wanted = min(PURGE_BATCH_MAX, count_max - purged)
            page: list[Proto] = []
            await self._client.run_query(old_inbox(self._layout, before, wanted), page.extend)
            if page:
                try:
                    await self._writer.commit(
                        grant, [delete_write(DocumentName(document.name)) for document in page]
                    )
                except Refused as refused:
                    raise StoreUnavailable(str(refused), code=refused.code) from refused
                purged += len(page)
            if len(page) < wanted:
                break
        return purged
