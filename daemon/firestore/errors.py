"""What Firestore's gRPC statuses mean for us: the one place that maps them."""

from __future__ import annotations

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

_DATABASE_SIGNS = ("the database", "datastore mode", "requires an index", "has not been used")
"""In the details of a refusal that no other write would get around: the database is missing or of
the other kind, the API is off, an index is missing. Compared in lower case."""


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
            return StoreMisconfigured(
                f"Firestore refuses {method} ({code}): {details}; create the database in Native "
                "mode, or correct WATCHKEEPER_FIRESTORE_PROJECT and _DATABASE"
            )
        return Refused(method, code)
    if status in _FOR_GOOD:
        return StoreMisconfigured(
            f"Firestore refuses {method} ({code}): {details}; {_FOR_GOOD[status]}"
        )
    return StoreUnavailable(f"{method} ended with {code}: {details}", code=code)
