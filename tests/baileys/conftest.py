from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.baileys.directories import make_directories


@pytest.fixture(scope="session")
def baileys_dirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two paired accounts as Baileys wrote them. Shared: copy before changing anything."""
    return make_directories(tmp_path_factory.mktemp("baileys") / "sessions", 2)


@pytest.fixture
def legacy(baileys_dirs: Path, tmp_path: Path) -> Path:
    """A copy of both accounts, to break."""
    return Path(shutil.copytree(baileys_dirs, tmp_path / "sessions"))


@pytest.fixture
def account(legacy: Path) -> Path:
    """A copy of one account, to break."""
    return legacy / "account-0"
