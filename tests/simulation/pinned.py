"""Seeds that once found something, run for ever before all others. Each with what it found.

A seed names a world only as long as the simulation draws its numbers in the same order: when that
changes, a seed is one world among many again, and what it found is kept by the unit test that came
with the fix. They cost little and stay.
"""

from __future__ import annotations

PINNED = {
    3: "connections stayed open after a suspend past the deadline, while another holder logged in",
    8: "durability local: the mark `sending` was lost in a crash, and a ratchet's key used twice",
    10: "a seal applied to an older disk copy gave old keys a new version",
    13: "missing lease documents made anew: an epoch that had been acted under was granted again",
    18: "after a suspend, an act was on its way for up to half a second past the deadline",
    21: "accounts carried the new term's own epoch: another had acted under it before a backup",
    22: "a send that was under way when the term ended was called not accepted, and sent twice",
    27: "lease documents of a backup showed a lease as free whose holder was still acting",
    37: "the world looked at a host on its own clock, which ended terms that had not ended",
    73: "a connection was opened while the ack of the one before was still being stored",
    130: "a receipt overtook an ack whose keys came to nothing, and the session was not doubted",
    163: "an older disk copy was written over a newer shared one that could not be read",
    589: "after a backup of the lease the calm was over before its accounts could be connected",
    821: "a backup named an instance as the holder under an epoch that another had by then",
    664: "a crash that was to come before a step came after the storm, in the calm",
    1139: "an epoch was forgotten with its holder, who had not acted, and called doubly granted",
    1790: "a crash like that of 664 came in the first moment of the term after the storm",
    2381: "a receipt was stored, and the ack before it with the keys came to nothing; then a crash",
    100080: "a term that a suspend had eaten before it began was told to the warden, which killed",
    100145: "the same, with another holder by then",
    200127: "a message asked for in time after a suspend arrived 11 ms late, and was a violation",
    200015: "a kill right after a suspend, before the term could look, was called a violation",
    300229: "a receipt for a message behind the one recorded ended the doubt about its keys",
    400138: "an account was put back from before the whole database was, and not forgiven",
    400394: "after a backup of the lease two found out in turn, each in a term, that it was one",
    400483: "a second backup of the lease documents was not waited for: its holder still acted",
    500250: "an epoch was granted again after a backup, while no account could be listed",
}
