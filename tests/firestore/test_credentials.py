"""The bearer token: fetched beside the loop, renewed ahead of time, told to nobody."""

from __future__ import annotations

import datetime
import threading
from typing import Any

import google.auth.exceptions
import pytest
import trio
from google.auth.credentials import Credentials

from daemon.firestore.credentials import keep_access
from machine.ports import StoreMisconfigured, StoreUnavailable

SECRET = "ya29.very-secret"


class CountingCredentials(Credentials):
    """Google's own rules of freshness over tokens that count up; slow or failing on demand."""

    def __init__(self, valid_s: float, trouble: Exception | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # google-auth has no types
        self.valid_s = valid_s
        self.trouble = trouble
        self.refreshes = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    def refresh(self, request: Any) -> None:
        self.may_answer.wait()
        self.refreshes += 1
        if self.trouble is not None:
            raise self.trouble
        self.token = f"{SECRET}-{self.refreshes}"
        now = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)
        self.expiry = now + datetime.timedelta(seconds=self.valid_s)


async def test_the_first_call_waits_for_a_token_and_later_ones_do_not() -> None:
    credentials = CountingCredentials(valid_s=3600)
    with trio.fail_after(5):
        async with keep_access(credentials, object) as access:
            for _ in range(3):
                assert await access.metadata() == (("authorization", f"Bearer {SECRET}-1"),)
    assert credentials.refreshes == 1


async def test_many_first_calls_share_one_refresh() -> None:
    credentials = CountingCredentials(valid_s=3600)
    with trio.fail_after(5):
        async with keep_access(credentials, object) as access, trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(access.metadata)
    assert credentials.refreshes == 1


async def test_a_stale_token_is_used_while_its_successor_is_fetched() -> None:
    # Google's library calls a token stale 3:45 before its end.
    credentials = CountingCredentials(valid_s=60)
    with trio.fail_after(5):
        async with keep_access(credentials, object) as access:
            await access.metadata()
            credentials.may_answer.clear()
            assert await access.metadata() == (("authorization", f"Bearer {SECRET}-1"),)
            credentials.may_answer.set()
            while credentials.refreshes < 2:
                await trio.sleep(0.01)


async def test_a_hung_refresh_holds_nobody_beyond_their_deadline() -> None:
    credentials = CountingCredentials(valid_s=3600)
    credentials.may_answer.clear()
    started_at = trio.current_time()
    async with keep_access(credentials, object) as access:
        with trio.move_on_after(0.1) as late:
            await access.metadata()
        assert late.cancelled_caught
    assert trio.current_time() - started_at < 0.5
    credentials.may_answer.set()


async def test_a_failed_refresh_is_unavailable_and_one_for_good_is_misconfigured() -> None:
    for retryable, wanted in ((True, StoreUnavailable), (False, StoreMisconfigured)):
        trouble = google.auth.exceptions.RefreshError(  # type: ignore[no-untyped-call] # as above
            SECRET, retryable=retryable
        )
        credentials = CountingCredentials(3600, trouble)
        with trio.fail_after(5):
            async with keep_access(credentials, object) as access:
                with pytest.raises(wanted) as told:
                    await access.metadata()
        assert SECRET not in str(told.value)
        assert SECRET not in repr(access)
