"""What each module may import, and why; and the habits that a parser can see.

A rule that is in the way is changed here, with its reason, or the code is. There are no exceptions
in the code itself.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FUNCTION_LINES_MAX = 70


@dataclass(frozen=True)
class Only:
    """`what` may be imported only in modules below one of `where`."""

    what: str
    where: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Never:
    """Modules below `where` import nothing of `what`."""

    where: str
    what: tuple[str, ...]
    why: str


MACHINE_LIBRARIES = {"trio", "transitions", "machine"}
"""What `machine` stands on besides the standard library: it knows no outside world."""

OUTSIDE_WORLD = ("socket", "subprocess", "sqlite3", "threading", "ssl", "http", "urllib", "logging")
"""The standard library's doors to the outside. The machine goes through its ports instead."""

ADAPTERS = ("daemon.firestore", "daemon.sqlite", "daemon.bridge", "daemon.loopback", "daemon.http")

ONLY = (
    Only("transitions", ("machine.engine",), "whoever imports it could move the machine"),
    Only(
        "google",
        ("daemon.firestore",),
        "Firestore's words stop at their adapter; the client's own calls block or retry",
    ),
    Only("grpc", ("daemon.firestore",), "calls are bridged to Trio in one place"),
    Only(
        "sqlite3",
        ("daemon.sqlite", "daemon.loopback"),
        "it blocks: the stores and the small WhatsApp know which thread they run it in",
    ),
    Only(
        "fastapi",
        ("daemon.http", "daemon.loopback", "daemon.main"),
        "HTTP stops at its adapter; loopback brings routes, which the composition root hands on",
    ),
    Only("starlette", ("daemon.http", "daemon.loopback"), "as fastapi"),
    Only("hypercorn", ("daemon.http",), "one server, configured in one place"),
    Only(
        "cryptography",
        ("daemon.auth_codec", "daemon.keys"),
        "what is encrypted, and how, is read in one file",
    ),
    Only("loguru", ("daemon.journal",), "events go through the Journal port, secrets masked there"),
    Only(
        "logging",
        ("daemon.journal", "daemon.http.server"),
        "as loguru; the journal takes over the libraries' logging, Hypercorn wants a logger",
    ),
    Only("prometheus_client", ("daemon.journal",), "one registry, fed by the journal"),
    Only("pydantic_settings", ("daemon.settings",), "the environment is read in one place"),
    Only("typer", ("daemon.cli",), "arguments are read in one place"),
    Only("rich", ("daemon.cli", "daemon.terminal"), "the terminal stops at the command line"),
)

NEVER = (
    Never("machine", ("daemon",), "the machine knows its ports, not who implements them"),
    Never("machine", OUTSIDE_WORLD, "the outside world is reached through the ports"),
    Never("machine.states", ("machine", "trio"), "the table is read by tools that need no machine"),
    Never("machine.records", ("machine", "trio"), "facts depend on nothing"),
    Never("machine.refusals", ("machine", "trio"), "a refusal is a word and a sentence"),
    Never("machine.retry", ("machine",), "trying again knows nothing of what is tried"),
    Never("machine.engine", ("machine.instance", "machine.term"), "it moves any model"),
    Never("machine", ("asyncio", "anyio"), "Trio alone: two loops have two ideas of cancelling"),
    Never("daemon", ("asyncio", "anyio"), "as in the machine"),
    Never("daemon", ("tests", "bench"), "what ships does not need what checks it"),
    Never("daemon", ("machine.engine",), "only the instance fires triggers"),
    *(
        Never(
            adapter,
            tuple(other for other in ADAPTERS if other != adapter),
            "adapters meet in the composition root and nowhere else",
        )
        for adapter in ADAPTERS
    ),
    *(
        Never(
            adapter,
            ("daemon.settings", "daemon.main", "daemon.cli"),
            "an adapter is given values; where they come from is the composition root's",
        )
        for adapter in ADAPTERS
    ),
)


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[tuple[str, ast.AST]]:
    """Every module that is imported anywhere in the file, lazily or for types alike."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                # The package that the dots count from is the module itself in an __init__.
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                origin = ".".join([*above, origin] if origin else above)
            for alias in node.names:
                # `from daemon import http` imports daemon.http.
                yield f"{origin}.{alias.name}", node


ALL_IMPORTS = [
    (path, module_of(path), imported, node)
    for path in files("machine", "daemon")
    for imported, node in imports(
        parse(path), module_of(path), is_package=path.name == "__init__.py"
    )
]


@pytest.mark.parametrize("rule", ONLY, ids=lambda rule: rule.what)
def test_a_library_is_imported_only_where_the_rule_says(rule: Only) -> None:
    wrong = [
        place(path, node)
        for path, module, imported, node in ALL_IMPORTS
        if below(imported, rule.what) and not any(below(module, where) for where in rule.where)
    ]
    assert not wrong, f"{rule.what} belongs to {', '.join(rule.where)}: {rule.why}"


@pytest.mark.parametrize("rule", NEVER, ids=lambda rule: f"{rule.where}-{rule.what[0]}")
def test_a_layer_does_not_reach_into_another(rule: Never) -> None:
    wrong = [
        f"{place(path, node)} imports {imported}"
        for path, module, imported, node in ALL_IMPORTS
        if below(module, rule.where) and any(below(imported, what) for what in rule.what)
    ]
    assert not wrong, rule.why


def test_the_machine_stands_on_trio_and_transitions_only() -> None:
    wrong = [
        f"{place(path, node)} imports {imported}"
        for path, module, imported, node in ALL_IMPORTS
        if below(module, "machine")
        and (top := imported.split(".")[0]) not in MACHINE_LIBRARIES
        and top not in sys.stdlib_module_names
    ]
    assert not wrong


STANDARD_ONLY = ("daemon.warden", "daemon.journald")


def test_the_warden_stands_on_the_standard_library_only() -> None:
    wrong = [
        f"{place(path, node)} imports {imported}"
        for path, module, imported, node in ALL_IMPORTS
        if module in STANDARD_ONLY
        and imported not in STANDARD_ONLY
        and imported.split(".")[0] not in sys.stdlib_module_names
    ]
    assert not wrong, "what must outlive a wedged daemon imports nothing that could wedge"


def test_the_rules_see_every_spelling_of_an_import() -> None:
    tree = ast.parse(
        "import google.auth\n"
        "from daemon import http\n"
        "def late():\n"
        "    from .. import sqlite\n"
        "    from ..http.app import serve\n"
    )
    seen = [name for name, _ in imports(tree, "daemon.firestore.lease", is_package=False)]
    assert seen == ["google.auth", "daemon.http", "daemon.sqlite", "daemon.http.app.serve"]


# --- habits ----------------------------------------------------------------------------------


def caught(handler: ast.ExceptHandler) -> list[str]:
    """The names an `except` catches; the empty string for a bare one."""
    if handler.type is None:
        return [""]
    types = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return [ast.unparse(one) for one in types]


def raises_again(handler: ast.ExceptHandler) -> bool:
    """Whether the handler ends in a bare `raise`, whatever it does before."""
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


def swallows(node: ast.AST) -> bool:
    """Whether a cancellation could end here instead of reaching those who asked for it."""
    catching = {"", "trio.Cancelled", "Cancelled", "BaseException", "BaseExceptionGroup"}
    if isinstance(node, ast.ExceptHandler):
        return not catching.isdisjoint(caught(node)) and not raises_again(node)
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
        return not catching.isdisjoint(ast.unparse(one) for one in node.args)
    return False


def swallowed(tree: ast.Module) -> list[ast.AST]:
    return [node for node in ast.walk(tree) if swallows(node)]


def test_no_cancellation_is_swallowed() -> None:
    wrong = [
        place(path, node) for path in files("machine", "daemon") for node in swallowed(parse(path))
    ]
    assert not wrong, "whoever catches Cancelled or BaseException ends with a bare `raise`"


def test_the_check_for_swallowed_cancellations_knows_them() -> None:
    def count(clause: str, last: str) -> int:
        return len(swallowed(ast.parse(f"try:\n    work()\n{clause}\n    tidy()\n    {last}\n")))

    assert count("except:", "pass") == 1
    assert count("except BaseException as error:", "raise Other from error") == 1
    assert count("except (ValueError, BaseException):", "return_()") == 1
    assert count("except trio.Cancelled:", "return_()") == 1
    assert count("except trio.Cancelled:", "raise") == 0
    assert count("except BaseException:", "raise") == 0
    assert count("except Exception:", "pass") == 0
    assert len(swallowed(ast.parse("with suppress(OSError, BaseException):\n    work()"))) == 1


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


SLEEPS_ELSEWHERE = {
    "daemon.cli": "a client command: one thread, no event loop",
    "daemon.loopback.database": "SQLite does not wait when it switches to WAL: its opener does",
}


def test_nothing_sleeps_but_on_trios_clock() -> None:
    wrong = [
        place(path, call)
        for path in files("machine", "daemon")
        if module_of(path) not in SLEEPS_ELSEWHERE
        for name, call in calls(parse(path))
        if name in ("time.sleep", "sleep", "asyncio.sleep")
    ]
    assert not wrong


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_functions_fit_on_a_screen() -> None:
    wrong = [
        f"{place(path, function)} {function.name}: {lines} lines"
        for path in files("machine", "daemon")
        for function in functions(parse(path))
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES_MAX
    ]
    assert not wrong


def test_deadlines_are_the_callers() -> None:
    wrong = [
        f"{place(path, function)} {function.name}"
        for path in files("machine", "daemon")
        for function in functions(parse(path))
        for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
        if argument.arg in ("timeout", "timeout_s")
    ]
    assert not wrong, "write `trio.fail_after` around the call"


def test_names_say_what_a_thing_is() -> None:
    vague = ("utils", "helpers", "common", "base", "core", "service", "manager")
    ends = ("Manager", "Handler", "Leader", "Master", "Primary", "Helper", "Utils")
    wrong = [
        str(path.relative_to(ROOT))
        for path in files("machine", "daemon", "tests", "bench")
        if path.stem in vague
    ]
    wrong += [
        f"{place(path, node)} {node.name}"
        for path in files("machine", "daemon")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ClassDef) and node.name.endswith(ends)
    ]
    assert not wrong


def test_tests_use_fakes_and_patch_nothing_of_ours() -> None:
    wrong = []
    for path in files("tests"):
        tree = parse(path)
        wrong += [
            place(path, node)
            for name, node in imports(tree, module_of(path), is_package=False)
            if below(name, "unittest.mock") or below(name, "mock")
        ]
        wrong += [place(path, call) for name, call in calls(tree) if name == "monkeypatch.setattr"]
    assert not wrong
