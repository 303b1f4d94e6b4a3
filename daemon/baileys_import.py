"""Reads the directories in which Baileys' `useMultiFileAuthState` keeps accounts, so that people
who come from such a backend keep theirs.

Lives here: what such a directory holds, what of it can be trusted, and what is lost with each file
that cannot. Never lives here: writing. Files are opened for reading only, links are not followed,
and nothing in here can make an identity: Baileys itself answers a broken `creds.json` with a new
one and overwrites the old (WhatsApp facts, no. 11), which is the fault this module exists to avoid.

A value is the text of its file, byte for byte (Baileys' `BufferJSON`); a key's name is its file's
name without `.json`. That is the id as Baileys rewrites it for file names (`/` to `__`, `:` to
`-`), and stays so: see `daemon.key_names`. The layout is that of baileys 7.0.0-rc14,
`lib/Utils/use-multi-file-auth-state.js`.
"""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import trio

from daemon.key_names import CREDS, split_key_name
from machine.ports import LegacyAccount, LegacyFault, StoreMisconfigured, StoreUnavailable
from machine.records import AccountId, KeyName

PROBLEMS_MAX: Final = 100
NAME_CHARS_MAX: Final = 200

_CREDS_FILE: Final = "creds.json"
_ACCOUNT_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_OWN_ADDRESS: Final = re.compile(
    r"([0-9]{5,20})(?:_[0-9]+)?(?::[0-9]+)?@s\.whatsapp\.net", re.ASCII
)
_NUMBER: Final = re.compile(r"[0-9]{1,10}", re.ASCII)
_OPEN_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class ImportLimits:
    """How much is read at most. The defaults are far above what real accounts have.

    A packed part takes 900,000 bytes (`daemon.auth_codec.PART_BYTES_MAX`), its frame included.
    """

    file_bytes_max: int = 850_000
    directory_files_max: int = 100_000
    directory_bytes_max: int = 128 * 1024 * 1024
    directories_max: int = 20_000


LIMITS: Final = ImportLimits()

_LOSS: Final[Mapping[str, tuple[str, str]]] = {
    "session": (
        "dropped: the next message to or from this device opens a fresh session",
        "nothing; a message that is on its way now may ask to be sent again once",
    ),
    "sender-key": (
        "dropped, with the memory of who has the group's key: it is handed out anew",
        "nothing; messages of the group that are on their way now may ask to be sent again once",
    ),
    "sender-key-memory": ("dropped: the group's key is handed out anew", "nothing"),
    "identity-key": ("dropped: learnt again from the contact's next message", "nothing"),
    "device-list": ("dropped: asked again of the server", "nothing"),
    "lid-mapping": ("dropped: asked again of the server", "nothing"),
    "tctoken": (
        "dropped: made anew with the contact's next message",
        "until then a message to this contact may be refused (463); write after they have",
    ),
    "pre-key": (
        "left out, and it cannot be made anew: the server may still hand out its public half",
        "restore the file from a backup if you can; a contact's first message may come late",
    ),
    "app-state-sync-key": (
        "left out, and it cannot be made anew here: chat settings encrypted with it stay unread",
        "restore the file from a backup if you can; messages are not affected",
    ),
    "app-state-sync-version": (
        "left out: this collection of chat settings is read again from its beginning",
        "nothing",
    ),
}
"""What it means to go on without a key of each type, and what to do. `session`, `sender-key` and
what can be asked for again are safe to drop (WhatsApp facts, no. 5: credentials without sessions
work at once, both ways); the others are left out because a broken one helps nobody, and named
because nothing brings them back."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a directory that was not taken over, why, and what to do about it."""

    file: str
    cause: str
    advice: str


@dataclass(frozen=True, slots=True)
class BaileysImport:
    """An account as its directory holds it.

    `registered` is Baileys' flag of that name: set by pairing with a code, and false after pairing
    with a QR code. It says nothing about whether the account is paired; every import is.
    `fingerprint` is equal for two directories that hold the same device.
    """

    account_id: AccountId
    path: Path
    keys: Mapping[KeyName, bytes] = field(repr=False)
    phone: str
    name: str
    registered: bool
    fingerprint: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class QuarantinedDir:
    """A directory that must not be opened as an account; nothing of it was changed."""

    account_id: AccountId
    path: Path
    cause: str
    advice: str


class BaileysUnreadable(Exception):
    """The directory holds no account that can be trusted. Nothing of it was changed."""

    def __init__(self, cause: str, advice: str) -> None:
        super().__init__(f"{cause}; {advice}")
        self.cause = cause
        self.advice = advice


_FROM_BACKUP: Final = (
    "restore the directory from a backup, or pair the account again; the files are left as they are"
)
_STOP_THE_OTHER: Final = "stop the backend that still uses the directory, then import again"
_NO_LINKS: Final = "put the files themselves into the directory; links are not followed"


class LegacyDirectories:
    """The `LegacySource` of Baileys' directories."""

    def __init__(self, configured: Path | None) -> None:
        self._configured = configured

    async def scan(
        self, directory: str | None = None, *, known: Collection[AccountId] = ()
    ) -> Sequence[LegacyAccount | LegacyFault]:
        """Everything in `directory`; `None`: in the configured one, nothing when there is none.

        Directories of `known` accounts are passed over without being read.
        Raises `StoreMisconfigured` when it does not exist or may not be read, `StoreUnavailable`.
        Cancelled: ends at the next file.
        """
        path = self._configured if directory is None else Path(directory)
        if path is None:
            return ()
        try:
            found = await trio.to_thread.run_sync(
                scan_legacy_dir, path, trio.from_thread.check_cancelled, LIMITS, frozenset(known)
            )
        except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise StoreMisconfigured(
                f"the directory of the former backend cannot be read: {error.strerror}: {path}"
            ) from error
        except OSError as error:
            raise StoreUnavailable(
                f"the directory of the former backend does not answer: {error.strerror}: {path}",
                code=errno.errorcode.get(error.errno or 0, "EIO"),
            ) from error
        return [_as_legacy(each) for each in found]


def _as_legacy(found: BaileysImport | QuarantinedDir) -> LegacyAccount | LegacyFault:
    if isinstance(found, QuarantinedDir):
        return LegacyFault(str(found.path), found.account_id, found.cause, found.advice)
    notes = tuple((f"{each.file}: {each.cause}", each.advice) for each in found.problems)
    return LegacyAccount(found.account_id, found.name, found.phone, found.keys, notes)


# --- many directories ------------------------------------------------------------------------


def scan_legacy_dir(
    path: Path,
    checkpoint: Callable[[], object] = lambda: None,
    limits: ImportLimits = LIMITS,
    known: Collection[AccountId] = (),
) -> list[BaileysImport | QuarantinedDir]:
    """Read every account in `path`: each directory in it is one, and so may `path` itself be.

    Those of `known` accounts are passed over.

    Hidden directories, `lost+found` and directories that hold other things than `.json` files are
    no accounts. Two directories that hold the same device are both quarantined: opened together
    they would evict each other, and nothing in them says for certain which is newer.
    `checkpoint` is called before each file and may raise to end the scan.

    Raises `OSError` when `path` itself cannot be listed. Blocks: run it in a thread.
    """
    with os.scandir(path) as entries:
        found_entries = sorted(entries, key=lambda entry: entry.name)
    names = [entry.name for entry in found_entries]
    directories = [path] if any(_key_of(name) for name in names) else []
    found: list[BaileysImport | QuarantinedDir] = []
    for entry in found_entries:
        if entry.name.startswith(".") or entry.name == "lost+found" or not entry.is_dir():
            continue
        if entry.is_symlink():
            found.append(_quarantined(path / entry.name, "the directory is a link", _NO_LINKS))
        elif len(directories) == limits.directories_max:
            found.append(
                _quarantined(
                    path / entry.name,
                    f"there are more than {limits.directories_max} directories",
                    "import them in several steps",
                )
            )
            break
        else:
            directories.append(path / entry.name)
    for directory in directories:
        if account_id_of(directory) in known:
            continue
        try:
            if directory == path or _may_be_account(directory):
                found.append(read_baileys_dir(directory, checkpoint, limits))
        except BaileysUnreadable as unreadable:
            found.append(_quarantined(directory, unreadable.cause, unreadable.advice))
        except OSError as error:
            found.append(_quarantined(directory, *_unreadable(error)))
    return _without_twins(sorted(found, key=lambda each: each.account_id))


def _may_be_account(directory: Path) -> bool:
    with os.scandir(directory) as entries:
        names = [entry.name for entry in entries]
    return not names or any(name.endswith(".json") for name in names)


def _quarantined(directory: Path, cause: str, advice: str) -> QuarantinedDir:
    return QuarantinedDir(account_id_of(directory), directory, cause, advice)


def _without_twins(
    found: list[BaileysImport | QuarantinedDir],
) -> list[BaileysImport | QuarantinedDir]:
    devices = Counter(each.fingerprint for each in found if isinstance(each, BaileysImport))
    return [
        QuarantinedDir(
            each.account_id,
            each.path,
            f"another directory holds the same device of {each.phone}",
            "keep the one that was used last and move the other away; then import again",
        )
        if isinstance(each, BaileysImport) and devices[each.fingerprint] > 1
        else each
        for each in found
    ]


def account_id_of(directory: Path) -> AccountId:
    """Make an account id of a directory's name: the name itself where it is fit to be one.

    Otherwise what is not a letter, digit, `.`, `_` or `-` becomes `-`, and a hash of the whole name
    follows, so that two names never become one account.
    """
    name = directory.name or directory.resolve().name
    if _ACCOUNT_ID.fullmatch(name):
        return AccountId(name)
    digest = hashlib.blake2b(os.fsencode(name), digest_size=4).hexdigest()
    fit = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:48] or "account"
    return AccountId(f"{fit}-{digest}")


# --- one directory ---------------------------------------------------------------------------


def read_baileys_dir(
    path: Path,
    checkpoint: Callable[[], object] = lambda: None,
    limits: ImportLimits = LIMITS,
) -> BaileysImport:
    """Read one account's directory.

    Raises `BaileysUnreadable` with the cause and what to do: the credentials are missing, broken or
    of no paired account; a file cannot be read (then nothing is known, so nothing is dropped); or
    another process writes to the directory meanwhile. Blocks: run it in a thread.
    """
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            before = _list(directory, limits)
            texts, problems = _read_files(directory, before, checkpoint, limits)
            if _list(directory, limits) != before:
                raise BaileysUnreadable("files changed while they were read", _STOP_THE_OTHER)
        finally:
            os.close(directory)
    except FileNotFoundError as error:
        if not path.exists():
            raise BaileysUnreadable("there is no such directory", "check the path") from error
        raise BaileysUnreadable("a file vanished meanwhile", _STOP_THE_OTHER) from error
    except OSError as error:
        raise BaileysUnreadable(*_unreadable(error)) from error
    facts = _read_creds(texts, limits)
    keys = {CREDS: texts.pop(CREDS)}
    keys |= _sound_keys(texts, problems, limits)
    problems.sort(key=lambda problem: problem.file)
    if len(problems) > PROBLEMS_MAX:
        more = len(problems) - PROBLEMS_MAX
        problems[PROBLEMS_MAX:] = [Problem("…", f"{more} more files like these", "see above")]
    account_id = account_id_of(path)
    return BaileysImport(
        account_id=account_id,
        path=path,
        keys=keys,
        phone=facts.phone,
        name=facts.name or account_id,
        registered=facts.registered,
        fingerprint=facts.fingerprint,
        problems=tuple(problems),
    )


def _list(directory: int, limits: ImportLimits) -> dict[str, tuple[int, int, int, int]]:
    """Mode, size in bytes, time of change in ns and inode of each entry; links are not followed."""
    found: dict[str, tuple[int, int, int, int]] = {}
    with os.scandir(directory) as entries:
        for entry in entries:
            if len(found) == limits.directory_files_max:
                raise BaileysUnreadable(
                    f"the directory holds more than {limits.directory_files_max} files",
                    "check that it is an account's directory",
                )
            status = entry.stat(follow_symlinks=False)
            found[entry.name] = (status.st_mode, status.st_size, status.st_mtime_ns, status.st_ino)
    return found


def _read_files(
    directory: int,
    listing: Mapping[str, tuple[int, int, int, int]],
    checkpoint: Callable[[], object],
    limits: ImportLimits,
) -> tuple[dict[KeyName, bytes], list[Problem]]:
    """Read what is Baileys' own, and name what is not."""
    texts: dict[KeyName, bytes] = {}
    problems: list[Problem] = []
    bytes_total = 0
    for file in sorted(listing):
        mode, size, _, _ = listing[file]
        key = _key_of(file)
        if key is None:
            problems.append(
                Problem(_shown(file), "ignored: no file of Baileys", "nothing, if it is not needed")
            )
            continue
        if not stat.S_ISREG(mode):
            raise BaileysUnreadable(f"{_shown(file)} is not a regular file", _NO_LINKS)
        bytes_total += min(size, limits.file_bytes_max)
        if bytes_total > limits.directory_bytes_max:
            raise BaileysUnreadable(
                f"the directory holds more than {limits.directory_bytes_max} bytes",
                "check that it is an account's directory",
            )
        checkpoint()
        texts[key] = _read_file(directory, file, limits)
    return texts, problems


def _read_file(directory: int, file: str, limits: ImportLimits) -> bytes:
    """At most one byte more than `file_bytes_max`: the last one says that the file is too large."""
    descriptor = os.open(file, _OPEN_FLAGS, dir_fd=directory)
    with open(descriptor, "rb", buffering=0) as opened:  # noqa: PTH123 - a descriptor has no path
        # Looked at again after opening: the entry may have been exchanged since it was listed.
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BaileysUnreadable(f"{_shown(file)} is not a regular file", _NO_LINKS)
        chunks = []
        left = limits.file_bytes_max + 1
        while left > 0 and (chunk := opened.read(left)):
            chunks.append(chunk)
            left -= len(chunk)
        return b"".join(chunks)


def _key_of(file: str) -> KeyName | None:
    """The key that a file holds; `None` when Baileys would never have given it that name."""
    if file == _CREDS_FILE:
        return CREDS
    name = file.removesuffix(".json")
    found = split_key_name(name)
    if name == file or found is None or not name.isprintable():
        return None
    if found[0] == "pre-key" and not _NUMBER.fullmatch(found[1]):
        return None
    return KeyName(name)


def _shown(file: str) -> str:
    """A file's name, fit for a log line."""
    return (
        file if file.isprintable() and len(file) <= NAME_CHARS_MAX else ascii(file)[:NAME_CHARS_MAX]
    )


def _unreadable(error: OSError) -> tuple[str, str]:
    name = f"{_shown(str(error.filename))}: " if error.filename else ""
    return (
        f"{name}{error.strerror or 'cannot be read'}",
        "see that this user may read the directory and that its disk is well; then import again",
    )


# --- what the files say ----------------------------------------------------------------------


def _decode(text: bytes, limits: ImportLimits) -> tuple[object, str | None]:
    """The value of a file, or what is wrong with it; never any of its bytes."""
    if not text:
        return None, "is empty"
    if len(text) > limits.file_bytes_max:
        return None, f"has more than {limits.file_bytes_max} bytes"
    if not text.strip(b"\0"):
        return None, "holds only zeros: it was never written out before a crash"
    try:
        return msgspec.json.decode(text), None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None, "is not complete JSON: cut short, or written by something else"


def _sound_keys(
    texts: Mapping[KeyName, bytes], problems: list[Problem], limits: ImportLimits
) -> dict[KeyName, bytes]:
    """The keys that Baileys could use; the others go to `problems`."""
    keys: dict[KeyName, bytes] = {}
    forgotten: set[KeyName] = set()
    for name, text in texts.items():
        key_type, key_id = split_key_name(name) or ("", "")
        value, fault = _decode(text, limits)
        if fault is None and not _has_shape(key_type, value):
            fault = f"does not hold what a {key_type} is"
        if fault is None:
            keys[name] = text
            continue
        loss, advice = _LOSS[key_type]
        problems.append(Problem(_shown(f"{name}.json"), f"{fault}; {loss}", advice))
        if key_type == "sender-key":
            # Baileys hands a new key only to those who are not in the memory: without forgetting
            # it, the group's members could not read us until each of them asked.
            forgotten.add(KeyName(f"sender-key-memory-{key_id.rsplit('--', 2)[0]}"))
    return {name: text for name, text in keys.items() if name not in forgotten}


def _has_shape(key_type: str, value: object) -> bool:
    """Whether a value is of the kind that Baileys' `SignalDataTypeMap` has for this type."""
    match key_type:
        case "pre-key":
            return _is_key_pair(value)
        case "lid-mapping":
            return isinstance(value, str) and value != ""
        case "device-list":
            return isinstance(value, list)
        case "sender-key" | "identity-key":
            return _bytes_of(value) is not None
        case _:
            return isinstance(value, dict)


def _bytes_of(value: object) -> bytes | None:
    """The bytes that Baileys' `BufferJSON.reviver` makes of a value; `None` if it makes none."""
    if not isinstance(value, dict):
        return None
    data = value.get("data")
    if value.get("type") == "Buffer" and isinstance(data, str):
        try:
            return base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            return None
    try:
        # The older form of a Uint8Array: {"0": 17, "1": 4, …}.
        return bytes(value[str(index)] for index in range(len(value))) or None
    except (KeyError, TypeError, ValueError):
        return None


def _is_key_pair(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    private, public = _bytes_of(value.get("private")), _bytes_of(value.get("public"))
    # A public key may carry libsignal's type byte.
    return private is not None and len(private) == 32 and len(public or b"") in (32, 33)


def _is_signed_pre_key(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_key_pair(value.get("keyPair"))
        and len(_bytes_of(value.get("signature")) or b"") == 64
        and _is_integer(value.get("keyId"))
    )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_adv_secret(value: object) -> bool:
    try:
        return isinstance(value, str) and len(base64.b64decode(value, validate=True)) == 32
    except (binascii.Error, ValueError):
        return False


_ESSENTIAL: Final[tuple[tuple[str, Callable[[object], bool]], ...]] = (
    ("noiseKey", _is_key_pair),
    ("signedIdentityKey", _is_key_pair),
    ("signedPreKey", _is_signed_pre_key),
    ("registrationId", _is_integer),
    ("advSecretKey", _is_adv_secret),
)
"""Without any one of these the account is another device, or none."""


class _Facts(NamedTuple):
    """What the credentials of a paired account say of it."""

    phone: str
    name: str | None
    registered: bool
    fingerprint: str


def _read_creds(texts: Mapping[KeyName, bytes], limits: ImportLimits) -> _Facts:
    """See that the credentials are those of a paired account. Raises `BaileysUnreadable`."""
    if CREDS not in texts:
        raise BaileysUnreadable("creds.json is missing", _FROM_BACKUP)
    creds, fault = _decode(texts[CREDS], limits)
    if fault is not None:
        raise BaileysUnreadable(f"creds.json {fault}", _FROM_BACKUP)
    if not isinstance(creds, dict):
        raise BaileysUnreadable("creds.json does not hold credentials", _FROM_BACKUP)
    for name, is_sound in _ESSENTIAL:
        if name not in creds:
            raise BaileysUnreadable(f"creds.json has no {name}", _FROM_BACKUP)
        if not is_sound(creds[name]):
            raise BaileysUnreadable(
                f"creds.json has a {name} that baileys 7 cannot read", _FROM_BACKUP
            )
    me = creds.get("me")
    if not isinstance(me, dict):
        raise BaileysUnreadable("the account was never paired", "pair it here; there is no loss")
    # Asking for a pairing code sets `me` before the phone has agreed; `account` comes after.
    if not isinstance(creds.get("account"), dict) or not creds["account"]:
        raise BaileysUnreadable(
            "the account's pairing was begun and never finished", "pair it here; there is no loss"
        )
    own_address = _OWN_ADDRESS.fullmatch(str(me.get("id")))
    if own_address is None:
        raise BaileysUnreadable("creds.json does not say which phone number it is", _FROM_BACKUP)
    return _Facts(
        phone=own_address[1],
        name=_name_of(me),
        registered=creds.get("registered") is True,
        fingerprint=hashlib.sha256(_bytes_of(creds["noiseKey"]["private"]) or b"").hexdigest()[:16],
    )


def _name_of(me: Mapping[str, object]) -> str | None:
    """The name that the account has given itself. `~` is Baileys' word for none."""
    for key in ("name", "verifiedName", "notify"):
        name = me.get(key)
        if isinstance(name, str):
            shown = "".join(each for each in name if each.isprintable()).strip()[:NAME_CHARS_MAX]
            if shown and shown != "~":
                return shown
    return None
