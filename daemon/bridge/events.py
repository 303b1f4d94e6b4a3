"""The events that the bridge tells the journal, in the form of `machine.events.EVENTS`."""

from __future__ import annotations

from machine.events import EventKind
from machine.ports import Level

BRIDGE_EVENTS: dict[str, EventKind] = {
    "bridge.started": EventKind(
        Level.INFO,
        "bridge process {process} (pid {pid}) is up in {duration_s} s: Node {node}, "
        "Baileys {baileys}",
    ),
    "bridge.not_started": EventKind(
        Level.WARNING, "bridge process {process} did not start: {reason}; it is tried again"
    ),
    "bridge.ended": EventKind(
        Level.WARNING,
        "bridge process {process} (pid {pid}) ended: {reason}; the {connections} accounts that "
        "were open in it are opened again elsewhere",
    ),
    "bridge.stopped": EventKind(
        Level.INFO, "bridge process {process} (pid {pid}) stopped: {reason}"
    ),
    "bridge.not_gone": EventKind(
        Level.ERROR,
        "bridge process {process} (pid {pid}) was killed and is not gone after {waited_s} s: the "
        "system does not let go of it; it runs no instruction any more",
    ),
    "bridge.frame_refused": EventKind(
        Level.ERROR,
        "bridge process {process} (pid {pid}) sent a frame that means nothing: {error}; this is a "
        "bug, please report it; the process is killed",
    ),
    "bridge.call_refused": EventKind(
        Level.ERROR,
        "bridge process {process} (pid {pid}) did not understand {call}: {error}; this is a bug, "
        "please report it",
    ),
    "bridge.frame_ignored": EventKind(
        Level.DEBUG, "bridge process {process}: {frame} of a connection that is not here"
    ),
    "bridge.flooded": EventKind(
        Level.WARNING,
        "account {account_id}: {count} events of its connection were not read; it is closed",
    ),
    "bridge.close_unanswered": EventKind(
        Level.WARNING,
        "bridge process {process} (pid {pid}) did not close account {account_id} within "
        "{waited_s} s, so the process is killed: nobody may open the account before it is closed",
    ),
    "bridge.printed": EventKind(Level.WARNING, "bridge process {process} printed: {line}"),
    "bridge.complained": EventKind(Level.WARNING, "bridge process {process}: {line}"),
    "bridge.logged": EventKind(Level.DEBUG, "bridge process {process}: {line}"),
    "bridge.down": EventKind(
        Level.ERROR,
        "{deaths} bridge processes died within {within_s} s, the last: {reason}; this instance "
        "lets another try; WATCHKEEPER_BRIDGE_DEATHS_MAX is how many may",
    ),
    "bridge.account_isolated": EventKind(
        Level.ERROR,
        "account {account_id} was in each of several bridge processes that died, the last time "
        "alone, where it takes no other along; report what bridge.printed and bridge.ended say",
    ),
    "bridge.node_old": EventKind(
        Level.WARNING,
        "Node {node} takes several times the processor time of Node {better} with many accounts "
        "in a process, so each takes {accounts_max} at most; install Node {better}",
    ),
}
