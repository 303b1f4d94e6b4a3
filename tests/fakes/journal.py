"""A journal that remembers."""

from __future__ import annotations

import trio


class RecordingJournal:
    """A `Journal`: `events` has each event with its fields, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self._stirred = trio.Event()

    def note(self, event: str, /, **fields: object) -> None:
        self.events.append((event, fields))
        self._stirred.set()
        self._stirred = trio.Event()

    def names(self) -> list[str]:
        return [event for event, _ in self.events]

    def of(self, event: str) -> list[dict[str, object]]:
        """The fields of every such event."""
        return [fields for name, fields in self.events if name == event]

    async def wait_for(self, event: str, count: int = 1) -> dict[str, object]:
        """Wait until `event` was noted `count` times; the fields of that one."""
        while len(self.of(event)) < count:
            await self._stirred.wait()
        return self.of(event)[count - 1]
