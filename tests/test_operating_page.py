"""What an operator looks up is there: each warning and error of the log, each answer of the API."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import app
from daemon.generate_docs import every_event
from daemon.http.errors import STATUS_OF, ErrorCode
from daemon.settings import SECRETS_DIR_VARIABLE, Settings, variable_of
from machine.ports import Level

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
ALL_EVENTS = every_event()


def _row_names() -> set[str]:
    """Every name that begins a row of a table; a row may have several."""
    firsts = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    return {name for first in firsts for name in re.findall(r"`([^`]+)`", first)}


def test_every_warning_and_error_of_the_log_has_a_row() -> None:
    loud = {name for name, kind in ALL_EVENTS.items() if kind.level in (Level.WARNING, Level.ERROR)}
    assert loud - _row_names() == set()


def test_no_row_is_of_an_event_or_code_that_does_not_exist() -> None:
    fields = {name for name in _row_names() if re.fullmatch(r"[a-z]+(\.[a-z_]+)+", name)}
    assert fields - set(ALL_EVENTS) == set()


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_answer_of_the_api_has_a_row_with_its_status(code: ErrorCode) -> None:
    assert re.search(rf"^\| `{code}` \| {STATUS_OF[code]} \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.is_file(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
            assert heading in slugs, target


# --- what to do --------------------------------------------------------------------------------


ALERTS = re.findall(
    r"- alert: (\w+)", (ROOT / "deploy/prometheus/watchkeeper.rules.yml").read_text()
)
COMMAND = re.compile(r"`(watchkeeper [a-z]|journalctl |systemctl |curl |POST |GET )")
OTHERS = {"WATCHKEEPER_TEST_EMULATOR", "WATCHKEEPER_ENV_FILE", SECRETS_DIR_VARIABLE}
"""Variables that are no settings."""
IN_JOURNAL = {"EVENT", "INSTANCE", "EPOCH", "ACCOUNT_ID", "REQUEST_ID"}


def _last_cell(name: str) -> str:
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
    return row.rstrip(" |").rpartition(" | ")[2]


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_has_a_row_with_a_command(alert: str) -> None:
    assert COMMAND.search(_last_cell(alert)), _last_cell(alert)


def test_no_row_leaves_open_what_to_do() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    empty = [row for row in rows if re.search(r"\|\s*\|", row)]
    assert [row for row in empty if not row.startswith("| | ")] == []
    for code in ErrorCode:
        assert re.search(r"`[^`]+`|\]\(#", _last_cell(code)), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_setting_that_a_page_names_is_one(page: Path) -> None:
    known = {variable_of(name) for name in Settings.model_fields} | OTHERS
    known |= {f"WATCHKEEPER_{name}" for name in IN_JOURNAL}
    named = set(re.findall(r"\bWATCHKEEPER_[A-Z_]+[A-Z]\b(?!…)", page.read_text(encoding="utf-8")))
    assert {each for each in named if each not in known} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_that_a_page_names_is_one(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^|bin/)watchkeeper ([a-z-]+)(?: ([a-z]+))?", text, re.MULTILINE))
    commands = {command.name or _dashed(command.callback) for command in app.registered_commands}
    groups = {
        group.name: {
            command.name or _dashed(command.callback)
            for command in group.typer_instance.registered_commands
        }
        for group in app.registered_groups
        if group.typer_instance is not None
    }
    for command, below in named:
        assert command in commands or below in groups.get(command, ()), (command, below)


def _dashed(function: Callable[..., Any] | None) -> str:
    assert function is not None
    return function.__name__.replace("_", "-")
