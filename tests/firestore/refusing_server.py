"""A real gRPC server that answers every call with one status, or none: no emulator needed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

STREAMS = {"Listen", "BatchGetDocuments", "RunQuery"}


class RefusingServer:
    """Refuses with `status`; with `None` it hangs until the client cancels.

    `calls` counts the calls that came, `cancelled` those that the client gave up.
    """

    def __init__(self, status: grpc.StatusCode | None, details: str) -> None:
        self.status = status
        self.details = details
        self.calls = 0
        self.cancelled = 0
        self.metadata: dict[str, str] = {}
        self.host = ""

    def service(self, handler_call_details: Any) -> Any:
        method = handler_call_details.method.rsplit("/", 1)[-1]
        self.metadata = dict(handler_call_details.invocation_metadata)

        def refuse(request: Any, context: Any) -> bytes:
            self.calls += 1
            if self.status is None:
                ended = threading.Event()
                context.add_callback(ended.set)
                ended.wait(timeout=10)
                self.cancelled += not context.is_active()
                raise RuntimeError("nobody is there to hear it")
            context.abort(self.status, self.details)
            raise AssertionError("abort always raises")

        if method == "Listen":
            return grpc.stream_stream_rpc_method_handler(refuse)
        if method in STREAMS:
            return grpc.unary_stream_rpc_method_handler(refuse)
        return grpc.unary_unary_rpc_method_handler(refuse)


@contextmanager
def start_refusing_server(
    status: grpc.StatusCode | None, details: str = "as the test wants it"
) -> Iterator[RefusingServer]:
    refusing = RefusingServer(status, details)
    server = grpc.server(ThreadPoolExecutor(4), handlers=[refusing])
    refusing.host = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield refusing
    finally:
        server.stop(None).wait()
