"""The machine's facts as the JSON that callers see.

Moments are ISO 8601 in UTC, to the millisecond. `daemon.http.models` documents these shapes, and
the tests hold one against the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from daemon.http.peers import Peer
from machine.inbox import InboxPage
from machine.records import PENDING_STATES, Message, MessageState, Transition
from machine.views import AccountView, LeaseStatus, RestoreReport

Json = dict[str, object]


def moment(at: float | None) -> str | None:
    """Seconds since 1970 as `2025-01-31T12:00:00.000Z`; `None` stays."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")[:-6] + "Z"


def account_json(view: AccountView, *, in_memory: bool | None = None) -> Json:
    """An account. `in_memory`, when given, is known better than by the view."""
    account = view.account
    return {
        "accountId": account.account_id,
        "name": account.name,
        "phone": account.phone,
        "status": account.status.value,
        "inMemory": view.in_memory if in_memory is None else in_memory,
        "lastError": account.last_error,
        "since": moment(account.since),
        "createdAt": moment(account.created_at),
        "updatedAt": moment(account.updated_at),
        "lastConnectedAt": moment(account.last_connected_at),
        "queued": view.queued,
    }


def accounts_json(views: Iterable[AccountView], *, in_memory: bool | None = None) -> Json:
    """The list of accounts, by account id."""
    ordered = sorted(views, key=lambda view: view.account.account_id)
    accounts = [account_json(view, in_memory=in_memory) for view in ordered]
    return {"success": True, "accounts": accounts, "count": len(accounts)}


def sent_json(message: Message) -> Json:
    """What a send answers: how far the server has taken it.

    A receipt may have come in before the answer is written; a send's status still says
    `server_ack`, as the contract does, and the message's own route says more.
    """
    pending = message.state in PENDING_STATES
    status = message.state if pending else MessageState.SERVER_ACK
    return {"success": True, "messageId": message.message_id, "status": status.value}


def message_json(message: Message) -> Json:
    """A message's progress, without its text."""
    return {
        "success": True,
        "messageId": message.message_id,
        "accountId": message.account_id,
        "to": message.to,
        "status": message.state.value,
        "error": message.error,
        "attempts": message.attempts,
        "createdAt": moment(message.created_at),
        "updatedAt": moment(message.updated_at),
        "timestamps": {state.value: moment(at) for state, at in message.state_at.items()},
    }


def inbox_json(page: InboxPage) -> Json:
    """Messages that an account received."""
    messages = [
        {
            "accountId": message.account_id,
            "messageId": message.message_id,
            "chat": message.chat,
            "from": message.sender,
            "fromName": message.sender_name,
            "text": message.text,
            "sentAt": moment(message.sent_at),
            "receivedAt": moment(message.received_at),
        }
        for message in page.messages
    ]
    return {"success": True, "messages": messages, "cursor": page.cursor, "more": page.more}


def transition_json(transition: Transition) -> Json:
    """One transition of the machine."""
    return {
        "from": transition.source,
        "to": transition.dest,
        "trigger": transition.trigger,
        "reason": transition.reason,
        "at": moment(transition.at),
        "durationSeconds": round(transition.duration_s, 6),
        "epoch": transition.epoch,
        "instance": transition.instance,
    }


def lease_json(lease: LeaseStatus | None) -> Json | None:
    """The lease as this instance last saw it."""
    if lease is None:
        return None
    remaining_s = lease.remaining_s
    return {
        "holder": lease.holder,
        "epoch": lease.epoch,
        "ttlSeconds": lease.ttl_s,
        "remainingSeconds": None if remaining_s is None else round(max(0.0, remaining_s), 3),
        "renewals": lease.renewals,
        "lastRenewalAt": moment(lease.last_renewal_at),
        "paused": lease.paused,
    }


def restore_json(report: RestoreReport | None) -> Json | None:
    """The newest restore report."""
    if report is None:
        return None
    return {
        "epoch": report.epoch,
        "startedAt": moment(report.started_at),
        "finishedAt": moment(report.finished_at),
        "foundShared": report.found_shared,
        "foundDisk": report.found_disk,
        "total": report.total,
        "restored": report.restored,
        "listed": report.listed,
        "pairing": report.pairing,
        "doubted": report.doubted,
        "failed": len(report.failures),
        "failures": [
            {"accountId": failure.account_id, "cause": failure.cause, "advice": failure.advice}
            for failure in report.failures
        ],
        "durations": {name: round(seconds, 6) for name, seconds in report.durations.items()},
        "retries": dict(report.retries),
        "takenFrom": dict(report.taken_from),
    }


def peer_seen_json(peer: Peer) -> Json:
    """Another instance, as people see it."""
    return {
        "id": peer.name,
        "state": peer.state,
        "address": peer.address,
        "version": peer.version,
        "seenAt": moment(peer.seen_at),
    }
