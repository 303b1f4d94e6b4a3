"""Where accounts and messages are in Firestore, and which fields they have. Pure.

Below `watchkeeper/{group}-data`:

    accounts/{accountId}                 plain fields, epoch, revision, commitId, packed (main part)
    accounts/{accountId}/parts/{part}    packed: the other parts
    outbox/{messageId}                   one message each
    archive/{accountId}~{which}          what was taken off the list, with parts/ like an account

Fields that we do not know survive our writes. `packed` is opaque here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from daemon.firestore.client import FirestoreClient
from daemon.firestore.documents import (
    PACKED_BYTES_MAX,
    DocumentName,
    Fields,
    FieldValue,
    MalformedDocument,
    Moment,
    check_group,
    document_id,
    stamp_of,
    text_of,
    update_write,
)
from daemon.firestore.lease import COLLECTION
from daemon.firestore.protos import Proto
from machine.ports import AuthTooLarge
from machine.records import (
    MAIN_PART,
    Account,
    AccountCopy,
    AccountId,
    AccountStatus,
    Message,
    MessageId,
    MessageState,
    PartName,
    Version,
)

FORMAT = 1
"""Written into each document. A higher one than ours is not read: a newer version wrote it."""

ACCOUNTS, PARTS, OUTBOX, ARCHIVE = "accounts", "parts", "outbox", "archive"


class Layout:
    """The names of one group's documents."""

    def __init__(self, client: FirestoreClient, group: str) -> None:
        self._client = client
        self._data = f"{check_group(group)}-data"
        self.parent = client.document(COLLECTION, self._data)

    def account(self, account_id: AccountId) -> DocumentName:
        return self._name(ACCOUNTS, document_id(account_id))

    def part(self, owner: DocumentName, part: PartName) -> DocumentName:
        """A part of an account or of an archived one."""
        return DocumentName(f"{owner}/{PARTS}/{document_id(part)}")

    def message(self, message_id: MessageId) -> DocumentName:
        return self._name(OUTBOX, document_id(message_id))

    def archived(self, account_id: AccountId, which: str) -> DocumentName:
        return self._name(ARCHIVE, f"{document_id(account_id)}~{document_id(which)}")

    def _name(self, collection: str, key: str) -> DocumentName:
        return self._client.document(COLLECTION, self._data, collection, key)


def account_values(
    account: Account, version: Version, commit_id: str, packed: bytes | None
) -> dict[str, FieldValue]:
    """An account document's fields; without `packed` when it is `None`, so that it stays."""
    values: dict[str, FieldValue] = {
        "format": FORMAT,
        "name": account.name,
        "phone": account.phone,
        "status": account.status.value,
        "createdAt": Moment(account.created_at),
        "updatedAt": Moment(account.updated_at),
        "since": Moment(account.since),
        "lastError": account.last_error,
        "lastConnectedAt": _moment(account.last_connected_at),
        "epoch": version.epoch,
        "revision": version.revision,
        "commitId": commit_id,
    }
    if packed is not None:
        values["packed"] = check_size(MAIN_PART, packed)
    return values


def read_account(document: Proto) -> AccountCopy:
    """Read an account document, with its main part. Never raises: see `AccountCopy.fault`."""
    fields = Fields(document)
    account_id = AccountId(text_of(document.name))
    try:
        _check_format(fields)
        account = Account(
            account_id=account_id,
            name=fields.text("name"),
            status=_status(fields.text("status")),
            created_at=fields.moment("createdAt"),
            updated_at=fields.moment("updatedAt"),
            since=fields.moment("since"),
            phone=fields.text_or_none("phone"),
            last_error=fields.text_or_none("lastError"),
            last_connected_at=fields.moment_or_none("lastConnectedAt"),
        )
        version = Version(fields.integer("epoch"), fields.integer("revision"))
        commit_id = fields.text("commitId")
        packed = fields.blob_or_none("packed")
    except MalformedDocument as error:
        return _faulty_copy(account_id, fields, document, str(error))
    return AccountCopy(
        account=account,
        version=version,
        parts={} if packed is None else {MAIN_PART: packed},
        complete=False,
        stamp=stamp_of(document),
        commit_id=commit_id,
    )


def commit_id_of(document: Proto) -> str:
    """Which commit wrote an account document last; empty when it does not say."""
    commit_id: str = document.fields["commitId"].string_value if document.fields else ""
    return commit_id


def part_values(part: PartName, packed: bytes) -> dict[str, FieldValue]:
    """A part document's fields. Raises `AuthTooLarge`."""
    return {"packed": check_size(part, packed)}


def read_parts(documents: Iterable[Proto]) -> dict[PartName, bytes]:
    """Read the part documents of one account. Raises `MalformedDocument`."""
    parts: dict[PartName, bytes] = {}
    for document in documents:
        packed = Fields(document).blob_or_none("packed")
        if packed is None:
            raise MalformedDocument(f"part {text_of(document.name)!r} has no bytes")
        parts[PartName(text_of(document.name))] = packed
    return parts


def message_write(layout: Layout, message: Message, *, new: bool) -> Proto:
    """A write of a whole message; a new one is refused when its id is taken."""
    state_at = {state.value: Moment(at) for state, at in message.state_at.items()}
    values: dict[str, FieldValue] = {
        "format": FORMAT,
        "accountId": message.account_id,
        "to": message.to,
        "text": message.text,
        "state": message.state.value,
        "epoch": message.epoch,
        "createdAt": Moment(message.created_at),
        "updatedAt": Moment(message.updated_at),
        "idempotencyKey": message.idempotency_key,
        "error": message.error,
        "attempts": message.attempts,
        "stateAt": state_at,
    }
    return update_write(layout.message(message.message_id), values, exists=False if new else None)


def read_message(document: Proto) -> Message:
    """Read a message document. Raises `MalformedDocument`."""
    fields = Fields(document)
    _check_format(fields)
    return Message(
        message_id=MessageId(text_of(document.name)),
        account_id=AccountId(fields.text("accountId")),
        to=fields.text("to"),
        text=fields.text("text"),
        state=_message_state(fields.text("state")),
        epoch=fields.integer("epoch"),
        created_at=fields.moment("createdAt"),
        updated_at=fields.moment("updatedAt"),
        idempotency_key=fields.text_or_none("idempotencyKey"),
        error=fields.text_or_none("error"),
        attempts=fields.integer("attempts"),
        state_at={_message_state(key): at for key, at in fields.moments("stateAt").items()},
    )


def check_size(part: PartName, packed: bytes) -> bytes:
    """Return `packed`; raises `AuthTooLarge` when no document can hold it."""
    if len(packed) > PACKED_BYTES_MAX:
        raise AuthTooLarge(
            f"part {part!r} has {len(packed)} bytes; a Firestore document holds "
            f"{PACKED_BYTES_MAX} at most"
        )
    return packed


def _faulty_copy(account_id: AccountId, fields: Fields, document: Proto, fault: str) -> AccountCopy:
    """What can still be made out of a document of the wrong shape. Its bytes stay as they are."""

    def moment(key: str) -> float:
        value = fields.raw(key)
        return float(value) if isinstance(value, Moment) else 0.0

    def number(key: str) -> int:
        value = fields.raw(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    name, phone = fields.raw("name"), fields.raw("phone")
    packed, commit_id = fields.raw("packed"), fields.raw("commitId")
    return AccountCopy(
        account=Account(
            account_id=account_id,
            name=name if isinstance(name, str) else account_id,
            status=AccountStatus.QUARANTINED,
            created_at=moment("createdAt"),
            updated_at=moment("updatedAt"),
            since=moment("since"),
            phone=phone if isinstance(phone, str) else None,
        ),
        version=Version(number("epoch"), number("revision")),
        parts={MAIN_PART: packed} if isinstance(packed, bytes) else {},
        complete=False,
        stamp=stamp_of(document),
        commit_id=commit_id if isinstance(commit_id, str) else "",
        fault=fault,
    )


def _check_format(fields: Fields) -> None:
    written = fields.integer("format")
    if written > FORMAT:
        raise MalformedDocument(f"format {written} is newer than this version reads ({FORMAT})")


def _status(text: str) -> AccountStatus:
    try:
        return AccountStatus(text)
    except ValueError:
        raise MalformedDocument("field 'status' is none that we know") from None


def _message_state(text: str) -> MessageState:
    try:
        return MessageState(text)
    except ValueError:
        raise MalformedDocument("a message's state is none that we know") from None


def _moment(at: float | None) -> Moment | None:
    return None if at is None else Moment(at)


def main_part(parts: Mapping[PartName, bytes | None]) -> bytes | None:
    """The main part among changed parts. Raises `ValueError` when it is to be deleted."""
    if MAIN_PART in parts and parts[MAIN_PART] is None:
        raise ValueError("the main part is replaced, never deleted")
    return parts.get(MAIN_PART)
