"""What an operator looks up is there: each warning and error of the log, each answer of the API."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from daemon.generate_docs import every_event
from daemon.http.errors import STATUS_OF, ErrorCode
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
