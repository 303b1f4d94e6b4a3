"""Plausible mistakes, to show that the simulation would notice them.

Most are made between the machine and its ports: the real machine, wired to something that is wrong
in one way. Where a mistake is inside the machine, one function of it is replaced for the time of
one run in this process.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast

import trio

import machine.desk
import machine.lease
import machine.outbox
import machine.restore
import tests.simulation.front
from machine.desk import Desk
from machine.doubt import Source
from machine.instance import Instance
from machine.lease import UNCERTAIN, HeldLease, LeaseTiming, release, renew_write
from machine.ledger import Ledger
from machine.ports import (
    AccountStore,
    Bridge,
    Clocks,
    Connection,
    Connector,
    LeaseMissing,
    LeaseStore,
    LocalStore,
    Ports,
    ServerAck,
    StaleWrite,
)
from machine.records import (
    AccountCommit,
    AccountCopy,
    AccountId,
    Heartbeat,
    KeyName,
    LeaseStamps,
    LeaseState,
    LeaseView,
    LeaseWrite,
    Message,
    MessageId,
    Stamp,
)
from machine.refusals import NotActive
from machine.restore import Choice, Restore
from machine.session import Session
from machine.term import Term
from tests.simulation.process import Process
from tests.simulation.stores import SimulatedState
from tests.simulation.world import TIMINGS, Wiring


def as_it_is(ports: Ports, _process: Process) -> Ports:
    return ports


@dataclass(frozen=True)
class Mutant:
    """A mistake: what it is, how it is made, and the seeds one of which has to show it."""

    what: str
    wire: Wiring = as_it_is
    made: Callable[[], AbstractContextManager[None]] = nullcontext
    state: type[SimulatedState] = SimulatedState
    seeds: range = range(1, 41)


RIGHT = Mutant("the machine as it is")


class Over:
    """Something over a port: what it does not say itself, the port says."""

    def __init__(self, inner: Any, ports: Ports, process: Process) -> None:
        self.inner = inner
        self.ports = ports
        self.process = process

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def over_lease(kind: type[Over]) -> Wiring:
    return lambda ports, process: replace(
        ports, lease=cast(LeaseStore, kind(ports.lease, ports, process))
    )


def over_connector(kind: type[Over]) -> Wiring:
    return lambda ports, process: replace(
        ports, connector=cast(Connector, kind(ports.connector, ports, process))
    )


def patched(owner: object, name: str, wrong: object) -> Callable[[], AbstractContextManager[None]]:
    """`owner.name` is `wrong` for the time of the block."""

    @contextmanager
    def made() -> Iterator[None]:
        right = vars(owner)[name]
        setattr(owner, name, wrong)
        try:
            yield
        finally:
            setattr(owner, name, right)

    return made


# --- holding the lease ----------------------------------------------------------------------------


class LateHeldLease(HeldLease):
    """Allows itself the time that the answers took, on top."""

    def __post_init__(self) -> None:
        late_s = trio.current_time() - self.asked_at
        self.deadline += late_s
        self.boot_deadline += late_s

    def extend(self, asked_at: float, boot_asked_at: float, timing: LeaseTiming) -> None:
        late_s = trio.current_time() - asked_at
        super().extend(asked_at + late_s, boot_asked_at + late_s, timing)
        self.asked_at = asked_at


async def renew_blindly(
    held: HeldLease, store: LeaseStore, timing: LeaseTiming, clocks: Clocks, rng: object
) -> bool:
    """Take every answer for a yes."""
    asked_at, boot_asked_at = trio.current_time(), clocks.boottime()
    write = renew_write(held, nonce=f"{held.grant.incarnation} {asked_at}")
    try:
        with trio.fail_after(timing.attempt_s):
            stamps = await store.write(write)
        assert stamps.lease_stamp is not None
        assert write.lease is not None
        held.lease, held.lease_stamp = write.lease, stamps.lease_stamp
    except UNCERTAIN:
        pass
    held.extend(asked_at, boot_asked_at, timing)
    held.renewals += 1
    return True


class NoBoottime(Over):
    """Has one clock only, which stands still in a suspend."""

    def boottime(self) -> float:
        return trio.current_time()


@contextmanager
def never_stops() -> Iterator[None]:
    """The deadline is nobody's business."""

    def extend(self: Term, held: HeldLease) -> None:
        self.scope.deadline = math.inf

    with (
        patched(Term, "over", property(lambda self: self.scope.cancel_called))(),
        patched(Term, "extend", extend)(),
        patched(Term, "keep_boottime_watched", keep_no_watch)(),
    ):
        yield


async def release_then_settle(self: Term) -> None:
    ports = self._ports
    timing = TIMINGS[0]
    await release(
        self.held, ports.lease, timing, ports.clocks, ports.rng, ports.journal, reason="early"
    )
    await _settle(self)


_settle = Term.settle


async def keep_no_watch(_self: Term) -> None:
    await trio.sleep_forever()


# --- taking the lease -----------------------------------------------------------------------------


class Unconditional(Over):
    """Reads the preconditions when it sends, and so has none."""

    async def write(self, write: LeaseWrite) -> LeaseStamps:
        view = await self.inner.read()
        stamps: LeaseStamps = await self.inner.write(
            replace(
                write,
                lease_stamp=None if write.lease is None else view.lease_stamp,
                fence_stamp=None if write.fence is None else view.fence_stamp,
            )
        )
        return stamps


class UnconditionalRelease(Unconditional):
    """Gives back whatever lease there is."""

    async def write(self, write: LeaseWrite) -> LeaseStamps:
        if write.lease is not None and write.lease.state is LeaseState.RELEASED:
            return await super().write(write)
        stamps: LeaseStamps = await self.inner.write(write)
        return stamps


class OtherView(Over):
    """Sees the lease other than it is."""

    def seen(self, view: LeaseView) -> LeaseView:
        raise NotImplementedError

    async def read(self) -> LeaseView:
        return self.seen(await self.inner.read())

    async def read_heartbeat(self) -> Heartbeat:
        beat: Heartbeat = await self.inner.read_heartbeat()
        fence = self.process.instance._view
        assert fence is not None
        view = self.seen(replace(fence, lease=beat.lease, age_s=beat.age_s))
        return replace(beat, lease=view.lease, age_s=view.age_s)


class WallClockAge(OtherView):
    """Compares the wall clocks of two hosts."""

    written: dict[str, float] = {}  # noqa: RUF012 - what the document would hold, of all hosts

    def seen(self, view: LeaseView) -> LeaseView:
        now = self.ports.clocks.wall()
        return replace(view, age_s=now - self.written.get(view.lease.nonce, now))

    async def write(self, write: LeaseWrite) -> LeaseStamps:
        if write.lease is not None:
            self.written[write.lease.nonce] = self.ports.clocks.wall()
        stamps: LeaseStamps = await self.inner.write(write)
        return stamps


class Impatient(OtherView):
    """Takes the lease as soon as two renewals have not been seen."""

    def seen(self, view: LeaseView) -> LeaseView:
        return replace(view, lease=replace(view.lease, ttl_s=0.7 * view.lease.ttl_s))


class OwnTtl(OtherView):
    """Waits for its own ttl and not for the one that the holder promised."""

    def seen(self, view: LeaseView) -> LeaseView:
        return replace(view, lease=replace(view.lease, ttl_s=self.process.timing.ttl_s))


class DeafToPause(OtherView):
    """Does not heed that the operator has paused the group."""

    def seen(self, view: LeaseView) -> LeaseView:
        return replace(view, fence=replace(view.fence, paused=False))


class MissingIsFree(OtherView):
    """Takes a missing document for a free lease, and forgets which epochs there were."""

    def seen(self, view: LeaseView) -> LeaseView:
        return view

    async def read(self) -> LeaseView:
        try:
            view: LeaseView = await self.inner.read()
        except LeaseMissing:
            await self.inner.initialise()
            view = await self.inner.read()
        return view


class EpochForgotten(Over):
    """A disk that remembers no epoch."""

    async def highest_epoch(self) -> int:
        return 0


@contextmanager
def epochs_from_the_documents_only() -> Iterator[None]:
    with (
        patched(Restore, "_check_epoch", lambda *_args, **_more: None)(),
        patched(Instance, "_note_epoch", lambda *_args: None)(),
    ):
        yield


# --- writing --------------------------------------------------------------------------------------


class UnfencedState(SimulatedState):
    """Writes whatever it is given, whoever gives it."""

    def commit(self, commit: AccountCommit) -> Stamp:
        stored = self.accounts.get(commit.account.account_id)
        stamp = commit.stamp if stored is None else stored.stamp
        return super().commit(replace(commit, stamp=stamp))


class StaleIsDone(Over):
    """Takes a refusal for "somebody has written it already"."""

    async def commit(self, commit: AccountCommit) -> Stamp:
        try:
            stamp: Stamp = await self.inner.commit(commit)
        except StaleWrite:
            return commit.stamp
        return stamp


async def accept_before_durable(self: Desk, session: Session, message: Message) -> Message:
    assert session.ledger is not None
    session.outbox.reserve()

    def applied() -> None:
        session.outbox.unreserve()
        session.outbox.put(message)

    session.ledger.post(
        new_message=message, applied=applied, failed=lambda _error: session.outbox.unreserve()
    )
    return message


async def save_onto_whatever(self: Ledger, commit: AccountCommit) -> None:
    self._saved = self._base
    await _save_locally(self, commit)


_save_locally = Ledger._save_locally


# --- restoring ------------------------------------------------------------------------------------


def the_disk_wins(shared: AccountCopy | None, local: AccountCopy | None) -> Choice:
    if shared is None or local is None or local.fault is not None or shared.removed:
        return _reconcile(shared, local)
    chosen = replace(local, stamp=shared.stamp, commit_id=shared.commit_id)
    return Choice(local.account.account_id, Source.EQUAL, chosen)


_reconcile = machine.restore.reconcile


# --- WhatsApp -------------------------------------------------------------------------------------


@dataclass
class OtherConnection:
    """A connection that sends other than it is asked to."""

    inner: Connection
    tries: dict[MessageId, int] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class OtherBridge(Over):
    """A connector whose connections differ from the right ones in one way."""

    connection: type[OtherConnection] = OtherConnection
    doubts = True

    @asynccontextmanager
    async def open_bridge(self) -> AsyncIterator[Any]:
        async with self.inner.open_bridge() as bridge:
            self.bridge: Bridge = bridge
            yield self

    @asynccontextmanager
    async def open_connection(
        self,
        account_id: AccountId,
        keys: Mapping[KeyName, bytes] | None,
        *,
        doubtful: Collection[str] = (),
        **more: Any,
    ) -> AsyncIterator[Any]:
        doubtful = doubtful if self.doubts else ()
        async with self.bridge.open_connection(
            account_id, keys, doubtful=doubtful, **more
        ) as connection:
            yield self.connection(connection)


class NoDoubts(OtherBridge):
    """Goes on with sessions that may have been used for a message nobody recorded."""

    doubts = False


class KeylessConnection(OtherConnection):
    sends = 0

    async def send_text(self, message_id: MessageId, to: str, text: str) -> ServerAck:
        ack = await self.inner.send_text(message_id, to, text)
        self.sends += 1
        return ack if self.sends % 2 else ServerAck(None)


class KeysNotStored(OtherBridge):
    """Keeps the keys that every other send has changed for itself."""

    connection = KeylessConnection


class RenamingConnection(OtherConnection):
    async def send_text(self, message_id: MessageId, to: str, text: str) -> ServerAck:
        renamed = MessageId(f"{message_id}-{trio.current_time()}")
        return await self.inner.send_text(renamed, to, text)


class NewIdEachTry(OtherBridge):
    """Makes the message's id when it sends."""

    connection = RenamingConnection


# --- answering ------------------------------------------------------------------------------------


def id_without_key(account_id: AccountId, _key: str | None, rng: Any) -> MessageId:
    return _make_message_id(account_id, None, rng)


_make_message_id = machine.outbox.make_message_id


def nothing_was_done() -> NotActive:
    return NotActive("the lease went to another instance meanwhile; nothing was accepted")


MUTANTS = {
    "late-deadline": Mutant(
        "the deadline counts from the reply",
        made=patched(machine.lease, "HeldLease", LateHeldLease),
    ),
    "ambiguous-success": Mutant(
        "no answer to a renewal counts as a success",
        made=patched(machine.lease, "renew_once", renew_blindly),
    ),
    "no-boottime": Mutant(
        "only the clock that stands still in a suspend is looked at",
        wire=lambda ports, process: replace(
            ports, clocks=cast(Clocks, NoBoottime(ports.clocks, ports, process))
        ),
    ),
    "never-stops": Mutant("the term has no deadline of its own", made=never_stops),
    "release-first": Mutant(
        "the lease is released before the drain",
        made=patched(Term, "settle", release_then_settle),
    ),
    "late-precondition": Mutant(
        "the lease is written under preconditions read at sending", wire=over_lease(Unconditional)
    ),
    "release-any": Mutant(
        "whatever lease there is is released", wire=over_lease(UnconditionalRelease)
    ),
    "wall-clock": Mutant(
        "the lease's age is a difference of two hosts' wall clocks", wire=over_lease(WallClockAge)
    ),
    "impatient": Mutant("a candidate waits for 0.7 of the ttl", wire=over_lease(Impatient)),
    "own-ttl": Mutant(
        "a candidate waits for its own ttl, not for the holder's", wire=over_lease(OwnTtl)
    ),
    "pause-ignored": Mutant("a paused group is acquired", wire=over_lease(DeafToPause)),
    "epoch-forgotten": Mutant(
        "epochs are taken from the lease documents only, and missing documents are a free lease",
        wire=lambda ports, process: replace(
            ports,
            lease=cast(LeaseStore, MissingIsFree(ports.lease, ports, process)),
            local=cast(LocalStore, EpochForgotten(ports.local, ports, process)),
        ),
        made=epochs_from_the_documents_only,
    ),
    "no-fence": Mutant("the store takes any epoch and any stamp", state=UnfencedState),
    "stale-is-done": Mutant(
        "a refused commit counts as written",
        wire=lambda ports, process: replace(
            ports, accounts=cast(AccountStore, StaleIsDone(ports.accounts, ports, process))
        ),
    ),
    "accept-early": Mutant(
        "a message is accepted before it is durable",
        made=patched(Desk, "_write_accepted", accept_before_durable),
    ),
    "disk-patched": Mutant(
        "a change is applied to whatever copy the disk has",
        made=patched(Ledger, "_save_locally", save_onto_whatever),
    ),
    "disk-wins": Mutant(
        "this disk's copy is taken, whichever is newer",
        made=patched(machine.restore, "reconcile", the_disk_wins),
    ),
    "no-doubts": Mutant(
        "sessions with an unrecorded message are gone on with", wire=over_connector(NoDoubts)
    ),
    "keys-not-stored": Mutant(
        "the keys that every other send changes are not stored", wire=over_connector(KeysNotStored)
    ),
    "new-id-each-try": Mutant(
        "a message has another id at each try", wire=over_connector(NewIdEachTry)
    ),
    "id-without-key": Mutant(
        "a message's id does not follow from its idempotency key",
        made=patched(tests.simulation.front, "make_message_id", id_without_key),
    ),
    "nothing-was-done": Mutant(
        "a send that was under way when the term ended is called not accepted",
        made=patched(machine.desk, "_term_ended", nothing_was_done),
    ),
}
