"""Commits that are refused once the epoch has moved on: the verify write on the fence.

For creates, deletes and whatever else has no stamp of its own to be fenced by.
"""

from __future__ import annotations

from collections.abc import Sequence

from daemon.firestore.client import FirestoreClient
from daemon.firestore.documents import Fields, MalformedDocument, stamp_of, verify_write
from daemon.firestore.errors import Refused
from daemon.firestore.lease import fence_name
from daemon.firestore.protos import Proto
from machine.ports import StaleWrite, StoreUnavailable
from machine.records import Grant, Stamp

FENCE_READS_MAX = 3
"""An operator's change of the fence (pause, a wish to step down) moves its stamp and leaves the
epoch alone: the commit is then made again with the new stamp, this often at most."""


class FencedWriter:
    """Commits under a `Grant`. Remembers the fence's newest stamp while the grant is good."""

    def __init__(self, client: FirestoreClient, group: str) -> None:
        self._client = client
        self._fence = fence_name(client, group)
        self._moved: tuple[Grant, Stamp] | None = None

    async def commit(self, grant: Grant, writes: Sequence[Proto]) -> Proto:
        """Apply all writes, or none, while `grant` is the newest.

        Raises `StaleWrite` when it is not; `Refused` when a precondition of the writes themselves
        does not hold.
        """
        stamp = grant.fence_stamp
        if self._moved is not None and self._moved[0] == grant:
            stamp = self._moved[1]
        for _ in range(FENCE_READS_MAX):
            try:
                return await self._client.commit([*writes, verify_write(self._fence, stamp)])
            except Refused:
                present = await self._stamp_under(grant)
                if present == stamp:
                    # The fence stands as we said: it was one of the writes.
                    raise
                stamp = present
                self._moved = (grant, stamp)
        raise StoreUnavailable("the fence changes faster than we can read it", code="aborted")

    async def _stamp_under(self, grant: Grant) -> Stamp:
        """The fence's stamp, if `grant` is still the newest. Raises `StaleWrite` if not."""
        fence = await self._client.get(self._fence, fields=("epoch", "incarnation"))
        if fence is None:
            raise StaleWrite("the fence is gone: nobody holds an epoch")
        fields = Fields(fence)
        try:
            epoch, incarnation = fields.integer("epoch"), fields.text("incarnation")
        except MalformedDocument as error:
            raise StaleWrite(f"the fence cannot be read: {error}") from error
        if (epoch, incarnation) != (grant.epoch, grant.incarnation):
            raise StaleWrite(f"epoch {grant.epoch} is over: the fence is at {epoch}")
        return stamp_of(fence)
