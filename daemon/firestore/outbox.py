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
    text_of,
)
from daemon.firestore.errors import Refused
from daemon.firestore.fencing import FencedWriter
from daemon.firestore.layout import Layout, is_newer, read_message
from daemon.firestore.protos import Proto
from daemon.firestore.queries import PURGE_BATCH_MAX, old_messages, pending_messages
from machine.ports import OutboxStore, StoreMisconfigured, StoreUnavailable
from machine.records import PENDING_STATES, Grant, Message, MessageId


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
        pending: list[Message] = []

        def take(documents: list[Proto]) -> None:
            for document in documents:
                try:
                    pending.append(read_message(document))
                except MalformedDocument as error:
                    self._note_unreadable(
                        f"message {text_of(document.name)} cannot be read and stays: {error}"
                    )

        await self._outbox_client.run_query(pending_messages(self._outbox_layout), take)
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
            query = old_messages(self._outbox_layout, before, last)
            await self._outbox_client.run_query(query, page.extend)
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
