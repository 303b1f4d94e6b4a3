from __future__ import annotations

import base64
import os
import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from daemon.settings import (
    PREFIX,
    SECRET_FIELDS,
    Loaded,
    Settings,
    SettingsRefused,
    StoreKind,
    load_settings,
    parse_bind,
    serving_problems,
    variable_of,
)
from machine.ports import Level

TOKEN = "a-token-that-nobody-may-see"
KEY = base64.b64encode(bytes(range(32))).decode()


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of whoever runs the tests, and no `.env` of theirs."""
    for name in list(os.environ):
        if name.startswith(PREFIX) or name == "FIRESTORE_EMULATOR_HOST":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def load(monkeypatch: pytest.MonkeyPatch, **values: str) -> Loaded:
    set_all(monkeypatch, **values)
    return load_settings()


def load_serving(monkeypatch: pytest.MonkeyPatch, **values: str) -> Loaded:
    set_all(monkeypatch, **values)
    return load_settings(serving=True)


def set_all(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name, value in values.items():
        monkeypatch.setenv(PREFIX + name, value)


def refused(monkeypatch: pytest.MonkeyPatch, **values: str) -> str:
    with pytest.raises(SettingsRefused) as caught:
        load_serving(monkeypatch, **values)
    return "\n".join(caught.value.problems)


def test_without_any_setting_everything_has_a_default() -> None:
    loaded = load_settings()
    settings = loaded.settings
    assert settings.store is StoreKind.SQLITE
    assert settings.instance_name.endswith("-8080")
    assert settings.state_dir == Path(".watchkeeper") / settings.instance_name
    assert settings.loopback_dir == Path(".watchkeeper/shared/loopback")
    assert settings.address() == "http://127.0.0.1:8080"
    assert settings.log_level is Level.INFO
    assert set(loaded.sources.values()) == {"default"}


def test_two_instances_of_one_host_differ_in_name_and_state_directory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = load(monkeypatch, HTTP_BIND="127.0.0.1:8080").settings
    two = load(monkeypatch, HTTP_BIND="127.0.0.1:8081").settings
    assert one.instance_name != two.instance_name
    assert one.state_dir != two.state_dir
    assert one.shared_dir == two.shared_dir


def test_environment_beats_dotenv_beats_secrets_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    for name in ("group", "send_wait_s", "drain_s"):
        (secrets / f"watchkeeper_{name}").write_text("30")
    (tmp_path / ".env").write_text("WATCHKEEPER_GROUP=dotenv\nWATCHKEEPER_SEND_WAIT_S=4\n")
    loaded = load(monkeypatch, GROUP="environment", SECRETS_DIR=str(secrets))
    assert (loaded.settings.group, loaded.sources["group"]) == ("environment", "env")
    assert (loaded.settings.send_wait_s, loaded.sources["send_wait_s"]) == (4.0, ".env")
    assert (loaded.settings.drain_s, loaded.sources["drain_s"]) == (30.0, "secret")


def test_secret_file_is_read_without_its_line_break(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\nanother-token-for-rotation\n")
    path.chmod(0o600)
    loaded = load(monkeypatch, ADMIN_TOKEN_FILE=str(path))
    assert loaded.settings.admin_tokens() == (TOKEN, "another-token-for-rotation")
    assert loaded.sources["admin_token"] == "file"
    assert TOKEN not in repr(loaded)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read"), ("\n", "is empty"), ("x" * 70_000, "far too long")],
)
def test_useless_secret_file_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, expected: str
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    told = refused(monkeypatch, ADMIN_TOKEN_FILE=str(path))
    assert "WATCHKEEPER_ADMIN_TOKEN_FILE" in told
    assert expected in told


def test_secret_and_its_file_together_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    told = refused(monkeypatch, ADMIN_TOKEN=TOKEN, ADMIN_TOKEN_FILE=str(tmp_path / "token"))
    assert "both set" in told
    assert TOKEN not in told


def test_contradictory_lease_times_are_refused_with_the_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = refused(monkeypatch, LEASE_TTL_S="9")
    assert "WATCHKEEPER_LEASE_TTL_S" in told
    assert "5 + 2 x attempt 2 + margin 1.5 = 10.5 s" in told


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"DRAIN_S": "3"}, "5 + lease_attempt 2 = 7 s"),
        ({"RESTORE_TRY_S": "500"}, "WATCHKEEPER_RESTORE_TRY_S (500) is longer than"),
        ({"DURABILITY": "local", "REPLICATE_WITHIN_S": "30"}, "WATCHKEEPER_REPLICATE_WITHIN_S"),
        ({"METRICS_BIND": "127.0.0.1:8080"}, "WATCHKEEPER_METRICS_BIND is the API's own"),
        ({"ADVERTISE_URL": "http://0.0.0.0:8080"}, "every interface"),
        ({"ADVERTISE_URL": "http://a:1/path"}, "scheme, host and port only"),
        ({"HTTP_BIND": "8080"}, "must be host:port"),
        ({"LEASE_TTL_S": "soon"}, "WATCHKEEPER_LEASE_TTL_S, from env"),
        ({"STORE": "redis"}, "'sqlite' or 'firestore' (it is 'redis')"),
        ({"INSTANCE_NAME": "../etc"}, "WATCHKEEPER_INSTANCE_NAME"),
        ({"OPEN_CONCURRENCY": "0"}, "WATCHKEEPER_OPEN_CONCURRENCY"),
        ({"SECRETS_DIR": "/nowhere/at/all"}, "WATCHKEEPER_SECRETS_DIR"),
        ({"PRODUCTION": "true"}, "WATCHKEEPER_CONNECTOR is loopback"),
    ],
)
def test_what_cannot_work_is_refused_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], expected: str
) -> None:
    assert expected in refused(monkeypatch, **values)


def test_every_problem_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told = refused(monkeypatch, LEASE_TTL_S="soon", STORE="redis", HTTP_BIND="x")
    assert told.count("\n") == 2


@pytest.mark.parametrize(
    "values",
    [
        {"ENCRYPTION_KEY": "SECRETISH-not-base64!"},
        {"ENCRYPTION_KEY": base64.b64encode(b"SECRETISH").decode()},
        {"ENCRYPTION_KEYS_OLD": "SECRETISH"},
        {"ADMIN_TOKEN": "SECRETISH"},
        {"ADVERTISE_URL": "http://user:SECRETISH@host:1"},
    ],
)
def test_no_error_shows_a_secret(monkeypatch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    told = refused(monkeypatch, **values)
    assert PREFIX + next(iter(values)) in told
    for value in (*values.values(), "SECRETISH"):
        assert value not in told


def test_emulator_in_production_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRESTORE_EMULATOR_HOST", "127.0.0.1:1")
    told = refused(monkeypatch, PRODUCTION="true", CONNECTOR="baileys")
    assert "FIRESTORE_EMULATOR_HOST" in told
    assert load(monkeypatch, PRODUCTION="false").settings.firestore_emulator_host == "127.0.0.1:1"


def test_serving_demands_token_project_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    told = refused(monkeypatch, STORE="firestore", HTTP_BIND="0.0.0.0:8080")
    for name in ("ADMIN_TOKEN_FILE", "FIRESTORE_PROJECT", "ENCRYPTION_KEY_FILE", "ADVERTISE_URL"):
        assert PREFIX + name in told
    # A command of an operator needs none of them.
    assert load_settings().settings.store is StoreKind.FIRESTORE


def test_embedded_store_without_a_key_serves_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_serving(monkeypatch, ADMIN_TOKEN=TOKEN)
    assert serving_problems(loaded.settings) == ()
    assert any("unencrypted" in warning for warning in loaded.warnings)
    assert load_serving(monkeypatch, ENCRYPTION_KEY=KEY).warnings == ()


def test_keys_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, ENCRYPTION_KEY=KEY, ENCRYPTION_KEYS_OLD=f"{KEY}\n{KEY}").settings
    assert settings.encryption_key_bytes() == bytes(range(32))
    assert settings.encryption_keys_old_bytes() == (bytes(range(32)),) * 2


def test_mistyped_variable_is_told_with_what_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings = load(monkeypatch, LEASE_TTLS="15", ENCRYPTION_KEY=KEY).warnings
    told = "WATCHKEEPER_LEASE_TTLS is no setting; did you mean WATCHKEEPER_LEASE_TTL_S?"
    assert warnings == (told,)


def test_variables_that_kubernetes_makes_of_a_service_are_no_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = {"SERVICE_HOST": "10.0.0.1", "PORT": "tcp://10.0.0.1:80", "PORT_80_TCP_ADDR": "x"}
    assert load(monkeypatch, ENCRYPTION_KEY=KEY, **values).warnings == ()


def test_settings_become_the_machine_s_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, DRAIN_S="33", MESSAGE_RETENTION_DAYS="2").settings
    assert settings.limits().settle_s == 33
    assert settings.limits().message_retention_s == 2 * 86_400
    assert settings.lease_timing().ttl_s == 15


def test_every_setting_has_a_description_and_numbers_have_bounds() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name
        if field.annotation in {int, float}:
            assert len(field.metadata) == 2, f"{variable_of(name)} needs a lower and upper bound"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:8080", ("::1", 8080)), ("h:0", ("h", 0))],
)
def test_bind_addresses(text: str, expected: tuple[str, int]) -> None:
    assert parse_bind(text) == expected


@pytest.mark.parametrize("text", ["", ":80", "h", "h:", "h:99999", "::1:80", "http://h:80", "h:x"])
def test_bad_bind_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        parse_bind(text)


def test_address_takes_the_port_that_was_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(monkeypatch, HTTP_BIND="[::1]:0").settings
    assert settings.address(4711) == "http://[::1]:4711"


def test_named_files_take_the_place_of_the_env_file_and_the_last_one_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("WATCHKEEPER_GROUP=from-env-file\n")
    first, second = tmp_path / "common", tmp_path / "own"
    first.write_text("WATCHKEEPER_GROUP=common\nWATCHKEEPER_LEASE_TTL_S=20\n")
    second.write_text("WATCHKEEPER_GROUP=own\n")
    settings = load(monkeypatch, ENV_FILE=f"{first}:{second}").settings
    assert (settings.group, settings.lease_ttl_s) == ("own", 20)


def test_a_named_file_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "is not a file" in refused(monkeypatch, ENV_FILE=str(tmp_path / "nowhere"))


# --- anything ----------------------------------------------------------------------------------

MARK = "sEcReT-9f2b7c"
"""In each secret that is made up below; no sentence may repeat it."""

VARIABLES = [variable_of(field) for field in Settings.model_fields]
FEW = examples(
    max_examples=150,
    deadline=None,
    # The environment and the directory are emptied before each example, not only each test.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# What an environment can hold: any bytes but NUL, which Python shows as lone surrogates.
characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
bad_bytes = st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF, categories=["Cs"])
texts = st.text(st.one_of(characters, bad_bytes), max_size=40)
almost = st.sampled_from(
    [
        *("", " ", "0", "-1", "1e400", "nan", "inf", "1_000", "0x10", "9" * 400, "true", "null"),
        *("127.0.0.1:8080", "[::1]:0", "[::]:8080", "0.0.0.0:80", "http://[", "http://h:99999"),
        *("http://u:p@h", "//", "http://h/..", "sqlite", "firestore", "baileys", "remote", "local"),
        *(".", "..", "/", "/dev/null", "a/b", "[]", "{}", '{"a": 1}', "a" * 100, KEY, TOKEN),
    ]
)
secret_texts = st.one_of(
    st.text(string.printable, max_size=20).map(lambda text: text + MARK),
    st.just(base64.b64encode(MARK.encode()).decode()),
    st.just(f"{KEY}\n{MARK}"),
)
SECRET_NAMES = [variable_of(field) for field in SECRET_FIELDS]
environments = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(VARIABLES, st.one_of(almost, texts)),
        **dict.fromkeys(SECRET_NAMES, secret_texts),
    },
)


@contextmanager
def only(environment: dict[str, str]) -> Iterator[None]:
    """Exactly these variables, of those that settings are read from."""
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            del os.environ[name]


def outcome(env_file: Path = Path("no-such-file")) -> str:
    """Every sentence that loading says; it says no in one way only."""
    try:
        loaded = load_settings(serving=True, env_file=env_file)
    except SettingsRefused as refused:
        return "\n".join((*refused.problems, repr(refused))) or pytest.fail("no reason was given")
    # What was accepted can be asked for everything that a daemon asks of it.
    loaded.settings.address()
    loaded.settings.lease_timing()
    loaded.settings.limits()
    loaded.settings.encryption_key_bytes()
    loaded.settings.encryption_keys_old_bytes()
    return "\n".join((*loaded.warnings, repr(loaded)))


@FEW
@given(environments)
def test_any_environment_is_accepted_or_refused_in_sentences_without_secrets(
    environment: dict[str, str],
) -> None:
    with only(environment):
        assert MARK not in outcome()


@FEW
@given(st.one_of(st.binary(max_size=200), st.lists(st.tuples(st.sampled_from(VARIABLES), texts))))
def test_any_env_file_is_accepted_or_refused_in_sentences(
    tmp_path: Path, content: bytes | list[tuple[str, str]]
) -> None:
    path = tmp_path / "settings.env"
    if isinstance(content, list):
        lines = "".join(f"{name}={value}\n" for name, value in content)
        content = lines.encode(errors="surrogateescape")
    path.write_bytes(content + f"\nWATCHKEEPER_ADMIN_TOKEN={MARK}".encode())
    assert MARK not in outcome(path)


@FEW
@given(st.sampled_from(SECRET_FIELDS), st.binary(max_size=60))
def test_any_secret_file_is_accepted_or_refused_in_sentences(
    tmp_path: Path, field: str, content: bytes
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(MARK.encode() + content)
    with only({variable_of(f"{field}_file"): str(path)}):
        assert MARK not in outcome()
