"""What Firestore's gRPC statuses mean for us: the one place that maps them."""

from __future__ import annotations

import re

import grpc

from machine.ports import StoreMisconfigured, StoreUnavailable

_REFUSED = {
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.NOT_FOUND,
}

_FOR_GOOD = {
    grpc.StatusCode.PERMISSION_DENIED: (
        "grant this service account the role roles/datastore.user on the project"
    ),
    grpc.StatusCode.UNAUTHENTICATED: "check the application default credentials",
    grpc.StatusCode.INVALID_ARGUMENT: "check project and database; else this is a bug of ours",
    grpc.StatusCode.UNIMPLEMENTED: "this server does not speak Firestore's v1 protocol",
}

_DATABASE_SIGNS = ("the database", "datastore mode", "has not been used")
"""In the details of a refusal that no other write would get around: the database is missing or of
the other kind, the API is off. Compared in lower case."""

_INDEX_SIGN = re.compile(r"requires an? (\S+ )?index")
"""A query that has no index: a composite one ("requires an index"), or that of a field which
somebody exempted ("requires a COLLECTION_ASC index"). In lower case."""


_OTHER_DATABASE = (
    "create the database in Native mode, or correct WATCHKEEPER_FIRESTORE_PROJECT and _DATABASE"
)
_NO_INDEX = (
    "deploy deploy/firestore/firestore.indexes.json; an exemption of a field that is asked for by "
    "value must go"
)


class Forbidden(StoreMisconfigured):
    """Firestore refuses `method` for good; `details` are the server's words."""

    def __init__(self, method: str, status: grpc.StatusCode, details: str, advice: str) -> None:
        self.status = status
        self.details = details
        super().__init__(f"Firestore refuses {method} ({status.name.lower()}): {details}; {advice}")


class Refused(Exception):
    """A precondition did not hold, or a document that must exist does not.

    Stays inside this package: each store says in its port's words what it means.
    `code` is `failed_precondition`, `already_exists` or `not_found`.
    """

    def __init__(self, method: str, code: str) -> None:
        super().__init__(f"{method} refused: {code}")
        self.code = code


def error_for(method: str, status: grpc.StatusCode, details: str) -> Exception:
    """The error that a call which ended with `status` raises.

    `details` are the server's words (names of documents and settings; never a field's value).
    """
    code = status.name.lower()
    words = details.lower()
    if status in _REFUSED:
        if any(sign in words for sign in _DATABASE_SIGNS):
            return Forbidden(method, status, details, _OTHER_DATABASE)
        if _INDEX_SIGN.search(words):
            return Forbidden(method, status, details, _NO_INDEX)
        return Refused(method, code)
    if status in _FOR_GOOD:
        return Forbidden(method, status, details, _FOR_GOOD[status])
    return StoreUnavailable(f"{method} ended with {code}: {details}", code=code)
