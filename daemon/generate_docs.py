"""Write the pages of `docs/` that follow from the code: settings, state machine, events.

`python -m daemon.generate_docs` writes them, `--check` says which are stale and ends with 1.
Never lives here: anything that is not in the code already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le

from daemon.diagram import Format, render
from daemon.http.events import HTTP_EVENTS
from daemon.main import DAEMON_EVENTS
from daemon.settings import SECRET_FIELDS, SECRETS_DIR_VARIABLE, Settings, variable_of
from daemon.warden import EVENTS as WARDEN_EVENTS
from machine.events import EVENTS, EventKind
from machine.ports import Level

DOCS = Path(__file__).resolve().parent.parent / "docs"
MADE_FROM = "<!-- Made by `python -m daemon.generate_docs`; change {source} instead. -->"

COMPUTED_DEFAULTS = {
    "instance_name": "host name and port",
    "state_dir": "`.watchkeeper/<instance name>`",
    "loopback_dir": "`<shared dir>/loopback`",
}
"""Defaults that depend on other settings or on the host."""


def settings_page() -> str:
    """The table of settings, from the class."""
    lines = [
        MADE_FROM.format(source="`daemon/settings.py`"),
        "# Settings",
        "",
        (
            "Every setting is an environment variable. The first of these that has it wins: "
            "the environment, a `.env` file in the working directory, the secrets directory "
            f"(`{SECRETS_DIR_VARIABLE}`: one file a setting, named like the variable), the "
            "default. `watchkeeper config` prints what is in effect and where each came from; "
            "secrets are masked."
        ),
        "",
        "Secrets belong into files: "
        + ", ".join(f"`{variable_of(field)}_FILE`" for field in SECRET_FIELDS)
        + " name them (mode 0600; a line break at the end is dropped). Giving a secret and its "
        "file is refused.",
        "",
        (
            "Numbers that contradict each other are refused at the start, with the sum shown "
            "and exit code 2."
        ),
        "",
        "| variable | default | bounds | meaning |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        default = COMPUTED_DEFAULTS.get(name) or _default(field.default)
        bounds = _bounds(field.annotation, field.metadata)
        lines.append(
            f"| `{variable_of(name)}` | {default} | {bounds} | {_cell(field.description or '')} |"
        )
    return "\n".join(lines) + "\n"


def _default(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, bool):
        value = str(value).lower()
    if isinstance(value, float):
        value = f"{value:g}"
    return f"`{value}`"


def _bounds(annotation: Any, metadata: list[Any]) -> str:
    """What values are possible: choices, or the range of a number."""
    options = (
        get_args(annotation) if get_origin(annotation) in {Union, UnionType} else (annotation,)
    )
    kinds = [kind for kind in options if kind is not NoneType]
    if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Enum):
        return ", ".join(f"`{choice.value}`" for choice in kinds[0])
    parts: list[str] = []
    for bound in metadata:
        if isinstance(bound, Ge):
            parts.append(f"≥ {bound.ge}")
        elif isinstance(bound, Gt):
            parts.append(f"> {bound.gt}")
        elif isinstance(bound, Le):
            parts.append(f"≤ {bound.le}")
    return ", ".join(parts) or "-"


def state_machine_page() -> str:
    """The diagram and its tables, from the table of transitions."""
    lines = [
        MADE_FROM.format(source="`machine/states.py`"),
        "# State machine",
        "",
        (
            "What an instance can be, and what moves it. Anything that is not in the second "
            "table is refused. Also as a picture: `watchkeeper diagram --format svg`; `--diff "
            "OLD.json` marks what changed since an earlier `--format json`."
        ),
        "",
    ]
    return "\n".join(lines) + "\n" + render(Format.MD).decode()


def every_event() -> dict[str, EventKind]:
    """Collect the tables of the machine, the daemon's parts and the warden."""
    # The warden's is plain: it imports nothing.
    warden = {name: EventKind(Level(level), text) for name, (level, text) in WARDEN_EVENTS.items()}
    return {**EVENTS, **HTTP_EVENTS, **DAEMON_EVENTS, **warden}


def events_page() -> str:
    """Every event, in one table."""
    lines = [
        MADE_FROM.format(source="the events of `machine` and `daemon`"),
        "# Events",
        "",
        (
            "What the log tells, spelled the same in the metric "
            "`watchkeeper_events_total{event=…}`. With `WATCHKEEPER_LOG_FORMAT=json` every line "
            "also has the fields in braces. No event holds a secret or the text of a message."
        ),
        "",
        "| event | level | sentence |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {kind.level.value} | {_cell(kind.text)} |"
        for name, kind in every_event().items()
    ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


PAGES: Mapping[str, Callable[[], str]] = {
    "settings.md": settings_page,
    "state-machine.md": state_machine_page,
    "events.md": events_page,
}


def stale_pages(directory: Path = DOCS) -> Iterator[str]:
    """Name each page that is not what the code says."""
    for name, make in PAGES.items():
        path = directory / name
        if not path.is_file() or path.read_text("utf-8") != make():
            yield name


def write_pages(directory: Path = DOCS) -> None:
    """Write every page."""
    directory.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        (directory / name).write_text(make(), "utf-8")


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` report the stale ones; the exit code."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m daemon.generate_docs [--check]\n")
        return 2
    if not arguments:
        write_pages()
        return 0
    stale = list(stale_pages())
    for name in stale:
        sys.stderr.write(f"docs/{name} is stale: run `python -m daemon.generate_docs`\n")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
