"""Importing directories that the real Baileys has written, whole and broken in every way."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.auth_codec import Keyring, PackedAuthCodec, make_key, parse_key
from daemon.baileys_import import (
    LIMITS,
    PROBLEMS_MAX,
    BaileysImport,
    BaileysUnreadable,
    ImportLimits,
    LegacyDirectories,
    QuarantinedDir,
    account_id_of,
    read_baileys_dir,
    scan_legacy_dir,
)
from machine.ports import LegacyAccount, LegacyFault, LegacySource, StoreMisconfigured
from machine.records import AccountId, KeyChange, KeyName, Version
from tests.baileys.directories import differences, fingerprints

pytestmark = pytest.mark.node

# Each example puts the directory back as it was; a busy machine is not a wrong result.
FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=5,
)

SESSION = "session-30000000_1.0.json"
GROUP_KEY = "sender-key-120363021033254949@g.us--491555000000--7.json"
GROUP_MEMORY = "sender-key-memory-120363021033254949@g.us.json"


def edit_creds(account: Path, edit: Callable[[dict[str, object]], object]) -> None:
    creds = json.loads((account / "creds.json").read_text())
    edit(creds)
    (account / "creds.json").write_text(json.dumps(creds))


def quarantine(account: Path) -> BaileysUnreadable:
    with pytest.raises(BaileysUnreadable) as caught:
        read_baileys_dir(account)
    assert caught.value.advice
    return caught.value


# --- whole directories -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["account-0", "account-1"])
def test_import_is_what_baileys_itself_reads(baileys_dirs: Path, name: str) -> None:
    found = read_baileys_dir(baileys_dirs / name)
    compared, differs = differences(baileys_dirs / name, found.keys)
    assert differs == []
    assert compared == len(found.keys) - 1 == 77
    assert found.problems == ()


def test_comparison_with_baileys_notices_a_difference(baileys_dirs: Path) -> None:
    keys = dict(read_baileys_dir(baileys_dirs / "account-0").keys)
    keys[KeyName("app-state-sync-key-AAAAAB__p")] = b'{"keyData":"AAAA"}'
    del keys[KeyName("pre-key-7")]
    _, differs = differences(baileys_dirs / "account-0", keys)
    assert differs == ["pre-key 7", "app-state-sync-key AAAAAB/p"]


def test_facts_come_from_the_credentials(baileys_dirs: Path) -> None:
    first, second = scan_legacy_dir(baileys_dirs)
    assert isinstance(first, BaileysImport)
    assert isinstance(second, BaileysImport)
    assert (first.account_id, first.phone, first.name) == ("account-0", "491555000000", "Shop 0 ☕")
    assert (first.registered, second.registered) == (False, True)
    assert first.fingerprint != second.fingerprint


def test_account_without_a_name_is_called_by_its_id(account: Path) -> None:
    edit_creds(
        account, lambda creds: creds.update(me={"id": "49151:3@s.whatsapp.net", "name": "~"})
    )
    assert read_baileys_dir(account).name == "account-0"


def test_values_are_the_files_byte_for_byte(baileys_dirs: Path) -> None:
    account = baileys_dirs / "account-0"
    found = read_baileys_dir(account)
    assert found.keys == {
        KeyName(path.name.removesuffix(".json")): path.read_bytes() for path in account.iterdir()
    }


def test_two_imports_are_equal(baileys_dirs: Path) -> None:
    assert scan_legacy_dir(baileys_dirs) == scan_legacy_dir(baileys_dirs)


def test_import_survives_the_codec(baileys_dirs: Path) -> None:
    found = read_baileys_dir(baileys_dirs / "account-1")
    codec = PackedAuthCodec(Keyring(parse_key(make_key())))
    changed = codec.change(found.account_id, {}, KeyChange(found.keys), Version(1, 1))
    parts = {part: encoded for part, encoded in changed.items() if encoded is not None}
    assert codec.unpack(found.account_id, parts) == found.keys


def test_originals_are_untouched_also_when_broken(legacy: Path) -> None:
    (legacy / "account-1" / "creds.json").write_text("{")
    (legacy / "account-0" / SESSION).write_bytes(b"")
    for path in legacy.rglob("*.json"):
        path.chmod(0o400)
    (legacy / "account-0").chmod(0o500)
    before = fingerprints(legacy)
    scan_legacy_dir(legacy)
    assert fingerprints(legacy) == before
    (legacy / "account-0").chmod(0o700)


def test_directory_that_is_an_account_is_read_as_one(account: Path) -> None:
    assert scan_legacy_dir(account) == [read_baileys_dir(account)]


# --- credentials that cannot be trusted ------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 100, 1_000, -1])
def test_cut_credentials_are_quarantined(account: Path, length: int) -> None:
    creds = account / "creds.json"
    creds.write_bytes(creds.read_bytes()[:length])
    assert "creds.json is" in quarantine(account).cause


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (b"\0" * 1_900, "only zeros"),
        (b"null", "does not hold credentials"),
        (b"[]", "does not hold credentials"),
        (b"\xff\xfe{}", "not complete JSON"),
        (b"[" * 100_000, "not complete JSON"),
        (b" " * (LIMITS.file_bytes_max + 1), "more than"),
    ],
)
def test_foreign_credentials_are_quarantined(account: Path, text: bytes, cause: str) -> None:
    (account / "creds.json").write_bytes(text)
    assert cause in quarantine(account).cause


def test_missing_credentials_are_quarantined(account: Path) -> None:
    (account / "creds.json").unlink()
    assert quarantine(account).cause == "creds.json is missing"


@pytest.mark.parametrize(
    "field", ["noiseKey", "signedIdentityKey", "signedPreKey", "registrationId", "advSecretKey"]
)
@pytest.mark.parametrize("value", [None, "x", {}, {"type": "Buffer", "data": [1, 2]}, True])
def test_missing_or_broken_field_is_quarantined(account: Path, field: str, value: object) -> None:
    edit_creds(account, lambda creds: creds.update({field: value}))
    assert field in quarantine(account).cause
    edit_creds(account, lambda creds: creds.pop(field))
    assert field in quarantine(account).cause


def test_never_paired_account_is_quarantined(account: Path) -> None:
    edit_creds(account, lambda creds: creds.pop("me"))
    assert "never paired" in quarantine(account).cause


def test_pairing_that_was_never_finished_is_quarantined(account: Path) -> None:
    # Asking for a pairing code sets `me` in Baileys, long before the phone agrees.
    edit_creds(account, lambda creds: creds.pop("account"))
    assert "never finished" in quarantine(account).cause


def test_account_of_no_phone_number_is_quarantined(account: Path) -> None:
    edit_creds(account, lambda creds: creds.update(me={"id": "../../x"}))
    assert "phone number" in quarantine(account).cause


def test_quarantine_shows_no_secret(account: Path) -> None:
    text = (account / "creds.json").read_text()
    (account / "creds.json").write_text(text[:-3])
    secret = json.loads(text)["advSecretKey"]
    assert secret not in f"{quarantine(account)} {quarantine(account)!r}"


def test_broken_account_does_not_hide_the_others(legacy: Path) -> None:
    (legacy / "account-0" / "creds.json").write_bytes(b"")
    first, second = scan_legacy_dir(legacy)
    assert isinstance(first, QuarantinedDir)
    assert (first.path, first.cause) == (legacy / "account-0", "creds.json is empty")
    assert isinstance(second, BaileysImport)


# --- broken keys -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (SESSION, "fresh session"),
        (GROUP_KEY, "handed out anew"),
        (GROUP_MEMORY, "handed out anew"),
        ("identity-key-30000000_1.0.json", "learnt again"),
        ("device-list-491700000.json", "asked again"),
        ("lid-mapping-491700000.json", "asked again"),
        ("tctoken-30000000@lid.json", "made anew"),
        ("pre-key-7.json", "cannot be made anew"),
        ("app-state-sync-key-AAAAAB__p.json", "cannot be made anew"),
        ("app-state-sync-version-regular_high.json", "from its beginning"),
    ],
)
@pytest.mark.parametrize("text", [b"", b'{"half', b"null", b"17", b"\0\0"])
def test_broken_key_is_left_out_and_named(account: Path, file: str, says: str, text: bytes) -> None:
    whole = read_baileys_dir(account)
    (account / file).write_bytes(text)
    found = read_baileys_dir(account)
    assert [problem.file for problem in found.problems] == [file]
    assert says in found.problems[0].cause
    assert found.problems[0].advice
    missing = set(whole.keys) - set(found.keys)
    expected = {file} | ({GROUP_MEMORY} if file == GROUP_KEY else set())
    assert {f"{name}.json" for name in missing} == expected
    assert all(whole.keys[name] == value for name, value in found.keys.items())


def test_too_large_key_is_left_out(account: Path) -> None:
    (account / SESSION).write_bytes(b'"' + b"x" * LIMITS.file_bytes_max + b'"')
    found = read_baileys_dir(account)
    assert "more than" in found.problems[0].cause


# --- what is not Baileys' --------------------------------------------------------------------


def test_foreign_files_are_named_and_ignored(account: Path) -> None:
    whole = read_baileys_dir(account)
    foreign = [
        ".DS_Store",
        "creds.json.bak",
        "notes.txt",
        "pre-key-x.json",
        "session-.json",
        "session-1.0.json.tmp",
        "unknown-1.json",
    ]
    for name in foreign:
        (account / name).write_text("{}")
    (account / "media").mkdir()
    found = read_baileys_dir(account)
    assert found.keys == whole.keys
    assert sorted(problem.file for problem in found.problems) == sorted([*foreign, "media"])


def test_many_problems_are_summed_up(account: Path) -> None:
    for number in range(PROBLEMS_MAX + 5):
        (account / f"{number}.txt").touch()
    problems = read_baileys_dir(account).problems
    assert len(problems) == PROBLEMS_MAX + 1
    assert problems[-1].cause == "5 more files like these"


def test_link_is_never_followed(legacy: Path, tmp_path: Path) -> None:
    account = legacy / "account-0"
    (account / SESSION).rename(tmp_path / "outside.json")
    (account / SESSION).symlink_to(tmp_path / "outside.json")
    assert "not a regular file" in quarantine(account).cause
    (legacy / "linked").symlink_to(tmp_path, target_is_directory=True)
    by_id = {each.account_id: each for each in scan_legacy_dir(legacy)}
    linked = by_id[AccountId("linked")]
    assert isinstance(linked, QuarantinedDir)
    assert linked.cause == "the directory is a link"


def test_pipe_in_the_place_of_a_file_does_not_hang(account: Path) -> None:
    (account / "creds.json").unlink()
    os.mkfifo(account / "creds.json")
    assert "not a regular file" in quarantine(account).cause


@pytest.mark.parametrize(
    "limits",
    [ImportLimits(directory_files_max=77), ImportLimits(directory_bytes_max=10_000)],
    ids=["files", "bytes"],
)
def test_too_large_directory_is_quarantined(legacy: Path, limits: ImportLimits) -> None:
    found = scan_legacy_dir(legacy, limits=limits)
    assert all(isinstance(each, QuarantinedDir) and "more than" in each.cause for each in found)
    assert len(found) == 2


def test_too_many_directories_are_said_to_be(legacy: Path) -> None:
    _, second = scan_legacy_dir(legacy, limits=ImportLimits(directories_max=1))
    assert isinstance(second, QuarantinedDir)
    assert "more than 1 directories" in second.cause


def test_directory_that_cannot_be_read_is_quarantined(account: Path) -> None:
    assert quarantine(account / "creds.json").cause.endswith("Not a directory")
    assert quarantine(account / "gone").cause == "there is no such directory"


@FEW
@given(data=st.data())
def test_any_credentials_are_imported_or_quarantined_and_nothing_else(
    account: Path, data: st.DataObject
) -> None:
    creds = account / "creds.json"
    kept = creds.read_bytes()
    try:
        whole = json.loads(kept)
        field = data.draw(st.sampled_from(["me", "account", "noiseKey", "signedPreKey", "name"]))
        inner = data.draw(st.sampled_from(["id", "private", "public", "keyPair", "signature", ""]))
        value = data.draw(anything)
        if inner and isinstance(whole.get(field), dict):
            whole[field][inner] = value
        else:
            whole[field] = value
        creds.write_text(json.dumps(whole))
        with contextlib.suppress(BaileysUnreadable):
            assert read_baileys_dir(account).phone.isdigit()
    finally:
        creds.write_bytes(kept)


def test_directory_in_use_is_quarantined(account: Path) -> None:
    reads = 0

    def write_meanwhile() -> None:
        nonlocal reads
        reads += 1
        if reads == 5:
            (account / SESSION).write_text("{}")

    with pytest.raises(BaileysUnreadable, match="stop the backend"):
        read_baileys_dir(account, write_meanwhile)


def test_file_that_vanishes_meanwhile_is_quarantined(account: Path) -> None:
    with pytest.raises(BaileysUnreadable, match="stop the backend"):
        read_baileys_dir(
            account, lambda: (account / "tctoken-__index.json").unlink(missing_ok=True)
        )


def test_two_directories_of_one_device_are_both_quarantined(legacy: Path) -> None:
    shutil.copytree(legacy / "account-0", legacy / "account-0 (copy)")
    found = scan_legacy_dir(legacy)
    quarantined = [each for each in found if isinstance(each, QuarantinedDir)]
    assert {each.path.name for each in quarantined} == {"account-0", "account-0 (copy)"}
    assert all("same device" in each.cause for each in quarantined)
    assert len(found) == 3


def test_what_is_no_account_is_passed_over(legacy: Path) -> None:
    (legacy / "README").write_text("hello")
    for name in (".git", "lost+found", "Default"):
        (legacy / name).mkdir()
        (legacy / name / "File").touch()
    (legacy / "emptied").mkdir()
    ids = {each.account_id for each in scan_legacy_dir(legacy)}
    assert ids == {"account-0", "account-1", "emptied"}


@pytest.mark.parametrize(
    ("name", "account_id"),
    [
        ("shop-1", "shop-1"),
        ("4915.x_Y", "4915.x_Y"),
        ("my shop", "my-shop-34cc49fd"),
        ("my:shop", "my-shop-d42d9809"),
        ("☕", "account-3775660f"),
        ("-x", "x-ada72edb"),
    ],
)
def test_account_id_is_the_name_of_the_directory(name: str, account_id: str) -> None:
    assert account_id_of(Path("/sessions") / name) == account_id


def test_account_ids_of_different_names_differ() -> None:
    names = ["my shop", "my:shop", "my-shop", "my  shop", "MY SHOP", "x" * 65, "x" * 66]
    assert len({account_id_of(Path(name)) for name in names}) == len(names)


# --- the port --------------------------------------------------------------------------------


async def test_source_gives_accounts_with_notes_and_faults(legacy: Path) -> None:
    (legacy / "account-0" / SESSION).write_bytes(b"")
    (legacy / "account-1" / "creds.json").write_bytes(b"")
    source: LegacySource = LegacyDirectories(legacy)
    account, fault = await source.scan()
    assert isinstance(account, LegacyAccount)
    assert account.notes[0][0].startswith(f"{SESSION}: is empty")
    assert isinstance(fault, LegacyFault)
    assert fault.directory == str(legacy / "account-1")
    assert (fault.account_id, fault.cause) == ("account-1", "creds.json is empty")


async def test_source_without_a_directory_has_nothing() -> None:
    assert await LegacyDirectories(None).scan() == ()


async def test_source_whose_directory_is_missing_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreMisconfigured, match="No such file"):
        await LegacyDirectories(tmp_path / "gone").scan()


async def test_cancelled_source_ends_at_the_next_file(legacy: Path) -> None:
    with trio.move_on_after(0) as scope:
        await LegacyDirectories(legacy).scan()
    assert scope.cancelled_caught
