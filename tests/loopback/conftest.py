from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.loopback import LoopbackConnector, LoopbackTiming, LoopbackWorld

# Real threads and SQLite, so the real clock. Nothing may depend on the watcher's slow look.
QUICK = LoopbackTiming(watch_every_s=60)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "world"


@pytest.fixture
def world(directory: Path) -> Iterator[LoopbackWorld]:
    world = LoopbackWorld(directory)
    yield world
    world.close()


@pytest.fixture
def connector(directory: Path) -> LoopbackConnector:
    return LoopbackConnector(directory, timing=QUICK)
