"""What goes wrong, when and to whom: storms of overlapping faults, and calms in between.

Every fault heals itself when it is over or cancelled; a calm begins with all of them healed.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import trio

from machine.records import LeaseWrite
from tests.simulation.group import ACCOUNTS, TIMING, Group, Host
from tests.simulation.process import Process

STORM_S = 105.0
CALM_S = 45.0
FAULT_EVERY_S = 6.0
ACTIVE_WITHIN_S = TIMING.ttl_s + 5.0
"""The promise: this long after everything has healed, somebody is ACTIVE."""
ARRIVED_WITHIN_S = 60.0
"""How long the last messages have to arrive, in calm."""
LOOK_EVERY_S = 0.5
PAUSE_MAX_S = 30.0


class Faults:
    """Breaks a group's world, and mends it again."""

    def __init__(self, group: Group, seed: int) -> None:
        self.group = group
        self.checks = group.checks
        self.rng = random.Random(f"{seed} faults")
        self.healed_in_s: list[float] = []
        self.kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (3, self._cut),
            (3, self._one_way),
            (2, self._deafen),
            (6, self._slow_then_cut),
            (1, self._freeze_store),
            (3, self._stall),
            (3, self._suspend),
            (3, self._crash),
            (3, self._redeploy),
            (2, self._step_down),
            (1, self._step_down_through_store),
            (2, self._drop_connections),
            (1, self._kill_bridge),
        ]

    async def run(self, minutes: float) -> None:
        """Storms and calms for `minutes`; every calm ends with somebody ACTIVE."""
        ends_at = trio.current_time() + 60.0 * minutes
        for host in self.group.hosts:
            self.group.start(host)
        while trio.current_time() < ends_at:
            await self._storm()
            self._heal()
            await self._check_active()
            await trio.sleep(CALM_S - min(CALM_S, self.healed_in_s[-1]))

    async def _storm(self) -> None:
        self.checks.tell("world", "a storm begins")
        for host in self.group.hosts:
            host.link.rough = self.rng.choice((0.0, 0.02, 0.1, 0.3))
        for account_id in ACCOUNTS:
            script = self.group.whatsapp.script(account_id)
            script.ack_delay_s = self.rng.choice((0.02, 0.2, 3.0))
            script.wire_delay_s = self.rng.choice((0.0, 0.02, 0.2))
            script.login_delay_s = self.rng.choice((0.0, 0.1, 1.0))
        with trio.move_on_after(STORM_S):
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.sleep(self.rng.expovariate(1 / FAULT_EVERY_S))
                    kinds = [kind for weight, kind in self.kinds for _ in range(weight)]
                    nursery.start_soon(self.rng.choice(kinds))

    def _heal(self) -> None:
        """Whatever the faults have not mended by themselves."""
        self.checks.tell("world", "calm")
        for host in self.group.hosts:
            host.link.rough = 0.0
            if host.process is None:
                self.group.start(host)
        for account_id in ACCOUNTS:
            script = self.group.whatsapp.script(account_id)
            script.ack_delay_s, script.acks_lost = 0.02, 0
            script.wire_delay_s, script.login_delay_s = 0.0, 0.02
            script.refuse_login.clear()
            script.refuse_open.clear()
        self.group.state.deliver_all()

    async def _check_active(self) -> None:
        healed_at = trio.current_time()
        while self.group.serving() is None:
            if trio.current_time() - healed_at > ACTIVE_WITHIN_S:
                self.checks.violated(f"nobody is ACTIVE {ACTIVE_WITHIN_S:g} s after healing")
                break
            await trio.sleep(LOOK_EVERY_S)
        self.healed_in_s.append(trio.current_time() - healed_at)

    async def wait_arrived(self) -> None:
        """Give what was accepted last the time to arrive, and what was cut the time to reopen."""
        group = self.group
        with trio.move_on_after(ARRIVED_WITHIN_S):
            while group.undelivered() or len(group.whatsapp.open) < len(ACCOUNTS):
                await trio.sleep(LOOK_EVERY_S)

    # --- whom it meets

    def _some_host(self) -> Host:
        """The holder more often than not."""
        holder = self.group.holder()
        if holder is not None and self.rng.random() < 0.6:
            return holder
        return self.rng.choice(self.group.hosts)

    @contextmanager
    def _told(self, host: Host | None, what: str) -> Iterator[None]:
        who = "world" if host is None else host.name
        self.checks.counts["faults"] += 1
        self.checks.tell(who, f"fault: {what}")
        try:
            yield
        finally:
            self.checks.tell(who, f"fault over: {what}")

    # --- the network

    async def _cut(self) -> None:
        await self._cut_host(self._some_host(), self.rng.uniform(2.0, 40.0))

    async def _cut_host(self, host: Host, for_s: float) -> None:
        with self._told(host, "cut off the store"):
            host.link.cut += 1
            try:
                await trio.sleep(for_s)
            finally:
                host.link.cut -= 1
                self._listen_again(host)

    def _listen_again(self, host: Host) -> None:
        if host.store is not None and not host.store.partitioned:
            self.group.state.refresh_watchers(host.store)

    async def _one_way(self) -> None:
        host = self._some_host()
        if self.rng.random() < 0.5:
            with self._told(host, "its requests are lost"):
                host.link.requests_lost += 1
                try:
                    await trio.sleep(self.rng.uniform(2.0, 30.0))
                finally:
                    host.link.requests_lost -= 1
            return
        with self._told(host, "replies to it are lost"):
            host.link.replies_lost += 1
            try:
                await trio.sleep(self.rng.uniform(2.0, 30.0))
            finally:
                host.link.replies_lost -= 1

    async def _deafen(self) -> None:
        host = self._some_host()
        with self._told(host, "its listener is deaf"):
            host.link.deaf += 1
            try:
                await trio.sleep(self.rng.uniform(5.0, 60.0))
            finally:
                host.link.deaf -= 1
                self._listen_again(host)

    async def _slow_then_cut(self) -> None:
        """A store that gets slow, and often goes away altogether."""
        # The one whose answers matter most, as a rule: an answer that comes late must not
        # lengthen a term, and shows only when no other renewal comes after it.
        host = self.group.holder() or self._some_host()
        hosts = self.group.hosts if self.rng.random() < 0.2 else [host]
        with self._told(None, f"slow for {[host.name for host in hosts]}"):
            for host in hosts:
                host.link.slow += 1
            try:
                await trio.sleep(self.rng.uniform(4.0, 20.0))
            finally:
                for host in hosts:
                    host.link.slow -= 1
        if self.rng.random() < 0.8:
            await self._cut_host(host, self.rng.uniform(10.0, 40.0))

    async def _freeze_store(self) -> None:
        with self._told(None, "the store hangs"):
            self.group.state.freeze()
            try:
                await trio.sleep(self.rng.uniform(1.0, 25.0))
            finally:
                self.group.state.thaw()

    # --- processes

    async def _stall(self) -> None:
        """The daemon stands still and its host does not: the warden ends it at its deadline."""
        host = self._some_host()
        process = host.running
        if process is None:
            return
        for_s = self.rng.uniform(0.05, PAUSE_MAX_S)
        status = process.instance.lease_status
        left_s = for_s
        if process.instance.epoch and status is not None and status.remaining_s is not None:
            left_s = status.remaining_s
        with self._told(host, f"its daemon stalls for {for_s:.2f} s"):
            process.pauses += 1
            process.gate.close()
            try:
                await trio.sleep(min(for_s, left_s))
                if for_s > left_s:
                    self.group.crash(host)
            finally:
                self._go_on(process)

    async def _suspend(self) -> None:
        """The whole host stands still, its warden too."""
        host = self._some_host()
        process = host.running
        if process is None:
            return
        for_s = self.rng.uniform(0.05, PAUSE_MAX_S)
        with self._told(host, f"suspended for {for_s:.2f} s"):
            process.pauses += 1
            process.gate.close()
            try:
                await trio.sleep(for_s)
            finally:
                self._go_on(process)

    def _go_on(self, process: Process) -> None:
        if not process.dead:
            process.thawed_at = trio.current_time()
            process.gate.open()

    async def _crash(self) -> None:
        host = self._some_host()
        if host.running is None:
            return
        self.checks.counts["faults"] += 1
        self.group.crash(host)

    async def _redeploy(self) -> None:
        """SIGTERM: the process drains and ends, another starts on the same disk."""
        host = self._some_host()
        process = host.running
        if process is None:
            return
        self.checks.counts["faults"] += 1
        process.instance.request_drain("SIGTERM")

    # --- the operator, and WhatsApp

    async def _step_down(self) -> None:
        host = self.group.holder()
        process = None if host is None else host.running
        if process is None:
            return
        to = self.rng.choice((None, *(one.name for one in self.group.hosts)))
        process.instance.request_step_down("the operator asks", handoff_to=to)

    async def _step_down_through_store(self) -> None:
        assert self.group.state.fence is not None
        fence, stamp = self.group.state.fence
        wish = replace(
            fence, step_down_of=fence.epoch, reason="the operator asks", changed_by="operator"
        )
        self.group.state.write_lease(LeaseWrite(fence=wish, fence_stamp=stamp))

    async def _drop_connections(self) -> None:
        whatsapp = self.group.whatsapp
        account_id = self.rng.choice(ACCOUNTS)
        if account_id not in whatsapp.open:
            return
        if self.rng.random() < 0.5:
            whatsapp.script(account_id).acks_lost += 1
            await trio.sleep(self.rng.uniform(0.5, 5.0))
        if account_id in whatsapp.open:
            self.checks.tell("world", f"{account_id}'s connection drops")
            whatsapp.cut(account_id, self.rng.choice((428, 503, 515)))

    async def _kill_bridge(self) -> None:
        host = self._some_host()
        if host.running is not None and host.connector is not None and host.connector.bridges:
            self.checks.tell(host.name, "its bridge dies")
            host.connector.bridges[0].kill()
