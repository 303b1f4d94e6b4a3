"""Firestore's protocol buffers as plain (upb) classes, and the method names they travel on.

The proto-plus wrappers that `firestore_v1.types` exports cost about ten times as much to read;
`.pb()` is their documented way to the classes beneath. They come without type information, so
everything here is `Any`, and nothing else in the package imports Google's types.
"""

from __future__ import annotations

from typing import Any

from google.cloud.firestore_v1.types import document as _document
from google.cloud.firestore_v1.types import firestore as _firestore
from google.cloud.firestore_v1.types import write as _write

Proto = Any
"""An instance of one of the classes below (or of a message inside one)."""

Document: Any = _document.Document.pb()
Value: Any = _document.Value.pb()
Write: Any = _write.Write.pb()
GetDocumentRequest: Any = _firestore.GetDocumentRequest.pb()
ListDocumentsRequest: Any = _firestore.ListDocumentsRequest.pb()
ListDocumentsResponse: Any = _firestore.ListDocumentsResponse.pb()
BatchGetDocumentsRequest: Any = _firestore.BatchGetDocumentsRequest.pb()
BatchGetDocumentsResponse: Any = _firestore.BatchGetDocumentsResponse.pb()
RunQueryRequest: Any = _firestore.RunQueryRequest.pb()
RunQueryResponse: Any = _firestore.RunQueryResponse.pb()
CommitRequest: Any = _firestore.CommitRequest.pb()
CommitResponse: Any = _firestore.CommitResponse.pb()
ListenRequest: Any = _firestore.ListenRequest.pb()
ListenResponse: Any = _firestore.ListenResponse.pb()

SERVICE = "/google.firestore.v1.Firestore/"

UNARY: dict[str, Any] = {
    "GetDocument": Document,
    "ListDocuments": ListDocumentsResponse,
    "Commit": CommitResponse,
}
"""Methods with one answer, and its class."""

STREAMING: dict[str, Any] = {
    "BatchGetDocuments": BatchGetDocumentsResponse,
    "RunQuery": RunQueryResponse,
}
"""Methods that answer one request with many messages, and their class."""
