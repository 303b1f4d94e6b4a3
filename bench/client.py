"""A small HTTP/1.1 client: a load generator must cost less than what it loads.

Lives here: one request at a time on a kept-alive connection, answers with a Content-Length.
Never lives here: retries. Whether a request may be sent again is for the caller to say.
"""

from __future__ import annotations

import json
import select
from dataclasses import dataclass
from types import TracebackType

import trio

READ_BYTES = 65_536
HEAD_BYTES_MAX = 65_536
TO = "4915112345678"


class NobodyListens(Exception):
    """The connection was refused: nothing was sent."""


class ConnectionBroke(Exception):
    """The request went out, and the connection ended before the answer was complete.

    The message says whether the connection was new or kept from an earlier request.
    """


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    body: bytes


def make_request(
    method: str, path: str, *, bearer: str = "", content: object = None, headers: str = ""
) -> bytes:
    """A whole request, as bytes; `headers` are complete lines, each with its line end."""
    body = b"" if content is None else json.dumps(content).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {bearer}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    )
    return head.encode() + body


def send_request(bearer: str, account_id: str, text: str, key: str | None = None) -> bytes:
    """A `send-message` request."""
    content = {"accountId": account_id, "to": TO, "message": text}
    headers = "" if key is None else f"Idempotency-Key: {key}\r\n"
    path = "/api/whatsapp/send-message"
    return make_request("POST", path, bearer=bearer, content=content, headers=headers)


class Line:
    """One connection to a port of this host, opened when needed and kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stream: trio.SocketStream | None = None

    async def __aenter__(self) -> Line:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop the connection."""
        if self._stream is not None:
            self._stream.socket.close()
            self._stream = None

    async def ask(self, request: bytes) -> Answer:
        """Send a request and read its answer. Raises `NobodyListens`, `ConnectionBroke`.

        Cancelled: the connection is dropped, for an answer may be on its way.
        """
        kept = self._stream
        stream = await self._open()
        which = "a kept" if stream is kept else "a new"
        complete = False
        try:
            await stream.send_all(request)
            answer, keep = await self._read(stream)
            complete = keep
        except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError) as error:
            raise ConnectionBroke(f"{which} connection: {error.__cause__ or error}") from error
        finally:
            if not complete:
                self.close()
        return answer

    async def _open(self) -> trio.SocketStream:
        if self._stream is not None:
            # An idle connection that can be read from was closed by the other side.
            # Not `select`, which takes no descriptor above 1,023: in a crash many callers wait.
            readable = select.poll()
            readable.register(self._stream.socket.fileno(), select.POLLIN)
            if not readable.poll(0):
                return self._stream
            self.close()
        try:
            self._stream = await trio.open_tcp_stream("127.0.0.1", self._port)
        except OSError as error:
            raise NobodyListens(str(error)) from error
        return self._stream

    async def _read(self, stream: trio.SocketStream) -> tuple[Answer, bool]:
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += await _more(stream)
            assert len(data) < HEAD_BYTES_MAX, "an answer's head without an end"
        head = data[:end].lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        body = data[end + 4 :]
        while len(body) < length:
            body += await _more(stream)
        return Answer(int(head[9:12]), body), b"connection: close" not in head


async def _more(stream: trio.SocketStream) -> bytes:
    data = await stream.receive_some(READ_BYTES)
    if not data:
        raise EOFError("closed before the answer was complete")
    return bytes(data)
