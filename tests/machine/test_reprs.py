"""A record that an error quotes, or a log line, shows no secret."""

from __future__ import annotations

import pytest

from machine.ports import LegacyAccount, QrShown, ServerAck
from machine.records import (
    MAIN_PART,
    AccountCommit,
    AccountCopy,
    AccountId,
    Grant,
    KeyChange,
    KeyName,
    Listing,
    Message,
    MessageId,
    MessageState,
    Stamp,
    Version,
)
from machine.views import PairingCode, QrCode
from tests.contracts.samples import an_account

SECRET = "sEcReT"
BYTES = SECRET.encode()
KEYS = KeyChange({KeyName("creds"): BYTES})
COPY = AccountCopy(an_account(), Version(1, 1), {MAIN_PART: BYTES}, complete=True)
MESSAGE = Message(
    MessageId("m"), AccountId("a"), "4915112345678", SECRET, MessageState.QUEUED, 1, 0.0, 0.0
)


@pytest.mark.parametrize(
    "record",
    [
        KEYS,
        ServerAck(KEYS),
        COPY,
        Listing((COPY,)),
        MESSAGE,
        AccountCommit(
            Grant(1, "a", "a-1", Stamp("1")),
            "c",
            an_account(),
            Version(1, 1),
            Stamp("1"),
            {MAIN_PART: BYTES},
            (MESSAGE,),
        ),
        LegacyAccount(AccountId("a"), "A", None, {KeyName("creds"): BYTES}),
        QrShown(SECRET, 0.0),
        QrCode(SECRET, 0.0),
        PairingCode(SECRET, 0.0),
    ],
    ids=lambda record: type(record).__name__,
)
def test_no_key_no_text_and_no_code_is_in_a_repr(record: object) -> None:
    assert SECRET not in repr(record)
