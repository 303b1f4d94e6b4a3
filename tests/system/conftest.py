from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.system.cluster import Cluster, firestore_env, open_cluster, sqlite_env


@pytest.fixture(params=["sqlite", pytest.param("firestore", marks=pytest.mark.emulator)])
def store_env(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """The settings of a fresh group, on each of the two stores."""
    if request.param == "sqlite":
        return sqlite_env(tmp_path)
    return firestore_env(tmp_path, request.getfixturevalue("firestore_emulator"))


@pytest.fixture
async def cluster(store_env: dict[str, str], tmp_path: Path) -> AsyncIterator[Cluster]:
    async with open_cluster(tmp_path, store_env) as cluster:
        yield cluster
