from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner, Result

from daemon.cli import Exit, _follow_messages, _wait_connected, app
from daemon.remote import Remote, local_address
from daemon.settings import PREFIX, Settings

TOKEN = "token-of-the-operator-0001"
ACCOUNT = {"accountId": "sales", "name": "Sales", "status": "connected", "phone": "4915112345678"}

COMMANDS = {
    *("run", "init", "keygen", "config", "doctor", "cost", "diagram", "status", "accounts"),
    *("send", "messages", "step-down", "drain", "import", "loopback", "setup-whatsapp", "health"),
}

Answer = tuple[int, dict[str, Any] | str]


class FakeInstance:
    """An instance as the commands see it: scripted answers, and what was asked of it."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], list[Answer]] = {}
        self.asked: list[tuple[str, str, dict[str, str], Any]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                headers = {name.lower(): value for name, value in self.headers.items()}
                fake.asked.append((self.command, self.path, headers, body))
                status, content = fake.next_answer(self.command, self.path)
                raw = (
                    b""
                    if status == 204
                    else (content if isinstance(content, str) else json.dumps(content)).encode()
                )
                self.send_response(status)
                self.send_header("content-length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            do_GET = do_POST = do_DELETE = answer  # noqa: N815  # the library's names

            def log_message(self, format: str, *args: object) -> None:
                """Stay silent."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def will(self, method: str, path: str, *answers: Answer) -> None:
        """Answer a request so; with several, one after the other, the last for ever."""
        self.answers[method, path] = list(answers)

    def next_answer(self, method: str, path: str) -> Answer:
        script = self.answers.get((method, path), [refusal(404, "account_not_found", "No.")])
        return script.pop(0) if len(script) > 1 else script[0]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def refusal(status: int, code: str, message: str) -> Answer:
    return status, {"success": False, "error": code, "message": message, "requestId": "r-17"}


def fine(**content: Any) -> Answer:
    return 200, {"success": True, **content}


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeInstance]:
    fake = FakeInstance()
    monkeypatch.setenv("WATCHKEEPER_ADVERTISE_URL", fake.url)
    monkeypatch.setenv("WATCHKEEPER_ADMIN_TOKEN", TOKEN)
    try:
        yield fake
    finally:
        fake.close()


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIX) or name == "FIRESTORE_EMULATOR_HOST":
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)


def command(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=stdin)


# --- as a process ----------------------------------------------------------------------------


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parent.parent)
    return subprocess.run(
        [sys.executable, "-m", "daemon", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": root, **environment},
        check=False,
    )


def test_help_is_there_at_once_and_names_every_command() -> None:
    process("--help")  # Once, so that the files are in memory and compiled.
    begun = time.perf_counter()
    ended = process("--help")
    took_s = time.perf_counter() - begun
    assert ended.returncode == 0
    commands = typer.main.get_command(app)
    assert isinstance(commands, TyperGroup)
    assert set(commands.commands) == COMMANDS
    for name in COMMANDS:
        assert f"  {name} " in ended.stdout
    # Measured 0.22 s on an idle core; the limit leaves room for a busy machine.
    assert took_s < 1.5


def test_help_loads_nothing_heavy() -> None:
    root = str(Path(__file__).resolve().parent.parent)
    code = "import sys, daemon.cli; print(*sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    heavy = {"trio", "httpx", "pydantic", "rich.table", "grpc", "fastapi", "loguru", "transitions"}
    assert heavy & set(ended.stdout.split()) == set()


def test_refused_settings_end_run_with_2_and_one_sentence_each() -> None:
    ended = process(
        "run", WATCHKEEPER_LEASE_TTL_S="9", WATCHKEEPER_ADMIN_TOKEN="too-short-secret"[:9]
    )
    assert ended.returncode == Exit.USAGE
    assert ended.stdout == ""
    assert "10.5 s" in ended.stderr
    assert "WATCHKEEPER_ADMIN_TOKEN must be" in ended.stderr
    assert "too-short" not in ended.stderr
    assert "Traceback" not in ended.stderr


def test_every_command_and_exit_code_is_documented() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs/cli.md").read_text()
    for name in COMMANDS:
        assert f"`{name}" in page
    for code in Exit:
        assert f"| {code.value} | " in page


# --- without an instance ---------------------------------------------------------------------


def test_keygen_makes_a_new_key_each_time() -> None:
    keys = {command("keygen").stdout.strip() for _ in range(3)}
    assert len(keys) == 3
    assert {len(base64.b64decode(key)) for key in keys} == {32}
    assert len(command("keygen", "--token").stdout.strip()) >= 32


def test_keygen_writes_a_private_file_and_never_over_one(tmp_path: Path) -> None:
    path = tmp_path / "key"
    assert command("keygen", "--output", str(path)).stdout == ""
    made = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = command("keygen", "--output", str(path))
    assert again.exit_code == Exit.USAGE
    assert "File exists" in again.stderr
    assert path.read_text() == made


def test_init_creates_the_lease_once() -> None:
    first = command("init", "--json")
    assert json.loads(first.stdout) == {
        "ok": True,
        "created": True,
        "group": "default",
        "findings": [],
    }
    second = command("init")
    assert second.exit_code == 0
    assert "Nothing was changed" in second.stdout


def test_init_leaves_a_file_that_is_no_store_alone(tmp_path: Path) -> None:
    path = tmp_path / ".watchkeeper/shared/shared.db"
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    ended = command("init")
    assert ended.exit_code == Exit.REFUSED
    assert "shared.db" in ended.stderr
    assert path.read_text() == "precious"


def test_config_names_sources_and_masks_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHKEEPER_ADMIN_TOKEN", TOKEN)
    monkeypatch.setenv("WATCHKEEPER_GROUP", "blue")
    shown = command("config", "--json")
    settings = json.loads(shown.stdout)
    assert settings["WATCHKEEPER_GROUP"] == {"value": "blue", "source": "env"}
    assert settings["WATCHKEEPER_LEASE_TTL_S"] == {"value": 15.0, "source": "default"}
    assert settings["WATCHKEEPER_ADMIN_TOKEN"]["source"] == "env"
    table = command("config")
    assert "blue" in table.stdout
    for text in (shown.stdout, shown.stderr, table.stdout, table.stderr):
        assert TOKEN not in text


def test_config_says_what_keeps_an_instance_from_starting() -> None:
    ended = command("config")
    assert ended.exit_code == 0
    assert "An instance would not start: WATCHKEEPER_ADMIN_TOKEN_FILE" in ended.stderr


def test_diagram_to_stdout_and_to_a_file(tmp_path: Path) -> None:
    assert command("diagram").stdout.startswith("stateDiagram-v2")
    path = tmp_path / "old.json"
    assert command("diagram", "--format", "json", "--output", str(path)).stdout == ""
    marked = command("diagram", "--format", "md", "--diff", str(path), "--current", "active")
    assert "**ACTIVE** (present)" in marked.stdout
    assert "kept" in marked.stdout


@pytest.mark.parametrize(
    "arguments", [["--format", "gif"], ["--current", "ASLEEP"], ["--diff", "/nowhere"]]
)
def test_bad_diagram_arguments_end_with_2(arguments: list[str]) -> None:
    assert command("diagram", *arguments).exit_code == Exit.USAGE


def test_nobody_there_ends_with_3_and_says_what_to_do() -> None:
    ended = command("status", "--url", "http://127.0.0.1:1")
    assert ended.exit_code == Exit.UNREACHABLE
    assert "watchkeeper run" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("url", ["nowhere", "ftp://a", "http://user:secret-pass@a:1"])
def test_bad_address_ends_with_2(url: str) -> None:
    ended = command("status", "--url", url)
    assert ended.exit_code == Exit.USAGE
    assert "secret-pass" not in ended.stderr


def test_missing_token_file_ends_with_2(tmp_path: Path) -> None:
    ended = command("status", "--token-file", str(tmp_path / "none"))
    assert ended.exit_code == Exit.USAGE


def test_commands_reach_an_instance_that_listens_on_every_interface() -> None:
    assert local_address(Settings(http_bind="0.0.0.0:81")) == "http://127.0.0.1:81"
    assert local_address(Settings(http_bind="[::]:81")) == "http://[::1]:81"
    assert local_address(Settings(http_bind="10.0.0.7:81")) == "http://10.0.0.7:81"


# --- with an instance ------------------------------------------------------------------------


def test_token_goes_into_the_header_and_nowhere_else(
    instance: FakeInstance, tmp_path: Path
) -> None:
    instance.will("GET", "/api/whatsapp/accounts", fine(accounts=[], count=0))
    command("accounts", "list")
    other = tmp_path / "token"
    other.write_text("another-token-from-a-file\n")
    command("accounts", "list", "--token-file", str(other))
    assert [headers["authorization"] for _, _, headers, _ in instance.asked] == [
        f"Bearer {TOKEN}",
        "Bearer another-token-from-a-file",
    ]


def test_refusal_is_told_in_its_own_words_and_ends_with_1(instance: FakeInstance) -> None:
    instance.will("POST", "/api/admin/step-down", refusal(409, "no_standby", "Nobody stands by."))
    ended = command("step-down")
    assert ended.exit_code == Exit.REFUSED
    assert "Nobody stands by. (no_standby) [request r-17]" in ended.stderr
    assert ended.stdout == ""


def test_wrong_token_says_which_option_helps(instance: FakeInstance) -> None:
    instance.will(
        "GET", "/api/status/dashboard", refusal(401, "unauthorized", "The token is wrong.")
    )
    ended = command("status")
    assert ended.exit_code == Exit.REFUSED
    assert "--token-file" in ended.stderr
    assert TOKEN not in ended.stderr


@pytest.mark.parametrize("answer", [(200, "<html>"), (502, "Bad gateway"), (200, "[]")])
def test_another_server_is_not_mistaken_for_ours(instance: FakeInstance, answer: Answer) -> None:
    instance.will("GET", "/api/status/dashboard", answer)
    assert command("status").exit_code == Exit.UNREACHABLE


def test_error_without_our_shape_is_no_success(instance: FakeInstance) -> None:
    instance.will("GET", "/api/status/dashboard", (500, {"detail": "broken"}))
    ended = command("status")
    assert ended.exit_code == Exit.REFUSED
    assert "The answer was 500." in ended.stderr


def test_accounts_are_listed_for_people_and_for_scripts(instance: FakeInstance) -> None:
    evil = {**ACCOUNT, "name": "[red]x\x1b[2J\x07"}
    instance.will("GET", "/api/whatsapp/accounts", fine(accounts=[evil], count=1))
    table = command("accounts", "list").stdout
    assert "sales" in table
    assert "[red]x" in table
    assert "\x1b" not in table
    assert json.loads(command("accounts", "list", "--json").stdout)["accounts"] == [evil]


def test_send_prints_the_message_id(instance: FakeInstance) -> None:
    instance.will(
        "POST",
        "/api/whatsapp/send-message",
        fine(messageId="3EB0A1", status="server_ack"),
        (202, {"success": True, "messageId": "3EB0A2", "status": "queued"}),
    )
    first = command("send", "sales", "+4915112345678", "hello", "--idempotency-key", "k1")
    second = command("send", "sales", "+4915112345678", "-", "--json", stdin="from stdin")
    assert first.stdout.startswith("3EB0A1: server_ack")
    assert json.loads(second.stdout)["status"] == "queued"
    bodies = [body for _, _, _, body in instance.asked]
    assert [body["message"] for body in bodies] == ["hello", "from stdin"]
    keys = [headers["idempotency-key"] for _, _, headers, _ in instance.asked]
    assert keys[0] == "k1"
    assert len(keys[1]) == 36


def test_send_without_an_answer_says_how_to_repeat_it_safely() -> None:
    ended = command("send", "sales", "49", "x", "--url", "http://127.0.0.1:1")
    assert ended.exit_code == Exit.UNREACHABLE
    assert "--idempotency-key" in ended.stderr


def a_received(number: int, **changes: object) -> dict[str, object]:
    return {
        "accountId": "sales",
        "messageId": f"3A{number}",
        "chat": "4915187654321",
        "from": "4915187654321",
        "fromName": "Zoë",
        "text": f"text {number}",
        "sentAt": "2026-01-31T12:00:00.000Z",
        "receivedAt": "2026-01-31T12:00:01.000Z",
        **changes,
    }


def inbox_path(cursor: str, limit: int = 100) -> str:
    return f"/api/whatsapp/messages?accountId=sales&direction=in&cursor={cursor}&limit={limit}"


def test_messages_are_shown_with_their_senders_and_how_to_go_on(instance: FakeInstance) -> None:
    page = [a_received(1), a_received(2, fromName=None, chat="12036304@g.us", text="a\x1b[31mb")]
    instance.will("GET", inbox_path("c0", 2), fine(messages=page, cursor="c1", more=True))
    instance.will("GET", inbox_path(""), fine(messages=[], cursor="", more=False))
    shown = command("messages", "sales", "--cursor", "c0", "--limit", "2")
    assert "Zoë (4915187654321)" in shown.stdout
    assert "4915187654321 in 12036304@g.us" in shown.stdout
    assert "\x1b" not in shown.stdout
    assert "There are more. Go on with: --cursor c1" in shown.stderr
    assert command("messages", "sales").stdout == "no messages\n"
    as_json = command("messages", "sales", "--cursor", "c0", "--limit", "2", "--json")
    assert json.loads(as_json.stdout)["messages"] == page


def test_following_goes_on_over_a_handoff_and_shows_each_message_once(
    instance: FakeInstance, capsys: pytest.CaptureFixture[str]
) -> None:
    class Enough(Exception):
        pass

    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            raise Enough

    away = refusal(503, "store_unavailable", "The store is away.")
    instance.will(
        "GET",
        inbox_path("", 2),
        fine(messages=[a_received(1), a_received(2)], cursor="c1", more=True),
    )
    instance.will(
        "GET", inbox_path("c1", 2), fine(messages=[a_received(3)], cursor="c2", more=False)
    )
    instance.will(
        "GET", inbox_path("c2", 2), away, away, fine(messages=[], cursor="c2", more=False)
    )
    with Remote(instance.url, TOKEN) as remote, pytest.raises(Enough):
        _follow_messages(remote, "sales", "", 2, as_json=True, pause=pause)
    told = capsys.readouterr()
    lines = [json.loads(line)["messageId"] for line in told.out.splitlines()]
    assert lines == ["3A1", "3A2", "3A3"]
    assert told.err.count("Asking again.") == 1


def test_following_an_account_that_nobody_knows_ends(instance: FakeInstance) -> None:
    ended = command("messages", "sales", "--follow")
    assert ended.exit_code == Exit.REFUSED
    assert "No." in ended.stderr


def test_somebody_writes_to_an_account_of_the_loopback_connector(instance: FakeInstance) -> None:
    instance.will("POST", "/api/loopback/receive", fine(messageId="3A1", waiting=1))
    assert "watchkeeper messages sales" in command("loopback", "receive", "sales", "Hello").stdout
    ended = command("loopback", "receive", "sales", "Hello", "--from", "49170", "--json")
    assert json.loads(ended.stdout)["waiting"] == 1
    assert instance.asked[1][3] == {"accountId": "sales", "from": "49170", "text": "Hello"}


def test_add_without_waiting_prints_the_account(instance: FakeInstance) -> None:
    instance.will("POST", "/api/whatsapp/accounts", (201, {"success": True, "account": ACCOUNT}))
    ended = command("accounts", "add", "Sales", "--id", "sales", "--wait", "0", "--json")
    assert json.loads(ended.stdout) == {"account": ACCOUNT}
    assert instance.asked[0][3] == {"name": "Sales", "accountId": "sales"}


@pytest.mark.parametrize(
    ("name", "account_id"),
    [
        ("Anna", "anna"),
        ("Sales, München 2", "sales-munchen-2"),
        ("x" * 63 + " y", "x" * 63),
        ("客服", None),
    ],
)
def test_an_id_is_made_of_the_name(
    instance: FakeInstance, name: str, account_id: str | None
) -> None:
    instance.will("POST", "/api/whatsapp/accounts", (201, {"success": True, "account": ACCOUNT}))
    command("accounts", "add", name, "--wait", "0")
    assert instance.asked[0][3].get("accountId") == account_id


def test_waiting_draws_each_new_code_once_until_connected(
    instance: FakeInstance, capsys: pytest.CaptureFixture[str]
) -> None:
    def account(status: str) -> Answer:
        return fine(account={**ACCOUNT, "status": status})

    path = "/api/whatsapp/accounts/sales"
    away = refusal(503, "no_active_instance", "A handoff.")
    waiting = account("awaiting_scan")
    instance.will("GET", path, waiting, waiting, waiting, away, waiting, account("connected"))
    none_now = refusal(409, "not_awaiting_scan", "No code.")
    instance.will(
        "GET", f"{path}/qr", none_now, fine(qr="first"), fine(qr="first"), fine(qr="second")
    )
    pauses: list[float] = []
    with Remote(instance.url, TOKEN) as remote:
        found = _wait_connected(remote, "sales", 60, pause=pauses.append)
    assert found["status"] == "connected"
    assert capsys.readouterr().err.count("loopback scan sales") == 2
    assert len(pauses) == 5


def test_waiting_for_a_lost_account_ends_with_1_and_for_nobody_with_4(
    instance: FakeInstance,
) -> None:
    path = "/api/whatsapp/accounts/sales"
    instance.will("GET", path, fine(account={**ACCOUNT, "status": "banned"}))
    with Remote(instance.url, TOKEN) as remote:
        with pytest.raises(typer.Exit) as dead:
            _wait_connected(remote, "sales", 60, pause=lambda _: None)
        instance.will("GET", path, fine(account={**ACCOUNT, "status": "connecting"}))
        instance.will("GET", f"{path}/qr", refusal(409, "not_awaiting_scan", "No code."))
        with pytest.raises(typer.Exit) as late:
            _wait_connected(remote, "sales", 0.05, pause=lambda _: None)
    assert (dead.value.exit_code, late.value.exit_code) == (Exit.REFUSED, Exit.WAITED)


def test_account_ids_are_escaped_in_the_path(instance: FakeInstance) -> None:
    command("accounts", "remove", "../admin/drain?x", "--purge")
    assert instance.asked[0][:2] == (
        "DELETE",
        "/api/whatsapp/accounts/..%2Fadmin%2Fdrain%3Fx?purge=true",
    )


def test_operations_carry_their_reason(instance: FakeInstance, tmp_path: Path) -> None:
    accepted = (202, {"success": True, "instance": "a", "state": "ACTIVE", "handoffTo": "b"})
    instance.will("POST", "/api/admin/step-down", accepted)
    instance.will("POST", "/api/admin/drain", accepted)
    instance.will("POST", "/api/admin/import", fine(report={"imported": ["sales"], "failed": []}))
    instance.will("POST", "/api/loopback/scan/sales", fine())
    instance.will("DELETE", "/api/whatsapp/accounts/sales", (204, ""))
    instance.will("POST", "/api/whatsapp/accounts/sales/logout", (202, {"success": True}))
    for arguments in (
        ["step-down", "--reason", "upgrade", "--to", "b"],
        ["drain", "--reason", "upgrade"],
        ["import", "--from-baileys", "sessions"],
        ["loopback", "scan", "sales", "--phone", "4915112345678"],
        ["accounts", "remove", "sales"],
        ["accounts", "logout", "sales"],
    ):
        ended = command(*arguments)
        assert ended.exit_code == 0, ended.stderr
        assert ended.stdout
    bodies = [body for _, _, _, body in instance.asked]
    assert bodies[:4] == [
        {"reason": "upgrade", "force": False, "handoffTo": "b"},
        {"reason": "upgrade"},
        {"directory": str(tmp_path / "sessions")},
        {"phone": "4915112345678"},
    ]


def test_status_shows_the_holder_the_restore_and_the_standbys(instance: FakeInstance) -> None:
    dashboard = {
        "instance": {"id": "a", "state": "ACTIVE", "since": "s", "version": "1", "epoch": 7,
                     "address": instance.url},
        "lease": {"holder": "a", "epoch": 7, "ttlSeconds": 15.0, "remainingSeconds": 12.4,
                  "renewals": 3, "lastRenewalAt": None, "paused": False},
        "restore": {"total": 2, "restored": 1, "failed": 1, "finishedAt": "now", "failures": [
            {"accountId": "old", "cause": "wrong key", "advice": "give the old key"}]},
        "accounts": [ACCOUNT],
        "outbox": {"depth": 4},
        "peers": [{"id": "b", "state": "PASSIVE", "address": "http://b", "seenAt": "now"}],
    }  # fmt: skip
    instance.will("GET", "/api/status/dashboard", fine(**dashboard))
    ended = command("status")
    assert ended.exit_code == 0
    for text in ("ACTIVE", "held by a, epoch 7, ttl 15 s, 12.4 s left", "1 restored, 1 failed of 2",
                 "standby", "b at http://b", "connected"):  # fmt: skip
        assert text in ended.stdout
    assert "wrong key; give the old key" in ended.stderr
    bare = {"instance": dashboard["instance"], "lease": None, "restore": None, "accounts": []}
    instance.will("GET", "/api/status/dashboard", fine(**bare))
    assert "not seen yet" in command("status").stdout


def test_health_is_the_answer_of_the_endpoint(instance: FakeInstance) -> None:
    instance.answers["GET", "/livez"] = [(200, {}), (503, {})]
    assert command("health").exit_code == Exit.OK
    assert command("health").exit_code == Exit.REFUSED
    instance.answers["GET", "/readyz"] = [(200, {})]
    assert command("health", "--ready").exit_code == Exit.OK
