"""Changed settings and a running instance."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from daemon.http.auth import Tokens
from daemon.journal import LoguruJournal, open_journal
from daemon.reload import RELOAD_EVENTS, Reloader
from daemon.settings import Settings, SettingsRefused
from machine.events import EVENTS
from machine.ports import Level

OLD = "the-old-token-of-the-callers"
NEW = "the-new-token-of-the-callers"


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def journal(stream: io.StringIO) -> Iterator[LoguruJournal]:
    with open_journal("a", secrets=[OLD], stream=stream, events={**EVENTS, **RELOAD_EVENTS}) as it:
        yield it


def made(**values: object) -> Settings:
    return Settings(**{"admin_token": OLD, "instance_name": "a", **values})  # type: ignore[arg-type]


async def reloaded(journal: LoguruJournal, tokens: Tokens, fresh: Settings) -> Reloader:
    reloader = Reloader(made(), journal=journal, tokens=tokens, read=lambda: fresh)
    await reloader.reload()
    return reloader


async def test_a_new_token_and_a_new_level_count_at_once(journal: LoguruJournal) -> None:
    tokens = Tokens((OLD,))
    fresh = made(admin_token=f"{NEW}\n{OLD}", log_level="debug")
    reloader = await reloaded(journal, tokens, fresh)
    assert (tokens.own, len(tokens.digests)) == (NEW, 2)
    assert journal.level is Level.DEBUG
    assert reloader.settings == fresh


async def test_a_token_that_was_reloaded_appears_in_no_line(
    journal: LoguruJournal, stream: io.StringIO
) -> None:
    await reloaded(journal, Tokens((OLD,)), made(admin_token=NEW))
    journal.note("drain.asked", reason=f"said {OLD} and {NEW}")
    journal.note("drain.asked", reason="the end")
    await journal_written(stream, "the end")
    assert OLD not in stream.getvalue()
    assert NEW not in stream.getvalue()


async def test_what_takes_a_restart_is_named_and_stays(
    journal: LoguruJournal, stream: io.StringIO
) -> None:
    reloader = await reloaded(journal, Tokens((OLD,)), made(lease_ttl_s=30))
    await journal_written(stream, "WATCHKEEPER_LEASE_TTL_S")
    assert reloader.settings.lease_ttl_s == made().lease_ttl_s


async def test_settings_that_are_refused_change_nothing(
    journal: LoguruJournal, stream: io.StringIO
) -> None:
    def read() -> Settings:
        raise SettingsRefused(("The times contradict each other.",))

    tokens = Tokens((OLD,))
    await Reloader(made(), journal=journal, tokens=tokens, read=read).reload()
    await journal_written(stream, "The times contradict each other.")
    assert tokens.own == OLD


async def journal_written(stream: io.StringIO, words: str) -> None:
    """The journal's thread writes; wait for it."""
    import trio

    with trio.fail_after(5):
        while words not in stream.getvalue():
            await trio.sleep(0.01)
