"""Applying changed settings to a running instance: those that can change, and a word on the others.

Never lives here: how settings are read (`daemon.settings`), or a change that would end a term.
"""

from __future__ import annotations

from collections.abc import Callable

import trio

from daemon.http.auth import Tokens
from daemon.journal import LoguruJournal
from daemon.settings import Settings, SettingsRefused, load_settings, variable_of
from machine.events import EventKind
from machine.ports import Level

RELOADABLE = frozenset({"log_level", "admin_token", "admin_token_file"})
"""Everything else takes a restart: with a second instance that interrupts nothing."""

RELOAD_EVENTS = {
    "settings.reloaded": EventKind(Level.INFO, "settings read again; changed now: {changed}"),
    "settings.refused": EventKind(
        Level.ERROR, "settings read again and refused, the former ones stay: {problems}"
    ),
    "settings.need_restart": EventKind(
        Level.WARNING, "settings that take a restart have changed: {variables}"
    ),
}

ReadSettings = Callable[[], Settings]


def read_settings() -> Settings:
    """Read the settings as at the start. Raises `SettingsRefused`."""
    return load_settings(serving=True).settings


class Reloader:
    """Takes changed settings over. `settings` are those in effect."""

    def __init__(
        self,
        settings: Settings,
        *,
        journal: LoguruJournal,
        tokens: Tokens,
        read: ReadSettings = read_settings,
    ) -> None:
        self.settings = settings
        self._journal = journal
        self._tokens = tokens
        self._read = read

    async def reload(self) -> None:
        """Read the settings again and apply what can change; what is refused changes nothing."""
        try:
            fresh = await trio.to_thread.run_sync(self._read)
        except SettingsRefused as refused:
            self._journal.note("settings.refused", problems=" ".join(refused.problems))
            return
        changed = {name for name in Settings.model_fields if self._differs(name, fresh)}
        self._apply(fresh)
        applied = sorted(map(variable_of, changed & RELOADABLE))
        self._journal.note("settings.reloaded", changed=", ".join(applied) or "nothing")
        waiting = sorted(map(variable_of, changed - RELOADABLE))
        if waiting:
            self._journal.note("settings.need_restart", variables=", ".join(waiting))

    def _differs(self, name: str, fresh: Settings) -> bool:
        return bool(getattr(fresh, name) != getattr(self.settings, name))

    def _apply(self, fresh: Settings) -> None:
        # The journal first: a token must be known as a secret before it can turn up anywhere.
        self._journal.learn_secrets(fresh.admin_tokens())
        self._tokens.replace(fresh.admin_tokens())
        self._journal.level = fresh.log_level
        kept = {name: getattr(fresh, name) for name in RELOADABLE}
        self.settings = self.settings.model_copy(update=kept)
