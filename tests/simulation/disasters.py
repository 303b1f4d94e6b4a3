"""What happens to data behind everybody's back: documents deleted, unreadable, or from a backup.

Rarer than other faults, and with a promise of its own each: docs/simulation.md says which.
"""

from __future__ import annotations

import trio

from tests.simulation.faults import Fault, Faults
from tests.simulation.stores import Backup
from tests.simulation.world import ACCOUNTS, TTL_MAX_S, World

BACKUP_EVERY_S = 40.0
BACKUPS_KEPT = 4


class Disasters:
    """The kinds of disaster, for `Faults`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.checks = world.checks
        self._backups: list[Backup] = []
        self._database_put_back_at = -1.0
        self._disks = {host.name: host.disk.remember() for host in world.hosts}
        self._lease_gone = False

    def kinds(self, faults: Faults) -> dict[str, Fault]:
        self.faults = faults
        self.rng = faults.rng
        return {
            "lease documents deleted": self._delete_lease,
            "lease documents from a backup": self._restore_lease,
            "account deleted": self._delete_account,
            "account unreadable": self._damage_account,
            "account from a backup": self._restore_account,
            "database from a backup": self._restore_database,
            "disk from a backup": self._restore_disk,
        }

    async def keep_backups(self) -> None:
        """Make a backup every so often, of the store and of each disk."""
        while True:
            await trio.sleep(BACKUP_EVERY_S)
            if not (self._lease_gone or self.world.clients.excused):
                self._backups = [*self._backups, self.world.state.back_up()][-BACKUPS_KEPT:]
            host = self.rng.choice(self.world.hosts)
            self._disks[host.name] = host.disk.remember()

    # --- the lease documents

    async def _delete_lease(self) -> None:
        """Both are missing for a while; then put back, or made anew by `watchkeeper init`."""
        state = self.world.state
        if self._lease_gone:
            return
        self._lease_gone = True
        kept = state.back_up()
        anew = self.rng.random() < 0.5
        with self.faults.told(None, f"the lease documents are deleted, made anew: {anew}"):
            state.lease = state.fence = None
            try:
                # Who makes them anew is told to wait until the old holder has certainly stopped.
                await trio.sleep(TTL_MAX_S if anew else self.rng.uniform(1.0, 30.0))
                if anew:
                    self.world.lease_put_back = True
                    state.initialise(0)
            finally:
                if state.missing:
                    state.restore_lease(kept)
                else:
                    state.tell_watchers()
                self._lease_gone = False

    async def _restore_lease(self) -> None:
        if self._backups and not self._lease_gone:
            backup = self.rng.choice(self._backups)
            self.checks.tell("world", f"the lease documents are as at {backup.at:.0f} s again")
            self.world.lease_put_back = True
            self.world.state.restore_lease(backup)

    # --- accounts

    async def _delete_account(self) -> None:
        account_id = self.rng.choice(ACCOUNTS)
        state = self.world.state
        if account_id in self.world.clients.excused:
            return
        with self.faults.told(None, f"{account_id} is deleted"):
            self.world.clients.excused.add(account_id)
            kept = state.back_up()
            del state.accounts[account_id]
            self.checks.account_put_back(account_id)
            try:
                await trio.sleep(self.rng.uniform(1.0, 30.0))
            finally:
                if account_id not in state.accounts:
                    state.restore_account(account_id, kept)

    async def _damage_account(self) -> None:
        account_id = self.rng.choice(ACCOUNTS)
        state = self.world.state
        if account_id in self.world.clients.excused:
            return
        with self.faults.told(None, f"{account_id} is unreadable"):
            self.world.clients.excused.add(account_id)
            state.damage_account(account_id)
            try:
                await trio.sleep(self.rng.uniform(1.0, 30.0))
            finally:
                state.accounts[account_id].fault = None

    async def _restore_account(self) -> None:
        account_id = self.rng.choice(ACCOUNTS)
        if self._backups and account_id not in self.world.clients.excused:
            backup = self.rng.choice(self._backups)
            self.checks.tell("world", f"{account_id} is as at {backup.at:.0f} s again")
            # Who has only heads in memory cannot write the newest back, and says so.
            self.world.clients.excused.add(account_id)
            self.world.state.restore_account(account_id, backup)
            if backup.at < self._database_put_back_at:
                # Of a history that was undone: its version says nothing about which keys are newer.
                self.world.whatsapp.forgive(account_id)

    # --- everything

    async def _restore_database(self) -> None:
        """All documents of one backup, with every instance stopped and without the disks' copies.

        Those may carry epochs that the backup has not reached, and would win over what is written
        from now on. What was accepted since and not sent is lost with it.
        """
        if not self._backups or self._lease_gone or self.world.clients.excused:
            return
        backup = self.rng.choice(self._backups)
        state = self.world.state
        self.checks.tell("world", f"the database is as at {backup.at:.0f} s again")
        self._database_put_back_at = self.checks.clock.now
        for host in self.world.hosts:
            if host.process is not None:
                self.world.crash(host)
            host.disk.copies.clear()
            self._disks[host.name] = host.disk.remember()
        self.checks.database_put_back()
        self.world.lease_put_back = True
        state.restore_lease(backup)
        for account_id in ACCOUNTS:
            state.restore_account(account_id, backup)
            self.world.whatsapp.forgive(account_id)
        for message_id in [one for one in state.messages if one not in backup.messages]:
            self.world.clients.accepted.pop(message_id, None)
            self.world.clients.forgotten.add(message_id)
        state.messages = dict(backup.messages)

    async def _restore_disk(self) -> None:
        """A disk of an older snapshot, under a process that starts with it."""
        host = self.faults.some_host()
        if host.process is not None and not host.process.gate.closed:
            self.checks.tell(host.name, "its disk is an older one again")
            self.world.crash(host)
            host.disk.go_back(self._disks[host.name])
