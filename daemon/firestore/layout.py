"""Where accounts and messages are in Firestore, and which fields they have. Pure.

Below `watchkeeper/{group}-data`:

    accounts/{accountId}                 plain fields, epoch, revision, commitId, packed (the main
                                         part), parts (names of the other parts: how many bytes)
    accounts/{accountId}/parts/{part}    packed: the other parts
    accounts/{accountId}~removed         the mark that an account was removed; beside the accounts,
                                         so that one query reads both as of one moment
    outbox/{messageId}                   one message each
    inbox/{hash}                         one received message each, named by its account, chat and
                                         id; place: account, epoch, revision, number, so that one
                                         field finds an account's and orders them
    archive/{accountId}~{which}          what was taken off the list, with parts/ like an account

Fields that we do not know survive our writes. `packed` is opaque here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from daemon.firestore.client import FirestoreClient
from daemon.firestore.documents import (
    PACKED_BYTES_MAX,
    DocumentName,
    Fields,
    FieldValue,
    MalformedDocument,
    Moment,
    NewerFormat,
    check_format,
    check_group,
    delete_write,
    document_id,
    set_in_map,
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
    InboundMessage,
    InboxEntry,
    InboxPlace,
    Message,
    MessageId,
    MessageState,
    PartName,
    Stamp,
    Version,
)

FORMAT = 1
"""Written into each document. One of a higher format is not read, and not written over.

A change that an earlier release may ignore is a field more and no new format. One that it must not
ignore takes two releases: the first reads the new format, the second writes it (docs/upgrades.md).
"""

REMOVED = "~removed"

ACCOUNTS, PARTS, ARCHIVE = "accounts", "parts", "archive"
OUTBOX, INBOX = "outbox", "inbox"

_PLACE = re.compile(r"[^/]+/([0-9]{12})/([0-9]{12})/([0-9]{4})")


class Layout:
    """The names of one group's documents."""

    def __init__(self, client: FirestoreClient, group: str) -> None:
        self._client = client
        self._data = f"{check_group(group)}-data"
        self.parent = client.document(COLLECTION, self._data)

    def account(self, account_id: AccountId) -> DocumentName:
        return self._name(ACCOUNTS, document_id(account_id))

    def mark(self, account_id: AccountId) -> DocumentName:
        return self._name(ACCOUNTS, document_id(account_id) + REMOVED)

    def part(self, owner: DocumentName, part: PartName) -> DocumentName:
        """A part of an account or of an archived one."""
        return DocumentName(f"{owner}/{PARTS}/{document_id(part)}")

    def message(self, message_id: MessageId) -> DocumentName:
        return self._name(OUTBOX, document_id(message_id))

    def inbound(self, message: InboundMessage) -> DocumentName:
        # What strangers chose is no document's name: it may be long, and hold anything.
        key = "\0".join((message.account_id, message.chat, message.message_id))
        return self._name(INBOX, hashlib.sha256(key.encode()).hexdigest())

    def archived(self, account_id: AccountId, which: str) -> DocumentName:
        return self._name(ARCHIVE, f"{document_id(account_id)}~{document_id(which)}")

    def _name(self, collection: str, key: str) -> DocumentName:
        return self._client.document(COLLECTION, self._data, collection, key)


def account_write(
    name: DocumentName,
    account: Account,
    version: Version,
    commit_id: str,
    parts: Mapping[PartName, bytes | None],
    *,
    stamp: Stamp | None = None,
    exists: bool | None = None,
) -> Proto:
    """A write of an account's document, with its main part if that is among the changed `parts`.

    The other parts have documents of their own (`part_writes`); only their names are in here.
    Raises `AuthTooLarge`, `ValueError` when the main part is to be deleted.
    """
    values = _account_values(account, version, commit_id)
    if MAIN_PART in parts:
        packed = parts[MAIN_PART]
        if packed is None:
            raise ValueError("the main part is replaced, never deleted")
        values["packed"] = _check_size(MAIN_PART, packed)
    write = update_write(name, values, stamp=stamp, exists=exists)
    for part, packed in parts.items():
        if part != MAIN_PART:
            set_in_map(write, "parts", part, None if packed is None else len(packed))
    return write


def part_writes(
    layout: Layout, owner: DocumentName, parts: Mapping[PartName, bytes | None]
) -> Iterator[Proto]:
    """Writes of the changed parts other than the main one. Raises `AuthTooLarge`."""
    for part, packed in parts.items():
        if part == MAIN_PART:
            continue
        name = layout.part(owner, part)
        if packed is None:
            yield delete_write(name)
        else:
            yield update_write(name, {"packed": _check_size(part, packed)})


def mark_write(layout: Layout, account: Account, version: Version) -> Proto:
    """A write of the mark that says that `account` was removed."""
    values = _account_values(account, version, "")
    values["removed"] = True
    return update_write(layout.mark(account.account_id), values)


def _account_values(account: Account, version: Version, commit_id: str) -> dict[str, FieldValue]:
    return {
        "format": FORMAT,
        "name": account.name,
        "phone": account.phone,
        "status": account.status.value,
        "createdAt": Moment(account.created_at),
        "updatedAt": Moment(account.updated_at),
        "since": Moment(account.since),
        "lastError": account.last_error,
        "lastConnectedAt": _moment(account.last_connected_at),
        "bannedUntil": _moment(account.banned_until),
        "sessionsDoubtful": account.sessions_doubtful,
        "epoch": version.epoch,
        "revision": version.revision,
        "commitId": commit_id,
    }


def read_account(document: Proto) -> AccountCopy:
    """Read an account document, with its main part, or a mark.

    Never raises: see `AccountCopy.fault`.
    """
    fields = Fields(document)
    removed = document.name.endswith(REMOVED)
    account_id = AccountId(text_of(document.name.removesuffix(REMOVED)))
    try:
        check_format(fields, FORMAT)
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
            banned_until=fields.moment_or_none("bannedUntil"),
            sessions_doubtful=fields.flag_or_false("sessionsDoubtful"),
        )
        version = Version(fields.integer("epoch"), fields.integer("revision"))
        if not version.plausible:
            raise MalformedDocument(f"version {version} is none that was ever counted to")
        commit_id = fields.text("commitId")
        packed = fields.blob_or_none("packed")
        others = fields.keys_or_none("parts")
    except MalformedDocument as error:
        copy = _faulty_copy(account_id, fields, document, str(error))
        return replace(copy, newer=isinstance(error, NewerFormat))
    return AccountCopy(
        account=account,
        version=version,
        parts={} if packed is None else {MAIN_PART: packed},
        complete=not others,
        stamp=stamp_of(document),
        commit_id=commit_id,
        removed=removed,
    )


def commit_id_of(document: Proto) -> str:
    """Which commit wrote an account document last; empty when it does not say."""
    commit_id: str = document.fields["commitId"].string_value if document.fields else ""
    return commit_id


def is_newer(document: Proto) -> bool:
    """Whether a newer release wrote the document. It needs its `format` only."""
    try:
        check_format(Fields(document), FORMAT)
    except MalformedDocument as error:
        return isinstance(error, NewerFormat)
    return False


def other_parts(document: Proto) -> set[PartName]:
    """The names of an account's parts other than the main one. Raises `MalformedDocument`."""
    return {PartName(key) for key in Fields(document).keys_or_none("parts") or ()}


def read_parts(documents: Iterable[Proto], expected: set[PartName]) -> dict[PartName, bytes]:
    """Read the part documents of one account. Raises `MalformedDocument`."""
    parts: dict[PartName, bytes] = {}
    for document in documents:
        packed = Fields(document).blob_or_none("packed")
        if packed is None:
            raise MalformedDocument(f"part {text_of(document.name)!r} has no bytes")
        parts[PartName(text_of(document.name))] = packed
    if parts.keys() != expected:
        names = ", ".join(sorted(parts.keys() ^ expected))
        raise MalformedDocument(f"the account's list of parts and its parts differ in: {names}")
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
    check_format(fields, FORMAT)
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


def inbox_place(account_id: AccountId, place: InboxPlace) -> str:
    """A place as a text that sorts as it does, below its account's name."""
    where = f"{place.epoch:012d}/{place.revision:012d}/{place.number:04d}"
    return f"{document_id(account_id)}/{where}"


def inbox_range(account_id: AccountId) -> tuple[str, str]:
    """All places of an account are between these two."""
    name = document_id(account_id)
    return f"{name}/", f"{name}0"  # 0 follows the slash, which no name holds.


def inbound_write(layout: Layout, message: InboundMessage, place: InboxPlace) -> Proto:
    """A write of a received message; refused when it is there."""
    values: dict[str, FieldValue] = {
        "format": FORMAT,
        "place": inbox_place(message.account_id, place),
        "accountId": message.account_id,
        "messageId": message.message_id,
        "chat": message.chat,
        "sender": message.sender,
        "senderName": message.sender_name,
        "text": message.text,
        "sentAt": Moment(message.sent_at),
        "receivedAt": Moment(message.received_at),
    }
    return update_write(layout.inbound(message), values, exists=False)


def read_inbound(document: Proto) -> InboxEntry:
    """Read a received message. Raises `MalformedDocument`."""
    fields = Fields(document)
    check_format(fields, FORMAT)
    place = _PLACE.fullmatch(fields.text("place"))
    if place is None:
        raise MalformedDocument("field 'place' is not ours")
    return InboxEntry(
        InboxPlace(*map(int, place.groups())),
        InboundMessage(
            account_id=AccountId(fields.text("accountId")),
            message_id=MessageId(fields.text("messageId")),
            chat=fields.text("chat"),
            sender=fields.text("sender"),
            sender_name=fields.text_or_none("senderName"),
            text=fields.text("text"),
            sent_at=fields.moment("sentAt"),
            received_at=fields.moment("receivedAt"),
        ),
    )


def _faulty_copy(account_id: AccountId, fields: Fields, document: Proto, fault: str) -> AccountCopy:
    """What can still be made out of a document of the wrong shape. Its bytes stay as they are."""

    def moment(key: str) -> float:
        value = fields.raw(key)
        return float(value) if isinstance(value, Moment) else 0.0

    def number(key: str) -> int:
        value = fields.raw(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    version = Version(number("epoch"), number("revision"))
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
        version=version if version.plausible else Version(0, 0),
        parts={MAIN_PART: packed} if isinstance(packed, bytes) else {},
        complete=False,
        stamp=stamp_of(document),
        commit_id=commit_id if isinstance(commit_id, str) else "",
        fault=fault,
    )


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


def _check_size(part: PartName, packed: bytes) -> bytes:
    if len(packed) > PACKED_BYTES_MAX:
        raise AuthTooLarge(
            f"part {part!r} has {len(packed)} bytes; a Firestore document holds "
            f"{PACKED_BYTES_MAX} at most"
        )
    return packed
