"""The outbox on Firestore: one document a message. They are written by the account's commits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from daemon.firestore.client import FirestoreClient
from daemon.firestore.documents import (
    DocumentName,
    Fields,
    MalformedDocument,
    Moment,
    delete_write,
    encode,
    text_of,
)
from daemon.firestore.errors import Refused
from daemon.firestore.fencing import FencedWriter
from daemon.firestore.layout import OUTBOX, Layout, is_newer, read_message
from daemon.firestore.protos import Proto, RunQueryRequest, Value
from machine.ports import OutboxStore, StoreMisconfigured, StoreUnavailable
from machine.records import PENDING_STATES, Grant, Message, MessageId

PURGE_BATCH_MAX = 400
"""Deletes in one commit."""


class FirestoreOutboxStore(OutboxStore):
    """`OutboxStore` on Firestore, on the data line.

    `note_trouble` gets a sentence for each message that cannot be read; it must not raise.
    """

    def __init__(
        self,
        client: FirestoreClient,
        group: str,
        *,
        note_trouble: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._outbox_client = client
        self._outbox_layout = Layout(client, group)
        self._outbox_writer = FencedWriter(client, group)
        self._note_unreadable = note_trouble

    async def list_pending(self) -> Sequence[Message]:
        request = self._query()
        where = request.structured_query.where.field_filter
        where.field.field_path = "state"
        where.op = type(where).IN
        encode(where.value, sorted(state.value for state in PENDING_STATES))
        pending: list[Message] = []

        def take(documents: list[Proto]) -> None:
            for document in documents:
                try:
                    pending.append(read_message(document))
                except MalformedDocument as error:
                    self._note_unreadable(
                        f"message {text_of(document.name)} cannot be read and stays: {error}"
                    )

        await self._outbox_client.run_query(request, take)
        # Ordered here: with an order of Firestore's the query would need a composite index.
        return sorted(pending, key=lambda message: (message.created_at, message.message_id))

    async def fetch_message(self, message_id: MessageId) -> Message | None:
        document = await self._outbox_client.get(self._outbox_layout.message(message_id))
        if document is None:
            return None
        try:
            return read_message(document)
        except MalformedDocument as error:
            raise StoreMisconfigured(
                f"message {message_id} is not of our format: {error}"
            ) from error

    async def purge_messages(self, grant: Grant, *, before: float, count_max: int) -> int:
        """Delete settled messages last updated before `before` (wall clock); how many went.

        Pages through the old ones by their time, for pending ones among them are passed over.
        Raises `StaleWrite`.
        """
        purged = 0
        last: tuple[Moment, DocumentName] | None = None
        pending = {state.value for state in PENDING_STATES}
        while purged < count_max:
            page: list[Proto] = []
            await self._outbox_client.run_query(self._old_messages(before, last), page.extend)
            settled = [
                document
                for document in page
                # What a newer release calls its states is for that one to say.
                if document.fields["state"].string_value not in pending and not is_newer(document)
            ][: count_max - purged]
            if settled:
                writes = [delete_write(document.name) for document in settled]
                try:
                    await self._outbox_writer.commit(grant, writes)
                except Refused as refused:
                    raise StoreUnavailable(str(refused), code=refused.code) from refused
                purged += len(settled)
            if len(page) < PURGE_BATCH_MAX:
                break
            at = Fields(page[-1]).moment("updatedAt")
            last = (Moment(at), DocumentName(page[-1].name))
        return purged

    def _query(self) -> Proto:
        request = RunQueryRequest(parent=self._outbox_layout.parent)
        request.structured_query.from_.add(collection_id=OUTBOX)
        return request

    def _old_messages(self, before: float, last: tuple[Moment, DocumentName] | None) -> Proto:
        """One page of messages older than `before`, oldest first, after `last`."""
        request = self._query()
        query = request.structured_query
        for path in ("updatedAt", "state", "format"):
            query.select.fields.add(field_path=path)
        where = query.where.field_filter
        where.field.field_path = "updatedAt"
        where.op = type(where).LESS_THAN
        encode(where.value, Moment(before))
        for path in ("updatedAt", "__name__"):
            query.order_by.add(direction=1).field.field_path = path
        if last is not None:
            moment = Value()
            encode(moment, last[0])
            query.start_at.values.extend([moment, Value(reference_value=last[1])])
            query.start_at.before = False
        query.limit.value = PURGE_BATCH_MAX
        return request
