"""Which of the offered formats a caller wants: the Accept header, or `?format=`."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import WithJsonSchema

from daemon.http.errors import ApiError, ErrorCode

ACCEPT_PARTS_MAX = 32
"""More alternatives than this in one Accept header are not read."""


def documented_formats(offered: Mapping[str, str]) -> WithJsonSchema:
    """How the document tells which `?format=` there are; others are `not_acceptable`."""
    return WithJsonSchema({"type": "string", "enum": list(offered), "examples": list(offered)[:1]})


def choose_format(offered: Mapping[str, str], accept: str | None, wanted: str | None) -> str:
    """The name of the best offered format; `offered` maps names to media types, best first.

    `wanted` (from `?format=`) goes before `accept`. Raises `ApiError(NOT_ACCEPTABLE)`.
    """
    if wanted is not None:
        if wanted in offered:
            return wanted
        raise _refusal(offered)
    if not accept:
        return next(iter(offered))
    ranges = [_read_range(part) for part in accept.split(",")[:ACCEPT_PARTS_MAX]]
    qualities = {name: _quality(media, ranges) for name, media in offered.items()}
    best = max(qualities, key=lambda name: qualities[name])
    if qualities[best] <= 0:
        raise _refusal(offered)
    return best


def _read_range(part: str) -> tuple[str, float]:
    media, *parameters = (piece.strip() for piece in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = min(1.0, max(0.0, float(value)))
            except ValueError:
                quality = 0.0
    return media.lower(), quality


def _quality(media: str, ranges: list[tuple[str, float]]) -> float:
    """The quality of the most exact range that fits (RFC 9110, 12.5.1); 0 when none does."""
    kind = media.partition("/")[0]
    for pattern in (media, f"{kind}/*", "*/*"):
        for found, quality in ranges:
            if found == pattern:
                return quality
    return 0.0


def _refusal(offered: Mapping[str, str]) -> ApiError:
    formats = ", ".join(f"{media} (?format={name})" for name, media in offered.items())
    return ApiError(ErrorCode.NOT_ACCEPTABLE, f"Offered are {formats}.")
