"""What is secret, and the forms in which it would be found."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from typing import Any

from daemon.auth_codec import EncryptionKey, Keyring, PackedAuthCodec
from daemon.settings import decode_key
from tests.seed import open_stores
from tests.system.cluster import KEY, Cluster

SHORT_CHARS = 16
"""Values shorter than this would be found by chance; no secret is that short."""


def forms(secret: bytes) -> set[str]:
    """The ways in which bytes get into a log: as text, base64, hex, a repr."""
    found = {base64.b64encode(secret).decode(), secret.hex(), repr(secret)[2:-1]}
    with suppress(UnicodeDecodeError):
        found.add(secret.decode())
    return {form for form in found if len(form) >= SHORT_CHARS}


def strings_in(value: Any) -> set[str]:
    """Every long string in credentials; names are no secrets, values may be."""
    if isinstance(value, dict):
        return set().union(*(strings_in(each) for each in value.values()))
    if isinstance(value, list):
        return set().union(*(strings_in(each) for each in value))
    return {value} if isinstance(value, str) and len(value) >= SHORT_CHARS else set()


async def credentials(cluster: Cluster) -> set[str]:
    """What is secret in the accounts that the shared store has now."""
    codec = PackedAuthCodec(Keyring(EncryptionKey(decode_key(KEY))))
    found: set[str] = set()
    async with open_stores(cluster.env) as stores:
        for copy in (await stores.accounts.list_accounts()).copies:
            account_id = copy.account.account_id
            whole = await stores.accounts.fetch_account(account_id)
            assert whole is not None
            if not whole.parts:  # Never paired.
                continue
            for value in codec.unpack(account_id, whole.parts).values():
                found |= forms(value) | strings_in(json.loads(value))
    # Phone numbers and ids are in plain sight by design.
    return {each for each in found if "@s.whatsapp.net" not in each or "{" in each}
