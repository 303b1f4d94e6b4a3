"""Names, values and stamps: what goes in comes out. Pure, no emulator."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.firestore.client import FirestoreClient
from daemon.firestore.credentials import EmulatorAccess
from daemon.firestore.documents import (
    DocumentName,
    FieldValue,
    MalformedDocument,
    Moment,
    check_group,
    decode,
    document_id,
    encode,
    set_stamp,
    stamp_from,
    text_of,
    update_write,
    verify_write,
)
from daemon.firestore.layout import REMOVED, Layout, account_write, read_account, read_message
from daemon.firestore.protos import Document, Value, Write
from machine.ports import AuthTooLarge
from machine.records import MAIN_PART, Account, AccountId, AccountStatus, PartName, Stamp, Version

NAME = DocumentName("projects/p/databases/(default)/documents/c/d")
INT64 = st.integers(min_value=-(2**63), max_value=2**63 - 1)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = st.none() | st.booleans() | INT64 | TEXTS | st.binary() | st.floats(allow_nan=False)


@given(TEXTS.filter(bool))
def test_every_text_makes_a_lawful_id_and_comes_back(text: str) -> None:
    made = document_id(text)
    assert "/" not in made
    assert made not in {".", ".."}
    assert re.fullmatch(r"__.*__", made, re.DOTALL) is None
    assert REMOVED not in made
    assert text_of(f"a/b/{made}") == text


def test_an_empty_id_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        document_id("")


@pytest.mark.parametrize("group", ["", "a/b", ".x", "a b", "x" * 101, "a\n"])
def test_a_group_that_cannot_be_in_a_name_is_refused(group: str) -> None:
    with pytest.raises(ValueError, match="group"):
        check_group(group)


@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)))
def test_values_come_back_as_they_went(value: FieldValue) -> None:
    target = Value()
    encode(target, value)
    assert decode(Value.FromString(target.SerializeToString())) == value


@given(st.integers(min_value=-(10**15), max_value=4 * 10**15))
def test_moments_are_exact_to_the_microsecond(micros: int) -> None:
    target = Value()
    encode(target, Moment(micros / 1_000_000))
    assert target.timestamp_value.nanos % 1000 == 0
    assert 0 <= target.timestamp_value.nanos < 10**9
    assert decode(target) == micros / 1_000_000


def test_a_stamp_is_the_update_time_to_the_nanosecond() -> None:
    source = Document()
    source.update_time.seconds, source.update_time.nanos = 1_700_000_000, 1_000
    stamp = stamp_from(source.update_time)
    target = Document()
    set_stamp(target.update_time, stamp)
    assert target.update_time == source.update_time


@pytest.mark.parametrize("foreign", ["", "1", "7.5", "x.000000001", "-1.000000000"])
def test_a_foreign_stamp_matches_no_document(foreign: str) -> None:
    target = Document()
    set_stamp(target.update_time, Stamp(foreign))
    assert (target.update_time.seconds, target.update_time.nanos) == (0, 1000)


def test_a_write_masks_exactly_its_fields_and_a_verify_write_none() -> None:
    write = update_write(NAME, {"a": 1, "b": None}, exists=False)
    assert list(write.update_mask.field_paths) == ["a", "b"]
    assert write.current_document.exists is False
    verify = Write.FromString(verify_write(NAME, Stamp("5.000000000")).SerializeToString())
    assert verify.HasField("update_mask")
    assert not verify.update_mask.field_paths
    assert verify.current_document.update_time.seconds == 5


ACCOUNT = Account(AccountId("a"), "n", AccountStatus.CONNECTED, 1.0, 2.0, 3.0)


def a_document() -> object:
    write = account_write(NAME, ACCOUNT, Version(2, 3), "c", {MAIN_PART: b"m"})
    document: object = Document.FromString(write.update.SerializeToString())
    return document


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("status", "asleep", "status"),
        ("status", 7, "status"),
        ("name", None, "name"),
        ("epoch", "2", "epoch"),
        ("revision", True, "revision"),
        ("createdAt", 5, "createdAt"),
        ("packed", "text", "packed"),
        ("parts", [1], "parts"),
        ("phone", 49, "phone"),
        ("format", 2, "newer"),
        ("format", None, "format"),
        ("commitId", b"c", "commitId"),
    ],
)
def test_a_document_of_the_wrong_shape_is_a_fault_and_no_error(
    field: str, value: FieldValue, fault: str
) -> None:
    document: Document = a_document()
    good = read_account(document)
    assert (good.fault, good.account.status) == (None, AccountStatus.CONNECTED)
    encode(document.fields[field], value)
    copy = read_account(document)
    assert copy.fault is not None
    assert fault in copy.fault
    assert copy.account.status is AccountStatus.QUARANTINED
    assert copy.newer is (value == 2)
    if field not in {"packed", "epoch", "revision"}:
        assert (copy.version, copy.parts) == (Version(2, 3), {MAIN_PART: b"m"})


@given(st.dictionaries(TEXTS, PLAIN))
def test_no_document_whatever_makes_reading_raise(values: dict[str, FieldValue]) -> None:
    document = Document(name=str(NAME))
    for key, value in values.items():
        encode(document.fields[key], value)
    assert read_account(document).fault
    with pytest.raises(MalformedDocument):
        read_message(document)


def test_a_part_that_no_document_holds_is_refused_before_it_is_sent() -> None:
    with pytest.raises(AuthTooLarge, match="1000001"):
        account_write(NAME, ACCOUNT, Version(1, 1), "c", {MAIN_PART: bytes(1_000_001)})


def test_an_accounts_document_and_its_mark_have_names_of_their_own() -> None:
    client = FirestoreClient("p", "(default)", "127.0.0.1:1", EmulatorAccess())
    layout = Layout(client, "g")
    assert layout.mark(AccountId("a")) == layout.account(AccountId("a")) + REMOVED
    assert layout.account(AccountId("a~removed")) != layout.mark(AccountId("a"))
    assert layout.part(NAME, PartName("x/y")) == f"{NAME}/parts/x%2Fy"
