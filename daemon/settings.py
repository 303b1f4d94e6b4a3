"""What an operator can set: `WATCHKEEPER_*` variables, a `.env` file, a secrets directory.

Every setting lives here, with its unit, its default and its bounds; `docs/settings.md` is generated
from this class. Numbers that contradict each other are refused before anything is started. The
first of these that knows a setting wins: environment, `.env`, secrets directory, default.

Never lives here: reading a setting anywhere else (nothing else looks at the environment), or what
is done with one.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)

from machine.limits import Durability
from machine.ports import Level

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from machine.lease import LeaseTiming
    from machine.limits import Limits

PREFIX = "WATCHKEEPER_"
ENV_FILE = Path(".env")
ENV_FILE_VARIABLE = PREFIX + "ENV_FILE"
"""Names other files to read instead, separated by colons, the strongest last. A service reads its
settings so: those of its environment stay what they were at its start, whatever is reloaded."""
SECRETS_DIR_VARIABLE = PREFIX + "SECRETS_DIR"
SECRET_FILE_BYTES_MAX = 64 * 1024
ENCRYPTION_KEY_BYTES = 32
TOKEN_CHARACTERS_MIN = 16

SECRET_FIELDS = ("admin_token", "encryption_key", "encryption_keys_old")
"""Settings that hold a secret; each can also be given as `…_FILE`, a path to read it from."""

FOREIGN_VARIABLES = re.compile(
    r"(SERVICE_(HOST|PORT.*)|PORT(_.*)?|TEST_.*|BENCH_.*|SECRETS_DIR|ENV_FILE)"
)
"""Names behind our prefix that others set: Kubernetes makes `WATCHKEEPER_SERVICE_HOST`,
`WATCHKEEPER_PORT_8080_TCP`, … of a service called `watchkeeper`."""


class SettingsRefused(Exception):
    """The settings cannot work. `problems` are whole sentences that name the variable."""

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__(" ".join(problems))
        self.problems = problems


class StoreKind(StrEnum):
    """Where the lease and the accounts are shared."""

    SQLITE = "sqlite"
    FIRESTORE = "firestore"


class ConnectorKind(StrEnum):
    """What connections to WhatsApp are made with."""

    LOOPBACK = "loopback"
    BAILEYS = "baileys"


class LogFormat(StrEnum):
    """How a log line looks: for people, or one JSON object a line."""

    TEXT = "text"
    JSON = "json"


def parse_bind(text: str) -> tuple[str, int]:
    """Split `host:port` or `[v6]:port`.

    Raises `ValueError` with what is wrong.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\[\]:/\s]+)):(\d{1,5})", text)
    if match is None or int(match[3]) > 65535:
        raise ValueError("must be host:port, for example 127.0.0.1:8080 or [::1]:8080")
    return match[1] or match[2], int(match[3])


def _bind(text: str) -> str:
    parse_bind(text)
    return text


def _url(text: str) -> str:
    """Check an address others reach us at; a path, a query or a password has no place in it."""
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be a URL such as http://10.0.0.7:8080")
    if parts.username or parts.password:
        raise ValueError("must hold no user name or password: it is written to the shared store")
    if parts.path not in {"", "/"} or parts.query or parts.fragment:
        raise ValueError("must end after the port: scheme, host and port only")
    if parts.hostname in UNSPECIFIED_HOSTS:
        raise ValueError(
            f"{parts.hostname} means every interface of this host; nobody else can connect to it. "
            "Give the address under which the other instances reach this one"
        )
    return text.rstrip("/")


def _web_socket_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in {"ws", "wss"} or not parts.hostname or parts.username or parts.password:
        raise ValueError("must be a WebSocket's address such as ws://127.0.0.1:9000/ws/chat")
    return text


UNSPECIFIED_HOSTS = frozenset({"0.0.0.0", "::", "[::]", "*"})  # noqa: S104  # named to refuse them

Bind = Annotated[str, AfterValidator(_bind)]
Url = Annotated[str, AfterValidator(_url)]
WebSocketUrl = Annotated[str, AfterValidator(_web_socket_url)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Settings(BaseSettings):
    """The effective settings: complete, within bounds, and free of contradictions.

    Secrets are `SecretStr`, so that no repr, log line or error shows one.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        populate_by_name=True,
        env_ignore_empty=True,
        validate_default=False,
    )

    # --- who and where ---
    group: Name = Field(
        default="default",
        description="Which lease and which accounts. Instances of one group compete for one "
        "lease; more groups scale out.",
    )
    instance_name: Name = Field(
        default="",
        description="This instance's name in the log, the lease and the dashboard. Must differ "
        "between instances of a group. Default: host name and port.",
    )
    store: StoreKind = Field(
        default=StoreKind.SQLITE,
        description="Where the lease and the accounts are shared: `sqlite` (instances on one "
        "host) or `firestore`.",
    )
    connector: ConnectorKind = Field(
        default=ConnectorKind.LOOPBACK,
        description="What connects accounts: `loopback` (a small WhatsApp of our own, for trying "
        "out) or `baileys` (the real one).",
    )
    production: bool = Field(
        default=False,
        description="Refuse what belongs to a workbench: the Firestore emulator and the loopback "
        "connector.",
    )
    state_dir: Path = Field(
        default=Path(),
        description="Directory of this instance's own copy (credentials, keys, transitions). One "
        "process at a time. Default: `.watchkeeper/` and the instance's name.",
    )
    shared_dir: Path = Field(
        default=Path(".watchkeeper/shared"),
        description="Directory of the shared SQLite file, with `WATCHKEEPER_STORE=sqlite`.",
    )
    loopback_dir: Path = Field(
        default=Path(),
        description="Directory of the loopback connector's own state, shared between instances. "
        "Default: `loopback` in the shared directory.",
    )
    legacy_sessions_dir: Path | None = Field(
        default=None,
        description="Directory with Baileys multi-file sessions, one directory an account, that "
        "a restore imports when no store knows them. Never modified.",
    )

    # --- Firestore ---
    firestore_project: str | None = Field(
        default=None,
        max_length=64,
        description="Google Cloud project, with `WATCHKEEPER_STORE=firestore`.",
    )
    firestore_database: str = Field(
        default="(default)", min_length=1, max_length=64, description="Firestore database id."
    )
    firestore_emulator_host: str | None = Field(
        default=None,
        validation_alias="FIRESTORE_EMULATOR_HOST",
        description="host:port of a Firestore emulator (Google's own variable, no prefix). "
        "Refused with `WATCHKEEPER_PRODUCTION=true`.",
    )

    # --- HTTP ---
    http_bind: Bind = Field(
        default="127.0.0.1:8080",
        description="host:port on which the API listens; port 0 picks a free one.",
    )
    advertise_url: Url | None = Field(
        default=None,
        description="Where the other instances reach this API. Needed when the API listens on "
        "every interface. Default: from the bind address.",
    )
    metrics_bind: Bind | None = Field(
        default=None,
        description="host:port of a listener of its own for `/metrics`, without a token. Default: "
        "none; `/metrics` is then on the API, behind the token.",
    )
    http_connections_max: int = Field(
        default=12_000,
        ge=10,
        le=100_000,
        description="Open connections; further ones are answered 503.",
    )
    http_body_bytes_max: int = Field(
        default=256 * 1024,
        ge=1024,
        le=16 * 1024 * 1024,
        description="Bytes in a request's body, then 413.",
    )
    forward_connections_max: int = Field(
        default=256,
        ge=1,
        le=10_000,
        description="Connections kept to the holder for forwarded requests.",
    )

    # --- secrets ---
    admin_token: SecretStr | None = Field(
        default=None,
        description="The callers' bearer token, at least 16 characters. Several, one a line, are "
        "all accepted (for rotation); the first is the one that our own commands send.",
    )
    admin_token_file: Path | None = Field(
        default=None, description="File to read the admin token from."
    )
    encryption_key: SecretStr | None = Field(
        default=None,
        description="Key for credentials at rest: base64 of 32 bytes, as `watchkeeper keygen` "
        "prints it. Required with Firestore.",
    )
    encryption_key_file: Path | None = Field(
        default=None, description="File to read the encryption key from."
    )
    encryption_keys_old: SecretStr | None = Field(
        default=None,
        description="Former encryption keys, one a line: still read, no longer written (rotation).",
    )
    encryption_keys_old_file: Path | None = Field(
        default=None, description="File to read the former encryption keys from."
    )

    # --- the lease ---
    lease_ttl_s: float = Field(
        default=15.0,
        ge=1,
        le=600,
        description="Seconds without a renewal after which another instance may take over. At "
        "least renew + 2 x attempt + margin.",
    )
    lease_renew_s: float = Field(
        default=5.0,
        ge=1,
        le=300,
        description="Seconds between renewals (Firestore: one write a second).",
    )
    lease_attempt_s: float = Field(
        default=2.0,
        ge=0.1,
        le=60,
        description="Seconds that one attempt to renew or acquire may take.",
    )
    lease_margin_s: float = Field(
        default=1.5,
        ge=0.1,
        le=60,
        description="Seconds before the ttl is over at which the holder stops acting.",
    )

    # --- handing over ---
    handoff_wait_s: float = Field(
        default=10.0,
        ge=2,
        le=120,
        description="Seconds a request waits for a new holder, then 503 `no_active_instance`.",
    )
    send_wait_s: float = Field(
        default=5.0,
        ge=0,
        le=60,
        description="Seconds a send waits for the server's ack, then 202 instead of 200.",
    )
    drain_s: float = Field(
        default=20.0,
        gt=0,
        le=600,
        description="Seconds a drain waits for messages in flight; the rest goes to the next "
        "holder. At least send_wait + lease_attempt.",
    )
    drain_linger_s: float = Field(
        default=2.0,
        ge=0,
        le=300,
        description="Seconds a released instance still forwards while nobody else holds the lease.",
    )

    # --- accounts and messages ---
    durability: Durability = Field(
        default=Durability.REMOTE,
        description="A key change counts when the shared store has it (`remote`) or when this "
        "host's disk has it (`local`: one host with a persistent volume).",
    )
    replicate_within_s: float = Field(
        default=1.0,
        gt=0,
        le=60,
        description="Seconds after which the shared store has a change, with durability `local`.",
    )
    restore_try_s: float = Field(
        default=20.0,
        gt=0,
        le=600,
        description="Seconds for one try to read all accounts of one store.",
    )
    restore_give_up_s: float = Field(
        default=120.0,
        gt=0,
        le=3600,
        description="Seconds after which the instance steps down when neither store can be read, "
        "and opens the accounts without their outbox when that cannot.",
    )
    open_concurrency: int = Field(
        default=50, ge=1, le=1000, description="Accounts that are being opened at once."
    )
    open_try_s: float = Field(
        default=30.0,
        gt=0,
        le=300,
        description="Seconds from opening an account to connected, each try.",
    )
    outbox_per_account_max: int = Field(
        default=1000, ge=1, le=100_000, description="Pending messages of an account, then 429."
    )
    message_retention_days: float = Field(
        default=7.0,
        gt=0,
        le=365,
        description="Days that settled and received messages are kept, to be looked up and read.",
    )
    warm_every_s: float = Field(
        default=3600.0,
        ge=10,
        le=86_400,
        description="Seconds between refreshes of a standby's copy (each reads every account).",
    )

    # --- WhatsApp, with connector `baileys` ---
    node: str = Field(default="node", description="The Node.js program, with connector `baileys`.")
    bridge_dir: Path | None = Field(
        default=None,
        description="Directory that `watchkeeper setup-whatsapp` has put Baileys into. Default: "
        "inside the installed package.",
    )
    bridge_accounts_max: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Accounts in one bridge process; more open another one. Default: 200 with "
        "Node 24 or later, 50 below it.",
    )
    bridge_ping_s: float = Field(
        default=10.0,
        ge=1,
        le=300,
        description="Seconds in which a bridge process answers a ping; else it hangs, is killed, "
        "and its accounts are opened in another.",
    )
    bridge_deaths_max: int = Field(
        default=5,
        ge=0,
        le=1000,
        description="Bridge processes that may die within `WATCHKEEPER_BRIDGE_DEATHS_WITHIN_S`; "
        "with one more the instance lets another try.",
    )
    bridge_deaths_within_s: float = Field(
        default=60.0, ge=1, le=3600, description="Seconds that deaths of bridge processes count."
    )
    whatsapp_url: WebSocketUrl | None = Field(
        default=None,
        description="Another server than WhatsApp's, for tests: `ws://127.0.0.1:PORT/ws/chat`. "
        "This host only; refused with `WATCHKEEPER_PRODUCTION=true`.",
    )
    whatsapp_url_insecure: bool = Field(
        default=False,
        description="Accept a `WATCHKEEPER_WHATSAPP_URL` on another host. TLS to WhatsApp's own "
        "address is all that says whom we speak to: for tests only.",
    )

    # --- telling ---
    log_format: LogFormat = Field(
        default=LogFormat.TEXT, description="`text` for people, `json` for one object a line."
    )
    log_level: Level = Field(
        default=Level.INFO,
        description="The quietest level that is logged: debug, info, warning, error.",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take given values only: `load_settings` has read the sources and knows which won."""
        return (init_settings,)

    @model_validator(mode="before")
    @classmethod
    def _fill_dependent_defaults(cls, data: dict[str, Any]) -> dict[str, Any]:
        """Give what depends on other settings its default."""
        filled = dict(data)
        if not filled.get("instance_name"):
            filled["instance_name"] = _default_instance_name(str(filled.get("http_bind", "")))
        if not filled.get("state_dir"):
            filled["state_dir"] = Path(".watchkeeper") / str(filled["instance_name"])
        if not filled.get("loopback_dir"):
            shared_dir = filled.get("shared_dir") or cls.model_fields["shared_dir"].default
            filled["loopback_dir"] = Path(shared_dir) / "loopback"
        return filled

    @property
    def host_port(self) -> tuple[str, int]:
        """Where the API listens."""
        return parse_bind(self.http_bind)

    def address(self, port: int | None = None) -> str:
        """Where others reach this API; `port` is the one really bound, when that was left open."""
        if self.advertise_url is not None:
            return self.advertise_url
        host, asked_port = parse_bind(self.http_bind)
        return f"http://{f'[{host}]' if ':' in host else host}:{port or asked_port}"

    def admin_tokens(self) -> tuple[str, ...]:
        """Every token that is accepted; the first is the one to send."""
        return _lines(self.admin_token)

    def encryption_key_bytes(self) -> bytes | None:
        """The 32 bytes that new records are encrypted with; `None` without a key."""
        return None if self.encryption_key is None else decode_key(_lines(self.encryption_key)[0])

    def encryption_keys_old_bytes(self) -> tuple[bytes, ...]:
        """Former keys, 32 bytes each."""
        return tuple(decode_key(line) for line in _lines(self.encryption_keys_old))

    def lease_timing(self) -> LeaseTiming:
        """The lease's times. Raises `ValueError` with the sum when they contradict each other."""
        from machine.lease import LeaseTiming

        return LeaseTiming(
            ttl_s=self.lease_ttl_s,
            renew_s=self.lease_renew_s,
            attempt_s=self.lease_attempt_s,
            margin_s=self.lease_margin_s,
        )

    def limits(self) -> Limits:
        """The machine's limits. Raises `ValueError` when they contradict each other."""
        from machine.limits import Limits

        return Limits(
            restore_try_s=self.restore_try_s,
            restore_give_up_s=self.restore_give_up_s,
            open_concurrency=self.open_concurrency,
            open_try_s=self.open_try_s,
            outbox_per_account_max=self.outbox_per_account_max,
            settle_s=self.drain_s,
            message_retention_s=self.message_retention_days * 86_400,
            replicate_within_s=self.replicate_within_s,
            warm_every_s=self.warm_every_s,
            linger_s=self.drain_linger_s,
        )

    def stop_s(self) -> float:
        """Seconds from SIGTERM to the end at the longest: what a service file must allow."""
        release_s = 4 * self.lease_attempt_s
        answer_s = self.handoff_wait_s + 1
        return 2 * self.drain_s + release_s + self.drain_linger_s + answer_s + self.lease_margin_s


def _default_instance_name(http_bind: str) -> str:
    """Name host and port: two instances on one host differ in the port, at least."""
    try:
        port = parse_bind(http_bind or Settings.model_fields["http_bind"].default)[1]
    except ValueError:
        port = 0  # The bind address is reported as a problem of its own.
    host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()).strip("-.")[:50] or "instance"
    return f"{host}-{port or os.getpid()}"


def _lines(secret: SecretStr | None) -> tuple[str, ...]:
    """Split a secret that may hold several, one a line."""
    if secret is None:
        return ()
    return tuple(line.strip() for line in secret.get_secret_value().split() if line.strip())


def decode_key(text: str) -> bytes:
    """Decode an encryption key.

    Raises `ValueError`, which never shows the key.
    """
    try:
        key = base64.b64decode(text.replace("-", "+").replace("_", "/"), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("is not base64. Make one with `watchkeeper keygen`") from None
    if len(key) != ENCRYPTION_KEY_BYTES:
        raise ValueError(
            f"is {len(key)} bytes long, not {ENCRYPTION_KEY_BYTES}. "
            "Make one with `watchkeeper keygen`"
        )
    return key


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings with where each came from (`env`, `.env`, `secret`, `file`, `default`)."""

    settings: Settings
    sources: Mapping[str, str]
    warnings: tuple[str, ...]


def load_settings(*, serving: bool = False, env_file: Path = ENV_FILE) -> Loaded:
    """Read, complete and check the settings.

    `serving` also demands what only a running instance needs (a token, a project, a key).

    Raises `SettingsRefused` with every problem found, never with a secret.
    """
    values, sources, problems = _gather(env_file)
    if not problems:
        problems = _read_secret_files(values, sources)
    if problems:
        raise SettingsRefused(tuple(problems))
    try:
        settings = Settings(**values)
    except ValidationError as error:
        raise SettingsRefused(
            tuple(_sentence(detail, sources) for detail in error.errors(include_url=False))
        ) from None
    problems = [*contradictions(settings), *(serving_problems(settings) if serving else ())]
    if problems:
        raise SettingsRefused(tuple(problems))
    complete = {name: sources.get(name, "default") for name in Settings.model_fields}
    return Loaded(settings, complete, (*_unknown_variables(), *_warnings(settings)))


def variable_of(field: str) -> str:
    """The environment variable of a setting."""
    alias = Settings.model_fields[field].validation_alias
    return alias if isinstance(alias, str) else PREFIX + field.upper()


def _gather(env_file: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Merge the sources, the strongest last; remember which one won for each setting."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    for label, open_source in _sources(env_file, problems):
        try:
            found = open_source()()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            # The cause is named by its type only: a parser's message may quote the file.
            problems.append(
                f"The {label} settings cannot be read ({type(error).__name__}): they must be "
                "text in UTF-8 that this user may read."
            )
            continue
        for key, value in found.items():
            field = "firestore_emulator_host" if key == "FIRESTORE_EMULATOR_HOST" else key
            if field in Settings.model_fields:
                values[field] = value
                sources[field] = label
    return values, sources, problems


def _sources(
    env_file: Path, problems: list[str]
) -> Iterator[tuple[str, Callable[[], PydanticBaseSettingsSource]]]:
    """Yield how to open the sources, weakest first. Opening one may read it already."""
    secrets_dir = os.environ.get(SECRETS_DIR_VARIABLE)
    if secrets_dir:
        if Path(secrets_dir).is_dir():
            yield "secret", partial(SecretsSettingsSource, Settings, secrets_dir=secrets_dir)
        else:
            problems.append(
                f"{SECRETS_DIR_VARIABLE}: {secrets_dir} is not a directory. Create it, or unset "
                "the variable."
            )
    for path in _env_files(env_file, problems):
        yield ".env", partial(DotEnvSettingsSource, Settings, env_file=path)
    yield "env", partial(EnvSettingsSource, Settings)


def _env_files(default: Path, problems: list[str]) -> Iterator[Path]:
    """Name the files of settings, weakest first. One that was asked for must be there."""
    named = os.environ.get(ENV_FILE_VARIABLE)
    if not named:
        if default.is_file():
            yield default
        return
    for path in map(Path, named.split(os.pathsep)):
        if path.is_file():
            yield path
        else:
            problems.append(
                f"{ENV_FILE_VARIABLE}: {path} is not a file. Create it, or take it off the list."
            )


def _read_secret_files(values: dict[str, Any], sources: dict[str, str]) -> list[str]:
    """Replace each `…_FILE` by what is in the file."""
    problems: list[str] = []
    for field in SECRET_FIELDS:
        path_text = values.get(f"{field}_file")
        if not path_text:
            continue
        file_variable = variable_of(f"{field}_file")
        if values.get(field):
            problems.append(
                f"{variable_of(field)} and {file_variable} are both set: nobody could tell which "
                "one counts. Unset one of them."
            )
            continue
        try:
            with Path(str(path_text)).open("rb") as file:
                raw = file.read(SECRET_FILE_BYTES_MAX + 1)
            text = raw.decode()
        except OSError as error:
            problems.append(
                f"{file_variable}: {path_text} cannot be read ({error.strerror}). Create it with "
                "mode 0600, owned by the user who runs this."
            )
            continue
        except UnicodeDecodeError:
            problems.append(f"{file_variable}: {path_text} is not text.")
            continue
        if not text.strip() or len(raw) > SECRET_FILE_BYTES_MAX:
            fault = "is empty" if not text.strip() else "is far too long for a secret"
            problems.append(f"{file_variable}: {path_text} {fault}. Put the secret into it.")
            continue
        values[field] = text.rstrip("\r\n")
        sources[field] = "file"
    return problems


def _sentence(detail: ErrorDetails, sources: Mapping[str, str]) -> str:
    """Say what is wrong with one setting; its value only when it is no secret."""
    field = str(detail["loc"][0]) if detail["loc"] else ""
    if field == "FIRESTORE_EMULATOR_HOST":
        field = "firestore_emulator_host"
    if field not in Settings.model_fields:
        return f"{detail['msg']}."
    what = detail["msg"].removeprefix("Value error, ")
    value = str(detail["input"])[:100]
    # An address with "@" in it may hold a password.
    shown = "" if field in SECRET_FIELDS or "@" in value else f" (it is {value!r})"
    source = sources.get(field, "default")
    return f"{variable_of(field)}, from {source}: {what[:1].lower()}{what[1:]}{shown}."


def contradictions(settings: Settings) -> tuple[str, ...]:
    """Every pair of numbers, or of choices, that cannot both hold, with the sum shown."""
    return tuple(_contradictions(settings))


def _contradictions(settings: Settings) -> Iterator[str]:
    for build in (settings.lease_timing, settings.limits):
        try:
            build()
        except ValueError as error:
            yield _with_variables(str(error))
    needed_s = settings.send_wait_s + settings.lease_attempt_s
    if settings.drain_s < needed_s:
        yield (
            f"{PREFIX}DRAIN_S is {settings.drain_s:g} s, but a drain must outlast the sends in "
            f"flight and the release: send_wait {settings.send_wait_s:g} + lease_attempt "
            f"{settings.lease_attempt_s:g} = {needed_s:g} s. Raise {PREFIX}DRAIN_S."
        )
    if settings.durability is Durability.LOCAL and settings.replicate_within_s > settings.drain_s:
        yield (
            f"{PREFIX}REPLICATE_WITHIN_S is {settings.replicate_within_s:g} s, longer than a whole "
            f"drain ({settings.drain_s:g} s): a redeploy could leave changes on the disk only. "
            f"Lower it, or raise {PREFIX}DRAIN_S."
        )
    if settings.metrics_bind is not None and settings.metrics_bind == settings.http_bind:
        yield f"{PREFIX}METRICS_BIND is the API's own address. Choose another port."
    yield from _bad_secrets(settings)
    yield from _bad_whatsapp_url(settings)
    if settings.production and settings.firestore_emulator_host:
        yield (
            "FIRESTORE_EMULATOR_HOST is set with WATCHKEEPER_PRODUCTION=true: an emulator keeps "
            "everything in memory and loses every account. Unset one of them."
        )
    if settings.production and settings.connector is ConnectorKind.LOOPBACK:
        yield (
            "WATCHKEEPER_CONNECTOR is loopback with WATCHKEEPER_PRODUCTION=true: no message would "
            "ever leave. Set WATCHKEEPER_CONNECTOR=baileys."
        )


def _bad_whatsapp_url(settings: Settings) -> Iterator[str]:
    if settings.whatsapp_url is None:
        return
    if settings.production:
        yield (
            f"{PREFIX}WHATSAPP_URL is set with {PREFIX}PRODUCTION=true: whoever answers there "
            "would be taken for WhatsApp. Unset one of them."
        )
    host = urlsplit(settings.whatsapp_url).hostname or ""
    if not (settings.whatsapp_url_insecure or host == "localhost" or _is_loopback(host)):
        yield (
            f"{PREFIX}WHATSAPP_URL is on another host, and whoever answers there would be taken "
            f"for WhatsApp. Use a server on this host, or set {PREFIX}WHATSAPP_URL_INSECURE=true "
            "in a test that needs it."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bad_secrets(settings: Settings) -> Iterator[str]:
    for token in settings.admin_tokens():
        if len(token) < TOKEN_CHARACTERS_MIN or not (token.isascii() and token.isprintable()):
            yield (
                f"{PREFIX}ADMIN_TOKEN must be at least {TOKEN_CHARACTERS_MIN} printable ASCII "
                "characters. Make one with `watchkeeper keygen --token`."
            )
            break
    for field in ("encryption_key", "encryption_keys_old"):
        try:
            keys = [decode_key(line) for line in _lines(getattr(settings, field))]
        except ValueError as error:
            yield f"{variable_of(field)} {error}."
            continue
        if field == "encryption_key" and len(keys) > 1:
            yield (
                f"{PREFIX}ENCRYPTION_KEY holds {len(keys)} keys. Leave the newest one there and "
                f"put the others into {PREFIX}ENCRYPTION_KEYS_OLD."
            )


def serving_problems(settings: Settings) -> tuple[str, ...]:
    """What keeps these settings from running an instance, though not from running a command."""
    return tuple(_serving_problems(settings))


def _serving_problems(settings: Settings) -> Iterator[str]:
    if not settings.admin_tokens():
        yield (
            f"{PREFIX}ADMIN_TOKEN_FILE is not set, and the API is never open to everyone. Make a "
            "token: `umask 077; watchkeeper keygen --token > admin-token`, and name that file."
        )
    if settings.store is StoreKind.FIRESTORE:
        if not settings.firestore_project:
            yield f"{PREFIX}STORE is firestore, but {PREFIX}FIRESTORE_PROJECT is not set."
        if settings.encryption_key is None:
            yield (
                f"{PREFIX}STORE is firestore, but {PREFIX}ENCRYPTION_KEY_FILE is not set: "
                "credentials never go there unencrypted. Make a key: `umask 077; watchkeeper "
                "keygen > encryption-key`, give the same file to every instance, and keep a copy."
            )
    host = parse_bind(settings.http_bind)[0]
    if host in UNSPECIFIED_HOSTS and settings.advertise_url is None:
        yield (
            f"{PREFIX}HTTP_BIND is {settings.http_bind}, every interface, so the other instances "
            f"cannot be told where to forward to. Set {PREFIX}ADVERTISE_URL to the address under "
            "which they reach this one, for example http://10.0.0.7:8080."
        )


def _with_variables(text: str) -> str:
    """Write the settings that a sentence names as the variables that an operator knows."""
    names = sorted(Settings.model_fields, key=len, reverse=True)
    pattern = re.compile(rf"(?<![A-Za-z_])({'|'.join(names)})(?![A-Za-z_])", re.IGNORECASE)
    return pattern.sub(
        lambda match: PREFIX + match[0].upper() if "_" in match[0] else match[0], text
    )


def _warnings(settings: Settings) -> Iterator[str]:
    if settings.encryption_key is None and settings.store is StoreKind.SQLITE:
        yield (
            f"{PREFIX}ENCRYPTION_KEY_FILE is not set: credentials are kept unencrypted in "
            f"{settings.state_dir} and {settings.shared_dir}."
        )
    host = parse_bind(settings.http_bind)[0]
    url = settings.advertise_url or ""
    if urlsplit(url).hostname in {"localhost", "127.0.0.1", "::1"} and host in UNSPECIFIED_HOSTS:
        yield (
            f"{PREFIX}ADVERTISE_URL is {url}: only instances on this very host can forward to it."
        )
    for field in SECRET_FIELDS:
        path: Path | None = getattr(settings, f"{field}_file")
        if path is not None and path.is_file() and path.stat().st_mode & 0o077:
            yield f"{path} can be read by others. Run: chmod 600 {path}"


def _unknown_variables() -> Iterator[str]:
    """A mistyped name would otherwise be ignored in silence."""
    known = {variable_of(field) for field in Settings.model_fields}
    for name in sorted(os.environ):
        if not name.startswith(PREFIX) or name in known:
            continue
        if FOREIGN_VARIABLES.fullmatch(name.removeprefix(PREFIX)):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        yield f"{name} is no setting" + (f"; did you mean {near[0]}?" if near else ".")
