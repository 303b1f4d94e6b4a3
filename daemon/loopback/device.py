"""What a linked device keeps: its credentials, its pre-keys and one session for each contact.

Lives here: making and reading those bytes. The machine's stores carry them and never look inside.
Never lives here: real cryptography. A session is an id and a position, enough to tell whether a
state was rolled back.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field

from machine.records import KeyName

CREDS = KeyName("creds")
PRE_KEYS = 30
SECRET_BYTES = 32


class CredsUnreadable(Exception):
    """These keys belong to no device that could ever log in here."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device as it introduces itself. `proof` is the digest of its secret.

    `phone` is what the device believes. `adopted`: paired by another connector (an imported
    Baileys directory), so the server may meet it for the first time at a login.
    """

    device_id: str
    proof: str = field(repr=False)
    phone: str
    adopted: bool


@dataclass(frozen=True, slots=True)
class NewDevice:
    """A device that shows a QR code: it has an identity, and no phone yet."""

    device_id: str
    secret: bytes = field(repr=False)

    @property
    def proof(self) -> str:
        return hashlib.sha256(self.secret).hexdigest()


def new_device() -> NewDevice:
    """Make a new identity."""
    return NewDevice(secrets.token_hex(16), secrets.token_bytes(SECRET_BYTES))


def make_keys(device: NewDevice, phone: str) -> dict[KeyName, bytes]:
    """The keys that a completed pairing leaves behind: `creds` and the pre-keys."""
    creds = {
        "loopback": 1,
        "deviceId": device.device_id,
        "secret": base64.b64encode(device.secret).decode(),
        "me": {"id": f"{phone}:1@s.whatsapp.net"},
    }
    keys = {CREDS: json.dumps(creds).encode()}
    for number in range(1, PRE_KEYS + 1):
        pair = {half: secrets.token_hex(32) for half in ("private", "public")}
        keys[KeyName(f"pre-key-{number}")] = json.dumps(pair).encode()
    return keys


def read_device(keys: Mapping[KeyName, bytes]) -> Device:
    """The device that `keys` belong to: one of ours, or one that Baileys paired.

    Raises `CredsUnreadable`; its message holds none of the bytes.
    """
    try:
        creds = json.loads(keys[CREDS])
        phone = str(creds["me"]["id"]).split("@")[0].split(":")[0]
        if creds.get("loopback") == 1:
            secret = base64.b64decode(creds["secret"], validate=True)
            proof = hashlib.sha256(secret).hexdigest()
            return Device(str(creds["deviceId"]), proof, phone, adopted=False)
        # Baileys' identity is its two key pairs; the rest of its creds changes as it runs.
        identity = [creds["noiseKey"], creds["signedIdentityKey"]]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        # The cause would show the bytes (JSONDecodeError carries its document).
        raise CredsUnreadable("creds are missing or not those of a paired device") from None
    canonical = json.dumps(identity, sort_keys=True).encode()
    digest = hashlib.sha256(canonical).hexdigest()
    proof = hashlib.sha256(b"proof " + canonical).hexdigest()
    return Device(f"baileys-{digest[:32]}", proof, phone, adopted=True)


@dataclass(frozen=True, slots=True)
class Session:
    """One contact's ratchet on our side: the next message is encrypted at `position`."""

    session_id: str
    position: int

    def advanced(self) -> Session:
        """The session after one message."""
        return Session(self.session_id, self.position + 1)


def new_session() -> Session:
    """Begin a session that no recipient has seen."""
    return Session(secrets.token_hex(8), 0)


def session_key(to: str) -> KeyName:
    """Where a contact's session is kept, as Baileys names it (first device of the contact)."""
    return KeyName(f"session-{to}.0")


def reading_key(sender: str) -> KeyName:
    """Where it is kept how far a contact's messages were read: another of the contact's devices."""
    return KeyName(f"session-{sender}.1")


def dump_session(session: Session) -> bytes:
    """The bytes that the stores keep."""
    return b'{"loopback":1,"session":"%s","position":%d}' % (
        session.session_id.encode(),
        session.position,
    )


def load_session(value: bytes | None) -> Session:
    """The opposite of `dump_session`; a session that is absent or not ours begins anew."""
    if value is None:
        return new_session()
    try:
        fields = json.loads(value)
        if fields["loopback"] == 1:
            return Session(str(fields["session"]), int(fields["position"]))
    except (KeyError, TypeError, ValueError, RecursionError):
        pass  # A real Signal session of an imported account: a new one is always safe.
    return new_session()


def phone_of(account_id: str) -> str:
    """The number that the loopback phone of an account has, unless the scan names another."""
    digits = int.from_bytes(hashlib.sha256(account_id.encode()).digest()[:8])
    return f"49151{digits % 10**8:08d}"
