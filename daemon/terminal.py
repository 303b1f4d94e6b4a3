"""What the commands print: tables for people, JSON for scripts, QR codes for phones.

Never lives here: asking or deciding anything. Text from elsewhere is stripped of control
characters first: an account's name must not move the cursor.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from daemon.findings import Finding

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")

STATUS_STYLES = {
    "ok": "green",
    "connected": "green",
    "ACTIVE": "bold green",
    "PASSIVE": "blue",
    "warn": "yellow",
    "backing_off": "yellow",
    "restoring": "yellow",
    "connecting": "yellow",
    "qr_ready": "cyan",
    "awaiting_scan": "cyan",
    "fail": "bold red",
    "banned": "bold red",
    "logged_out": "red",
    "quarantined": "red",
    "not checked": "dim",
}


def clean(value: object) -> str:
    """Make a value fit for one line of a terminal."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _CONTROL.sub(" ", str(value))


def print_json(content: object) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None
) -> None:
    """Print a table; known states and verdicts in their colours."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        cells = (clean(value) for value in row)
        table.add_row(*(Text(cell, style=STATUS_STYLES.get(cell, "")) for cell in cells))
    _console(sys.stdout).print(table)


def print_findings(findings: Iterable[Finding]) -> None:
    """Print each check as a line, and below it, whole, what to do: commands are there to copy."""
    console = _console(sys.stdout)
    for finding in findings:
        style = STATUS_STYLES.get(finding.verdict.value, "")
        line = Text(f"{finding.verdict.value:<12}", style=style)
        line.append(f"{clean(finding.check)}: {clean(finding.found)}", style="default")
        console.print(line, soft_wrap=True)
        if finding.advice:
            console.print(Text(f"{'':<12}-> {clean(finding.advice)}"), soft_wrap=True)


def say(text: str) -> None:
    """Print a sentence on stdout, whole, however long."""
    sys.stdout.write(clean(text) + "\n")


def complain(text: str) -> None:
    """Print a sentence on stderr, marked, in red where there are colours."""
    _console(sys.stderr).print(Text(f"watchkeeper: {clean(text)}", style="red"), soft_wrap=True)


def remark(text: str) -> None:
    """Print a remark on stderr, so that stdout holds nothing but the answer."""
    _console(sys.stderr).print(Text(clean(text), style="yellow"), soft_wrap=True)


def show_qr(qr: str) -> None:
    """Draw a QR code on stderr, small enough for 80 columns."""
    import segno

    segno.make(qr, error="l").terminal(out=sys.stderr, border=2, compact=True)
    sys.stderr.flush()


def print_status(dashboard: Mapping[str, Any]) -> None:
    """Print a dashboard as a few lines and a table of accounts."""
    instance: Mapping[str, Any] = dashboard["instance"]
    lines: list[tuple[str, object]] = [
        ("instance", f"{instance['id']} ({instance.get('version', '?')})"),
        ("state", instance["state"]),
        ("since", instance.get("since")),
        ("epoch", instance.get("epoch")),
        ("address", instance.get("address")),
        ("lease", _lease_line(dashboard.get("lease"))),
        ("restore", _restore_line(dashboard.get("restore"))),
        ("outbox", (dashboard.get("outbox") or {}).get("depth")),
    ]
    lines += [
        ("standby" if peer.get("state") == "PASSIVE" else "peer", _peer_line(peer))
        for peer in dashboard.get("peers", [])
    ]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in lines:
        text = clean(value)
        table.add_row(Text(name, style="bold"), Text(text, style=STATUS_STYLES.get(text, "")))
    _console(sys.stdout).print(table)
    for failure in (dashboard.get("restore") or {}).get("failures", []):
        remark(
            f"not restored: {failure.get('accountId') or 'a store'}: {failure.get('cause')}; "
            f"{failure.get('advice')}"
        )
    print_accounts(dashboard.get("accounts", []))


def print_accounts(accounts: Sequence[Mapping[str, Any]]) -> None:
    """Print accounts as a table, or say that there are none."""
    if not accounts:
        say("no accounts; add one with: watchkeeper accounts add NAME")
        return
    columns = {
        "accountId": "account",
        "name": "name",
        "phone": "phone",
        "status": "status",
        "inMemory": "in memory",
        "queued": "queued",
    }
    if any(account.get("lastError") for account in accounts):
        columns["lastError"] = "last error"
    print_table(
        list(columns.values()), [[account.get(name) for name in columns] for account in accounts]
    )


def print_received(messages: Sequence[Mapping[str, Any]]) -> None:
    """Print received messages as a table, or say that there are none."""
    if not messages:
        say("no messages")
        return
    print_table(
        ["received", "from", "text"],
        [[message["receivedAt"], _sender(message), message["text"]] for message in messages],
    )


def print_received_line(message: Mapping[str, Any], *, as_json: bool) -> None:
    """Print one received message as one line, at once."""
    if as_json:
        sys.stdout.write(json.dumps(message, ensure_ascii=False) + "\n")
    else:
        say(f"{message['receivedAt']}  {_sender(message)}: {message['text']}")
    sys.stdout.flush()


def _sender(message: Mapping[str, Any]) -> str:
    name = message.get("fromName")
    sender = f"{name} ({message['from']})" if name else str(message["from"])
    return sender if message["chat"] == message["from"] else f"{sender} in {message['chat']}"


def _lease_line(lease: Mapping[str, Any] | None) -> str:
    if not lease:
        return "not seen yet"
    holder = lease.get("holder")
    text = f"held by {holder}" if holder else "free"
    text += f", epoch {lease.get('epoch')}, ttl {lease.get('ttlSeconds'):g} s"
    if (remaining := lease.get("remainingSeconds")) is not None:
        text += f", {remaining:.1f} s left"
    if lease.get("paused"):
        text += ", PAUSED by an operator"
    return text


def _restore_line(restore: Mapping[str, Any] | None) -> str:
    if not restore:
        return "none here yet"
    text = f"{restore.get('restored')} restored, {restore.get('failed')} failed"
    text += f" of {restore.get('total')}"
    return text if restore.get("finishedAt") else f"running: {text}"


def _peer_line(peer: Mapping[str, Any]) -> str:
    return f"{peer.get('id')} at {peer.get('address')}, seen {peer.get('seenAt')}"


def _console(stream: TextIO) -> Console:
    # Rich must not read markup or emoji into what others named.
    return Console(file=stream, markup=False, emoji=False, highlight=False)
