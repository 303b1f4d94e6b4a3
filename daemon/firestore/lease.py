"""The lease on Firestore: two documents in `watchkeeper/`, written in one conditional commit.

Never lives here: a clock of ours (ages are differences of the server's own times), and any
decision about who may act.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import replace

import grpc
import trio

from daemon.firestore import protos
from daemon.firestore.client import FirestoreClient, Line
from daemon.firestore.documents import (
    DocumentName,
    Fields,
    FieldValue,
    MalformedDocument,
    Moment,
    NewerFormat,
    check_format,
    check_group,
    seconds_between,
    stamp_from,
    stamp_of,
    update_write,
)
from daemon.firestore.errors import Refused, error_for
from daemon.firestore.protos import Proto
from machine.ports import (
    LeaseMissing,
    LeaseRefused,
    LeaseStore,
    StoreMisconfigured,
    StoreUnavailable,
)
from machine.records import (
    COUNT_MAX,
    FENCE_HISTORY_MAX,
    Fence,
    FenceChange,
    Heartbeat,
    Lease,
    LeaseStamps,
    LeaseState,
    LeaseView,
    LeaseWrite,
)

COLLECTION = "watchkeeper"

FORMAT = 1
"""Of lease and fence. The first release did not write it, and does not look at it.

So a format 2 must also lack a field that format 1 has, `nonce` or `changedBy` for example, or the
first release would take part without knowing.
"""

LISTEN_PAUSE_MIN_S = 0.5
LISTEN_PAUSE_MAX_S = 30.0
LISTEN_AGE_MAX_S = 600.0
"""A listen stream is renewed after this long without a word: a silent death costs no more than
that. With its resume token a renewal is billed only for what has changed."""

TARGET_ID = 1


def fence_name(client: FirestoreClient, group: str) -> DocumentName:
    """The fence of `group`: what every write that needs a verify write refers to."""
    return client.document(COLLECTION, f"{check_group(group)}-fence")


class FirestoreLeaseStore(LeaseStore):
    """`LeaseStore` on Firestore, on the heartbeat line.

    `note_trouble` gets a sentence when the fence's listener is in trouble; it must not raise.
    `listen_restarts` counts how often the listener had to open its stream again.
    """

    def __init__(
        self,
        client: FirestoreClient,
        group: str,
        *,
        note_trouble: Callable[[str], None] = lambda sentence: None,
        jitter: random.Random | None = None,
    ) -> None:
        self.listen_restarts = 0
        self._client = client
        self._lease = client.document(COLLECTION, f"{check_group(group)}-lease")
        self._fence = fence_name(client, group)
        self._note_trouble = note_trouble
        self._jitter = jitter or random.Random()

    async def read(self) -> LeaseView:
        found = await self._find()
        if self._lease not in found or self._fence not in found:
            missing = [name for name in (self._lease, self._fence) if name not in found]
            raise LeaseMissing(_missing_sentence(missing))
        # A later response vouches that earlier ones had not changed until its own read_time
        # (BatchGetDocumentsResponse.read_time), so the latest is the age of both.
        read_times = [answer.read_time for answer in found.values()]
        read_time = max(read_times, key=lambda moment: (moment.seconds, moment.nanos))
        fence = found[self._fence].found
        with _told_as_format():
            beat = _heartbeat(found[self._lease].found, read_time)
            return LeaseView(
                lease=beat.lease,
                fence=_read_fence(fence),
                lease_stamp=beat.lease_stamp,
                fence_stamp=stamp_of(fence),
                age_s=beat.age_s,
            )

    async def read_heartbeat(self) -> Heartbeat:
        answers = await self._client.batch_get([self._lease], line=Line.HEARTBEAT)
        for answer in answers:
            if answer.HasField("found"):
                with _told_as_format():
                    return _heartbeat(answer.found, answer.read_time)
        raise LeaseMissing(_missing_sentence([self._lease]))

    async def write(self, write: LeaseWrite) -> LeaseStamps:
        writes: list[Proto] = []
        if write.lease is not None:
            stamp = write.lease_stamp
            writes.append(
                update_write(
                    self._lease, _lease_values(write.lease), stamp=stamp, exists=stamp is None
                )
            )
        if write.fence is not None:
            stamp = write.fence_stamp
            writes.append(
                update_write(
                    self._fence, _fence_values(write.fence), stamp=stamp, exists=stamp is None
                )
            )
        if not writes:
            raise ValueError("a LeaseWrite without a document writes nothing")
        try:
            response = await self._client.commit(writes, line=Line.HEARTBEAT)
        except Refused as refused:
            if refused.code == "not_found":
                raise LeaseMissing(_missing_sentence([self._lease, self._fence])) from refused
            raise LeaseRefused(str(refused)) from refused
        stamps = [stamp_from(result.update_time) for result in response.write_results]
        return LeaseStamps(
            lease_stamp=stamps.pop(0) if write.lease is not None else None,
            fence_stamp=stamps.pop(0) if write.fence is not None else None,
        )

    async def initialise(self, *, epoch: int = 0) -> bool:
        found = await self._find()
        if found:
            return self._already(found)
        lease = Lease("", "", epoch, "", 0.0, LeaseState.RELEASED)
        fence = Fence(epoch, "", "", "", LeaseState.RELEASED)
        writes = [
            update_write(self._lease, _lease_values(lease), exists=False),
            update_write(self._fence, _fence_values(fence), exists=False),
        ]
        try:
            await self._client.commit(writes, line=Line.HEARTBEAT)
        except Refused:
            # Somebody else was quicker, or an unanswered attempt of ours was.
            return self._already(await self._find())
        return True

    def watch_fence(self) -> AbstractAsyncContextManager[trio.MemoryReceiveChannel[Fence]]:
        return self._watch_fence()

    @asynccontextmanager
    async def _watch_fence(self) -> AsyncIterator[trio.MemoryReceiveChannel[Fence]]:
        newest = _Newest()
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_listening, newest)
            try:
                yield newest.receive
            except Exception as error:  # noqa: BLE001 - raised below, outside the nursery's group
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _keep_listening(self, newest: _Newest) -> None:
        """Listen to the fence until cancelled, reopening with backoff. Never raises.

        Refused for good (permissions): says so and asks again at the slowest pace, for an
        operator may repair it while we run.
        """
        resume = _Resume()
        pause_s = LISTEN_PAUSE_MIN_S
        while True:
            resume.live = False
            trouble: Exception | None = None
            with trio.move_on_after(LISTEN_AGE_MAX_S) as age:
                trouble = await self._listen(newest, resume, age)
            if resume.live:
                pause_s = LISTEN_PAUSE_MIN_S
            elif trouble is not None:
                # Perhaps it is the resume mark that the server will not have.
                resume.mark = b""
            if isinstance(trouble, StoreMisconfigured):
                pause_s = LISTEN_PAUSE_MAX_S
            if trouble is not None:
                self._note_trouble(f"the fence's listener was interrupted: {trouble}")
                await trio.sleep(pause_s * self._jitter.uniform(0.5, 1.0))
                pause_s = min(2 * pause_s, LISTEN_PAUSE_MAX_S)
            self.listen_restarts += 1

    async def _listen(
        self, newest: _Newest, resume: _Resume, age: trio.CancelScope
    ) -> Exception | None:
        """Read one stream to its end; why it ended. Each message moves the end of its age."""
        request = protos.ListenRequest(database=self._client.database)
        request.add_target.target_id = TARGET_ID
        request.add_target.documents.documents.append(self._fence)
        if resume.mark:
            request.add_target.resume_token = resume.mark
        try:
            async with self._client.open_listen(request) as stream:
                while batch := await stream.next_batch():
                    age.deadline = trio.current_time() + LISTEN_AGE_MAX_S
                    for message in batch:
                        self._take(message, newest, resume)
        except grpc.RpcError as error:
            return error_for("Listen", error.code(), error.details() or "")
        except (Refused, StoreUnavailable, StoreMisconfigured) as error:
            return error
        return StoreUnavailable("Listen: the server ended the stream", code="ended")

    def _take(self, message: Proto, newest: _Newest, resume: _Resume) -> None:
        match message.WhichOneof("response_type"):
            case "document_change":
                self._client.operations.listens += 1
                self._client.operations.reads += 1
                try:
                    newest.put(_watched_fence(message.document_change.document))
                except MalformedDocument as error:
                    self._note_trouble(f"the fence cannot be read: {error}")
            case "target_change":
                change = message.target_change
                kinds = type(change)
                if change.resume_token:
                    resume.mark = change.resume_token
                if change.target_change_type == kinds.CURRENT:
                    resume.live = True
                elif change.target_change_type in (kinds.REMOVE, kinds.RESET):
                    resume.mark = b""
                    if change.target_change_type == kinds.REMOVE:
                        status = _status_of(change.cause.code)
                        raise error_for("Listen", status, change.cause.message)
            case "document_delete":
                self._note_trouble("the fence was deleted: restore it, or run `watchkeeper init`")

    async def _find(self) -> dict[DocumentName, Proto]:
        answers = await self._client.batch_get([self._lease, self._fence], line=Line.HEARTBEAT)
        return {DocumentName(a.found.name): a for a in answers if a.HasField("found")}

    def _already(self, found: dict[DocumentName, Proto]) -> bool:
        missing = [name for name in (self._lease, self._fence) if name not in found]
        if missing:
            raise LeaseMissing(_missing_sentence(missing))
        return False


class _Resume:
    """Where a new listen stream may go on, and whether the last one became live."""

    def __init__(self) -> None:
        self.mark = b""
        self.live = False


class _Newest:
    """A channel that holds one fence at most: a new one takes the place of an unread one."""

    def __init__(self) -> None:
        self._send, self.receive = trio.open_memory_channel[Fence](1)
        self._unread = self.receive.clone()

    def put(self, fence: Fence) -> None:
        try:
            self._send.send_nowait(fence)
        except trio.WouldBlock:
            self._unread.receive_nowait()
            self._send.send_nowait(fence)


@contextmanager
def _told_as_format() -> Iterator[None]:
    """Tell a document that cannot be read as what it is for an operator."""
    try:
        yield
    except NewerFormat as error:
        raise StoreMisconfigured(f"the lease in {COLLECTION}/ cannot be read: {error}") from error
    except MalformedDocument as error:
        raise StoreMisconfigured(
            f"the lease in {COLLECTION}/ is not of our format: {error}; another program writes it"
        ) from error


def _status_of(code: int) -> grpc.StatusCode:
    for status in grpc.StatusCode:
        if status.value[0] == code:
            return status
    return grpc.StatusCode.UNKNOWN


def _missing_sentence(names: list[DocumentName]) -> str:
    ids = " and ".join(f"{COLLECTION}/{name.rsplit('/', 1)[-1]}" for name in names)
    return f"{ids} missing: `watchkeeper init` makes them, once, for a new group"


def _lease_values(lease: Lease) -> dict[str, FieldValue]:
    return {
        "format": FORMAT,
        "holder": lease.holder,
        "incarnation": lease.incarnation,
        "epoch": lease.epoch,
        "nonce": lease.nonce,
        "ttlMs": round(lease.ttl_s * 1000),
        "state": lease.state.value,
    }


def _read_lease(document: Proto) -> Lease:
    fields = Fields(document)
    check_format(fields, FORMAT, absent=1)
    lease = Lease(
        holder=fields.text("holder"),
        incarnation=fields.text("incarnation"),
        epoch=fields.integer("epoch"),
        nonce=fields.text("nonce"),
        ttl_s=fields.integer("ttlMs") / 1000,
        state=_state(fields.text("state")),
    )
    if not lease.plausible:
        raise MalformedDocument("the lease's 'epoch' or 'ttlMs' is none that was ever written")
    return lease


def _heartbeat(document: Proto, read_time: Proto) -> Heartbeat:
    age_s = max(0.0, seconds_between(document.update_time, read_time))
    return Heartbeat(_read_lease(document), stamp_of(document), age_s)


def _fence_values(fence: Fence) -> dict[str, FieldValue]:
    history = fence.history[-FENCE_HISTORY_MAX:]
    return {
        "format": FORMAT,
        "epoch": fence.epoch,
        "holder": fence.holder,
        "incarnation": fence.incarnation,
        "address": fence.address,
        "state": fence.state.value,
        "handoffTo": fence.handoff_to,
        "paused": fence.paused,
        "stepDownOf": fence.step_down_of,
        "reason": fence.reason,
        "changedBy": fence.changed_by,
        "settled": fence.settled,
        "history": [
            {
                "at": Moment(change.at),
                "epoch": change.epoch,
                "state": change.state.value,
                "changedBy": change.changed_by,
                "reason": change.reason,
            }
            for change in history
        ],
    }


def _watched_fence(document: Proto) -> Fence:
    """The fence for whom it only tells the news: of a newer format, what every format says."""
    try:
        return _read_fence(document)
    except NewerFormat:
        return _read_lasting(Fields(document))


def _read_lasting(fields: Fields) -> Fence:
    """`FENCE_LASTING_FIELDS`."""
    return Fence(
        epoch=fields.integer("epoch"),
        holder=fields.text("holder"),
        incarnation=fields.text("incarnation"),
        address=fields.text("address"),
        state=_state(fields.text("state")),
    )


def _read_fence(document: Proto) -> Fence:
    fields = Fields(document)
    check_format(fields, FORMAT, absent=1)
    if not 0 <= fields.integer("epoch") <= COUNT_MAX:
        raise MalformedDocument("the fence's 'epoch' is none that was ever counted to")
    return replace(
        _read_lasting(fields),
        handoff_to=fields.text_or_none("handoffTo"),
        paused=fields.flag("paused"),
        step_down_of=fields.integer_or_none("stepDownOf"),
        reason=fields.text("reason"),
        changed_by=fields.text("changedBy"),
        settled=fields.flag_or_false("settled"),
        history=tuple(
            FenceChange(
                at=entry.moment("at"),
                epoch=entry.integer("epoch"),
                state=_state(entry.text("state")),
                changed_by=entry.text("changedBy"),
                reason=entry.text("reason"),
            )
            for entry in fields.maps("history")
        ),
    )


def _state(text: str) -> LeaseState:
    try:
        return LeaseState(text)
    except ValueError:
        raise MalformedDocument("field 'state' is none that we know") from None
