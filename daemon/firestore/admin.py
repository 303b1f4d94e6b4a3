"""What only Firestore's Admin API tells of a database: its kind, and its fields' settings. Reads.

Imported by `inspection` alone, and late: an instance never needs Google's admin types.
"""

from __future__ import annotations

from typing import Any

from google.cloud.firestore_admin_v1.types import database as _database
from google.cloud.firestore_admin_v1.types import firestore_admin as _admin

from daemon.firestore.client import FirestoreClient
from daemon.firestore.protos import Proto

GetDatabaseRequest: Any = _admin.GetDatabaseRequest.pb()
Database: Any = _database.Database.pb()
ListFieldsRequest: Any = _admin.ListFieldsRequest.pb()
ListFieldsResponse: Any = _admin.ListFieldsResponse.pb()

SERVICE = "/google.firestore.admin.v1.FirestoreAdmin/"
SET_FIELDS = "indexConfig.usesAncestorConfig:false OR ttlConfig:*"
"""Fields with a setting of their own; the API lists no others."""


async def get_database(client: FirestoreClient) -> Proto:
    """The database itself: its type, edition, location, protection.

    Raises `Refused` (`not_found`), `Forbidden`, `StoreUnavailable`.
    """
    return await client.call_other(
        SERVICE + "GetDatabase",
        GetDatabaseRequest(name=client.database),
        Database,
        ("name", client.database),
    )


async def list_set_fields(client: FirestoreClient) -> list[Proto]:
    """Every field, of all collections, that has indexes or a time to live of its own.

    Raises `Refused` (`not_found`), `Forbidden`, `StoreUnavailable`.
    """
    parent = f"{client.database}/collectionGroups/-"
    fields: list[Proto] = []
    page_start = ""
    while True:
        page = await client.call_other(
            SERVICE + "ListFields",
            # Without a page size: firebase-tools sends none with this filter either.
            ListFieldsRequest(parent=parent, filter=SET_FIELDS, page_token=page_start),
            ListFieldsResponse,
            ("parent", parent),
        )
        fields += page.fields
        page_start = page.next_page_token
        if not page_start:
            return fields
