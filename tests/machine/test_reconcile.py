from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from machine.doubt import Source
from machine.legacy import new_account
from machine.records import (
    MAIN_PART,
    AccountCopy,
    AccountId,
    AccountStatus,
    Listing,
    Stamp,
    Version,
)
from machine.restore import Choice, fault_of, reconcile, reconcile_all
from tests.fakes.codec import BROKEN, FakeCodec

ANN = AccountId("ann")


def copy(
    epoch: int,
    revision: int,
    *,
    fault: str | None = None,
    removed: bool = False,
    newer: bool = False,
    stamp: str | None = None,
    mark: bytes = b"",
) -> AccountCopy:
    version = Version(epoch, revision)
    return AccountCopy(
        account=new_account(ANN, "Ann", 0.0),
        version=version,
        parts={MAIN_PART: mark or str(version).encode()},
        complete=stamp is None,
        stamp=Stamp(stamp) if stamp else None,
        fault=fault,
        removed=removed,
        newer=newer,
    )


def shared(epoch: int, revision: int, **given: object) -> AccountCopy:
    return copy(epoch, revision, stamp=f"s{epoch}.{revision}", **given)  # type: ignore[arg-type]


CASES = {
    "only the shared store": (shared(1, 1), None, Source.SHARED, False),
    "only the disk": (None, copy(1, 1), Source.DISK, True),
    "equal": (shared(2, 5), copy(2, 5), Source.EQUAL, False),
    "disk newer": (shared(2, 5), copy(2, 6), Source.DISK, True),
    "shared newer": (shared(2, 6), copy(2, 5), Source.SHARED, False),
    "disk of an older epoch, many revisions ahead": (
        shared(3, 1),
        copy(2, 900),
        Source.SHARED,
        False,
    ),
    "shared of an older epoch": (shared(2, 900), copy(3, 1), Source.DISK, True),
    "disk unreadable": (shared(2, 5), copy(2, 5, fault="torn"), Source.SHARED, False),
    "disk unreadable and older": (shared(2, 5), copy(2, 4, fault="torn"), Source.SHARED, False),
    "disk unreadable and newer": (shared(2, 5), copy(2, 6, fault="torn"), Source.NEITHER, False),
    "shared unreadable, disk equal": (shared(2, 5, fault="x"), copy(2, 5), Source.EQUAL, True),
    "shared unreadable, disk newer": (shared(2, 5, fault="x"), copy(2, 6), Source.DISK, True),
    "shared unreadable, disk older": (shared(2, 5, fault="x"), copy(2, 4), Source.NEITHER, False),
    "shared of a newer release, its version unknown": (
        shared(0, 0, fault="format 2", newer=True),
        copy(2, 6),
        Source.NEITHER,
        False,
    ),
    "shared of a newer release, disk equal": (
        shared(2, 6, fault="format 2", newer=True),
        copy(2, 6),
        Source.NEITHER,
        False,
    ),
    "both unreadable": (
        shared(2, 5, fault="x"),
        copy(2, 5, fault="torn"),
        Source.NEITHER,
        False,
    ),
    "only the disk, unreadable": (None, copy(1, 1, fault="torn"), Source.NEITHER, False),
    "only shared, unreadable": (shared(1, 1, fault="x"), None, Source.NEITHER, False),
}


@pytest.mark.parametrize("name", CASES)
def test_the_newest_readable_copy_wins_by_number(name: str) -> None:
    in_shared, on_disk, source, push = CASES[name]
    choice = reconcile(in_shared, on_disk)
    assert (choice.source, choice.push) == (source, push)
    assert (choice.fault is not None) == (source is Source.NEITHER)


def test_equal_copies_use_the_bytes_that_are_here_and_the_stamp_of_the_store() -> None:
    choice = reconcile(shared(2, 5, mark=b"remote"), copy(2, 5, mark=b"local"))
    assert choice.copy.parts == {MAIN_PART: b"local"}
    assert choice.copy.complete
    assert choice.copy.stamp == "s2.5"


def test_a_newer_disk_copy_expects_the_stamp_of_the_store() -> None:
    assert reconcile(shared(2, 5), copy(2, 6)).copy.stamp == "s2.5"


@pytest.mark.parametrize(
    ("in_shared", "on_disk", "gone"),
    [
        (shared(3, 2, removed=True), copy(3, 1), True),
        (shared(3, 2, removed=True), copy(3, 2), True),
        (shared(3, 2, removed=True), None, True),
        (shared(3, 1, removed=True), copy(3, 2), False),
    ],
)
def test_a_removed_account_stays_removed_unless_the_disk_is_newer(
    in_shared: AccountCopy, on_disk: AccountCopy | None, gone: bool
) -> None:
    assert reconcile(in_shared, on_disk).removed is gone


def test_without_the_shared_listing_nothing_is_pushed() -> None:
    for listing in (None, Listing((), complete=False)):
        (choice,) = reconcile_all(listing, Listing((copy(4, 4),)))
        assert (choice.source, choice.push) == (Source.DISK, False)


versions = st.builds(Version, st.integers(0, 3), st.integers(0, 3))
copies = st.builds(
    lambda version, fault: replace(copy(version.epoch, version.revision), fault=fault),
    versions,
    st.sampled_from([None, None, "unreadable"]),
)
shared_copies = st.builds(lambda c: replace(c, stamp=Stamp("s"), complete=False), copies)


def _check(choice: Choice, given_copies: list[AccountCopy]) -> None:
    newest = max(given_copies, key=lambda c: c.version)
    readable_newest = any(c.fault is None and c.version == newest.version for c in given_copies)
    # Nothing older ever wins, and the newest readable copy is never given up.
    if choice.source is Source.NEITHER:
        assert not readable_newest
        assert choice.fault is not None
    else:
        assert choice.copy.version == newest.version
        assert choice.copy.fault is None
        assert readable_newest


@given(st.one_of(st.none(), shared_copies), st.one_of(st.none(), copies))
def test_nothing_is_lost_and_nothing_older_wins(
    in_shared: AccountCopy | None, on_disk: AccountCopy | None
) -> None:
    present = [c for c in (in_shared, on_disk) if c is not None]
    if present:
        _check(reconcile(in_shared, on_disk), present)


@given(
    st.dictionaries(st.sampled_from("abcdef"), shared_copies),
    st.dictionaries(st.sampled_from("abcdef"), copies),
)
def test_every_account_of_either_listing_gets_exactly_one_choice(
    in_shared: dict[str, AccountCopy], on_disk: dict[str, AccountCopy]
) -> None:
    def listing(found: dict[str, AccountCopy]) -> Listing:
        return Listing(
            tuple(
                replace(c, account=replace(c.account, account_id=AccountId(name)))
                for name, c in found.items()
            )
        )

    choices = reconcile_all(listing(in_shared), listing(on_disk))
    assert sorted(c.account_id for c in choices) == sorted({*in_shared, *on_disk})


def test_an_account_that_was_connected_is_not_opened_without_credentials() -> None:
    """It would be paired anew, over keys that may still be somewhere."""
    codec = FakeCodec()
    bare = replace(copy(1, 1), parts={})
    connected = replace(bare, account=replace(bare.account, status=AccountStatus.CONNECTED))
    assert fault_of(bare, codec) is None
    assert "no credentials" in str(fault_of(connected, codec))
    assert fault_of(replace(connected, fault="torn"), codec) == "torn"
    assert fault_of(replace(connected, parts={MAIN_PART: BROKEN}), codec) is not None
