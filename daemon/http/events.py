"""The events that the HTTP layer tells the journal, in the form of `machine.events.EVENTS`."""

from __future__ import annotations

from machine.events import EventKind
from machine.ports import Level

HTTP_EVENTS: dict[str, EventKind] = {
    "http.opened": EventKind(Level.INFO, "API listening at {address}"),
    "http.closed": EventKind(Level.INFO, "API closed; {in_flight} requests were cut off"),
    "http.request_failed": EventKind(
        Level.ERROR,
        "{method} {path} failed: {error} (request {request_id}); this is a bug, please report it",
    ),
    "http.connection_failed": EventKind(Level.WARNING, "a connection broke the server: {error}"),
    "http.connections_full": EventKind(
        Level.WARNING,
        "{count} connections are open, the most there may be; new ones are answered 503; "
        "raise WATCHKEEPER_HTTP_CONNECTIONS_MAX if these are callers you want",
    ),
    "http.accept_failed": EventKind(
        Level.WARNING, "no connection can be accepted: {error}; raise the open files limit"
    ),
    "http.connections_lowered": EventKind(
        Level.WARNING,
        "only {files} open files are allowed: at most {count} connections; raise LimitNOFILE",
    ),
    "http.forward_failed": EventKind(
        Level.INFO, "{method} {path} could not be forwarded to {holder}: {error}"
    ),
    "peer.seen": EventKind(Level.INFO, "standby {peer} is there ({state}, {address})"),
    "peer.forgotten": EventKind(Level.INFO, "standby {peer} was silent for {ttl_s} s: forgotten"),
}
