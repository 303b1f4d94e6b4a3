"""What a check found, and what to do about it: the words of `doctor` and `init`.

Never lives here: a check.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum


class Verdict(StrEnum):
    """How a check ended. Only `fail` keeps an instance from running."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNCHECKED = "not checked"


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: what was looked at, what was found, and what to do unless it is fine."""

    check: str
    verdict: Verdict
    found: str
    advice: str = ""

    def as_json(self) -> dict[str, str]:
        """Plain data, for `--json`."""
        return {key: str(value) for key, value in asdict(self).items()}


def ok(check: str, found: str) -> Finding:
    """Nothing to do."""
    return Finding(check, Verdict.OK, found)


def warn(check: str, found: str, advice: str) -> Finding:
    """Something that an instance runs with all the same."""
    return Finding(check, Verdict.WARN, found, advice)


def fail(check: str, found: str, advice: str) -> Finding:
    """Something that keeps an instance from running, or from being safe."""
    return Finding(check, Verdict.FAIL, found, advice)


def unchecked(check: str, found: str, advice: str = "") -> Finding:
    """Something that could not be looked at; `found` says why."""
    return Finding(check, Verdict.UNCHECKED, found, advice)
