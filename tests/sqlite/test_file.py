"""A file is ours, whole and not newer than we are, or it is refused and left as it is."""

from __future__ import annotations

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from daemon.sqlite.file import (
    FileBroken,
    Schema,
    check_file,
    create_file,
    open_connection,
    show_as_newest,
    translated,
    upgrade,
)
from machine.ports import StoreMisconfigured

SCHEMA = Schema(application_id=77, version=3, tables="CREATE TABLE t (n INTEGER) STRICT")


def test_a_new_file_is_private_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, SCHEMA)
    check_file(path, SCHEMA)
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.db"]


def test_creating_again_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, SCHEMA)
    connection = open_connection(path)
    connection.execute("INSERT INTO t VALUES (7)")
    connection.close()
    create_file(path, SCHEMA)
    connection = open_connection(path)
    assert connection.execute("SELECT n FROM t").fetchall() == [(7,)]
    connection.close()


OLDEST = replace(SCHEMA, version=1)
UPGRADING = replace(
    SCHEMA,
    upgrades={1: "ALTER TABLE t ADD COLUMN m INTEGER", 2: "CREATE TABLE u (n INTEGER) STRICT"},
    views={1: "CREATE TEMP VIEW t AS SELECT *, 8 AS m FROM main.t; CREATE TEMP TABLE u (n)"},
)


def upgrade_alone(path: Path, schema: Schema) -> None:
    """Upgrade in a transaction of its own."""
    connection = open_connection(path)
    try:
        connection.execute("BEGIN IMMEDIATE")
        upgrade(connection, path, schema)
        connection.execute("COMMIT")
    finally:
        connection.close()


def test_an_older_file_is_brought_up_step_by_step_by_one_of_many(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, OLDEST)
    connection = open_connection(path)
    connection.execute("INSERT INTO t VALUES (7)")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: upgrade_alone(path, UPGRADING), range(8)))
    assert connection.execute("SELECT n, m FROM t").fetchall() == [(7, None)]
    assert connection.execute("SELECT n FROM u").fetchall() == []
    assert connection.execute("PRAGMA user_version").fetchone() == (3,)
    connection.close()


def test_an_older_file_is_shown_as_the_newest_and_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, OLDEST)
    connection = open_connection(path)
    connection.execute("INSERT INTO t VALUES (7)")
    for _ in range(2):
        connection.execute("BEGIN")
        show_as_newest(connection, path, UPGRADING)
        assert connection.execute("SELECT n, m FROM t").fetchall() == [(7, 8)]
        assert connection.execute("SELECT n FROM u").fetchall() == []
        connection.execute("ROLLBACK")
    assert connection.execute("SELECT * FROM t").fetchall() == [(7,)]
    connection.close()


def test_a_file_too_old_to_be_shown_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, replace(SCHEMA, version=2))
    connection = open_connection(path)
    with pytest.raises(StoreMisconfigured, match=r"format 2.*earlier release"):
        show_as_newest(connection, path, SCHEMA)
    connection.close()


def test_an_upgrade_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, OLDEST)
    broken = replace(UPGRADING, upgrades={**UPGRADING.upgrades, 2: "no SQL"})
    with pytest.raises(sqlite3.OperationalError):
        upgrade_alone(path, broken)
    connection = open_connection(path)
    assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    with pytest.raises(sqlite3.OperationalError):
        connection.execute("SELECT m FROM t")
    connection.close()


def test_many_that_create_at_once_make_one_file(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: create_file(path, SCHEMA), range(8)))
    check_file(path, SCHEMA)
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.db"]


def test_a_connection_is_durable(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, SCHEMA)
    connection = open_connection(path)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    full = 2  # https://www.sqlite.org/pragma.html#pragma_synchronous
    assert connection.execute("PRAGMA synchronous").fetchone() == (full,)
    connection.close()


@pytest.mark.parametrize("content", [b"", b"SQLite format 3\x00", b"not a database" * 100])
def test_what_is_no_database_is_broken_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.db"
    path.write_bytes(content)
    create_file(path, SCHEMA)
    with pytest.raises(FileBroken):
        check_file(path, SCHEMA)
    assert path.read_bytes() == content


def test_a_cut_file_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, SCHEMA)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(FileBroken, match="cut"):
        check_file(path, SCHEMA)


def test_a_file_of_a_newer_version_is_refused_with_both_versions(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, replace(SCHEMA, version=4))
    before = path.read_bytes()
    with pytest.raises(StoreMisconfigured, match=r"format 4.*knows\s+3"):
        check_file(path, SCHEMA)
    assert path.read_bytes() == before


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (n)")
    connection.close()
    with pytest.raises(StoreMisconfigured, match="another program"):
        check_file(path, SCHEMA)


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreMisconfigured, match="missing"):
        create_file(tmp_path / "missing" / "t.db", SCHEMA)


def test_a_schema_whose_names_are_garbled_is_refused_for_good(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    create_file(path, SCHEMA)
    path.write_bytes(path.read_bytes().replace(b"CREATE TABLE t", b"\xffREATE TABLE t"))
    # Python's module cannot put that into a message of its own.
    with pytest.raises(sqlite3.DatabaseError, match="malformed") as caught:
        open_connection(path)
    assert isinstance(translated(caught.value, path), StoreMisconfigured)
