"""Firestore's gRPC on Trio: calls without a thread each, real cancellation, three lines.

Never lives here: a retry (the libraries' own are switched off), and what a document means.

A *line* is a gRPC channel with a TCP connection of its own, replaced when calls on it stay
unanswered: a bulk read can starve neither the heartbeats nor the fence's listener.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any
from urllib.parse import quote

import grpc
import trio

from daemon.firestore import protos
from daemon.firestore.credentials import Access, EmulatorAccess, open_google_access
from daemon.firestore.documents import DocumentName
from daemon.firestore.errors import Refused, error_for
from daemon.firestore.protos import Proto
from daemon.firestore.streams import BATCH_MESSAGES_MAX, Stream, StreamReaders

HOST = "firestore.googleapis.com:443"

CALL_TIMEOUT_MAX_S = 300.0
"""For callers without a deadline of their own: a limit on everything."""

DEADLINE_SLACK_S = 0.1
"""gRPC's own deadline lies this much after the caller's, so that it is Trio that ends the call and
callers see one kind of ending; the server still learns of it."""

UNANSWERED_MAX = 2
"""Calls on a channel that end by their deadline, in a row, before it is replaced. A connection
whose packets vanish looks alive to TCP for many minutes; a new one may go another way."""

MESSAGE_BYTES_MAX = 64 * 1024 * 1024
"""Of one answer. A page of `PAGE_DOCUMENTS_MAX` part documents stays below it."""

PAGE_DOCUMENTS_MAX = 60
"""Documents in a page of `list_documents`: each has at most 1 MiB."""

COALESCE_S = 0.01
"""How long a query's reader lets messages gather before it looks again."""

STREAM_READERS_MAX = 4
"""Threads of one line that read server streams."""


class Line(StrEnum):
    """Which connection a call takes."""

    HEARTBEAT = "heartbeat"
    DATA = "data"
    LISTEN = "listen"


@dataclass(slots=True)
class Operations:
    """What Firestore has billed us for so far, as we count it: one of each per document.

    `calls` counts answered calls, which cost nothing by themselves. A query without results and a
    missing document are billed as one read (https://firebase.google.com/docs/firestore/pricing).
    """

    calls: int = 0
    reads: int = 0
    writes: int = 0
    deletes: int = 0
    listens: int = 0


Metadata = tuple[tuple[str, str], ...]
"""What a call carries beside its request."""


class FirestoreClient:
    """Calls to one database. Made by `open_firestore`, and usable until its block ends.

    Every call may raise `StoreUnavailable` and `StoreMisconfigured`; a call that is cancelled is
    cancelled at the server too, and leaves nothing behind here.
    """

    def __init__(self, project: str, database: str, emulator_host: str | None, access: Access):
        self.database = f"projects/{project}/databases/{database}"
        self.root = f"{self.database}/documents"
        self.operations = Operations()
        self._access = access
        # As Google's Go client routes its calls, which named databases need
        # (googleapis/google-cloud-go, firestore/client.go).
        self._routing = (
            ("google-cloud-resource-prefix", self.database),
            ("x-goog-request-params", f"project_id={project}&database_id={database}"),
        )
        self._lines = {line: _Line(line, emulator_host) for line in Line}

    @property
    def account(self) -> str | None:
        """Whose credentials these are, where that is known: a service account's address."""
        return self._access.account

    def document(self, *segments: str) -> DocumentName:
        """The full name of a document: collection, document id, collection, document id, …"""
        return DocumentName("/".join((self.root, *segments)))

    async def get(
        self, name: DocumentName, *, line: Line = Line.DATA, fields: Sequence[str] | None = None
    ) -> Proto | None:
        """Read one document, or some of its fields; `None` when it does not exist."""
        request = protos.GetDocumentRequest(name=name)
        if fields is not None:
            request.mask.field_paths.extend(fields)
        try:
            document = await self._call(line, "GetDocument", request)
        except Refused as refused:
            if refused.code != "not_found":
                raise
            document = None
        self.operations.reads += 1
        return document

    async def batch_get(
        self,
        names: Sequence[DocumentName],
        *,
        line: Line = Line.DATA,
        fields: Sequence[str] | None = None,
    ) -> list[Proto]:
        """Read several documents in one call; Firestore's responses, in any order."""
        request = protos.BatchGetDocumentsRequest(database=self.database, documents=names)
        if fields is not None:
            request.mask.field_paths.extend(fields)
        responses: list[Proto] = []
        async with self._open_stream(line, "BatchGetDocuments", request) as stream:
            while batch := await _next_batch("BatchGetDocuments", stream):
                responses += [answer for answer in batch if answer.WhichOneof("result")]
        self.operations.reads += len(responses)
        return responses

    async def list_documents(self, parent: str, collection: str) -> list[Proto]:
        """Read a small collection, page by page. Not as of one moment."""
        documents: list[Proto] = []
        page_start = ""
        while True:
            page = await self._call(
                Line.DATA,
                "ListDocuments",
                protos.ListDocumentsRequest(
                    parent=parent,
                    collection_id=collection,
                    page_size=PAGE_DOCUMENTS_MAX,
                    page_token=page_start,
                ),
            )
            self.operations.reads += max(1, len(page.documents))
            documents += page.documents
            page_start = page.next_page_token
            if not page_start:
                return documents

    async def run_query(self, request: Proto, take: Callable[[list[Proto]], None]) -> None:
        """Read a query's documents, all as of one moment, giving them to `take` in batches.

        Raises in the middle when the stream breaks: what `take` got is then no complete answer.
        """
        found = 0
        try:
            async with self._open_stream(Line.DATA, "RunQuery", request) as stream:
                while batch := await _next_batch("RunQuery", stream):
                    documents = [answer.document for answer in batch if answer.HasField("document")]
                    found += len(documents)
                    take(documents)
                    if len(batch) < BATCH_MESSAGES_MAX:
                        # Woken for each message, we would keep the threads that read from theirs:
                        # twice the time for 10,000 documents.
                        await trio.sleep(COALESCE_S)
        finally:
            self.operations.reads += max(1, found)

    async def commit(self, writes: Sequence[Proto], *, line: Line = Line.DATA) -> Proto:
        """Apply all writes or none. Raises `Refused` when a precondition does not hold.

        Any error but `StoreMisconfigured` leaves open whether the writes were applied.
        """
        request = protos.CommitRequest(database=self.database, writes=writes)
        response = await self._call(line, "Commit", request)
        deletes = sum(1 for write in writes if write.delete)
        self.operations.deletes += deletes
        self.operations.writes += len(writes) - deletes
        return response

    async def get_as_stranger(self, name: DocumentName) -> Proto:
        """Read one document as who has no credentials: the security rules decide, not IAM.

        Raises `Forbidden` where they say no; `Refused` where they let in and nothing is there.
        """
        await trio.lowlevel.checkpoint()
        request = protos.GetDocumentRequest(name=name)
        return await self._ask(Line.DATA, "GetDocument", request, self._routing)

    async def call_other(
        self, path: str, request: Proto, answer: Any, routing: tuple[str, str]
    ) -> Proto:
        """Call `path`, a method of another service on Firestore's host, answered by an `answer`.

        `routing` is the request's field that says what it is about, and its value.
        """
        field, value = routing
        header = ("x-goog-request-params", f"{field}={quote(value, safe='/')}")
        access = await self._metadata_of_access()
        return await self._ask(Line.DATA, path, request, (header, *access), answer)

    def open_listen(self, request: Proto) -> AbstractAsyncContextManager[Stream]:
        """Open a Listen stream with one target; ends its call with the block.

        While the server is away the call waits inside gRPC, which asks for the connection every
        second or two and costs no time of ours.
        """
        return self._open_listen(request)

    @asynccontextmanager
    async def _open_listen(self, request: Proto) -> AsyncIterator[Stream]:
        metadata = await self._metadata()
        line = self._lines[Line.LISTEN]
        requests = _OneRequest(request)
        try:
            with line.use() as channel:
                method = channel.listen

                def start() -> Any:
                    return method(requests, metadata=metadata, wait_for_ready=True)

                async with line.readers.open_stream(start) as stream:
                    self.operations.calls += 1
                    yield stream
        finally:
            requests.close()

    @asynccontextmanager
    async def _open_stream(self, name: Line, method: str, request: Proto) -> AsyncIterator[Stream]:
        metadata = await self._metadata()
        line = self._lines[name]
        with line.use() as channel:

            def start() -> Any:
                timeout_s = _seconds_left()
                return channel.streaming[method](request, timeout=timeout_s, metadata=metadata)

            async with line.readers.open_stream(start) as stream:
                yield stream
            self.operations.calls += 1

    async def _call(self, name: Line, method: str, request: Proto) -> Proto:
        metadata = await self._metadata()
        return await self._ask(name, method, request, metadata)

    async def _ask(
        self, name: Line, method: str, request: Proto, metadata: Metadata, answer: Any = None
    ) -> Proto:
        """Make a unary call: of Firestore, or by its full name with the class of its `answer`."""
        with self._lines[name].use() as channel:
            call = channel.unary[method] if answer is None else channel.other(method, answer)
            future = call.future(request, timeout=_seconds_left(), metadata=metadata)
            await _wait_done(future)
            status = future.code()
            if status is not grpc.StatusCode.OK:
                raise error_for(method.rpartition("/")[2], status, future.details() or "")
            self.operations.calls += 1
            return future.result()

    async def _metadata(self) -> Metadata:
        return self._routing + await self._metadata_of_access()

    async def _metadata_of_access(self) -> Metadata:
        # Also the checkpoint of every call: a caller whose time is up sends nothing.
        await trio.lowlevel.checkpoint()
        return await self._access.metadata()

    def _close(self) -> None:
        for line in self._lines.values():
            line.close()


@asynccontextmanager
async def open_firestore(
    project: str, database: str = "(default)", emulator_host: str | None = None
) -> AsyncIterator[FirestoreClient]:
    """Open a client for one database; with `emulator_host` (`host:port`), of the emulator.

    Connects at the first call. Raises `StoreMisconfigured` when there are no credentials.
    """
    if emulator_host is not None:
        client = FirestoreClient(project, database, emulator_host, EmulatorAccess())
        try:
            yield client
        finally:
            client._close()
        return
    async with open_google_access() as access:
        client = FirestoreClient(project, database, None, access)
        try:
            yield client
        finally:
            client._close()


class _Line:
    """A connection for one kind of call: one channel in use, perhaps retired ones ending."""

    def __init__(self, name: Line, emulator_host: str | None) -> None:
        self.readers = StreamReaders(name, STREAM_READERS_MAX)
        self._emulator_host = emulator_host
        self._channel: _Channel | None = None
        self._retired: set[_Channel] = set()

    @contextmanager
    def use(self) -> Iterator[_Channel]:
        """The channel for one call; judges from the call's end whether the channel still works."""
        if self._channel is None:
            self._channel = _Channel(self._emulator_host)
        channel = self._channel
        channel.calls += 1
        deadline = trio.current_effective_deadline()
        try:
            yield channel
        except trio.Cancelled:
            # Cancelled before its time says nothing about the connection.
            if trio.current_time() >= deadline:
                self._unanswered(channel)
            raise
        except Exception as error:
            if getattr(error, "code", "") == "deadline_exceeded":
                self._unanswered(channel)
            raise
        else:
            channel.unanswered = 0
        finally:
            channel.calls -= 1
            if channel in self._retired and channel.calls == 0:
                self._retired.remove(channel)
                channel.close()

    def close(self) -> None:
        for channel in (*self._retired, *([self._channel] if self._channel else [])):
            channel.close()
        self._retired.clear()
        self._channel = None
        self.readers.close()

    def _unanswered(self, channel: _Channel) -> None:
        channel.unanswered += 1
        if channel.unanswered >= UNANSWERED_MAX and channel is self._channel:
            self._retired.add(channel)
            self._channel = None


class _Channel:
    """A gRPC channel and its methods."""

    def __init__(self, emulator_host: str | None) -> None:
        if emulator_host is None:
            self._grpc = grpc.secure_channel(HOST, grpc.ssl_channel_credentials(), _options(True))
        else:
            self._grpc = grpc.insecure_channel(emulator_host, _options(False))
        self.calls = 0
        self.unanswered = 0
        self.unary = {
            name: self._grpc.unary_unary(
                protos.SERVICE + name,
                request_serializer=_serialize,
                response_deserializer=answer.FromString,
            )
            for name, answer in protos.UNARY.items()
        }
        self.streaming = {
            name: self._grpc.unary_stream(
                protos.SERVICE + name,
                request_serializer=_serialize,
                response_deserializer=answer.FromString,
            )
            for name, answer in protos.STREAMING.items()
        }
        self.listen = self._grpc.stream_stream(
            protos.SERVICE + "Listen",
            request_serializer=_serialize,
            response_deserializer=protos.ListenResponse.FromString,
        )

    def other(self, path: str, answer: Any) -> Any:
        """A method that is not Firestore's own."""
        return self._grpc.unary_unary(
            path, request_serializer=_serialize, response_deserializer=answer.FromString
        )

    def close(self) -> None:
        self._grpc.close()


class _OneRequest:
    """The request side of a Listen stream: one request, then silence until the stream's end.

    gRPC consumes it in a thread of its own, which ends with `close`.
    """

    def __init__(self, request: Proto) -> None:
        self._request: Proto | None = request
        self._closed = threading.Event()

    def __iter__(self) -> _OneRequest:
        return self

    def __next__(self) -> Proto:
        if self._request is not None:
            request, self._request = self._request, None
            return request
        self._closed.wait()
        raise StopIteration

    def close(self) -> None:
        self._closed.set()


def _options(production: bool) -> list[tuple[str, int]]:
    options = [
        # Without it, channels to one address share one connection behind our backs.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
        ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
        # gRPC waits up to two minutes between connection attempts by default; a lease cannot.
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 2000),
        ("grpc.max_reconnect_backoff_ms", 1500),
    ]
    if production:
        # The emulator's server hangs up on clients that ping this often.
        options += [("grpc.keepalive_time_ms", 30_000), ("grpc.keepalive_timeout_ms", 10_000)]
    else:
        options += [("grpc.enable_http_proxy", 0)]
    return options


def _serialize(message: Proto) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def _seconds_left() -> float:
    left_s = trio.current_effective_deadline() - trio.current_time() + DEADLINE_SLACK_S
    return min(left_s, CALL_TIMEOUT_MAX_S)


async def _wait_done(future: Any) -> None:
    """Wait until a gRPC future is done; cancelled, cancel its call and leave at once."""
    done = trio.Event()
    loop = trio.lowlevel.current_trio_token()

    def wake(_: object) -> None:
        # Runs in gRPC's thread, perhaps after the loop has gone.
        with suppress(trio.RunFinishedError):
            loop.run_sync_soon(done.set)

    future.add_done_callback(wake)
    try:
        await done.wait()
    finally:
        # Of no effect on a call that is done.
        future.cancel()


async def _next_batch(method: str, stream: Stream) -> list[Proto]:
    """A stream's next messages, empty at its end; its error is mapped.

    Gives the loop a turn each time, also when messages are there already.
    """
    await trio.lowlevel.checkpoint()
    try:
        return await stream.next_batch()
    except grpc.RpcError as error:
        status, details = error.code(), error.details()
        raise error_for(method, status, details or "") from None
