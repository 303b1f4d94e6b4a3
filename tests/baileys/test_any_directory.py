"""Any directory whatever, read as a former backend's: imported or quarantined, never touched.

The credentials are made here, so that these tests need no Node; that real ones are read as Baileys
reads them is `test_baileys_import`'s.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.baileys_import import BaileysImport, ImportLimits, QuarantinedDir, scan_legacy_dir
from daemon.key_names import CREDS, KEY_TYPES
from tests.baileys.directories import CREDENTIALS, SECRET, fingerprints

# A busy machine is not a wrong result.
MANY = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

SECRET_FORMS = (SECRET.decode(), base64.b64encode(SECRET).decode())
LIMITS = ImportLimits(
    file_bytes_max=4_000, directory_files_max=8, directory_bytes_max=12_000, directories_max=3
)
"""Small, so that examples go over them."""


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
mutated = st.fixed_dictionaries(
    {},
    optional={
        **{name: st.one_of(st.just(value), anything) for name, value in CREDENTIALS.items()},
        "more": anything,
    },
)
documents = st.one_of(st.just(CREDENTIALS), mutated, anything).map(
    lambda value: json.dumps(value).encode()
)
contents = st.one_of(
    documents,
    st.binary(max_size=60),
    st.integers(0, 5_000).map(bytes),
    st.just(b"[" * 3_000),
    st.just(b'{"a":' * 700),
    st.tuples(documents, st.integers(0, 200)).map(lambda cut: cut[0][: cut[1]]),
)
# What a file system takes as a name: any bytes but NUL and "/".
odd_names = st.binary(min_size=1, max_size=30).map(
    lambda name: name.replace(b"/", b"_").replace(b"\0", b"_")
)
key_files = st.tuples(st.sampled_from(KEY_TYPES), odd_names).map(
    lambda key: f"{key[0]}-".encode() + key[1] + b".json"
)
names = st.one_of(
    st.just(b"creds.json"),
    key_files,
    odd_names,
    odd_names.map(lambda name: name + b".json"),
).filter(lambda name: name not in {b".", b".."})
account_files = st.builds(
    lambda creds, others: {**others, b"creds.json": creds},
    st.one_of(st.just(json.dumps(CREDENTIALS).encode()), contents),
    st.dictionaries(names, contents, max_size=8),
)
usual_names = st.sampled_from([b"anna", b"bert", b".hidden", b"lost+found", b"a b"])
trees = st.dictionaries(
    st.one_of(usual_names, odd_names).filter(lambda name: name not in {b".", b".."}),
    st.one_of(account_files, st.dictionaries(names, contents, max_size=4), contents),
    max_size=4,
)
Tree = dict[bytes, dict[bytes, bytes] | bytes]


def write(root: Path, tree: Tree) -> None:
    """Make the tree's files below `root`, which is emptied first."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for name, content in tree.items():
        path = root / os.fsdecode(name)
        if isinstance(content, bytes):
            path.write_bytes(content)
            continue
        path.mkdir()
        for file, text in content.items():
            (path / os.fsdecode(file)).write_bytes(text)


@MANY
@given(trees)
def test_any_directory_is_imported_or_quarantined_and_never_touched(
    tmp_path: Path, tree: Tree
) -> None:
    root = tmp_path / "sessions"
    write(root, tree)
    before = fingerprints(root)
    found = scan_legacy_dir(root, limits=LIMITS)
    assert fingerprints(root) == before
    assert len({each.path for each in found}) == len(found)
    for each in found:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", each.account_id)
        # Never the value of a field, whatever is said of it.
        assert not any(form in repr(each) for form in SECRET_FORMS)
        if isinstance(each, QuarantinedDir):
            assert each.cause
            assert each.advice
            continue
        assert re.fullmatch("[0-9]{5,20}", each.phone)
        assert CREDS in each.keys
        for name, value in each.keys.items():
            assert (each.path / f"{name}.json").read_bytes() == value


def test_the_made_credentials_are_good_ones(tmp_path: Path) -> None:
    """Or the test above would see nothing but refusals."""
    root = tmp_path / "sessions"
    files = {b"creds.json": json.dumps(CREDENTIALS).encode(), b"pre-key-1.json": b"{}"}
    write(root, {b"anna": files, b"bert": {b"creds.json": b"{}"}})
    anna, bert = scan_legacy_dir(root)
    assert isinstance(anna, BaileysImport)
    assert (anna.account_id, anna.phone, anna.name) == ("anna", "4915112345678", "Anna")
    assert [problem.file for problem in anna.problems] == ["pre-key-1.json"]
    assert isinstance(bert, QuarantinedDir)
