"""What is deployed into the database: it names collections and fields that the stores write."""

from __future__ import annotations

import json
from pathlib import Path

from daemon.firestore import layout
from daemon.firestore.inspection import EXEMPT

FILES = Path(__file__).resolve().parents[2] / "deploy" / "firestore"


def test_blobs_and_texts_are_exempt_from_indexes_and_nothing_else_is() -> None:
    content = json.loads((FILES / "firestore.indexes.json").read_text())
    exempt = {(each["collectionGroup"], each["fieldPath"]) for each in content["fieldOverrides"]}
    packed = {(name, "packed") for name in (layout.ACCOUNTS, layout.PARTS, layout.ARCHIVE)}
    assert exempt == packed | {(layout.OUTBOX, "text"), (layout.INBOX, "text")}
    assert exempt == set(EXEMPT), "what `watchkeeper init` looks for is what is deployed"
    assert all(each["indexes"] == [] for each in content["fieldOverrides"])
    assert content["indexes"] == []


def test_rules_let_no_client_in() -> None:
    rules = (FILES / "firestore.rules").read_text()
    assert "allow read, write: if false;" in rules
    assert rules.count("allow") == 1


def test_what_is_deployed_is_there() -> None:
    named = json.loads((FILES / "firebase.json").read_text())["firestore"]
    assert all((FILES / path).is_file() for path in named.values())
