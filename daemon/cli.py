"""The `watchkeeper` command: what a person or a script can ask of it.

Each command loads what it needs when it runs, so that `--help` answers at once. Exit codes are in
`Exit` and in docs/cli.md. Secrets are read from files or the environment, never from an argument,
where a process list would show them.

Never lives here: anything that an instance does by itself.
"""

from __future__ import annotations

import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote, urlencode

import typer

if TYPE_CHECKING:
    from daemon.findings import Finding
    from daemon.remote import Remote
    from daemon.settings import Loaded

ACCOUNTS = "/api/whatsapp/accounts"
POLL_S = 1.0
FOLLOW_S = 2.0
PAIRING_WAIT_S = 180.0
DEAD_ENDS = frozenset({"logged_out", "banned", "quarantined", "stopped"})


class Exit(IntEnum):
    """How a command ends, for scripts."""

    OK = 0
    REFUSED = 1
    """The instance said no, or `doctor` or `init` found a fault."""
    USAGE = 2
    """The arguments or the settings are wrong."""
    UNREACHABLE = 3
    """No instance, or no store, answered."""
    WAITED = 4
    """What was waited for did not happen in time."""


app = typer.Typer(
    name="watchkeeper",
    no_args_is_help=True,
    add_completion=False,
    # A traceback of Rich's shows local variables, and with them secrets.
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Keeps WhatsApp accounts alive through redeploys.",
)
accounts_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="The accounts.")
loopback_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="The loopback connector's phone."
)
app.add_typer(accounts_app, name="accounts")
app.add_typer(loopback_app, name="loopback")

Url = Annotated[
    str | None,
    typer.Option("--url", help="Which instance; default: the one of the present settings."),
]
TokenFile = Annotated[
    Path | None, typer.Option("--token-file", help="File with the admin token.", dir_okay=False)
]
Json = Annotated[bool, typer.Option("--json", help="Answer in JSON, for scripts.")]
AccountArgument = Annotated[str, typer.Argument(metavar="ACCOUNT", help="The account's id.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; logged and kept.")]


@contextmanager
def _ending() -> Iterator[None]:
    """Turn what went wrong into one sentence on stderr and an exit code."""
    from daemon.remote import BadTarget, Refused, Unreachable
    from daemon.settings import SettingsRefused
    from daemon.terminal import complain

    try:
        yield
    except SettingsRefused as refused:
        for problem in refused.problems:
            complain(problem)
        raise typer.Exit(Exit.USAGE) from None
    except BadTarget as error:
        complain(str(error))
        raise typer.Exit(Exit.USAGE) from None
    except Refused as refused:
        request = f" [request {refused.request_id}]" if refused.request_id else ""
        complain(f"{refused} ({refused.code}){request}")
        raise typer.Exit(Exit.REFUSED) from None
    except Unreachable as error:
        complain(str(error))
        raise typer.Exit(Exit.UNREACHABLE) from None


def _load(*, serving: bool = False) -> Loaded:
    from daemon.settings import load_settings

    return load_settings(serving=serving)


@contextmanager
def _remote(url: str | None, token_file: Path | None) -> Iterator[Remote]:
    """Reach the instance that the options or the settings name."""
    from daemon.remote import Remote, local_address, read_token

    with _ending():
        settings = _load().settings
        token = read_token(settings, token_file)
        with Remote(url or local_address(settings), token) as remote:
            yield remote


def _account_path(account: str, rest: str = "") -> str:
    return f"{ACCOUNTS}/{quote(account, safe='')}{rest}"


def _show_version(wanted: bool) -> None:
    if wanted:
        from daemon import __version__

        typer.echo(f"watchkeeper {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Say which.")
    ] = False,
) -> None:
    """Keep WhatsApp accounts alive through redeploys."""


# --- an instance -----------------------------------------------------------------------------


@app.command()
def run(
    no_warden: Annotated[
        bool,
        typer.Option(
            "--no-warden", help="Without the process that kills a hung instance; docs/operating.md."
        ),
    ] = False,
    told: Annotated[
        int | None, typer.Option(hidden=True, help="Where the warden listens; it sets this.")
    ] = None,
) -> None:
    """Run an instance, until SIGTERM, SIGINT or `watchkeeper drain`."""
    with _ending():
        loaded = _load(serving=True)
        import trio

        from daemon.main import serve
        from daemon.terminal import remark

        for warning in loaded.warnings:
            remark(warning)
        if told is None and not no_warden:
            remark("No warden here (Linux only): a hung instance is not killed.")
        raise typer.Exit(trio.run(serve, loaded.settings, told))


@app.command()
def init(
    epoch: Annotated[
        int, typer.Option(min=0, help="Begin above this epoch, after a loss of the lease.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Create the group's lease, once, and check what else the store must have.

    Touches nothing that exists. With Firestore each check is a line, and what is missing comes with
    the command that mends it.
    """
    import trio

    from daemon.findings import Verdict, fail
    from daemon.initialise import STORE_S, initialise, inspect_store
    from daemon.terminal import complain, print_findings, print_json, say
    from machine.ports import LeaseMissing, StoreMisconfigured, StoreUnavailable

    created = False
    refused: tuple[Finding, ...] = ()
    with _ending():
        settings = _load().settings
        try:
            created = trio.run(lambda: initialise(settings, epoch=epoch))
        except (StoreMisconfigured, LeaseMissing) as error:
            complain(str(error))
            refused = (fail("lease", str(error), "See below, or docs/firestore.md."),)
        except (StoreUnavailable, trio.TooSlowError) as error:
            complain(f"The store did not answer within {STORE_S:g} s. {error}".strip())
            raise typer.Exit(Exit.UNREACHABLE) from None
        findings = (*refused, *trio.run(inspect_store, settings))
    bad = any(finding.verdict is Verdict.FAIL for finding in findings)
    if as_json:
        told = [finding.as_json() for finding in findings]
        print_json({"ok": not bad, "created": created, "group": settings.group, "findings": told})
    else:
        if created:
            say(f"The lease of group {settings.group} is there: released, at epoch {epoch}.")
        elif not refused:
            say(f"The lease of group {settings.group} is there already. Nothing was changed.")
        print_findings(findings)
    raise typer.Exit(Exit.REFUSED if bad else Exit.OK)


@app.command()
def keygen(
    token: Annotated[
        bool, typer.Option("--token", help="Make an admin token instead of an encryption key.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Write it to this new file with mode 0600 instead of printing it."),
    ] = None,
) -> None:
    """Make an encryption key (base64 of 32 bytes), or an admin token."""
    import base64
    import os
    import secrets

    from daemon.terminal import complain

    made = secrets.token_urlsafe(32) if token else base64.b64encode(os.urandom(32)).decode()
    if output is None:
        typer.echo(made)
        return
    try:
        # Exclusive: an overwritten encryption key would lose every account.
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(made + "\n")
    except OSError as error:
        complain(f"{output} was not written: {error.strerror}.")
        raise typer.Exit(Exit.USAGE) from None


@app.command()
def config(as_json: Json = False) -> None:
    """Show the effective settings, each with its source. Secrets are masked."""
    from daemon.settings import serving_problems, variable_of
    from daemon.terminal import print_json, print_table, remark

    with _ending():
        loaded = _load()
    plain = loaded.settings.model_dump(mode="json")
    rows = [
        (variable_of(name), "" if value is None else value, loaded.sources[name])
        for name, value in plain.items()
    ]
    if as_json:
        print_json({name: {"value": value, "source": source} for name, value, source in rows})
    else:
        print_table(("setting", "value", "from"), rows)
    for warning in loaded.warnings:
        remark(warning)
    for problem in serving_problems(loaded.settings):
        remark(f"An instance would not start: {problem}")


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check store, permissions, clock, Node and ports, and say what to do."""
    import trio

    from daemon.doctor import examine
    from daemon.findings import Verdict
    from daemon.terminal import print_findings, print_json

    with _ending():
        findings = trio.run(examine, _load())
    bad = any(finding.verdict is Verdict.FAIL for finding in findings)
    if as_json:
        print_json({"ok": not bad, "findings": [finding.as_json() for finding in findings]})
    else:
        print_findings(findings)
    raise typer.Exit(Exit.REFUSED if bad else Exit.OK)


@app.command()
def health(
    ready: Annotated[
        bool, typer.Option("--ready", help="Whether it can answer or forward, not only lives.")
    ] = False,
    url: Url = None,
) -> None:
    """Ask the instance of these settings how it is, for a container's health check. No token."""
    from daemon.remote import local_address, probe
    from daemon.terminal import complain

    with _ending():
        well, told = probe(url or local_address(_load().settings), "/readyz" if ready else "/livez")
    if not well:
        complain(told)
        raise typer.Exit(Exit.REFUSED)


@app.command("setup-whatsapp")
def setup_whatsapp(
    directory: Annotated[
        Path | None,
        typer.Option(
            "--directory",
            help="Where to; default: WATCHKEEPER_BRIDGE_DIR, or inside the installed package.",
            file_okay=False,
        ),
    ] = None,
) -> None:
    """Install Baileys, as locked, for the connector `baileys`. Needs Node.js, npm and its registry.

    No package's own scripts are run.
    """
    from daemon.bridge.install import SOURCES, BridgeUnusable, find_node, set_up
    from daemon.terminal import complain

    with _ending():
        settings = _load().settings
        where = directory or settings.bridge_dir or SOURCES
        try:
            node = find_node(settings.node)
            baileys = set_up(where)
        except BridgeUnusable as error:
            complain(str(error))
            raise typer.Exit(Exit.REFUSED) from None
    typer.echo(f"Baileys {baileys} is in {where}, for Node.js {node.version}.")
    if directory is not None and directory != settings.bridge_dir:
        typer.echo(f"Set WATCHKEEPER_BRIDGE_DIR={directory.absolute()} for the instances.")


@app.command()
def cost(
    accounts: Annotated[int, typer.Option(min=0, help="How many accounts.")] = 100,
    messages: Annotated[int, typer.Option(min=0, help="Messages sent a day.")] = 1000,
    received: Annotated[int, typer.Option(min=0, help="Messages received a day.")] = 1000,
    standbys: Annotated[int, typer.Option(min=0, help="How many instances stand by.")] = 1,
    deploys: Annotated[float, typer.Option(min=0, help="Deploys a day.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Estimate what Firestore costs a month with the present settings."""
    from daemon.cost import Load, report
    from daemon.terminal import print_json, print_table, say

    with _ending():
        settings = _load().settings
    told = report(settings, Load(accounts, messages, standbys, deploys, received))
    if as_json:
        print_json(told)
        return
    rows: Any = told["rows"]
    names = ("reads", "writes", "deletes")
    cells = [
        (row["what"], row["how"], *(f"{row[name]:,}" for name in names), f"${row['dollars']:.2f}")
        for row in rows
    ]
    print_table(("a month", "how", *names, "price"), cells)
    say(f"Together ${told['dollarsPerMonth']} a month at list price; {told['note']}.")
    say(f"Prices: {told['prices']}.")


@app.command()
def diagram(
    format: Annotated[str, typer.Option(help="mermaid, dot, svg, png, md or json.")] = "mermaid",
    diff: Annotated[
        Path | None,
        typer.Option(help="Mark what changed since this earlier `--format json`.", exists=True),
    ] = None,
    current: Annotated[str | None, typer.Option(help="Mark this state as the present one.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write to this file instead of to stdout.")
    ] = None,
) -> None:
    """Draw the state machine, from the same table that it runs on."""
    from daemon.diagram import DiagramRefused, Format, parse_old, render
    from daemon.terminal import complain
    from machine.states import State

    try:
        state = State(current.upper()) if current else None
        drawn = render(format, current=state, old=parse_old(diff.read_bytes()) if diff else None)
        if format == Format.PNG and output is None and sys.stdout.isatty():
            raise DiagramRefused("a PNG is nothing for a terminal: name a file with --output.")
        if output is None:
            sys.stdout.buffer.write(drawn)
        else:
            output.write_bytes(drawn)
    except ValueError:
        complain(f"{current} is no state. Known: {', '.join(State)}.")
        raise typer.Exit(Exit.USAGE) from None
    except (DiagramRefused, OSError) as error:
        complain(str(error))
        raise typer.Exit(Exit.USAGE) from None


# --- asking a running instance ---------------------------------------------------------------


@app.command()
def status(url: Url = None, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Show an instance: state, lease, restore, standbys, accounts."""
    from daemon.terminal import print_json, print_status

    with _remote(url, token_file) as remote:
        dashboard = remote.ask("GET", "/api/status/dashboard")
    if as_json:
        print_json(dashboard)
    else:
        print_status(dashboard)


@app.command()
def send(
    account: AccountArgument,
    to: Annotated[str, typer.Argument(help="The recipient's phone number, international.")],
    text: Annotated[str, typer.Argument(help="The message; `-` reads it from stdin.")],
    idempotency_key: Annotated[
        str | None,
        typer.Option(help="The same key sends the same message once, however often you ask."),
    ] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Send a text message."""
    import uuid

    from daemon.remote import Unreachable
    from daemon.terminal import print_json, say

    key = idempotency_key or str(uuid.uuid4())
    body = {"accountId": account, "to": to, "message": sys.stdin.read() if text == "-" else text}
    with _remote(url, token_file) as remote:
        try:
            answer = remote.ask(
                "POST",
                "/api/whatsapp/send-message",
                body,
                headers={"Idempotency-Key": key},
            )
        except Unreachable as error:
            raise Unreachable(
                f"{error} It is not known whether the message was accepted; to try again without "
                f"sending it twice: --idempotency-key {key}"
            ) from error
    if as_json:
        print_json(answer)
        return
    meanings = {
        "server_ack": "the server has it",
        "queued": "kept; it goes out when the account can",
        "sending": "kept; on its way",
        "delivered": "the recipient's phone has it",
        "read": "the recipient has read it",
    }
    what = str(answer.get("status"))
    say(f"{answer.get('messageId')}: {what} ({meanings.get(what, 'see its status')})")


@app.command()
def messages(
    account: AccountArgument,
    cursor: Annotated[str, typer.Option(help="Go on from there: the one that was shown.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=100, help="Messages at once.")] = 100,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show all, and go on as more arrive, until Ctrl+C.")
    ] = False,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Show what an account has received, oldest first."""
    from daemon.terminal import print_json, print_received, remark

    with _remote(url, token_file) as remote:
        if follow:
            _follow_messages(remote, account, cursor, limit, as_json=as_json)
            return
        answer = _read_messages(remote, account, cursor, limit)
    if as_json:
        print_json(answer)
        return
    print_received(answer["messages"])
    if answer["messages"]:
        more = "There are more. " if answer["more"] else ""
        remark(f"{more}Go on with: --cursor {answer['cursor']}")


def _read_messages(remote: Remote, account: str, cursor: str, limit: int) -> dict[str, Any]:
    asked = {"accountId": account, "direction": "in", "cursor": cursor, "limit": str(limit)}
    answer: dict[str, Any] = remote.ask("GET", f"/api/whatsapp/messages?{urlencode(asked)}")
    return answer


def _follow_messages(
    remote: Remote,
    account: str,
    cursor: str,
    limit: int,
    *,
    as_json: bool,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Print messages as they arrive: one a line, or one JSON document a line. Never returns.

    An instance that does not answer for a moment is asked again: the cursor holds at any other.
    """
    from daemon.remote import Refused, Unreachable
    from daemon.terminal import print_received_line, remark

    away = False
    while True:
        try:
            answer = _read_messages(remote, account, cursor, limit)
        except (Refused, Unreachable) as error:
            if isinstance(error, Refused) and error.status != 503:
                raise
            if not away:
                remark(f"{error} Asking again.")
            away, more = True, False
        else:
            away, more, cursor = False, answer["more"], answer["cursor"]
            for message in answer["messages"]:
                print_received_line(message, as_json=as_json)
        if not more:
            pause(FOLLOW_S)


@app.command("step-down")
def step_down(
    reason: Reason = "asked on the command line",
    force: Annotated[
        bool, typer.Option("--force", help="Even when nobody stands by to take over.")
    ] = False,
    to: Annotated[str | None, typer.Option(help="Which standby takes over.")] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Have the ACTIVE instance give the lease to a standby."""
    body: dict[str, object] = {"reason": reason, "force": force}
    if to is not None:
        body["handoffTo"] = to
    _operate("step-down", body, "was asked to step down", url, token_file, as_json)


@app.command()
def drain(
    reason: Reason = "asked on the command line",
    url: Url = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """End the instance that you ask, in order: settle, close, release, exit."""
    _operate("drain", {"reason": reason}, "drains and ends", url, token_file, as_json)


def _operate(
    what: str,
    body: dict[str, object],
    told: str,
    url: str | None,
    token_file: Path | None,
    as_json: bool,
) -> None:
    from daemon.terminal import print_json, say

    with _remote(url, token_file) as remote:
        answer = remote.ask("POST", f"/api/admin/{what}", body)
    if as_json:
        print_json(answer)
    else:
        to = f", handing over to {answer['handoffTo']}" if answer.get("handoffTo") else ""
        say(f"{answer.get('instance', 'The instance')} {told}{to}.")


@app.command("import")
def import_accounts(
    from_baileys: Annotated[
        Path,
        typer.Option(
            "--from-baileys",
            help="Directory with Baileys multi-file sessions, on the holder's host.",
        ),
    ],
    url: Url = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Bring accounts of another backend in. The originals are not touched."""
    from daemon.remote import IMPORT_S
    from daemon.terminal import print_json, say

    directory = str(from_baileys.absolute())
    with _remote(url, token_file) as remote:
        answer = remote.ask(
            "POST", "/api/admin/import", {"directory": directory}, answer_s=IMPORT_S
        )
    if as_json:
        print_json(answer)
        return
    report: dict[str, Any] = answer.get("report") or {}
    for name, value in report.items():
        items = value if isinstance(value, list) else [value]
        say(f"{name}: {len(items) if isinstance(value, list) else value}")
        if isinstance(value, list):
            for item in items:
                shown = item.values() if isinstance(item, dict) else [item]
                say("  " + ", ".join(str(part) for part in shown))


# --- accounts --------------------------------------------------------------------------------


@accounts_app.command("list")
def list_accounts(url: Url = None, token_file: TokenFile = None, as_json: Json = False) -> None:
    """List every account."""
    from daemon.terminal import print_accounts, print_json

    with _remote(url, token_file) as remote:
        answer = remote.ask("GET", ACCOUNTS)
    if as_json:
        print_json(answer)
    else:
        print_accounts(answer.get("accounts", []))


@accounts_app.command("add")
def add_account(
    name: Annotated[str, typer.Argument(help="The account's name, for people.")],
    account_id: Annotated[
        str | None,
        typer.Option(
            "--id", help="Its id, for good; default: the name in small letters, digits, -."
        ),
    ] = None,
    wait_s: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait for the scan; 0: do not.")
    ] = PAIRING_WAIT_S,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Add an account: show its QR code here and wait until the phone has scanned it."""
    from daemon.terminal import print_json, say

    body: dict[str, object] = {"name": name}
    # Nothing of the name is left where it is in another script: then the instance makes one up.
    if chosen := account_id or _id_of(name):
        body["accountId"] = chosen
    with _remote(url, token_file) as remote:
        account: dict[str, Any] = remote.ask("POST", ACCOUNTS, body)["account"]
        if wait_s > 0:
            account = _wait_connected(remote, str(account["accountId"]), wait_s)
    if as_json:
        print_json({"account": account})
    else:
        phone = f" as {account['phone']}" if account.get("phone") else ""
        say(f"{account['accountId']}: {account['status']}{phone}")


def _id_of(name: str) -> str:
    """An account id made of a name: `Sales, München` is `sales-munchen`."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:64].rstrip("-")


@accounts_app.command("qr")
def show_account_qr(
    account: AccountArgument,
    wait_s: Annotated[
        float, typer.Option("--wait", min=0, help="Seconds to wait for the scan; 0: do not.")
    ] = PAIRING_WAIT_S,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Show an account's QR code, and wait until the phone has scanned it."""
    from daemon.terminal import print_json, say, show_qr

    with _remote(url, token_file) as remote:
        if as_json or wait_s == 0:
            answer = remote.ask("GET", _account_path(account, "/qr"))
            if as_json:
                print_json(answer)
            else:
                show_qr(str(answer["qr"]))
            return
        found = _wait_connected(remote, account, wait_s)
    say(f"{found['accountId']}: {found['status']}")


def _wait_connected(
    remote: Remote, account: str, wait_s: float, *, pause: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """Show each new QR code until the account is connected.

    Exits with `WAITED` after `wait_s`, with `REFUSED` when the account has come to a dead end.
    """
    from daemon.remote import Refused
    from daemon.terminal import complain, remark, show_qr

    deadline = time.monotonic() + wait_s
    shown = ""
    while time.monotonic() < deadline:
        try:
            found: dict[str, Any] = remote.ask("GET", _account_path(account))["account"]
            if found["status"] == "connected":
                return found
            if found["status"] in DEAD_ENDS:
                complain(f"{account} is {found['status']}: {found.get('lastError') or 'see log'}")
                raise typer.Exit(Exit.REFUSED)
            qr = str(remote.ask("GET", _account_path(account, "/qr"))["qr"])
            if qr != shown:
                show_qr(qr)
                remark(
                    "On the phone: WhatsApp, Settings, Linked devices, Link a device. (With the "
                    f"loopback connector: watchkeeper loopback scan {account})"
                )
                shown = qr
        except Refused as refused:
            # No code now (it is being made, or was scanned), or nobody ACTIVE for a moment.
            if refused.status not in {409, 503}:
                raise
        pause(POLL_S)
    complain(f"{account} was not connected within {wait_s:g} s. Again: watchkeeper accounts qr")
    raise typer.Exit(Exit.WAITED)


@accounts_app.command("logout")
def log_out_account(
    account: AccountArgument, url: Url = None, token_file: TokenFile = None, as_json: Json = False
) -> None:
    """Unlink an account's device at WhatsApp. It stays listed; pair it again with `qr`."""
    from daemon.terminal import print_json, say

    with _remote(url, token_file) as remote:
        answer = remote.ask("POST", _account_path(account, "/logout"))
    if as_json:
        print_json(answer)
    else:
        say(f"{account} is being logged out.")


@accounts_app.command("remove")
def remove_account(
    account: AccountArgument,
    purge: Annotated[
        bool, typer.Option("--purge", help="Destroy its keys instead of archiving them.")
    ] = False,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Remove an account. Its keys are archived, unless you purge them."""
    from daemon.terminal import print_json, say

    with _remote(url, token_file) as remote:
        remote.ask("DELETE", _account_path(account, "?purge=true" if purge else ""))
    if as_json:
        print_json({"removed": account, "purged": purge})
    else:
        say(f"{account} is removed{' and its keys destroyed' if purge else '; keys archived'}.")


# --- the loopback connector ------------------------------------------------------------------


@loopback_app.command()
def receive(
    account: AccountArgument,
    text: Annotated[str, typer.Argument(help="What to write.")],
    sender: Annotated[
        str, typer.Option("--from", help="Whose number writes.", metavar="NUMBER")
    ] = "4915187654321",
    url: Url = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Have somebody write to an account of the loopback connector."""
    from daemon.terminal import print_json, say

    body: dict[str, object] = {"accountId": account, "from": sender, "text": text}
    with _remote(url, token_file) as remote:
        answer = remote.ask("POST", "/api/loopback/receive", body)
    if as_json:
        print_json(answer)
    else:
        say(f"{answer['messageId']} is with the server; see: watchkeeper messages {account}")


@loopback_app.command()
def scan(
    account: AccountArgument,
    phone: Annotated[
        str | None, typer.Option(help="The phone's number; default: a made-up one.")
    ] = None,
    url: Url = None,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Scan an account's QR code with the loopback connector's phone."""
    from daemon.terminal import print_json, say

    body: dict[str, object] = {} if phone is None else {"phone": phone}
    with _remote(url, token_file) as remote:
        answer = remote.ask("POST", f"/api/loopback/scan/{quote(account, safe='')}", body)
    if as_json:
        print_json(answer)
    else:
        say(f"{account} is scanned.")
