from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bridge.node.install import skip_or_fail
from tests.deploy.engine import Engine, missing, open_engine


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that has the stand-ins for the base images: built once, they take a minute."""
    lacking = missing()
    if lacking is not None:
        skip_or_fail(lacking)
    with open_engine(tmp_path_factory.mktemp("engine")) as engine:
        engine.build_stand_ins()
        yield engine
