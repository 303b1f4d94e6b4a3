"""The bearer token of our calls: fetched and renewed beside the loop, never inside a call's way.

gRPC's own authentication plugin starts a thread for each call; here one thread runs for each
refresh, about once an hour. The token reaches gRPC's metadata and nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol

import google.auth
import google.auth.exceptions
import trio
from google.auth.credentials import TokenState
from google.auth.transport.requests import Request

from machine.ports import StoreMisconfigured, StoreUnavailable

SCOPES = ("https://www.googleapis.com/auth/datastore",)
REFRESH_PAUSE_S = 5.0
"""Between two failed refreshes."""


class Access(Protocol):
    """What puts the authorization into a call's metadata."""

    @property
    def account(self) -> str | None:
        """Whose access it is, where that is known: a service account's address."""
        ...

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """Usually returns at once. Raises `StoreUnavailable`, `StoreMisconfigured`."""
        ...


class EmulatorAccess:
    """The emulator's fixed word for "past all rules"; no secret."""

    account = None

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", "Bearer owner"),)


class GoogleAccess:
    """Google's credentials, refreshed ahead of their expiry by one background task.

    Between its calls: whoever finds the credentials stale has asked for a refresh; only who finds
    them expired waits for it.
    """

    def __init__(self, credentials: Any, request: Callable[..., Any]) -> None:
        self._credentials = credentials
        self._request = request
        self._wanted = trio.Event()
        self._answered = trio.Event()
        self._trouble: Exception | None = None

    @property
    def account(self) -> str | None:
        """The service account's address; Compute Engine's is known once it has a token."""
        account: str | None = getattr(self._credentials, "service_account_email", None)
        return None if account == "default" else account

    async def metadata(self) -> tuple[tuple[str, str], ...]:
        """The header to send. Waits only while no valid one is there, as long as the caller lets.

        Raises `StoreUnavailable` when the refresh failed, `StoreMisconfigured` when it never will
        succeed.
        """
        state = self._credentials.token_state
        if state is not TokenState.FRESH:
            self._wanted.set()
        if state is TokenState.INVALID:
            await self._answered.wait()
            if self._trouble is not None:
                raise self._trouble
        return (("authorization", f"Bearer {self._credentials.token}"),)

    async def keep_fresh(self) -> None:
        """Refresh whenever it was asked for, until cancelled. Never raises for a failure."""
        while True:
            await self._wanted.wait()
            self._trouble = await self._refresh()
            answered, self._answered = self._answered, trio.Event()
            self._wanted = trio.Event()
            answered.set()
            if self._trouble is not None:
                await trio.sleep(REFRESH_PAUSE_S)

    async def _refresh(self) -> Exception | None:
        try:
            # A hung metadata server must not hold up the end of the program: the thread is let
            # go when we are cancelled. The library's own time limit ends it after two minutes.
            await trio.to_thread.run_sync(
                self._credentials.refresh, self._request, abandon_on_cancel=True
            )
        except google.auth.exceptions.GoogleAuthError as error:
            # The message may quote the server's reply; only the kind is told.
            kind = type(error).__name__
            if isinstance(error, google.auth.exceptions.RefreshError) and not error.retryable:
                return StoreMisconfigured(
                    f"Google refuses to renew our credentials ({kind}): check the service account"
                )
            return StoreUnavailable(f"no access token: {kind}", code="no_credentials")
        return None


@asynccontextmanager
async def open_google_access() -> AsyncIterator[GoogleAccess]:
    """Find the application default credentials and keep them fresh until the block's end.

    Raises `StoreMisconfigured` when there are none.
    """
    try:
        credentials, _ = await trio.to_thread.run_sync(_find_credentials, abandon_on_cancel=True)
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise StoreMisconfigured(
            "no Google credentials found: run on Google Cloud with a service account, or set "
            "GOOGLE_APPLICATION_CREDENTIALS to a credentials file"
        ) from error
    async with keep_access(credentials, Request()) as access:
        yield access


@asynccontextmanager
async def keep_access(credentials: Any, request: Callable[..., Any]) -> AsyncIterator[GoogleAccess]:
    """Keep `credentials` (google-auth's interface) fresh until the block's end."""
    access = GoogleAccess(credentials, request)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(access.keep_fresh)
        try:
            yield access
        except Exception as error:  # noqa: BLE001 - raised below, outside the nursery's group
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _find_credentials() -> tuple[Any, str | None]:
    found: tuple[Any, str | None] = google.auth.default(scopes=SCOPES)
    return found
