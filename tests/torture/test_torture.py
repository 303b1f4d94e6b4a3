"""Two minutes of torture, from a seed that is the same each time. `make torture` takes longer."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture.__main__ import report
from tests.torture.run import torture

MINUTES = 2.0
SEED = 20261125


@pytest.mark.long
@pytest.mark.system
@pytest.mark.emulator
async def test_a_group_under_torture_violates_nothing(tmp_path: Path) -> None:
    outcome = await torture(SEED, MINUTES, directory=tmp_path)
    print(report(outcome))
    assert outcome.violations == ()
    # It was a torture: terms came and went, and callers got something through.
    assert outcome.counts["terms"] >= 2
    assert outcome.counts["messages accepted"] > 50
    assert sum(outcome.faults.values()) > 20
