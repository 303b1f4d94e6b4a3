"""Packs an account's credentials and keys into a few encrypted parts, and back.

Lives here: which key goes into which part, the parts' layout, the encryption and its keys. Never
lives here: reading or writing a store, and what a key's value means.

The parts
    `main`               the credentials, and the manifest: which other parts there are, the version
                         each was written at, and its seal (the last 16 bytes)
    `pre-keys-<n>`       pre-keys, 128 to a block by their number
    `app-state`, `app-state-<collection>`   app-state keys; the state of each collection by itself
    `contacts-<hex>`     all that is about contacts, by a hash of the contact: 16 parts; one that
                         grows over its limit is split in 16 again, by the next digit of the hash

A change rewrites the parts it touches, and `main`. Everything is bound to what it says of itself:
a part that was moved to another account or place, cut, altered, or is of another version than the
manifest says does not open.

The layout of a part, big-endian: magic `WKAP`, format (1), flags (0 plain, 1 AES-256-GCM), key id
(8 bytes), epoch (8), revision (8), nonce (12), the body (msgpack), seal (16). The seal is GCM's
tag, over the body and, as associated data, the header, the account id and the part's name. Plain
parts carry a BLAKE2b checksum there: it finds accidents, not forgeries.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, TypeVar

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from daemon.key_names import CREDS, contact_of, split_key_name
from machine.ports import AuthTooLarge, AuthUnreadable
from machine.records import MAIN_PART, AccountId, KeyChange, KeyName, PartName, Version

PART_BYTES_MAX: Final = 900_000
"""A Firestore document holds 1,048,576 bytes, its name and other fields included."""
KEY_NAME_CHARS_MAX: Final = 1_024
PRE_KEYS_PER_BLOCK: Final = 128

_SECRET_BYTES: Final = 32
_MAGIC: Final = b"WKAP"
_FORMAT: Final = 1
_PLAIN: Final = 0
_AES_256_GCM: Final = 1
_HEADER: Final = struct.Struct(">4sBB8sQQ12s")
_SEAL_BYTES: Final = 16
_NO_KEY_ID: Final = bytes(8)
_CONTACT_DIGITS_MAX: Final = 8
_CONTACTS: Final = "contacts-"
_COLLECTION: Final = re.compile(r"[a-z_]{1,40}", re.ASCII)
_BLOCK_NUMBER: Final = re.compile(r"[0-9]{1,12}", re.ASCII)


_Value = TypeVar("_Value")


class BadEncryptionKey(ValueError):
    """What was given is not an encryption key. The message never repeats it."""


@dataclass(frozen=True, slots=True)
class EncryptionKey:
    """A secret of 32 bytes, and the id that names it in the parts it wrote (16 hex digits)."""

    secret: bytes = field(repr=False)
    key_id: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.secret) != _SECRET_BYTES:
            raise BadEncryptionKey(
                f"an encryption key has {_SECRET_BYTES} bytes, this one {len(self.secret)}"
            )
        digest = hashlib.sha256(b"watchkeeper key id" + self.secret).digest()
        object.__setattr__(self, "key_id", digest[:8].hex())


def parse_key(text: str) -> EncryptionKey:
    """Read a key as `make_key` writes it: standard base64 of 32 bytes.

    Raises `BadEncryptionKey`, with a message that is safe to show.
    """
    try:
        secret = base64.b64decode(text.strip().encode("ascii"), validate=True)
    except (binascii.Error, UnicodeEncodeError):
        # `from None`: the cause would carry the text into a traceback.
        raise BadEncryptionKey(
            "the encryption key is not base64; `watchkeeper keygen` makes one"
        ) from None
    if len(secret) != _SECRET_BYTES:
        raise BadEncryptionKey(
            f"the encryption key is base64 of {len(secret)} bytes and must be of {_SECRET_BYTES};"
            " `watchkeeper keygen` makes one"
        )
    return EncryptionKey(secret)


def make_key() -> str:
    """Make a new random key, as base64."""
    return base64.b64encode(os.urandom(_SECRET_BYTES)).decode("ascii")


@dataclass(frozen=True, slots=True)
class Keyring:
    """The key that writes, and the older ones that can still read."""

    active: EncryptionKey
    older: Sequence[EncryptionKey] = ()


class _PartRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the manifest knows of a part."""

    epoch: int
    revision: int
    seal: bytes


class _Main(msgspec.Struct, array_like=True):
    """The body of `main`. `splits` names the `contacts-` parts that were split in 16."""

    keys: dict[str, bytes]
    parts: dict[str, _PartRecord]
    splits: list[str]


class _MainManifest(msgspec.Struct, array_like=True, gc=False):
    """The same, with the keys left undecoded: all that `check` needs."""

    keys: msgspec.Raw
    parts: dict[str, _PartRecord]
    splits: list[str]


_encoder: Final = msgspec.msgpack.Encoder()
_main_decoder: Final = msgspec.msgpack.Decoder(_Main)
_manifest_decoder: Final = msgspec.msgpack.Decoder(_MainManifest)
_keys_decoder: Final = msgspec.msgpack.Decoder(dict[str, bytes])


class _Header(NamedTuple):
    """A part's header, checked as far as it can be without a key. (A tuple: 10,000 are made in
    one restore, and a frozen dataclass costs five times as much.)"""

    flags: int
    key_id: bytes
    epoch: int
    revision: int
    nonce: bytes


class PackedAuthCodec:
    """The `AuthCodec` of both stores. Holds the keys and no state of any account.

    With a keyring it writes encrypted parts; it reads encrypted and plain ones, so that a state
    that began without a key is encrypted by its next changes (`needs_rotation` finds the rest). A
    plain `main` is therefore believed: whoever must exclude forgeries keeps others from writing to
    the store. Without a keyring everything is plain.
    """

    def __init__(self, keyring: Keyring | None) -> None:
        self._keyring = keyring
        keys = (keyring.active, *keyring.older) if keyring else ()
        self._keys = {bytes.fromhex(key.key_id): key for key in keys}

    # --- AuthCodec -----------------------------------------------------------------------------

    def check(self, account_id: AccountId, parts: Mapping[PartName, bytes]) -> str | None:
        """What is wrong with the parts that are there, or `None`.

        Opens each of them and compares it with the manifest; a part that was not given is not
        missed. Costs about 15 µs a part, and 15 µs more for each 100 kB.
        """
        try:
            body = self._open_main(account_id, parts)
            try:
                manifest = _manifest_decoder.decode(body).parts
            except (msgspec.MsgspecError, UnicodeDecodeError):
                return _foreign(MAIN_PART)
            for part, encoded in parts.items():
                if part != MAIN_PART:
                    self._open_listed(account_id, part, encoded, manifest)
        except AuthUnreadable as unreadable:
            return str(unreadable)
        return None

    def unpack(
        self, account_id: AccountId, parts: Mapping[PartName, bytes]
    ) -> dict[KeyName, bytes]:
        """Every key. `parts` must be complete.

        Raises `AuthUnreadable` when a part is missing, foreign, broken or of another version.
        """
        main = self._decode_main(account_id, parts)
        keys = main.keys
        for part in parts:
            if part != MAIN_PART and part not in main.parts:
                raise AuthUnreadable(_unlisted(part))
        for name in main.parts:
            keys.update(self._decode_listed(account_id, PartName(name), parts, main))
        return {KeyName(name): value for name, value in keys.items()}

    def change(
        self,
        account_id: AccountId,
        parts: Mapping[PartName, bytes],
        change: KeyChange,
        version: Version,
    ) -> dict[PartName, bytes | None]:
        """The parts that differ after `change`, written at `version`; `MAIN_PART` among them.

        `parts` needs `main` and the parts that the change touches; the others are not looked at.
        Empty, it makes a new state. A part that holds nothing any more is answered as `None`.

        Raises `AuthUnreadable`, `AuthTooLarge`; `ValueError` when `version` is older than `main`.
        """
        main = _Main({}, {}, [])
        if parts:
            main = self._decode_main(account_id, parts)
            present = version_of(parts)
            if version < present:
                raise ValueError(f"a change at {version} cannot follow {present}")
        changed: dict[PartName, bytes | None] = {}
        for part, values in _by_part(change.values, frozenset(main.splits)).items():
            if part == MAIN_PART:
                _apply(main.keys, values)
                continue
            keys = self._decode_listed(account_id, part, parts, main) if part in main.parts else {}
            if _apply(keys, values):
                self._write_contents(account_id, part, keys, version, main, changed)
        changed[MAIN_PART] = self._seal(account_id, MAIN_PART, _encoder.encode(main), version)
        return changed

    # --- rotation ------------------------------------------------------------------------------

    def needs_rotation(self, parts: Mapping[PartName, bytes]) -> bool:
        """Whether a part that is there was not written with the active key.

        Give it a complete copy: `main` is rewritten by each change and alone says nothing about the
        others. False without a keyring, and for parts that cannot be read anyway.
        """
        if self._keyring is None:
            return False
        active = bytes.fromhex(self._keyring.active.key_id)
        for part, encoded in parts.items():
            try:
                header = _read_header(part, encoded)
            except AuthUnreadable:
                return False
            if header.flags != _AES_256_GCM or header.key_id != active:
                return True
        return False

    def rotate(
        self, account_id: AccountId, parts: Mapping[PartName, bytes], version: Version
    ) -> dict[PartName, bytes]:
        """All parts written again under the active key; empty when they are already.

        `parts` must be complete. Raises `AuthUnreadable`, also when nothing is to be rotated.
        """
        main = self._decode_main(account_id, parts)
        bodies = {
            PartName(name): self._open_listed(
                account_id, PartName(name), _given(PartName(name), parts), main.parts
            )
            for name in main.parts
        }
        if not self.needs_rotation(parts):
            return {}
        rotated = {
            part: self._seal_listed(account_id, part, body, version, main)
            for part, body in bodies.items()
        }
        rotated[MAIN_PART] = self._seal(account_id, MAIN_PART, _encoder.encode(main), version)
        return rotated

    # --- parts and the manifest ----------------------------------------------------------------

    def _decode_main(self, account_id: AccountId, parts: Mapping[PartName, bytes]) -> _Main:
        try:
            return _main_decoder.decode(self._open_main(account_id, parts))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise AuthUnreadable(_foreign(MAIN_PART)) from None

    def _decode_listed(
        self,
        account_id: AccountId,
        part: PartName,
        parts: Mapping[PartName, bytes],
        main: _Main,
    ) -> dict[str, bytes]:
        body = self._open_listed(account_id, part, _given(part, parts), main.parts)
        try:
            return _keys_decoder.decode(body)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise AuthUnreadable(_foreign(part)) from None

    def _open_main(self, account_id: AccountId, parts: Mapping[PartName, bytes]) -> bytes:
        encoded = _given(MAIN_PART, parts)
        return self._open(account_id, MAIN_PART, encoded, _read_header(MAIN_PART, encoded))

    def _open_listed(
        self,
        account_id: AccountId,
        part: PartName,
        encoded: bytes,
        manifest: Mapping[str, _PartRecord],
    ) -> bytes:
        """Open a part that must be exactly the one the manifest speaks of."""
        record = manifest.get(part)
        if record is None:
            raise AuthUnreadable(_unlisted(part))
        header = _read_header(part, encoded)
        if (header.epoch, header.revision) != (record.epoch, record.revision):
            found = Version(header.epoch, header.revision)
            listed = Version(record.epoch, record.revision)
            older = "older" if found < listed else "newer"
            raise AuthUnreadable(
                f"part {part} is of version {found} and the main part expects {listed}: it"
                f" is {older} than the rest, the copy is torn; use another copy of this account"
            )
        body = self._open(account_id, part, encoded, header)
        if encoded[-_SEAL_BYTES:] != record.seal:
            raise AuthUnreadable(
                f"part {part} is not the one that the main part was written with: the copy is torn;"
                " use another copy of this account"
            )
        return body

    def _write_contents(
        self,
        account_id: AccountId,
        part: PartName,
        keys: dict[str, bytes],
        version: Version,
        main: _Main,
        changed: dict[PartName, bytes | None],
    ) -> None:
        """Write a part's new contents: into it, out of existence, or split over 16 others."""
        if not keys:
            if main.parts.pop(part, None) is not None:
                changed[part] = None
            return
        body = _encoder.encode(keys)
        if _HEADER.size + len(body) + _SEAL_BYTES <= PART_BYTES_MAX:
            changed[part] = self._seal_listed(account_id, part, body, version, main)
            return
        if not part.startswith(_CONTACTS) or len(part) == len(_CONTACTS) + _CONTACT_DIGITS_MAX:
            raise AuthTooLarge(_too_large(part, len(body)))
        if len(keys) == 1:
            raise AuthTooLarge(_too_large(part, len(body)))
        main.splits.append(part)
        if main.parts.pop(part, None) is not None:
            changed[part] = None
        for smaller, some in _by_part(keys, frozenset(main.splits)).items():
            self._write_contents(account_id, smaller, some, version, main, changed)

    # --- bytes ---------------------------------------------------------------------------------

    def _seal_listed(
        self, account_id: AccountId, part: PartName, body: bytes, version: Version, main: _Main
    ) -> bytes:
        """Seal a part and enter it into the manifest."""
        encoded = self._seal(account_id, part, body, version)
        main.parts[part] = _PartRecord(version.epoch, version.revision, encoded[-_SEAL_BYTES:])
        return encoded

    def _seal(self, account_id: AccountId, part: PartName, body: bytes, version: Version) -> bytes:
        if _HEADER.size + len(body) + _SEAL_BYTES > PART_BYTES_MAX:
            raise AuthTooLarge(_too_large(part, len(body)))
        nonce = os.urandom(12)
        epoch, revision = version.epoch, version.revision
        if self._keyring is None:
            header = _HEADER.pack(_MAGIC, _FORMAT, _PLAIN, _NO_KEY_ID, epoch, revision, nonce)
            return header + body + _checksum(_bound(header, account_id, part), body)
        key = self._keyring.active
        key_id = bytes.fromhex(key.key_id)
        header = _HEADER.pack(_MAGIC, _FORMAT, _AES_256_GCM, key_id, epoch, revision, nonce)
        cipher = AESGCM(_account_secret(key, account_id))
        return header + cipher.encrypt(nonce, body, _bound(header, account_id, part))

    def _open(
        self, account_id: AccountId, part: PartName, encoded: bytes, header: _Header
    ) -> bytes:
        bound = _bound(encoded[: _HEADER.size], account_id, part)
        if header.flags == _PLAIN:
            body = encoded[_HEADER.size : -_SEAL_BYTES]
            if _checksum(bound, body) != encoded[-_SEAL_BYTES:]:
                raise AuthUnreadable(_altered(part))
            return body
        key = self._keys.get(header.key_id)
        if key is None:
            raise AuthUnreadable(
                f"part {part} is encrypted with the key whose id is {header.key_id.hex()}, and that"
                " key is not configured here; give it as the encryption key, or as an older one"
            )
        try:
            return AESGCM(_account_secret(key, account_id)).decrypt(
                header.nonce, memoryview(encoded)[_HEADER.size :], bound
            )
        except InvalidTag:
            raise AuthUnreadable(_altered(part)) from None


def version_of(parts: Mapping[PartName, bytes]) -> Version:
    """The version that `main` was written at, read without a key and not authenticated.

    Raises `AuthUnreadable`.
    """
    header = _read_header(MAIN_PART, _given(MAIN_PART, parts))
    return Version(header.epoch, header.revision)


def _given(part: PartName, parts: Mapping[PartName, bytes]) -> bytes:
    encoded = parts.get(part)
    if encoded is None:
        raise AuthUnreadable(
            f"part {part} is missing: the copy is incomplete; use another copy of this account"
        )
    return encoded


def _read_header(part: PartName, encoded: bytes) -> _Header:
    if not encoded:
        raise AuthUnreadable(f"part {part} is empty; use another copy of this account")
    if not encoded.startswith(_MAGIC[: len(encoded)]):
        raise AuthUnreadable(_foreign(part))
    if len(encoded) < _HEADER.size + _SEAL_BYTES:
        raise AuthUnreadable(
            f"part {part} is cut short at {len(encoded)} bytes; use another copy of this account"
        )
    _, layout, flags, key_id, epoch, revision, nonce = _HEADER.unpack_from(encoded)
    if layout > _FORMAT:
        raise AuthUnreadable(
            f"part {part} has format {layout} and this version of Watchkeeper reads format"
            f" {_FORMAT}; run the version that wrote it"
        )
    if layout != _FORMAT or flags not in (_PLAIN, _AES_256_GCM):
        raise AuthUnreadable(_foreign(part))
    return _Header(flags, key_id, epoch, revision, nonce)


def _bound(header: bytes, account_id: AccountId, part: PartName) -> bytes:
    """What a part's seal covers beside the body. NUL cannot occur in a part's name."""
    return b"".join((header, part.encode(), b"\0", account_id.encode()))


def _checksum(bound: bytes, body: bytes) -> bytes:
    digest = hashlib.blake2b(bound, digest_size=_SEAL_BYTES, person=b"wk plain part")
    digest.update(body)
    return digest.digest()


def _account_secret(key: EncryptionKey, account_id: AccountId) -> bytes:
    """Derive the account's own key.

    Random nonces are safe for about 2^32 parts of one key (NIST SP 800-38D, 8.3): a limit that a
    busy group of accounts would reach within a year, and a single account never.
    """
    return hashlib.blake2b(
        account_id.encode(), digest_size=_SECRET_BYTES, key=key.secret, person=b"wk account key"
    ).digest()


def _by_part(
    values: Mapping[KeyName, _Value] | Mapping[str, _Value], splits: Collection[str]
) -> dict[PartName, dict[str, _Value]]:
    """Sort keys by the part that they belong to."""
    sorted_values: dict[PartName, dict[str, _Value]] = {}
    for name, value in values.items():
        if len(name) > KEY_NAME_CHARS_MAX:
            raise AuthTooLarge(
                f"a key's name has {len(name)} characters, the limit is {KEY_NAME_CHARS_MAX}"
            )
        sorted_values.setdefault(_part_of(name, splits), {})[str(name)] = value
    return sorted_values


def _part_of(name: str, splits: Collection[str]) -> PartName:
    """Where a key belongs. Never change this for a name that may have been written already."""
    if name == CREDS:
        return MAIN_PART
    typed = split_key_name(name)
    contact = contact_of(*typed) if typed else name
    if typed:
        key_type, key_id = typed
        if key_type == "pre-key" and _BLOCK_NUMBER.fullmatch(key_id):
            return PartName(f"pre-keys-{int(key_id) // PRE_KEYS_PER_BLOCK}")
        if key_type == "app-state-sync-key":
            return PartName("app-state")
        # Their size grows with the contacts of the account, up to hundreds of kilobytes each.
        if key_type == "app-state-sync-version" and _COLLECTION.fullmatch(key_id):
            return PartName(f"app-state-{key_id}")
    digits = hashlib.blake2b(contact.encode(), digest_size=_CONTACT_DIGITS_MAX // 2).hexdigest()
    part = _CONTACTS + digits[0]
    while part in splits:
        part = _CONTACTS + digits[: len(part) - len(_CONTACTS) + 1]
    return PartName(part)


def _apply(keys: dict[str, bytes], values: Mapping[str, bytes | None]) -> bool:
    """Apply new values to a part's keys; whether anything is different now."""
    differs = False
    for name, value in values.items():
        if value is None:
            differs = keys.pop(name, None) is not None or differs
        elif keys.get(name) != value:
            keys[name] = value
            differs = True
    return differs


def _foreign(part: str) -> str:
    return f"part {part} was not written by Watchkeeper; use another copy of this account"


def _altered(part: str) -> str:
    return (
        f"part {part} was altered, or belongs to another account or part;"
        " use another copy of this account"
    )


def _unlisted(part: str) -> str:
    return (
        f"part {part} is not in the main part's list: it is newer than the main part, the copy is"
        " torn; use another copy of this account"
    )


def _too_large(part: str, body_bytes: int) -> str:
    return f"part {part} would have {body_bytes} bytes; a store takes {PART_BYTES_MAX} at most"
