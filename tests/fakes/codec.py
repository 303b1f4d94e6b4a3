"""Packing without encryption: readable in a failing test's output, exact in what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from machine.ports import AuthTooLarge, AuthUnreadable
from machine.records import MAIN_PART, AccountId, KeyChange, KeyName, PartName, Version

SESSIONS_PART = PartName("sessions")
REST_PART = PartName("rest")
BROKEN = b"broken"


def _part_of(name: KeyName) -> PartName:
    if name == "creds":
        return MAIN_PART
    return SESSIONS_PART if name.startswith("session-") else REST_PART


class FakeCodec:
    """An `AuthCodec`: JSON parts `main` (creds), `sessions`, `rest`.

    `unreadable` accounts are refused whole; `part_bytes_max` is where `AuthTooLarge` begins.
    A part whose bytes are `BROKEN` is unreadable.
    """

    def __init__(self, *, part_bytes_max: int = 900_000) -> None:
        self.unreadable: set[AccountId] = set()
        self.part_bytes_max = part_bytes_max
        self.rotating = False
        """Whether every state is to be written again."""

    def check(self, account_id: AccountId, parts: Mapping[PartName, bytes]) -> str | None:
        try:
            if MAIN_PART not in parts:
                return "the main part is missing"
            for name, data in parts.items():
                self._open(account_id, name, data)
        except AuthUnreadable as unreadable:
            return str(unreadable)
        return None

    def unpack(
        self, account_id: AccountId, parts: Mapping[PartName, bytes]
    ) -> dict[KeyName, bytes]:
        if MAIN_PART not in parts:
            raise AuthUnreadable("the main part is missing")
        listed = self._open(account_id, MAIN_PART, parts[MAIN_PART])["parts"]
        keys: dict[KeyName, bytes] = {}
        for name in (MAIN_PART, *listed):
            if name not in parts:
                raise AuthUnreadable(f"part {name} is missing")
            opened = self._open(account_id, PartName(name), parts[PartName(name)])
            if name != MAIN_PART and opened["version"] != listed[name]:
                raise AuthUnreadable(f"part {name} is not of this copy")
            keys |= {KeyName(key): bytes.fromhex(data) for key, data in opened["keys"].items()}
        return keys

    def change(
        self,
        account_id: AccountId,
        parts: Mapping[PartName, bytes],
        change: KeyChange,
        version: Version,
    ) -> dict[PartName, bytes | None]:
        old = self.unpack(account_id, parts) if parts else {}
        listed: dict[str, str] = {}
        if parts:
            listed = dict(self._open(account_id, MAIN_PART, parts[MAIN_PART])["parts"])
        merged = {**old, **change.values}
        keys = {name: data for name, data in merged.items() if data is not None}
        packed: dict[PartName, bytes | None] = {}
        for part in sorted({_part_of(name) for name in change.values} - {MAIN_PART}):
            inside = {name: data for name, data in keys.items() if _part_of(name) == part}
            if inside:
                packed[part] = self._close(account_id, version, inside, {})
                listed[part] = str(version)
            elif listed.pop(part, None) is not None:
                packed[part] = None
        creds = {name: data for name, data in keys.items() if _part_of(name) == MAIN_PART}
        packed[MAIN_PART] = self._close(account_id, version, creds, listed)
        return packed

    def rotate(
        self, account_id: AccountId, parts: Mapping[PartName, bytes], version: Version
    ) -> dict[PartName, bytes]:
        keys = self.unpack(account_id, parts)
        if not self.rotating:
            return {}
        change = KeyChange(dict(keys))
        packed = self.change(account_id, {}, change, version)
        return {name: data for name, data in packed.items() if data is not None}

    def _close(
        self,
        account_id: AccountId,
        version: Version,
        keys: Mapping[KeyName, bytes],
        parts: Mapping[str, str],
    ) -> bytes:
        content = {
            "account": account_id,
            "version": str(version),
            "keys": {name: data.hex() for name, data in sorted(keys.items())},
            "parts": parts,
        }
        data = json.dumps(content).encode()
        if len(data) > self.part_bytes_max:
            raise AuthTooLarge(f"a part of {account_id} has {len(data)} bytes")
        return data

    def _open(self, account_id: AccountId, name: PartName, data: bytes) -> dict[str, Any]:
        if account_id in self.unreadable:
            raise AuthUnreadable(f"injected: {account_id} is unreadable")
        try:
            content = json.loads(data)
        except ValueError as error:
            raise AuthUnreadable(f"part {name} is broken") from error
        if content["account"] != account_id:
            raise AuthUnreadable(f"part {name} belongs to another account")
        return content  # type: ignore[no-any-return]  # what _close has made
