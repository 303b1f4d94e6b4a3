"""How the OpenAPI document tells errors and formats, and its last corrections."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from daemon.http import models
from daemon.http.errors import MEANINGS, RETRY_AFTER_S, ErrorCode
from daemon.http.models import ErrorAnswer

Responses = dict[int | str, dict[str, Any]]

AT_HOLDER = (
    ErrorCode.NO_ACTIVE_INSTANCE,
    ErrorCode.NOT_ACTIVE,
    ErrorCode.STORE_UNAVAILABLE,
    ErrorCode.HOLDER_UNREACHABLE,
)
"""What any request that only the holder may answer can end with."""

WITH_BODY = (
    ErrorCode.INVALID_REQUEST,
    ErrorCode.REQUEST_TIMEOUT,
    ErrorCode.PAYLOAD_TOO_LARGE,
)
"""What any request with a body can end with."""

EVERYWHERE = (ErrorCode.UNAUTHORIZED, ErrorCode.INTERNAL_ERROR, ErrorCode.TOO_MANY_CONNECTIONS)

ABOUT = """Keeps WhatsApp accounts alive through redeploys.

Any instance of a group answers: one that does not hold the lease forwards to the holder, and waits
for the next holder during a handoff. Every answer names the instance
(`X-Watchkeeper-Instance`, `X-Watchkeeper-State`, and `X-Watchkeeper-Served-By` when another one
answered) and the request (`X-Request-Id`, yours if you send one).

Send `Authorization: Bearer …` everywhere but to the health endpoints.
"""


def errors(*codes: ErrorCode) -> Responses:
    """The documented answers for these codes, one entry a status, one example a code."""
    found: Responses = {}
    for code in (*codes, *EVERYWHERE):
        entry = found.setdefault(
            code.status,
            {
                "model": ErrorAnswer,
                "description": "",
                "content": {"application/json": {"examples": {}}},
            },
        )
        entry["description"] = f"{entry['description']} `{code}`: {MEANINGS[code]}".strip()
        entry["content"]["application/json"]["examples"][code.value] = {
            "summary": MEANINGS[code],
            "value": {
                "success": False,
                "error": code.value,
                "message": MEANINGS[code],
                "requestId": "5f0c9a7e21d34b68",
            },
        }
        if code in RETRY_AFTER_S:
            entry["headers"] = {
                "Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}
            }
    return found


def file_answer(description: str, *media_types: str) -> dict[str, Any]:
    """A documented 200 in formats that are no JSON."""
    content = {media: {"schema": {"type": "string"}} for media in media_types}
    return {"description": description, "content": content}


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: FastAPI's, without its own 422, with the bearer token."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    schema = get_openapi(
        title=app.title, version=app.version, description=ABOUT, routes=app.routes, tags=_TAGS
    )
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            answers = operation["responses"]
            if "HTTPValidationError" in str(answers.get("422", "")):
                del answers["422"]
            if path.startswith("/api/") or path == "/metrics":
                operation["security"] = [{"bearer": []}]
    schemas = schema["components"]["schemas"]
    for name, described in schemas.items():
        extra = getattr(getattr(models, name, None), "model_config", {}).get("json_schema_extra")
        if extra is not None:
            # FastAPI drops what is null in an example, and the example then lacks a field.
            described["examples"] = extra["examples"]
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    schema["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    app.openapi_schema = schema
    return schema


_TAGS = [
    {"name": "accounts", "description": "WhatsApp accounts: pairing, status, removal"},
    {"name": "messages", "description": "Sends, and what became of them"},
    {"name": "status", "description": "What this instance is doing, and did"},
    {"name": "operations", "description": "Handing over, ending, importing"},
    {"name": "health", "description": "For supervisors and load balancers; no token"},
]
