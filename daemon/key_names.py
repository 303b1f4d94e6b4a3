"""How the keys of an account are named, and which contact a key belongs to.

A key's name is `creds`, or `<type>-<id>` where the id is written as Baileys writes it into a file
name: `/` as `__` and `:` as `-` (`useMultiFileAuthState`, baileys 7.0.0-rc14). The original id
cannot be told from that, and need not be: every reader and writer applies `key_name` to the id that
it looks for, so an imported directory and a live connector meet at the same name.

Never lives here: what a key's value means.
"""

from __future__ import annotations

import re
from typing import Final

from machine.records import KeyName

CREDS: Final = KeyName("creds")

KEY_TYPES: Final = (
    "app-state-sync-version",
    "app-state-sync-key",
    "sender-key-memory",
    "identity-key",
    "device-list",
    "lid-mapping",
    "sender-key",
    "pre-key",
    "session",
    "tctoken",
)
"""Baileys' types of keys (`SignalDataTypeMap`, 7.0.0-rc14), the longest first: `sender-key` is also
the beginning of `sender-key-memory`, and the longer one is meant."""

_TYPE_AND_ID: Final = re.compile(f"({'|'.join(KEY_TYPES)})-(.+)", re.DOTALL)


def key_name(key_type: str, key_id: str) -> KeyName:
    """Name the key of `key_type` that Baileys calls `key_id`."""
    return KeyName(f"{key_type}-{key_id.replace('/', '__').replace(':', '-')}")


def split_key_name(name: str) -> tuple[str, str] | None:
    """Split a name into type and (rewritten) id; `None` for `creds` and names that are no key's."""
    found = _TYPE_AND_ID.fullmatch(name)
    return (found[1], found[2]) if found else None


def contact_of(key_type: str, key_id: str) -> str:
    """Name whom a key is about, so that what one message changes can be kept together.

    A sender key belongs to its sender, not to its group: one big group would otherwise fill one
    place. The memory of a group's sender keys belongs to the group. The forms of the ids are those
    of Baileys' `Signal/libsignal.js` and `lid-mapping.js`.
    """
    if key_type in ("session", "identity-key"):  # "<user>[_<domain>].<device>"
        return key_id.partition(".")[0].partition("_")[0]
    if key_type == "sender-key":  # "<group>--<user>[_<domain>]--<device>"
        fields = key_id.rsplit("--", 2)
        return fields[1].partition("_")[0] if len(fields) == 3 else key_id
    if key_type == "lid-mapping":  # "<phone user>" or "<lid user>_reverse"
        return key_id.removesuffix("_reverse")
    if key_type == "tctoken":  # "<user>@<server>"
        return key_id.partition("@")[0]
    return key_id
