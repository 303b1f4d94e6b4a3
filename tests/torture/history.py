"""What must be true of the group, told by its effects: in the store, at WhatsApp, at the callers.

An instance's own opinion counts for nothing here. The store is read past all proxies; the loopback
WhatsApp counts logins that threw a living one out, keeps what arrived, and knows what was readable.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import trio

from daemon.firestore.accounts import FirestoreAccountStore
from daemon.firestore.client import open_firestore
from daemon.firestore.lease import FirestoreLeaseStore
from daemon.loopback.world import LoopbackWorld
from machine.ports import LeaseMissing, StoreUnavailable
from machine.records import LeaseState, LeaseView, Version
from tests.torture.world import ACCOUNTS, GROUP, LEASE_TTL_S, World

LOOK_EVERY_S = 0.02
LOOK_S = 1.0
ARRIVED_S = 60.0
CONNECTED_S = 60.0
ACTIVE_WITHIN_S = LEASE_TTL_S + 10.0
"""After everything has healed: a ttl, and what a killed process takes to start when busy."""


@dataclass(frozen=True)
class Look:
    """The lease as it was seen at a moment of our clock."""

    at: float
    view: LeaseView


@dataclass(frozen=True)
class Change:
    """A change of holder: when the lease was free to take, taken, and a send accepted again."""

    freed_at: float
    acquired_at: float
    epoch: int


class History:
    """Watches a world. `violations` has each claim that was broken, in order."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.violations: list[str] = []
        self.changes: list[Change] = []
        self.counts: Counter[str] = Counter()
        self.frozen_hosts = 0
        """How many times a daemon was stopped together with its warden: nobody could kill it."""
        self.healed_at = 0.0
        """When somebody was ACTIVE in the last calm."""
        self._last: Look | None = None
        self._renewed_at = 0.0
        self._versions: dict[str, Version] = {}
        self._whatsapp = LoopbackWorld(world.cluster.directory / "loopback")

    def violated(self, claim: str) -> None:
        self.violations.append(f"at {trio.current_time():.1f} s: {claim}")

    # --- the store

    async def keep_looking(self) -> None:
        """Look at the lease all the time, and at the accounts now and then."""
        host = self.world.emulator.host
        while True:
            try:
                async with open_firestore(self.world.project, "(default)", host) as client:
                    lease = FirestoreLeaseStore(client, GROUP)
                    accounts = FirestoreAccountStore(client, GROUP)
                    while True:
                        for _ in range(50):
                            with trio.move_on_after(LOOK_S):
                                self._see(await lease.read())
                            await trio.sleep(LOOK_EVERY_S)
                        with trio.move_on_after(LOOK_S):
                            await self._see_accounts(accounts)
            except (StoreUnavailable, LeaseMissing):
                # The emulator is being tortured, too.
                await trio.sleep(0.2)

    def _see(self, view: LeaseView) -> None:
        now = trio.current_time()
        self.counts["looks"] += 1
        before = self._last.view if self._last is not None else None
        self._last = Look(now, view)
        if before is None:
            self._renewed_at = now
            return
        fence, earlier = view.fence, before.fence
        if fence.epoch < earlier.epoch:
            self.violated(f"the fence's epoch fell from {earlier.epoch} to {fence.epoch}")
        granted = fence.incarnation != ""
        if granted and fence.epoch == earlier.epoch and fence.incarnation != earlier.incarnation:
            self.violated(f"epoch {fence.epoch} was granted to two")
        if fence.epoch > earlier.epoch:
            self.counts["terms"] += fence.epoch - earlier.epoch
            released = before.lease.state is LeaseState.RELEASED
            freed_at = self._renewed_at + (0 if released else self.world.ttl_s)
            self.changes.append(Change(freed_at, now, fence.epoch))
        if view.lease_stamp != before.lease_stamp:
            self._renewed_at = now - min(view.age_s, LOOK_S)

    async def _see_accounts(self, store: FirestoreAccountStore) -> None:
        for copy in (await store.list_accounts()).copies:
            account_id = str(copy.account.account_id)
            before = self._versions.get(account_id, Version(0, 0))
            if copy.version < before:
                self.violated(f"{account_id} went back from {before} to {copy.version}")
            self._versions[account_id] = copy.version

    @property
    def epoch(self) -> int:
        """The highest epoch that was seen."""
        return self._last.view.fence.epoch if self._last is not None else 0

    # --- WhatsApp and the callers

    async def judge_calm(self) -> None:
        """In calm: every account connected, and nobody was thrown out by one of ours."""
        try:
            active = await self.world.wait_active(ACTIVE_WITHIN_S)
            self.healed_at = trio.current_time()
            await self.world.wait_all_up()
        except trio.TooSlowError:
            self.violated(
                f"nobody is ACTIVE, or not all are up, {ACTIVE_WITHIN_S:g} s after healing"
            )
            return
        try:
            await self.world.cluster.wait_connected(active.node, *ACCOUNTS, within_s=CONNECTED_S)
        except trio.TooSlowError:
            listed = await self.world.cluster.json(active.node, "GET", "/api/whatsapp/accounts")
            self.violated(f"not every account is connected: {listed['accounts']}")
        count, _ = await self._whatsapp.list_evictions()
        allowed = self.frozen_hosts * len(ACCOUNTS)
        if count > allowed:
            self.violated(
                f"{count} logins threw a living one out; hosts that were frozen as a whole explain "
                f"{allowed}: two acted at once"
            )
        self.counts["evictions of frozen hosts"] = count

    async def judge_messages(self) -> None:
        """In the end: what was accepted has arrived, readable, and is shown once."""
        accepted = self.world.sent.accepted
        with trio.move_on_after(ARRIVED_S):
            while missing := set(accepted) - set(await self._shown()):
                await trio.sleep(0.2)
        shown = await self._shown()
        if missing := set(accepted) - set(shown):
            self.violated(f"{len(missing)} accepted messages never arrived: {sorted(missing)[:5]}")
        texts = Counter(shown.values())
        if twice := [text for text, times in texts.items() if times > 1]:
            self.violated(f"{len(twice)} messages are shown twice: {twice[:5]}")
        if not self.counts["looks"] or not self._versions:
            self.violated("the watch over the store has seen nothing: it judges nothing either")
        if unreadable := [each async for each in self._unreadable()]:
            self.violated(f"{len(unreadable)} messages are unreadable: {unreadable[:5]}")
        for refusal in self.world.sent.failed:
            self.violated(f"refused for no reason: {refusal}")
        self.counts["messages accepted"] = len(accepted)
        self.counts["messages shown"] = len(shown)

    async def _shown(self) -> dict[str, str]:
        shown: dict[str, str] = {}
        after = 0
        while True:
            page = await self._whatsapp.list_messages(after=after)
            shown |= {each.message_id: each.text for each in page.arrivals}
            if not page.more:
                return shown
            after = page.next_seq

    async def _unreadable(self) -> AsyncIterator[str]:
        after = 0
        while True:
            page = await self._whatsapp.list_messages(raw=True, after=after)
            for each in page.arrivals:
                if not each.readable:
                    yield each.text
            if not page.more:
                return
            after = page.next_seq

    # --- the logs

    def judge_logs(self) -> None:
        """No bug of ours was met, and nothing was thrown away."""
        for seat in self.world.seats:
            for event, fields in _events(seat.node.log()):
                # Of a library, as gRPC at an answer of the emulator's that is torn: counted only.
                self.counts[event] += event.startswith(("warden.", "library."))
                doubled = event == "session.doubled" and not self.frozen_hosts
                if doubled or event in ("http.request_failed", "session.quarantined"):
                    self.violated(f"{seat.name} tells {event}: {fields}")
            if bugs := [line for line in _others(seat.node.log()) if "Traceback" in line]:
                self.violated(f"{seat.name} met {len(bugs)} bugs; see its log")


def _others(log: str) -> Iterator[str]:
    """What is no line of the journal's."""
    return (line for line in log.splitlines() if not line.startswith("{"))


def _events(log: str) -> Iterator[tuple[str, object]]:
    for line in log.splitlines():
        if line.startswith("{"):
            # A process that was killed may have left half a line.
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            yield str(entry.get("event")), entry.get("fields")
