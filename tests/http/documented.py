"""Holds answers against the OpenAPI document: a validator for the part of JSON Schema it uses.

A keyword that it does not know is an error, so that no part of the document goes unread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

Schema = Mapping[str, Any]

SILENT = {"title", "description", "examples", "example", "default", "deprecated"}
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}


class Document:
    """An OpenAPI document that answers can be held against."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.paths = {
            path: re.compile(re.sub(r"\{[^}]+\}", "[^/]+", path) + r"\Z")
            for path in document["paths"]
        }

    def operation(self, method: str, path: str) -> Schema | None:
        exact = [name for name in self.paths if name == path]
        for name in exact or [name for name, shape in self.paths.items() if shape.match(path)]:
            found = self.document["paths"][name].get(method.lower())
            if found is not None:
                operation: Schema = found
                return operation
        return None

    def faults_of_answer(
        self, method: str, path: str, status: int, media_type: str, content: Any
    ) -> list[str]:
        """What is wrong with an answer; an undocumented status is wrong."""
        operation = self.operation(method, path)
        if operation is None:
            return []
        answer = operation["responses"].get(str(status))
        if answer is None:
            return [f"{method} {path} answers {status}, which is not documented"]
        if status == 204:
            return []
        described = answer.get("content", {}).get(media_type)
        if described is None:
            return [f"{method} {path} answers {status} as {media_type}, which is not documented"]
        if media_type != "application/json":
            return []
        return self.faults(described["schema"], content, f"{method} {path} {status}")

    def faults(self, schema: Schema, value: Any, where: str) -> list[str]:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return self.faults(self.document["components"]["schemas"][name], value, where)
        found = _type(self, schema, schema["type"], value, where) if "type" in schema else []
        if found:
            return found
        for keyword, rule in schema.items():
            if keyword in SILENT or keyword == "type":
                continue
            check = CHECKS.get(keyword)
            assert check is not None, f"{where}: the validator does not know {keyword!r}"
            found += check(self, schema, rule, value, where)
        return found


def _type(document: Document, schema: Schema, rule: str, value: Any, where: str) -> list[str]:
    return [] if TYPES[rule](value) else [f"{where} is no {rule}: {value!r}"]


def _required(document: Document, schema: Schema, rule: Any, value: Any, where: str) -> list[str]:
    return [f"{where}.{name} is missing" for name in rule if name not in value]


def _properties(document: Document, schema: Schema, rule: Any, value: Any, where: str) -> list[str]:
    found: list[str] = []
    for name, part in value.items():
        if name in rule:
            found += document.faults(rule[name], part, f"{where}.{name}")
    return found


def _additional(document: Document, schema: Schema, rule: Any, value: Any, where: str) -> list[str]:
    found: list[str] = []
    for name in value.keys() - schema.get("properties", {}).keys():
        if rule is False:
            found.append(f"{where}.{name} is not documented")
        elif isinstance(rule, dict):
            found += document.faults(rule, value[name], f"{where}.{name}")
    return found


def _items(document: Document, schema: Schema, rule: Any, value: Any, where: str) -> list[str]:
    found: list[str] = []
    for index, part in enumerate(value):
        found += document.faults(rule, part, f"{where}[{index}]")
    return found


def _any_of(document: Document, schema: Schema, rule: Any, value: Any, where: str) -> list[str]:
    tries = [document.faults(option, value, where) for option in rule]
    return [] if any(not faults for faults in tries) else min(tries, key=len)


def _enum(document: Document, schema: Schema, rule: Any, value: Any, where: str) -> list[str]:
    return [] if value in rule else [f"{where} is none of {rule}: {value!r}"]


def _const(document: Document, schema: Schema, rule: Any, value: Any, where: str) -> list[str]:
    same = value == rule and type(value) is type(rule)
    return [] if same else [f"{where} is not {rule!r}: {value!r}"]


def _pattern(document: Document, schema: Schema, rule: str, value: Any, where: str) -> list[str]:
    fits = isinstance(value, str) and re.search(rule, value)
    return [] if fits else [f"{where} does not fit {rule}: {value!r}"]


def _length(document: Document, schema: Schema, rule: int, value: Any, where: str) -> list[str]:
    low, high = schema.get("minLength", 0), schema.get("maxLength", 1 << 60)
    return [] if low <= len(value) <= high else [f"{where} has {len(value)} characters"]


CHECKS: dict[str, Callable[[Document, Schema, Any, Any, str], list[str]]] = {
    "required": _required,
    "properties": _properties,
    "additionalProperties": _additional,
    "items": _items,
    "anyOf": _any_of,
    "enum": _enum,
    "const": _const,
    "pattern": _pattern,
    "minLength": _length,
    "maxLength": _length,
}
