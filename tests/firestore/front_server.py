"""A real gRPC server before an emulator: it has the Admin API, and refuses what it is told to.

The real Firestore cannot be asked in a test, and an emulator knows neither roles nor indexes nor
the Admin API. So those answers are given here; all else is the emulator's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.cloud.firestore_admin_v1.types import Database, Field, Index
from google.cloud.firestore_admin_v1.types import firestore_admin as admin

PAGE_FIELDS = 2
PASSED_ON = ("authorization", "google-cloud-resource-prefix")
ADMIN = "google.firestore.admin.v1.FirestoreAdmin"
STREAMS = {"BatchGetDocuments": "unary_stream", "RunQuery": "unary_stream"}


def a_good_database() -> Database:
    return Database(
        location_id="europe-west3",
        type_=Database.DatabaseType.FIRESTORE_NATIVE,
        database_edition=Database.DatabaseEdition.STANDARD,
        point_in_time_recovery_enablement=(
            Database.PointInTimeRecoveryEnablement.POINT_IN_TIME_RECOVERY_ENABLED
        ),
        delete_protection_state=Database.DeleteProtectionState.DELETE_PROTECTION_ENABLED,
    )


def a_field(collection: str, name: str) -> Field:
    return Field(name=f"projects/p/databases/d/collectionGroups/{collection}/fields/{name}")


def an_exempt_field(collection: str, name: str) -> Field:
    found = a_field(collection, name)
    found.index_config = Field.IndexConfig(ancestor_field="…/__default__/fields/*")
    return found


def an_expiring_field(collection: str, name: str) -> Field:
    found = a_field(collection, name)
    found.ttl_config = Field.TtlConfig(state=Field.TtlConfig.State.ACTIVE)
    found.index_config = Field.IndexConfig(uses_ancestor_config=True)
    return found


def the_defaults() -> Field:
    """Every database lists them: they are set for themselves."""
    found = a_field("__default__", "*")
    found.index_config = Field.IndexConfig(indexes=[Index()])
    return found


@dataclass
class Front:
    """What the server says. `refused`: the status and the words for a method, by its name."""

    emulator: str
    database: Database = field(default_factory=a_good_database)
    fields: list[Field] = field(default_factory=list)
    refused: dict[str, tuple[grpc.StatusCode, str]] = field(default_factory=dict)
    asked: list[tuple[str, Any]] = field(default_factory=list)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    host: str = ""
    channel: Any = None

    def service(self, details: Any) -> Any:
        service, method = details.method.strip("/").split("/")
        self.metadata[method] = dict(details.invocation_metadata)
        if method in self.refused:
            return self._refusal(method)
        if service == ADMIN:
            answer = self._get_database if method == "GetDatabase" else self._list_fields
            return grpc.unary_unary_rpc_method_handler(answer)
        return self._passed_on(details.method, details.invocation_metadata)

    def _refusal(self, method: str) -> Any:
        def refuse(request: Any, context: Any) -> Any:
            context.abort(*self.refused[method])

        if method == "Listen":
            return grpc.stream_stream_rpc_method_handler(refuse)
        if method in STREAMS:
            return grpc.unary_stream_rpc_method_handler(refuse)
        return grpc.unary_unary_rpc_method_handler(refuse)

    def _get_database(self, request: bytes, context: Any) -> bytes:
        self.asked.append(("GetDatabase", admin.GetDatabaseRequest.deserialize(request)))
        answer: bytes = Database.serialize(self.database)
        return answer

    def _list_fields(self, request: bytes, context: Any) -> bytes:
        asked = admin.ListFieldsRequest.deserialize(request)
        self.asked.append(("ListFields", asked))
        first = int(asked.page_token or 0)
        rest = len(self.fields) > first + PAGE_FIELDS
        page = admin.ListFieldsResponse(
            fields=self.fields[first : first + PAGE_FIELDS],
            next_page_token=str(first + PAGE_FIELDS) if rest else "",
        )
        answer: bytes = admin.ListFieldsResponse.serialize(page)
        return answer

    def _passed_on(self, path: str, metadata: Any) -> Any:
        method = path.rpartition("/")[2]
        kind = "stream_stream" if method == "Listen" else STREAMS.get(method, "unary_unary")
        own = [(key, value) for key, value in metadata if key in PASSED_ON]
        ask = getattr(self.channel, kind)(path)

        def pass_on(request: Any, context: Any) -> Any:
            try:
                if kind == "unary_unary":
                    return ask(request, metadata=own)
                return self._stream(ask(request, metadata=own), context)
            except grpc.RpcError as error:
                context.abort(error.code(), error.details())

        return getattr(grpc, f"{kind}_rpc_method_handler")(pass_on)

    @staticmethod
    def _stream(call: Any, context: Any) -> Iterator[bytes]:
        context.add_callback(call.cancel)
        try:
            yield from call
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())


@contextmanager
def start_front(emulator: str) -> Iterator[Front]:
    """A front before the emulator at `emulator`, with nothing set and nothing refused."""
    front = Front(emulator)
    server = grpc.server(ThreadPoolExecutor(16), handlers=[front])
    front.host = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    with grpc.insecure_channel(emulator) as front.channel:
        server.start()
        try:
            yield front
        finally:
            server.stop(None).wait(5)
