from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from daemon.http.auth import OPEN_PATHS
from daemon.http.errors import ErrorCode
from daemon.http.ports import DeskPort, InstancePort, MakeMessageId
from machine.desk import Desk
from machine.instance import Instance
from machine.outbox import make_message_id
from tests.http.asking import the_document
from tests.http.documented import Document

ROUTES = {
    ("get", "/api/whatsapp/accounts"),
    ("post", "/api/whatsapp/accounts"),
    ("get", "/api/whatsapp/accounts/{accountId}"),
    ("delete", "/api/whatsapp/accounts/{accountId}"),
    ("get", "/api/whatsapp/accounts/{accountId}/qr"),
    ("post", "/api/whatsapp/accounts/{accountId}/pairing-code"),
    ("post", "/api/whatsapp/accounts/{accountId}/reconnect"),
    ("post", "/api/whatsapp/accounts/{accountId}/logout"),
    ("post", "/api/whatsapp/accounts/{accountId}/repair"),
    ("post", "/api/whatsapp/send-message"),
    ("get", "/api/whatsapp/messages"),
    ("get", "/api/whatsapp/messages/{messageId}"),
    ("get", "/api/status/dashboard"),
    ("get", "/api/status/transitions"),
    ("get", "/api/status/diagram"),
    ("post", "/api/admin/step-down"),
    ("post", "/api/admin/drain"),
    ("post", "/api/admin/import"),
    ("post", "/api/internal/hello"),
    ("get", "/metrics"),
    ("get", "/livez"),
    ("get", "/readyz"),
    ("get", "/startupz"),
    ("get", "/active"),
    ("get", "/passive"),
}


@pytest.fixture
def document() -> Document:
    return the_document()


def operations(document: Document) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in document.document["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def test_every_route_of_the_contract_is_documented(document: Document) -> None:
    assert {(method, path) for method, path, _ in operations(document)} == ROUTES


def test_every_operation_is_described_and_says_whether_it_needs_a_token(
    document: Document,
) -> None:
    for method, path, operation in operations(document):
        where = f"{method} {path}"
        assert operation["description"], where
        assert operation["tags"], where
        assert ("security" in operation) == (path not in OPEN_PATHS), where


def test_every_model_has_an_example_that_fits_it(document: Document) -> None:
    schemas = document.document["components"]["schemas"]
    used = {
        content["schema"]["$ref"].rpartition("/")[2]
        for _, _, operation in operations(document)
        for part in [operation.get("requestBody", {}), *operation["responses"].values()]
        for content in part.get("content", {}).values()
        if "$ref" in content["schema"]
    }
    assert len(used) > 15
    for name in used:
        examples = schemas[name].get("examples", [])
        assert examples, f"{name} has no example"
        for example in examples:
            assert document.faults(schemas[name], example, name) == []


def test_every_documented_error_has_an_example_that_fits(document: Document) -> None:
    seen: set[str] = set()
    for method, path, operation in operations(document):
        for status, answer in operation["responses"].items():
            content = answer.get("content", {}).get("application/json", {})
            for code, example in content.get("examples", {}).items():
                where = f"{method} {path} {status} {code}"
                assert ErrorCode(code).status == int(status), where
                assert document.faults(content["schema"], example["value"], where) == []
                seen.add(code)
    assert seen | {"method_not_allowed"} == {code.value for code in ErrorCode}


def test_parameters_have_examples_or_descriptions(document: Document) -> None:
    for method, path, operation in operations(document):
        for parameter in operation.get("parameters", []):
            told = "description" in parameter or "examples" in parameter["schema"]
            assert told or "example" in str(parameter), f"{method} {path} {parameter['name']}"


def test_no_trace_of_frameworks_own_validation_errors(document: Document) -> None:
    assert "HTTPValidationError" not in str(document.document)


def test_validator_can_say_no(document: Document) -> None:
    schemas = document.document["components"]["schemas"]
    good = schemas["AccountAnswer"]["examples"][0]
    for wrong in (
        {**good, "success": "yes"},
        {"success": True},
        {**good, "extra": 1},
        {**good, "account": {**good["account"], "queued": "many"}},
        {**good, "account": {**good["account"], "status": "asleep"}},
        {**good, "account": None},
    ):
        assert document.faults(schemas["AccountAnswer"], wrong, "wrong") != []


def test_the_machine_fits_what_the_api_asks_of_it() -> None:
    """Checked by mypy: these lines do not type-check otherwise."""

    def instance(real: Instance) -> InstancePort:
        return real

    def desk(real: Desk) -> DeskPort:
        return real

    make: MakeMessageId = make_message_id
    assert callable(make)
    assert callable(instance)
    assert callable(desk)
