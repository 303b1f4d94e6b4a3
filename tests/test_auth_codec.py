"""The auth codec: a dictionary on the outside, sealed parts inside, and never a wrong value."""

from __future__ import annotations

import base64
import json
import traceback
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.auth_codec import (
    PART_BYTES_MAX,
    BadEncryptionKey,
    EncryptionKey,
    Keyring,
    PackedAuthCodec,
    make_key,
    parse_key,
    version_of,
)
from daemon.key_names import KEY_TYPES, contact_of, key_name, split_key_name
from machine.ports import AuthCodec, AuthTooLarge, AuthUnreadable
from machine.records import MAIN_PART, AccountId, KeyChange, KeyName, PartName, Version

ANNA = AccountId("anna")
BERT = AccountId("bert")
OLD_KEY = EncryptionKey(bytes(range(32)))
KEY = EncryptionKey(bytes(range(32, 64)))
Parts = dict[PartName, bytes]

ENCRYPTED = PackedAuthCodec(Keyring(KEY))
PLAIN = PackedAuthCodec(None)
BOTH = pytest.mark.parametrize("codec", [ENCRYPTED, PLAIN], ids=["encrypted", "plain"])


def name(text: str) -> KeyName:
    return KeyName(text)


def part(text: str) -> PartName:
    return PartName(text)


def merge(parts: Mapping[PartName, bytes], changed: Mapping[PartName, bytes | None]) -> Parts:
    """What a store does with the answer of `change`."""
    merged = {**parts, **changed}
    return {part: encoded for part, encoded in merged.items() if encoded is not None}


def write(
    codec: AuthCodec,
    values: Mapping[KeyName, bytes | None],
    parts: Parts | None = None,
    *,
    account_id: AccountId = ANNA,
    version: Version | None = None,
) -> Parts:
    parts = parts or {}
    version = version or Version(1, 1)
    return merge(parts, codec.change(account_id, parts, KeyChange(values), version))


STATE: dict[KeyName, bytes] = {
    name("creds"): b'{"noiseKey":1}',
    name("pre-key-1"): b"one",
    name("pre-key-127"): b"two",
    name("pre-key-128"): b"three",
    name("session-491500.0"): b"s",
    name("session-123_1.4"): b"lid",
    name("identity-key-491500.0"): b"i",
    name("device-list-491500"): b"d",
    name("lid-mapping-491500"): b"l",
    name("lid-mapping-123_reverse"): b"r",
    name("tctoken-123@lid"): b"t",
    name("sender-key-99@g.us--491500--0"): b"k",
    name("sender-key-memory-99@g.us"): b"m",
    name("app-state-sync-key-AAAA__w=="): b"a",
    name("app-state-sync-version-regular"): b"v",
    name("something else"): b"?",
}


# --- a dictionary ----------------------------------------------------------------------------


@BOTH
def test_state_comes_back_as_it_was_written(codec: PackedAuthCodec) -> None:
    parts = write(codec, STATE)
    assert codec.unpack(ANNA, parts) == STATE
    assert codec.check(ANNA, parts) is None
    assert codec.check(ANNA, {MAIN_PART: parts[MAIN_PART]}) is None


def test_keys_of_one_contact_share_a_part() -> None:
    about_one_contact = [
        "session-491500.0",
        "session-491500.7",
        "identity-key-491500.0",
        "device-list-491500",
        "lid-mapping-491500",
        "sender-key-99@g.us--491500--0",
    ]
    parts = write(ENCRYPTED, {name(each): b"x" for each in about_one_contact})
    assert len(parts) == 2
    assert {contact_of(*(split_key_name(each) or ("", ""))) for each in about_one_contact} == {
        "491500"
    }


def test_keys_of_many_contacts_spread_over_sixteen_parts() -> None:
    parts = write(ENCRYPTED, {name(f"session-49{n}.0"): b"x" for n in range(400)})
    assert set(parts) == {MAIN_PART, *(part(f"contacts-{digit:x}") for digit in range(16))}


def test_parts_are_named_as_documented() -> None:
    values = {key: value for key, value in STATE.items() if not key.startswith("pre-key")}
    parts = write(ENCRYPTED, {**values, name("pre-key-1"): b"1", name("pre-key-300"): b"2"})
    named = {each for each in parts if not each.startswith("contacts-")}
    assert named == {"main", "pre-keys-0", "pre-keys-2", "app-state", "app-state-regular"}


def test_where_a_key_belongs_never_moves() -> None:
    # Golden: states written by earlier versions are found by these.
    golden = {
        "session-491500.0": "contacts-2",
        "session-123_1.4": "contacts-2",
        "sender-key-memory-99@g.us": "contacts-1",
        "something else": "contacts-7",
    }
    found = {
        each: next(iter(set(write(ENCRYPTED, {name(each): b"x"})) - {MAIN_PART})) for each in golden
    }
    assert found == golden


@BOTH
def test_change_rewrites_only_the_parts_it_touches(codec: PackedAuthCodec) -> None:
    parts = write(codec, STATE)
    change = KeyChange({name("session-491500.0"): b"new", name("creds"): b"{}"})
    changed = codec.change(ANNA, parts, change, Version(1, 2))
    assert len(changed) == 2
    assert MAIN_PART in changed
    needed = {each: parts[each] for each in changed}
    again = codec.change(ANNA, needed, change, Version(1, 2))
    assert set(again) == set(changed), "the other parts need not be given"


def test_value_that_stays_the_same_rewrites_main_only() -> None:
    parts = write(ENCRYPTED, STATE)
    change = KeyChange({name("pre-key-1"): b"one", name("session-0.0"): None})
    assert set(ENCRYPTED.change(ANNA, parts, change, Version(1, 2))) == {MAIN_PART}


def test_part_without_keys_is_deleted() -> None:
    parts = write(ENCRYPTED, STATE)
    changed = ENCRYPTED.change(ANNA, parts, KeyChange({name("pre-key-128"): None}), Version(1, 2))
    assert changed[part("pre-keys-1")] is None
    assert name("pre-key-128") not in ENCRYPTED.unpack(ANNA, merge(parts, changed))


def test_version_is_readable_without_a_key_and_never_falls() -> None:
    parts = write(ENCRYPTED, STATE, version=Version(3, 7))
    assert version_of(parts) == Version(3, 7)
    with pytest.raises(ValueError, match=r"2\.9 cannot follow 3\.7"):
        ENCRYPTED.change(ANNA, parts, KeyChange({}), Version(2, 9))


# --- limits ----------------------------------------------------------------------------------


def test_part_over_the_limit_is_refused() -> None:
    with pytest.raises(AuthTooLarge, match="main"):
        write(ENCRYPTED, {name("creds"): bytes(PART_BYTES_MAX)})
    with pytest.raises(AuthTooLarge, match="contacts-"):
        write(ENCRYPTED, {name("session-1.0"): bytes(PART_BYTES_MAX)})
    with pytest.raises(AuthTooLarge, match="pre-keys-0"):
        write(ENCRYPTED, {name(f"pre-key-{n}"): bytes(10_000) for n in range(100)})
    with pytest.raises(AuthTooLarge, match="characters"):
        write(ENCRYPTED, {name("x" * 2_000): b""})


@BOTH
def test_contacts_outgrowing_a_part_are_split_and_stay_readable(codec: PackedAuthCodec) -> None:
    values = {name(f"session-49{n}.0"): bytes([n % 256]) * 100_000 for n in range(200)}
    parts: Parts = {}
    for revision, start in enumerate(range(0, 200, 40)):
        some = dict(list(values.items())[start : start + 40])
        parts = write(codec, some, parts, version=Version(1, revision))
    assert any(len(each) > len("contacts-x") for each in parts)
    assert all(len(encoded) <= PART_BYTES_MAX for encoded in parts.values())
    assert codec.unpack(ANNA, parts) == values
    assert codec.check(ANNA, parts) is None
    change = KeyChange({name("session-490.0"): b"new"})
    changed = codec.change(ANNA, parts, change, Version(2, 0))
    assert len(changed) == 2
    assert codec.unpack(ANNA, merge(parts, changed)) == {**values, **change.values}


# --- what is not readable --------------------------------------------------------------------


def refusal(codec: AuthCodec, account_id: AccountId, parts: Parts) -> str:
    with pytest.raises(AuthUnreadable) as caught:
        codec.unpack(account_id, parts)
    return str(caught.value)


@BOTH
def test_each_way_to_be_unreadable_is_named(codec: PackedAuthCodec) -> None:
    parts = write(codec, STATE)
    pre = part("pre-keys-0")
    main = parts[MAIN_PART]
    newer_format = main[:4] + b"\x02" + main[5:]
    assert "main is missing" in refusal(codec, ANNA, {})
    assert "main is empty" in refusal(codec, ANNA, {**parts, MAIN_PART: b""})
    assert "cut short" in refusal(codec, ANNA, {**parts, MAIN_PART: main[:30]})
    assert "not written by" in refusal(codec, ANNA, {**parts, MAIN_PART: b"{}" * 50})
    assert "run the version" in refusal(codec, ANNA, {**parts, MAIN_PART: newer_format})
    assert "another account" in refusal(codec, BERT, parts)
    assert "pre-keys-0 was altered" in refusal(codec, ANNA, {**parts, pre: parts[pre][:-1]})
    without = {each: encoded for each, encoded in parts.items() if each != pre}
    assert "pre-keys-0 is missing" in refusal(codec, ANNA, without)
    assert "newer than the main part" in refusal(codec, ANNA, {**parts, part("pre-keys-9"): main})


@BOTH
def test_torn_copy_is_noticed_in_either_direction(codec: PackedAuthCodec) -> None:
    older = write(codec, STATE)
    newer = write(codec, {name("pre-key-1"): b"new"}, older, version=Version(1, 2))
    pre = part("pre-keys-0")
    for torn, word in (
        ({**newer, pre: older[pre]}, "older"),
        ({**older, pre: newer[pre]}, "newer"),
    ):
        assert word in refusal(codec, ANNA, torn)
        assert word in (codec.check(ANNA, torn) or "")


@BOTH
def test_two_parts_written_at_one_version_are_told_apart(codec: PackedAuthCodec) -> None:
    one = write(codec, STATE)
    other = write(codec, {**STATE, name("pre-key-1"): b"other"})
    pre = part("pre-keys-0")
    torn = {**one, pre: other[pre]}
    assert "not the one" in refusal(codec, ANNA, torn)
    assert "not the one" in (codec.check(ANNA, torn) or "")


def test_wrong_key_names_the_key_that_is_needed_and_keeps_secrets() -> None:
    parts = write(ENCRYPTED, STATE)
    for stranger in (PackedAuthCodec(Keyring(OLD_KEY)), PLAIN):
        message = refusal(stranger, ANNA, parts)
        assert KEY.key_id in message
        assert stranger.check(ANNA, parts) == message


def test_encrypted_parts_hold_no_plain_byte_of_a_value() -> None:
    parts = write(ENCRYPTED, {name("creds"): b"SECRET" * 9, name("pre-key-1"): b"SECRET" * 9})
    assert not any(b"SECRET" in encoded or b"creds" in encoded for encoded in parts.values())


def test_message_of_unreadable_holds_none_of_the_bytes() -> None:
    parts = {MAIN_PART: b"SECRET" * 50}
    with pytest.raises(AuthUnreadable) as caught:
        ENCRYPTED.unpack(ANNA, parts)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))


# --- properties ------------------------------------------------------------------------------

key_names = st.one_of(
    st.just(name("creds")),
    st.builds(
        lambda key_type, key_id: key_name(key_type, key_id),
        st.sampled_from(KEY_TYPES),
        st.one_of(
            st.integers(0, 400).map(str),
            st.sampled_from(["4915.0", "4915.1", "77_1.0", "9@g.us::4915::0", "A/B=", "x@lid"]),
            st.text(max_size=5),
        ),
    ),
    st.text(max_size=8).map(KeyName),
)
changes = st.dictionaries(key_names, st.one_of(st.none(), st.binary(max_size=40)), max_size=12)
codecs = st.sampled_from([ENCRYPTED, PLAIN])

# A busy machine is not a wrong result: examples have no deadline.
FEW = settings(max_examples=60, deadline=None)
MANY = settings(max_examples=300, deadline=None)


@FEW
@given(codecs, st.lists(changes, max_size=6))
def test_changes_mean_what_they_mean_for_a_dictionary(
    codec: PackedAuthCodec, history: list[dict[KeyName, bytes | None]]
) -> None:
    truth: dict[KeyName, bytes] = {}
    parts = write(codec, {})
    for revision, values in enumerate(history, start=2):
        before = parts
        version = Version(1, revision)
        changed = codec.change(ANNA, parts, KeyChange(values), version)
        parts = merge(parts, changed)
        for key, value in values.items():
            if value is None:
                truth.pop(key, None)
            else:
                truth[key] = value
        assert codec.unpack(ANNA, parts) == truth
        assert codec.check(ANNA, parts) is None
        assert version_of(parts) == version
        assert all(parts[each] == before[each] for each in before if each not in changed)


def accounts(codec: PackedAuthCodec) -> tuple[Parts, Parts, Parts]:
    """Anna's state before and after a change of everything, and Bert's."""
    before = write(codec, STATE)
    after = write(
        codec, {each: value + b"+" for each, value in STATE.items()}, before, version=Version(1, 2)
    )
    return before, after, write(codec, STATE, account_id=BERT, version=Version(1, 2))


FIXED = {codec: accounts(codec) for codec in (ENCRYPTED, PLAIN)}


def assert_unreadable(codec: PackedAuthCodec, parts: Parts) -> None:
    with pytest.raises(AuthUnreadable):
        codec.unpack(ANNA, parts)
    assert codec.check(ANNA, parts) is not None
    with pytest.raises(AuthUnreadable):
        codec.rotate(ANNA, parts, Version(9, 9))


@MANY
@given(codecs, st.data())
def test_any_flipped_bit_makes_it_unreadable(codec: PackedAuthCodec, data: st.DataObject) -> None:
    _, parts, _ = FIXED[codec]
    hit = data.draw(st.sampled_from(sorted(parts)))
    broken = bytearray(parts[hit])
    broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert_unreadable(codec, {**parts, hit: bytes(broken)})


@MANY
@given(codecs, st.data())
def test_any_truncation_or_growth_makes_it_unreadable(
    codec: PackedAuthCodec, data: st.DataObject
) -> None:
    _, parts, _ = FIXED[codec]
    hit = data.draw(st.sampled_from(sorted(parts)))
    cut = parts[hit][: data.draw(st.integers(0, len(parts[hit]) - 1))]
    grown = parts[hit] + data.draw(st.binary(min_size=1, max_size=9))
    assert_unreadable(codec, {**parts, hit: cut})
    assert_unreadable(codec, {**parts, hit: grown})


@MANY
@given(codecs, st.data())
def test_any_part_from_elsewhere_makes_it_unreadable(
    codec: PackedAuthCodec, data: st.DataObject
) -> None:
    older, parts, others = FIXED[codec]
    hit = data.draw(st.sampled_from(sorted(parts)))
    wrong = data.draw(st.sampled_from(sorted(set(parts) - {hit})))
    for stranger in (others[hit], older[hit], parts[wrong]):
        assert_unreadable(codec, {**parts, hit: stranger})


@MANY
@given(codecs, st.binary(max_size=120))
def test_any_bytes_are_readable_or_refused_and_nothing_else(
    codec: PackedAuthCodec, noise: bytes
) -> None:
    for parts in ({MAIN_PART: noise}, {MAIN_PART: b"WKAP\x01" + noise}):
        assert_unreadable(codec, parts)


# Written once, by the first version of the format: these must stay readable for ever.
GOLDEN: dict[str, dict[str, str]] = {
    "encrypted": {
        "contacts-2": (
            "V0tBUAEBVjk7PnmjAS4AAAAAAAAAAwAAAAAAAAAHK0Nj3reXRydDVYfWY6nrqGAv97sPQ+fvEB4WR/J9"
            "HrfjB6wugjf72NmT9tS/UJiTwUTs"
        ),
        "main": (
            "V0tBUAEBVjk7PnmjAS4AAAAAAAAAAwAAAAAAAAAHqzs0utdcflN/rh6Mw57UdwDLfrmaUMiDzWTlR4LK"
            "5yZDX7hut5/wfgC8xhe7xKrEG1YCUEszcp2npKOiiRKQpzpUfFqPcea6qVgxpoEuOUB1HpwU/4Yb2u/Q"
            "XWXY9w3KNOsu6qxv8bwJVAKJ5ErJ"
        ),
        "pre-keys-0": (
            "V0tBUAEBVjk7PnmjAS4AAAAAAAAAAwAAAAAAAAAHjAaJZAq5rAIWKOI9r8l5loA8YX+PADrtjYoF0l07"
            "Yf6KEfG2jur9LVZ8Snk="
        ),
    },
    "plain": {
        "contacts-2": (
            "V0tBUAEAAAAAAAAAAAAAAAAAAAAAAwAAAAAAAAAH94ueMxIRyM+2+gEZgbBzZXNzaW9uLTQ5MTUwMC4w"
            "xAN0d29K2c8J8pcymft8+pAJJB6q"
        ),
        "main": (
            "V0tBUAEAAAAAAAAAAAAAAAAAAAAAAwAAAAAAAAAHR4Qvf/g/X9TlUishk4GlY3JlZHPEB3siYSI6MX2C"
            "qnByZS1rZXlzLTCTAwfEEJMURzO1geU5tfEf+2xcQtCqY29udGFjdHMtMpMDB8QQStnPCfKXMpn7fPqQ"
            "CSQeqpDkpkDB2BTvNDUtb/pWdJeV"
        ),
        "pre-keys-0": (
            "V0tBUAEAAAAAAAAAAAAAAAAAAAAAAwAAAAAAAAAHweB5suOBzmtlB0nzgalwcmUta2V5LTHEA29uZZMU"
            "RzO1geU5tfEf+2xcQtA="
        ),
    },
}


@pytest.mark.parametrize("written", ["encrypted", "plain"])
def test_what_the_first_version_wrote_stays_readable(written: str) -> None:
    parts = {part(each): base64.b64decode(text) for each, text in GOLDEN[written].items()}
    assert ENCRYPTED.unpack(ANNA, parts) == {
        name("creds"): b'{"a":1}',
        name("pre-key-1"): b"one",
        name("session-491500.0"): b"two",
    }
    assert version_of(parts) == Version(3, 7)


@BOTH
def test_authentic_part_that_means_nothing_is_unreadable(codec: PackedAuthCodec) -> None:
    # `_seal`: no public way leads to such a part; a later version of this program might.
    parts = write(codec, STATE)
    for body in (b"", b"\xc1", b"\x93\x80", msgspec.msgpack.encode({"main": b""}), b"\xd9\x01\xff"):
        main = codec._seal(ANNA, MAIN_PART, body, Version(1, 1))
        assert_unreadable(codec, {**parts, MAIN_PART: main})


@BOTH
def test_part_is_bound_to_its_name(codec: PackedAuthCodec) -> None:
    body = msgspec.msgpack.encode([{"creds": b"other"}, {}, []])
    parts = {MAIN_PART: codec._seal(ANNA, part("pre-keys-0"), body, Version(1, 1))}
    assert_unreadable(codec, parts)
    parts = {MAIN_PART: codec._seal(ANNA, MAIN_PART, body, Version(1, 1))}
    assert codec.unpack(ANNA, parts) == {name("creds"): b"other"}


# --- keys and rotation -----------------------------------------------------------------------


def test_rotation_rewrites_everything_under_the_active_key() -> None:
    parts = write(PackedAuthCodec(Keyring(OLD_KEY)), STATE)
    codec = PackedAuthCodec(Keyring(KEY, [OLD_KEY]))
    assert codec.needs_rotation(parts)
    rotated = codec.rotate(ANNA, parts, Version(1, 2))
    assert set(rotated) == set(parts)
    assert ENCRYPTED.unpack(ANNA, rotated) == STATE
    assert not codec.needs_rotation(rotated)
    assert codec.rotate(ANNA, rotated, Version(1, 3)) == {}


def test_change_under_a_new_key_leaves_the_rest_readable_and_to_be_rotated() -> None:
    codec = PackedAuthCodec(Keyring(KEY, [OLD_KEY]))
    parts = write(PackedAuthCodec(Keyring(OLD_KEY)), STATE)
    parts = write(codec, {name("creds"): b"new"}, parts, version=Version(1, 2))
    assert codec.unpack(ANNA, parts) == {**STATE, name("creds"): b"new"}
    assert codec.needs_rotation(parts)


def test_plain_state_is_read_with_a_key_and_encrypted_by_rotation() -> None:
    parts = write(PLAIN, STATE)
    assert ENCRYPTED.unpack(ANNA, parts) == STATE
    assert ENCRYPTED.needs_rotation(parts)
    rotated = ENCRYPTED.rotate(ANNA, parts, Version(1, 2))
    assert ENCRYPTED.unpack(ANNA, rotated) == STATE
    assert KEY.key_id in refusal(PLAIN, ANNA, rotated)


def test_nothing_needs_rotation_without_a_keyring() -> None:
    parts = write(PLAIN, STATE)
    assert not PLAIN.needs_rotation(parts)
    assert PLAIN.rotate(ANNA, parts, Version(1, 2)) == {}


def test_made_key_is_read_back() -> None:
    text = make_key()
    key = parse_key(f"  {text}\n")
    assert len(key.secret) == 32
    assert key == parse_key(text)
    assert make_key() != text


@pytest.mark.parametrize(
    "text", ["", "c2hvcnQ=", "not base64!!", "schlüssel", make_key()[:-1], make_key() + "AAAA"]
)
def test_bad_key_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(BadEncryptionKey) as caught:
        parse_key(text)
    shown = "".join(traceback.format_exception(caught.value, chain=True))
    assert not text or text not in shown.replace("parse_key(text)", "")


def test_secret_is_in_no_repr() -> None:
    ring = Keyring(KEY, [OLD_KEY])
    for shown in (repr(KEY), str(KEY), repr(ring), f"{ring}"):
        assert repr(KEY.secret)[2:20] not in shown
        assert KEY.key_id in shown


# --- names -----------------------------------------------------------------------------------


@FEW
@given(st.sampled_from(KEY_TYPES), st.text(min_size=1, max_size=20))
def test_name_of_a_key_gives_its_type_back(key_type: str, key_id: str) -> None:
    found = split_key_name(key_name(key_type, key_id))
    # Only "sender-key" with an id that begins with "memory-" reads as another type, and Baileys
    # itself would write both into one file.
    if not (key_type == "sender-key" and key_id.startswith("memory-")):
        assert found is not None
        assert found[0] == key_type


def test_state_as_large_as_after_a_pairing_is_a_few_parts() -> None:
    values = {name("creds"): json.dumps({"x": "y" * 1_900}).encode()}
    values |= {name(f"pre-key-{n}"): b"x" * 165 for n in range(1, 813)}
    parts = write(ENCRYPTED, values)
    assert set(parts) == {MAIN_PART, *(part(f"pre-keys-{n}") for n in range(7))}
