"""Every query that is ever made, each of one field: so none needs an index of our own.

In one place, so that `inspection` can ask each of them of a database before anything depends on
it. Never lives here: making them, and reading what they find.
"""

from __future__ import annotations

from collections.abc import Mapping

from daemon.firestore.documents import DocumentName, FieldValue, Moment, encode
from daemon.firestore.layout import ACCOUNTS, ARCHIVE, INBOX, OUTBOX, Layout, inbox_range
from daemon.firestore.protos import Proto, RunQueryRequest, Value
from machine.records import PENDING_STATES, AccountId

PURGE_BATCH_MAX = 400
"""Deletes in one commit."""

ASCENDING = 1


def every_query(layout: Layout) -> Mapping[str, Proto]:
    """One of each kind, by what it is for."""
    nobody = AccountId("nobody")
    return {
        "all accounts": all_accounts(layout),
        "an account's archive": archived(layout, nobody),
        "messages to send": pending_messages(layout),
        "old messages": old_messages(layout, 0.0, None),
        "received messages": inbox_page(layout, *inbox_range(nobody), 1),
        "old received messages": old_inbox(layout, 0.0, 1),
    }


def all_accounts(layout: Layout) -> Proto:
    """Accounts, and the marks of those that were removed."""
    return _query(layout, ACCOUNTS)


def archived(layout: Layout, account_id: AccountId) -> Proto:
    """Everything that was ever archived of an account."""
    request = _query(layout, ARCHIVE)
    query = request.structured_query
    query.select.fields.add(field_path="accountId")
    _compare(query.where.field_filter, "accountId", "EQUAL", str(account_id))
    return request


def pending_messages(layout: Layout) -> Proto:
    """Messages that are to be sent, in any order: with one it would need a composite index."""
    request = _query(layout, OUTBOX)
    pending = sorted(state.value for state in PENDING_STATES)
    _compare(request.structured_query.where.field_filter, "state", "IN", pending)
    return request


def old_messages(layout: Layout, before: float, last: tuple[Moment, DocumentName] | None) -> Proto:
    """One page of messages older than `before`, oldest first, after `last`."""
    request = _query(layout, OUTBOX)
    query = request.structured_query
    for path in ("updatedAt", "state", "format"):
        query.select.fields.add(field_path=path)
    _compare(query.where.field_filter, "updatedAt", "LESS_THAN", Moment(before))
    for path in ("updatedAt", "__name__"):
        query.order_by.add(direction=ASCENDING).field.field_path = path
    if last is not None:
        moment = Value()
        encode(moment, last[0])
        query.start_at.values.extend([moment, Value(reference_value=last[1])])
        query.start_at.before = False
    query.limit.value = PURGE_BATCH_MAX
    return request


def inbox_page(layout: Layout, lowest: str, highest: str, count: int) -> Proto:
    """Received messages whose place is between two, in order."""
    request = _query(layout, INBOX)
    query = request.structured_query
    both = query.where.composite_filter
    both.op = type(both).AND
    for bound, place in (("GREATER_THAN", lowest), ("LESS_THAN", highest)):
        _compare(both.filters.add().field_filter, "place", bound, place)
    query.order_by.add(direction=ASCENDING).field.field_path = "place"
    query.limit.value = count
    return request


def old_inbox(layout: Layout, before: float, count: int) -> Proto:
    """Received messages older than `before`, oldest first."""
    request = _query(layout, INBOX)
    query = request.structured_query
    query.select.fields.add(field_path="receivedAt")
    _compare(query.where.field_filter, "receivedAt", "LESS_THAN", Moment(before))
    query.order_by.add(direction=ASCENDING).field.field_path = "receivedAt"
    query.limit.value = count
    return request


def _query(layout: Layout, collection: str) -> Proto:
    request = RunQueryRequest(parent=layout.parent)
    request.structured_query.from_.add(collection_id=collection)
    return request


def _compare(condition: Proto, path: str, operator: str, value: FieldValue) -> None:
    """Fill a field filter: `operator` is the name of one of the protocol's."""
    condition.field.field_path = path
    condition.op = getattr(type(condition), operator)
    encode(condition.value, value)
