"""Each contract runs on each adapter. A new adapter is one line here and a world in `worlds.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.contracts.worlds import (
    SHARED_ADAPTERS,
    LocalWorld,
    SharedWorld,
    local_world,
    open_shared_world,
)

LOCAL_ADAPTERS = ["fake", "sqlite"]


@pytest.fixture(params=SHARED_ADAPTERS)
def adapter(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def host(request: pytest.FixtureRequest, adapter: str) -> str | None:
    """The emulator's address, for the adapter that needs one."""
    return str(request.getfixturevalue("firestore_emulator")) if adapter == "firestore" else None


@pytest.fixture
async def world(adapter: str, host: str | None, tmp_path: Path) -> AsyncIterator[SharedWorld]:
    async with open_shared_world(adapter, tmp_path, host) as world:
        yield world


@pytest.fixture(params=LOCAL_ADAPTERS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> LocalWorld:
    return local_world(str(request.param), tmp_path)
