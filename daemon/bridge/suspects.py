"""Which accounts were in processes that died, and how far they are kept apart for it.

One account can bring a process down, each time it is opened: by a message that Baileys chokes on
and that the server delivers again, say. Left among the others it would take them all along, again
and again. So after each death its accounts are opened among fewer others, until the one is alone.

Never lives here: which processes there are (`connector`).
"""

from __future__ import annotations

import trio

from machine.records import AccountId

SUSPECTED_S = 900.0
"""How long an account is suspected after the last death that it was there for; longer than the
longest wait of a session between two tries."""
STEP_BITS = 2
"""Each death leaves a quarter of the company."""


class Suspects:
    """How often each account was in a process when it died, of late.

    An account's level is 0 when it never was. Accounts of one level share processes, at most
    `cap(level)` in each; at the highest level each has one to itself.
    """

    def __init__(self, accounts_max: int) -> None:
        self._accounts_max = accounts_max
        self._blamed: dict[AccountId, tuple[int, float]] = {}
        self.level_max = 1
        while self.cap(self.level_max) > 1:
            self.level_max += 1

    def cap(self, level: int) -> int:
        """How many accounts of this level one process takes."""
        return max(1, self._accounts_max >> (STEP_BITS * level))

    def blame(self, account_id: AccountId) -> None:
        """Its process has died under it."""
        self._blamed[account_id] = (self.blames(account_id) + 1, trio.current_time())

    def blames(self, account_id: AccountId) -> int:
        """How many deaths it was there for, none of them long ago."""
        count, at = self._blamed.get(account_id, (0, 0.0))
        if count and trio.current_time() - at > SUSPECTED_S:
            del self._blamed[account_id]
            return 0
        return count

    def level(self, account_id: AccountId) -> int:
        """How far it is kept apart."""
        return min(self.blames(account_id), self.level_max)

    def is_convicted(self, account_id: AccountId) -> bool:
        """Whether its process has just died with nobody else in it, for the first time."""
        return self.blames(account_id) == self.level_max + 1
