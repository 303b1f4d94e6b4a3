"""Server streams read into Trio: a few long-lived threads, never one for a call.

gRPC's Python API hands out a stream's messages only to a thread that blocks for them; unary calls
need no thread (`client.py`). The threads of a `StreamReaders` are made once, at first need, read
one stream at a time and end with it. What they read is parsed by gRPC and handed over in batches.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from queue import SimpleQueue
from typing import Any

import grpc
import trio

from daemon.firestore.protos import Proto

BATCH_MESSAGES_MAX = 256
"""Handed over at once: about 3 ms of decoding for account documents, so the loop stays quick."""

QUEUED_MESSAGES_MAX = 4 * BATCH_MESSAGES_MAX
"""Read ahead of the consumer; then the thread waits, and HTTP/2 makes the server wait."""


class Stream:
    """One stream's messages on their way to the loop: filled by a thread, emptied by one task."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._loop = trio.lowlevel.current_trio_token()
        self._arrived = trio.Event()
        self._room = threading.Condition()
        self._messages: deque[Proto] = deque()
        self._ended: grpc.RpcError | None = None
        self._over = False
        self._abandoned = False

    async def next_batch(self) -> list[Proto]:
        """Wait for the next messages, in order; empty when the stream has ended well.

        Raises the stream's `grpc.RpcError` after its last message.
        """
        while True:
            await self._arrived.wait()
            self._arrived = trio.Event()
            with self._room:
                count = min(len(self._messages), BATCH_MESSAGES_MAX)
                batch = [self._messages.popleft() for _ in range(count)]
                over = self._over
                if self._messages or over:
                    self._arrived.set()
                self._room.notify()
            if batch:
                return batch
            if over:
                if self._ended is not None:
                    raise self._ended
                return []

    def abandon(self) -> None:
        """Cancel the call and let the thread go; at once, from the loop."""
        with self._room:
            self._abandoned = True
            self._room.notify()
        self._call.cancel()

    def read_all(self) -> None:
        """Run in a reader thread: move messages until the stream ends or is abandoned."""
        ended: grpc.RpcError | None = None
        try:
            for message in self._call:
                with self._room:
                    while len(self._messages) >= QUEUED_MESSAGES_MAX and not self._abandoned:
                        self._room.wait()
                    if self._abandoned:
                        break
                    wake = not self._messages
                    self._messages.append(message)
                if wake:
                    self._tell()
        except grpc.RpcError as error:
            ended = error
        with self._room:
            self._ended, self._over = ended, True
        self._tell()

    def _tell(self) -> None:
        # The event is looked up in the loop: `next_batch` replaces it after each batch.
        with suppress(trio.RunFinishedError):
            self._loop.run_sync_soon(lambda: self._arrived.set(), idempotent=False)


class StreamReaders:
    """At most `count_max` threads that read streams; further streams wait for a free one."""

    def __init__(self, name: str, count_max: int) -> None:
        self._name = name
        self._free = trio.CapacityLimiter(count_max)
        self._jobs: SimpleQueue[Stream | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._count = threading.Lock()

    @asynccontextmanager
    async def open_stream(self, start: Callable[[], Any]) -> AsyncIterator[Stream]:
        """Start a call (`start` returns gRPC's stream) and read it until the block's end.

        The block's end cancels the call, also when it is left early or is cancelled.
        """
        async with self._free:
            stream = Stream(start())
            self._hand_over(stream)
            try:
                yield stream
            finally:
                stream.abandon()

    def close(self) -> None:
        """End the threads. Only after the last stream: they are waiting for the next one."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            # They are past their last stream, so this is a matter of microseconds; the limit is
            # for a stream whose cancellation gRPC has not delivered yet.
            thread.join(timeout=0.5)
        self._threads.clear()

    def _hand_over(self, stream: Stream) -> None:
        with self._count:
            self._idle -= 1
            start_one = self._idle < 0 and len(self._threads) < self._free.total_tokens
            if start_one:
                self._idle += 1
        if start_one:
            thread = threading.Thread(
                target=self._serve, name=f"firestore-{self._name}", daemon=True
            )
            thread.start()
            self._threads.append(thread)
        self._jobs.put(stream)

    def _serve(self) -> None:
        while (stream := self._jobs.get()) is not None:
            stream.read_all()
            with self._count:
                self._idle += 1
