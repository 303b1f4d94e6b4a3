"""All documents of a group in the emulator, to a JSON file and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf import json_format

from daemon.firestore.client import open_firestore
from daemon.firestore.lease import COLLECTION
from daemon.firestore.protos import Proto, RunQueryRequest, Write

DATA_COLLECTIONS = ("accounts", "outbox", "inbox", "archive")


async def read_documents(project: str, emulator: str, group: str) -> list[Proto]:
    """Every document of the group, as it is."""
    found: list[Proto] = []
    async with open_firestore(project, emulator_host=emulator) as client:
        pair = [client.document(COLLECTION, f"{group}-{which}") for which in ("lease", "fence")]
        found += [one.found for one in await client.batch_get(pair) if one.HasField("found")]
        parent = client.document(COLLECTION, f"{group}-data")
        for collection in DATA_COLLECTIONS:
            request = RunQueryRequest(parent=parent)
            request.structured_query.from_.add(collection_id=collection)
            documents: list[Proto] = []
            await client.run_query(request, documents.extend)
            found += documents
            for document in documents:
                if collection in {"accounts", "archive"}:
                    found += await client.list_documents(document.name, "parts")
    return sorted(found, key=lambda document: str(document.name))


async def export_documents(project: str, emulator: str, group: str) -> list[dict[str, Any]]:
    """Name, below the database, and fields of every document."""
    exported = []
    for document in await read_documents(project, emulator, group):
        fields = json_format.MessageToDict(document)["fields"]
        exported.append({"name": document.name.split("/documents/")[1], "fields": fields})
    return exported


async def load_documents(project: str, emulator: str, documents: Sequence[dict[str, Any]]) -> None:
    """Write what was exported into an empty project."""
    async with open_firestore(project, emulator_host=emulator) as client:
        root = client.document(COLLECTION, "x").split("/documents/")[0]
        for document in documents:
            write = Write()
            json_format.ParseDict({"fields": document["fields"]}, write.update)
            write.update.name = f"{root}/documents/{document['name']}"
            write.current_document.exists = False
            await client.commit([write])
