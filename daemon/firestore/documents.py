"""Names, values and stamps of Firestore documents, to and from Python. Pure: nothing waits.

Never lives here: what the fields of a lease, an account or a message mean.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NewType
from urllib.parse import quote, unquote

from daemon.firestore.protos import Proto, Write
from machine.records import Stamp

DocumentName = NewType("DocumentName", str)
"""The full name, `projects/…/databases/…/documents/…`."""

PACKED_BYTES_MAX = 1_000_000
"""A blob in one document. Firestore's limit is 1 MiB for a document with its name and all fields
(https://firebase.google.com/docs/firestore/quotas); the rest is left for the plain fields."""

_STAMP = re.compile(r"([0-9]{1,12})\.([0-9]{9})")
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class MalformedDocument(Exception):
    """A document is not of the shape that we write. The message names the field, never a value."""


class Moment(float):
    """Seconds since 1970 that are kept as a Firestore timestamp: exact to the microsecond."""

    __slots__ = ()

    @property
    def micros(self) -> int:
        """Microseconds since 1970. Raises `ValueError` unless finite."""
        if not math.isfinite(self):
            raise ValueError("a moment must be finite")
        return round(self * 1_000_000)


FieldValue = (
    None
    | bool
    | int
    | float
    | str
    | bytes
    | Moment
    | Sequence["FieldValue"]
    | Mapping[str, "FieldValue"]
)


def check_group(group: str) -> str:
    """Return `group` if it can be part of a document's name; raises `ValueError`."""
    if _GROUP.fullmatch(group) is None:
        raise ValueError(f"group {group!r} may hold only letters, digits, '_', '-' and '.'")
    return group


def document_id(text: str) -> str:
    """Make any text a valid document id, reversibly (`text_of`). Raises `ValueError` when empty.

    Firestore refuses `/`, `.`, `..` and `__…__` as ids, and more than 1,500 bytes.
    """
    if not text:
        raise ValueError("an empty id cannot name a document")
    # `~` is left to us: names put it between an id and what is said of it.
    encoded = quote(text, safe="@+:").replace("~", "%7E")
    if encoded in {".", ".."}:
        encoded = encoded.replace(".", "%2E")
    if encoded.startswith("__"):
        encoded = "%5F" + encoded[1:]
    return encoded


def text_of(name: str) -> str:
    """Read back what `document_id` made the last segment of a document's name from."""
    return unquote(name.rsplit("/", 1)[-1])


def stamp_of(document: Proto) -> Stamp:
    """Read a document's version: its `update_time`."""
    return stamp_from(document.update_time)


def stamp_from(update_time: Proto) -> Stamp:
    """Make a stamp of a protobuf timestamp: seconds and nanoseconds since 1970."""
    return Stamp(f"{update_time.seconds}.{update_time.nanos:09d}")


def set_stamp(target: Proto, stamp: Stamp) -> None:
    """Write `stamp` into a protobuf timestamp, as it was.

    A stamp of another store becomes a moment at which no document was written: it never matches.
    """
    match = _STAMP.fullmatch(stamp)
    target.seconds, target.nanos = (int(match[1]), int(match[2])) if match else (0, 1000)


def seconds_between(earlier: Proto, later: Proto) -> float:
    """The seconds from one protobuf timestamp to another; exact, not through a float of 1970."""
    seconds: int = later.seconds - earlier.seconds
    nanos: int = later.nanos - earlier.nanos
    return seconds + nanos / 1e9


def encode(target: Proto, value: FieldValue) -> None:
    """Put a Python value into a Firestore `Value`."""
    match value:
        case None:
            target.null_value = 0
        case bool():
            target.boolean_value = value
        case int():
            target.integer_value = value
        case Moment():
            target.timestamp_value.seconds = value.micros // 1_000_000
            target.timestamp_value.nanos = value.micros % 1_000_000 * 1000
        case float():
            target.double_value = value
        case str():
            target.string_value = value
        case bytes():
            target.bytes_value = value
        case Mapping():
            target.map_value.SetInParent()
            for key, item in value.items():
                encode(target.map_value.fields[key], item)
        case _:
            target.array_value.SetInParent()
            for item in value:
                encode(target.array_value.values.add(), item)


def decode(value: Proto) -> FieldValue:
    """Read a Firestore `Value`. Kinds that we never write (a place, a reference) become `None`."""
    kind = value.WhichOneof("value_type")
    if kind in _PLAIN:
        plain: FieldValue = getattr(value, kind)
        return plain
    if kind == "timestamp_value":
        moment = value.timestamp_value
        return Moment((moment.seconds * 1_000_000 + moment.nanos // 1000) / 1_000_000)
    if kind == "map_value":
        return {key: decode(item) for key, item in value.map_value.fields.items()}
    if kind == "array_value":
        return [decode(item) for item in value.array_value.values]
    return None


_PLAIN = frozenset(
    {"string_value", "bytes_value", "integer_value", "double_value", "boolean_value"}
)


class NewerFormat(MalformedDocument):
    """A newer release wrote the document. The message says which formats, and what to do."""


def check_format(fields: Fields, known: int, *, absent: int | None = None) -> None:
    """Refuse a document whose format is above `known`. Raises `MalformedDocument`.

    `absent` is the format of documents that do not say one; `None` where each has always said it.
    """
    unsaid = absent is not None and fields.raw("format") is None
    written = absent if unsaid else fields.integer("format")
    assert written is not None
    if written > known:
        raise NewerFormat(
            f"format {written} is newer than this release reads ({known}). Nothing in it was "
            "changed. Start an instance of the release that wrote it, or of a later one "
            "(docs/upgrades.md)"
        )
    if written < 1:
        raise MalformedDocument(f"there is no format {written}")


class Fields:
    """The fields of one document, each decoded when it is read, with its expected kind.

    Every reader raises `MalformedDocument` when the field is missing or of another kind; those
    called `…_or_none` accept a missing field and a null. (Decoding all fields at once, looked for
    or not, makes a restore's reading half as slow again.)
    """

    __slots__ = ("_values",)

    def __init__(self, document: Proto) -> None:
        self._values = document.fields

    @classmethod
    def of_map(cls, value: Proto) -> Fields:
        """Read a map inside a document the same way. Raises `MalformedDocument`."""
        if value.WhichOneof("value_type") != "map_value":
            raise MalformedDocument("an entry is not a map")
        return cls(value.map_value)

    def raw(self, key: str) -> FieldValue:
        """Whatever is there, `None` if nothing is."""
        value = self._values.get(key)
        return None if value is None else decode(value)

    def text(self, key: str) -> str:
        value: str = self._of_kind(key, "string_value").string_value
        return value

    def text_or_none(self, key: str) -> str | None:
        return None if self._is_null(key) else self.text(key)

    def integer(self, key: str) -> int:
        value: int = self._of_kind(key, "integer_value").integer_value
        return value

    def integer_or_none(self, key: str) -> int | None:
        return None if self._is_null(key) else self.integer(key)

    def flag(self, key: str) -> bool:
        value: bool = self._of_kind(key, "boolean_value").boolean_value
        return value

    def flag_or_false(self, key: str) -> bool:
        return False if self._is_null(key) else self.flag(key)

    def moment(self, key: str) -> float:
        value = self._of_kind(key, "timestamp_value").timestamp_value
        seconds: float = (value.seconds * 1_000_000 + value.nanos // 1000) / 1_000_000
        return seconds

    def moment_or_none(self, key: str) -> float | None:
        return None if self._is_null(key) else self.moment(key)

    def blob_or_none(self, key: str) -> bytes | None:
        if self._is_null(key):
            return None
        value: bytes = self._of_kind(key, "bytes_value").bytes_value
        return value

    def maps(self, key: str) -> list[Fields]:
        """A list of maps."""
        items = self._of_kind(key, "array_value").array_value.values
        return [Fields.of_map(item) for item in items]

    def keys_or_none(self, key: str) -> list[str] | None:
        """The keys of a map."""
        if self._is_null(key):
            return None
        return list(self._of_kind(key, "map_value").map_value.fields)

    def moments(self, key: str) -> dict[str, float]:
        """A map of timestamps."""
        value = self._of_kind(key, "map_value")
        inner = Fields.of_map(value)
        return {name: inner.moment(name) for name in value.map_value.fields}

    def _of_kind(self, key: str, kind: str) -> Proto:
        value = self._values.get(key)
        if value is None or value.WhichOneof("value_type") != kind:
            raise MalformedDocument(f"field {key!r} is not a {kind.removesuffix('_value')}")
        return value

    def _is_null(self, key: str) -> bool:
        value = self._values.get(key)
        return value is None or value.WhichOneof("value_type") == "null_value"


def update_write(
    name: DocumentName,
    values: Mapping[str, FieldValue],
    *,
    stamp: Stamp | None = None,
    exists: bool | None = None,
) -> Proto:
    """A write of exactly the fields in `values`: what else the document holds survives.

    With `stamp` or `exists` it is refused, with the whole commit, unless the document is so.
    """
    write = Write()
    write.update.name = name
    for key, value in values.items():
        encode(write.update.fields[key], value)
    write.update_mask.field_paths.extend(values)
    _set_precondition(write, stamp, exists)
    return write


def set_in_map(write: Proto, key: str, inner: str, value: FieldValue | None) -> None:
    """Add to an update: one entry of the map field `key` is set, or deleted; the others stay."""
    escaped = inner.replace("\\", "\\\\").replace("`", "\\`")
    write.update_mask.field_paths.append(f"{key}.`{escaped}`")
    if value is not None:
        encode(write.update.fields[key].map_value.fields[inner], value)


def verify_write(name: DocumentName, stamp: Stamp) -> Proto:
    """A write that changes nothing and is refused unless the document is at `stamp`."""
    write = Write()
    write.update.name = name
    write.update_mask.SetInParent()
    _set_precondition(write, stamp, None)
    return write


def delete_write(name: DocumentName, *, stamp: Stamp | None = None) -> Proto:
    """A delete; with `stamp` it is refused unless the document is there, at that stamp."""
    write = Write()
    write.delete = name
    _set_precondition(write, stamp, None)
    return write


def bytes_of(writes: Iterable[Proto]) -> int:
    """How much of a commit's size limit these writes take."""
    return sum(write.ByteSize() + 8 for write in writes)


def _set_precondition(write: Proto, stamp: Stamp | None, exists: bool | None) -> None:
    if stamp is not None:
        set_stamp(write.current_document.update_time, stamp)
    elif exists is not None:
        write.current_document.exists = exists
