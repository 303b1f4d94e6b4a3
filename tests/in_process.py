"""The world as the composition root gives it to the machine, for an instance in this process."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from daemon.baileys_import import LegacyDirectories
from daemon.journal import open_journal
from daemon.main import HostClocks, make_codec, open_connector, open_shared
from daemon.settings import Settings
from daemon.sqlite.local import open_local
from machine.ports import Ports


def settings_of(env: Mapping[str, str], directory: Path) -> Settings:
    """The settings that a daemon process would have with `env`; its state is in `directory`."""
    given: dict[str, Any] = {
        ("firestore_emulator_host" if name.startswith("FIRESTORE") else name[12:].lower()): value
        for name, value in env.items()
    }
    return Settings(
        **given, instance_name="here", http_bind="127.0.0.1:0", state_dir=directory / "state"
    )


@asynccontextmanager
async def open_ports(settings: Settings, log_path: Path) -> AsyncIterator[Ports]:
    """Real stores and a real connector."""
    settings.state_dir.mkdir(exist_ok=True)
    with (
        log_path.open("w") as log,
        open_journal(settings.instance_name, stream=log, json_lines=True) as journal,
    ):
        async with (
            open_local(settings.state_dir) as local,
            open_shared(settings, journal) as shared,
            open_connector(settings, journal) as parts,
        ):
            yield Ports(
                lease=shared.lease,
                accounts=shared.accounts,
                outbox=shared.outbox,
                inbox=shared.inbox,
                local=local,
                codec=make_codec(settings),
                connector=parts.connector,
                legacy=LegacyDirectories(None),
                journal=journal,
                clocks=HostClocks(),
                rng=random.Random(7),
            )
