"""What goes wrong, when and to whom: storms of overlapping faults, and calms in between.

Every fault heals itself when it is over or cancelled; a calm begins with all of them healed.
Which kinds a world knows at all is chosen by its seed: few kinds together find what many hide.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import trio

from machine.ports import ConnectionClosed, ConnectorDown
from machine.records import AccountId, LeaseWrite
from tests.simulation.process import Process
from tests.simulation.world import ACCOUNTS, TTL_MAX_S, Host, World

STORM_S = 105.0
CALM_S = 45.0
FAULT_EVERY_S = 6.0
OPERATOR_S = 25.0
"""When the operator looks at accounts that somebody's backup has kept from coming back."""
ACTIVE_WITHIN_S = 5.0
"""The promise: a ttl and this long after everything has healed, somebody is ACTIVE."""
ARRIVED_WITHIN_S = 60.0
"""How long the last messages have to arrive, in calm."""
LOOK_EVERY_S = 0.5
CONNECTED_WITHIN_S = 15.0
PAUSE_MAX_S = 60.0
LOOK_AFTER_SUSPEND_S = 0.7
WALL_JUMP_S = 3600.0
STEPS_MAX = 400
"""A crash or a command comes before one of so many next steps of a process."""
KIND_SHARE = 0.7
"""The chance that a world knows a kind of fault."""
RESTART_S = (0.2, 20.0)
CALM_RESTART_S = (0.2, 1.0)

Fault = Callable[[], Awaitable[None]]


class Faults:
    """Breaks a world, and mends it again."""

    def __init__(self, world: World, seed: int, more: Callable[[Faults], dict[str, Fault]]) -> None:
        self.world = world
        self.checks = world.checks
        self.rng = random.Random(f"{seed} faults")
        self.healed_in_s: list[float] = []
        known = {**self._network(), **self._processes(), **self._outside(), **more(self)}
        chosen = {
            name: fault for name, fault in known.items() if self.rng.random() < KIND_SHARE
        } or known
        self.kinds = chosen

    async def run(self, minutes: float) -> None:
        """Storms and calms for `minutes`; every calm ends with somebody ACTIVE, and all there."""
        ends_at = trio.current_time() + 60.0 * minutes
        for host in self.world.hosts:
            self.world.start(host)
        while trio.current_time() < ends_at:
            await self._storm()
            await self._calm()

    async def _storm(self) -> None:
        self.checks.tell("world", "a storm begins")
        self.world.restart_s = RESTART_S
        for host in self.world.hosts:
            host.link.rough = self.rng.choice((0.0, 0.02, 0.1, 0.3))
            host.disk.flaky = self.rng.choice((0.0, 0.0, 0.05))
        for account_id in ACCOUNTS:
            script = self.world.whatsapp.script(account_id)
            script.ack_delay_s = self.rng.choice((0.02, 0.2, 3.0))
            script.wire_delay_s = self.rng.choice((0.0, 0.02, 0.2))
            script.login_delay_s = self.rng.choice((0.0, 0.1, 1.0))
            script.open_delay_s = self.rng.choice((0.0, 0.1))
        names = sorted(self.kinds)
        with trio.move_on_after(STORM_S):
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.sleep(self.rng.expovariate(1 / FAULT_EVERY_S))
                    name = self.rng.choice(names)
                    self.checks.counts[f"fault: {name}"] += 1
                    self.checks.counts["faults"] += 1
                    nursery.start_soon(self.kinds[name])

    async def _calm(self) -> None:
        """Mend what the faults have not mended by themselves, and see everybody come back."""
        began = trio.current_time()
        self.checks.tell("world", "calm")
        self.world.restart_s = CALM_RESTART_S
        for host in self.world.hosts:
            host.link.rough = host.disk.flaky = 0.0
            if host.process is None:
                self.world.start(host)
            else:
                host.process.gate.forget_step()
        for account_id in ACCOUNTS:
            script = self.world.whatsapp.script(account_id)
            script.ack_delay_s, script.acks_lost = 0.02, 0
            script.wire_delay_s, script.login_delay_s, script.open_delay_s = 0.0, 0.02, 0.0
            script.refuse_login.clear()
            script.refuse_open.clear()
        self.world.network.deliver_all()
        await self._check_active(began)
        self.world.reconnect_excused()
        await trio.sleep_until(began + OPERATOR_S)
        acting = self.world.acting()
        if acting is not None and self.world.clients.excused & set(self.world.unconnected()):
            acting.request_step_down("the operator asks for a new restore")
        await trio.sleep_until(began + CALM_S)
        self.world.clients.excused.clear()
        # After a backup of the lease, somebody may be ACTIVE only at the end of the calm.
        late = self.healed_in_s[-1] > CALM_S - CONNECTED_WITHIN_S
        for account_id in () if late else self.world.unconnected():
            self.checks.violated(8, f"{account_id} is not connected {CALM_S:g} s after healing")

    async def _check_active(self, healed_at: float) -> None:
        ttl_s = TTL_MAX_S if self.world.kind.mixed else self.world.ttl_s
        # Documents of a backup make everybody wait a ttl more: somebody may act whom they forgot.
        # And one more where two find out in turn, each in a term, that the accounts are newer.
        within_s = ttl_s * (3 if self.world.lease_put_back else 1) + ACTIVE_WITHIN_S
        self.world.lease_put_back = False
        while self.world.acting() is None:
            if trio.current_time() - healed_at > within_s:
                self.checks.violated(8, f"nobody is ACTIVE {within_s:g} s after healing")
                break
            await trio.sleep(LOOK_EVERY_S)
        self.healed_in_s.append(trio.current_time() - healed_at)

    async def wait_arrived(self) -> None:
        """Give what was accepted last the time to arrive, and what was cut the time to reopen."""
        with trio.move_on_after(ARRIVED_WITHIN_S):
            while self.world.undelivered() or self.world.unconnected() or self.world.unreceived():
                await trio.sleep(LOOK_EVERY_S)

    # --- whom it meets, and for how long

    def some_host(self) -> Host:
        """The holder more often than not."""
        holder = self.world.holder()
        if holder is not None and self.rng.random() < 0.6:
            return holder
        return self.rng.choice(self.world.hosts)

    @contextmanager
    def told(self, host: Host | None, what: str) -> Iterator[None]:
        who = "world" if host is None else host.name
        self.checks.tell(who, f"fault: {what}")
        try:
            yield
        finally:
            self.checks.tell(who, f"fault over: {what}")

    async def _for_a_while(
        self, thing: object, name: str, host: Host | None, what: str, longest_s: float
    ) -> None:
        """Count `thing.name` up for a while."""
        with self.told(host, what):
            setattr(thing, name, getattr(thing, name) + 1)
            try:
                await trio.sleep(self.rng.uniform(1.0, longest_s))
            finally:
                setattr(thing, name, getattr(thing, name) - 1)

    # --- the network and the store

    def _network(self) -> dict[str, Fault]:
        return {
            "cut off the store": lambda: self._cut(self.some_host(), 40.0),
            "requests lost": lambda: self._on_link("requests_lost", 30.0),
            "replies lost": lambda: self._on_link("replies_lost", 30.0),
            "listener deaf": self._deafen,
            "snapshots out of order": lambda: self._on_link("disordered", 60.0),
            "cut off the other hosts": lambda: self._on_link("alone", 40.0),
            "slow, then cut": self._slow_then_cut,
            "slow, then cut again": self._slow_then_cut,
            "store hangs": self._hang,
            "store down": self._store_down,
            "store throttles": lambda: self._on_state("throttled", 40.0),
        }

    async def _on_link(self, name: str, longest_s: float) -> None:
        host = self.some_host()
        await self._for_a_while(host.link, name, host, name.replace("_", " "), longest_s)

    async def _on_state(self, name: str, longest_s: float) -> None:
        await self._for_a_while(self.world.state, name, None, f"the store is {name}", longest_s)

    async def _cut(self, host: Host, longest_s: float) -> None:
        try:
            await self._for_a_while(host.link, "cut", host, "cut off the store", longest_s)
        finally:
            self._listen_again(host)

    def _listen_again(self, host: Host) -> None:
        if host.store is not None and not host.store.partitioned:
            self.world.state.refresh_watchers(host.store)

    async def _deafen(self) -> None:
        host = self.some_host()
        try:
            await self._for_a_while(host.link, "deaf", host, "its listener is deaf", 60.0)
        finally:
            self._listen_again(host)

    async def _slow_then_cut(self) -> None:
        """A store that gets slow, and often goes away altogether."""
        # The one whose answers matter most, as a rule: an answer that comes late must not
        # lengthen a term, and shows only when no other renewal comes after it.
        host = self.world.holder() or self.some_host()
        await self._for_a_while(host.link, "slow", host, "slow", 20.0)
        if self.rng.random() < 0.8:
            await self._cut(host, 40.0)

    async def _hang(self) -> None:
        try:
            await self._on_state("hanging", 25.0)
        finally:
            if not self.world.state.hanging:
                self.world.state.go_on()

    async def _store_down(self) -> None:
        try:
            await self._on_state("failing", 40.0)
        finally:
            for host in self.world.hosts:
                self._listen_again(host)

    # --- processes

    def _processes(self) -> dict[str, Fault]:
        return {
            "daemon stalls": self._stall,
            "host suspended": self._suspend,
            "crash": self._crash,
            "crash before a step": self._crash_at_step,
            "redeploy": self._redeploy,
            "redeploy before a step": self._redeploy_at_step,
            "step-down": self._step_down,
            "step-down before a step": self._step_down_at_step,
            "step-down through the store": self._step_down_through_store,
            "group paused": self._pause_group,
            "disk full": self._disk_full,
            "disk slow": self._disk_slow,
            "wall clock jumps": self._jump,
        }

    def _some_process(self) -> tuple[Host, Process] | None:
        host = self.some_host()
        return None if host.running is None else (host, host.running)

    async def _stall(self) -> None:
        """The daemon stands still and its host does not: its warden kills it at its deadline."""
        met = self._some_process()
        if met is None:
            return
        host, process = met
        for_s = self.rng.uniform(0.05, PAUSE_MAX_S)
        with self.told(host, f"its daemon stalls for {for_s:.2f} s"):
            process.pauses += 1
            process.gate.close()
            try:
                await trio.sleep(for_s)
            finally:
                self._go_on(process)

    async def _suspend(self) -> None:
        """The whole host stands still, its warden and its clock too."""
        met = self._some_process()
        if met is None or met[0].clock.suspended:
            return
        host, process = met
        for_s = self.rng.uniform(0.05, PAUSE_MAX_S)
        with self.told(host, f"suspended for {for_s:.2f} s"):
            process.pauses += 1
            process.gate.close()
            host.clock.suspend(self.world.clock.now)
            try:
                await trio.sleep(for_s)
            finally:
                host.clock.resume(self.world.clock.now)
                self._go_on(process)
                if host.warden is not None and host.process is process:
                    host.warden.ring()
                self.world.nursery.start_soon(self._look_closed, process)

    async def _look_closed(self, process: Process) -> None:
        await trio.sleep(LOOK_AFTER_SUSPEND_S)
        self.world.check_closed(process)

    def _go_on(self, process: Process) -> None:
        if not process.dead:
            process.thawed_at = self.world.clock.now
            process.gate.open()

    async def _crash(self) -> None:
        met = self._some_process()
        if met is not None:
            self._crash_now(*met)

    def _crash_now(self, host: Host, process: Process) -> None:
        if host.process is not process:
            return
        self.world.crash(host, host_lives=self.rng.random() < 0.5)
        torn = host.disk.tear() if self.world.tears and self.rng.random() < 0.5 else None
        if torn is not None:
            self.checks.tell(host.name, f"its disk's copy of {torn} is torn")
            self.checks.counts["torn"] += 1

    async def _crash_at_step(self) -> None:
        met = self._some_process()
        if met is not None:
            steps = self.rng.randrange(STEPS_MAX)
            met[1].gate.at_step(steps, lambda: self._crash_now(*met))

    async def _redeploy(self) -> None:
        """SIGTERM: the process drains and ends, another starts on the same disk."""
        met = self._some_process()
        if met is not None:
            met[1].instance.request_drain("SIGTERM")

    async def _redeploy_at_step(self) -> None:
        met = self._some_process()
        if met is not None:
            steps = self.rng.randrange(STEPS_MAX)
            met[1].gate.at_step(steps, lambda: met[1].instance.request_drain("SIGTERM"))

    # --- operators, disks and clocks

    def _handoff(self, process: Process) -> None:
        to = self.rng.choice((None, *(one.name for one in self.world.hosts)))
        process.instance.request_step_down("the operator asks", handoff_to=to)

    async def _step_down(self) -> None:
        met = self._some_process()
        if met is not None:
            self._handoff(met[1])

    async def _step_down_at_step(self) -> None:
        met = self._some_process()
        if met is not None:
            met[1].gate.at_step(self.rng.randrange(STEPS_MAX), lambda: self._handoff(met[1]))

    async def _step_down_through_store(self) -> None:
        if self.world.state.fence is not None:
            fence, stamp = self.world.state.fence
            wish = replace(fence, step_down_of=fence.epoch, changed_by="operator")
            self.world.state.write_lease(LeaseWrite(fence=wish, fence_stamp=stamp))

    async def _pause_group(self) -> None:
        """The operator keeps everybody from acting for a while."""
        with self.told(None, "the group is paused"):
            self._set_paused(True)
            try:
                await trio.sleep(self.rng.uniform(1.0, 40.0))
            finally:
                self._set_paused(False)

    def _set_paused(self, paused: bool) -> None:
        if self.world.state.fence is not None:
            fence, stamp = self.world.state.fence
            wish = replace(fence, paused=paused, reason="maintenance", changed_by="operator")
            self.world.state.write_lease(LeaseWrite(fence=wish, fence_stamp=stamp))

    async def _disk_full(self) -> None:
        host = self.some_host()
        await self._for_a_while(host.disk, "full", host, "its disk is full", 60.0)

    async def _disk_slow(self) -> None:
        host = self.some_host()
        await self._for_a_while(host.disk, "slow", host, "its disk is slow", 40.0)

    async def _jump(self) -> None:
        host = self.rng.choice(self.world.hosts)
        host.clock.wall_offset_s = self.rng.uniform(-WALL_JUMP_S, WALL_JUMP_S)
        self.checks.tell(host.name, f"its wall clock is {host.clock.wall_offset_s:.0f} s off")

    # --- WhatsApp

    def _outside(self) -> dict[str, Fault]:
        return {
            "connection drops": self._drop_connection,
            "acks lost": self._lose_acks,
            "logins refused": self._refuse_logins,
            "bridge dies": self._kill_bridge,
        }

    def _some_account(self) -> AccountId:
        return self.rng.choice(ACCOUNTS)

    async def _drop_connection(self, account_id: AccountId | None = None) -> None:
        account_id = account_id or self._some_account()
        if account_id in self.world.whatsapp.open:
            self.checks.tell("world", f"{account_id}'s connection drops")
            self.world.whatsapp.cut(account_id, self.rng.choice((408, 428, 500, 503, 515)))

    async def _lose_acks(self) -> None:
        account_id = self._some_account()
        self.world.whatsapp.script(account_id).acks_lost += 1
        await trio.sleep(self.rng.uniform(0.5, 5.0))
        await self._drop_connection(account_id)

    async def _refuse_logins(self) -> None:
        script = self.world.whatsapp.script(self._some_account())
        code = self.rng.choice((408, 428, 500, 503))
        script.refuse_login.extend([ConnectionClosed(code, "injected")] * self.rng.randrange(1, 4))
        await self._drop_connection()

    async def _kill_bridge(self) -> None:
        host = self.some_host()
        if host.running is None or host.connector is None:
            return
        self.checks.tell(host.name, "its bridge dies")
        for bridge in host.connector.bridges:
            bridge.kill()
        if self.rng.random() < 0.3:
            host.connector.refuse_bridge.append(ConnectorDown("injected"))
