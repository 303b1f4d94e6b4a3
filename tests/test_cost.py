from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from daemon.cli import app
from daemon.cost import Load, costs, inside_free_quota, report
from daemon.settings import Settings

LEASE_ONLY = Load(accounts=0, messages_per_day=0, standbys=1, deploys_per_day=0, received_per_day=0)


def test_renewals_at_the_defaults_are_what_the_design_says() -> None:
    holder = costs(Settings(), LEASE_ONLY)[0]
    assert round(holder.writes) == 518_400
    assert holder.dollars == pytest.approx(0.93, abs=0.01)


def test_standby_reads_one_document_when_the_renewal_it_saw_would_expire() -> None:
    standby = costs(Settings(), LEASE_ONLY)[1]
    assert round(standby.reads) == 30 * 86_400 / 15
    assert standby.dollars == pytest.approx(0.10, abs=0.01)
    # It sees the renewal at 8 s when the one at 0 s would expire, and looks again 8 s later.
    uneven = Settings(lease_ttl_s=10, lease_renew_s=4)
    assert round(costs(uneven, LEASE_ONLY)[1].reads) == 30 * 86_400 / 8


def test_the_lease_alone_fits_the_free_quota() -> None:
    assert inside_free_quota(costs(Settings(), LEASE_ONLY))
    assert not inside_free_quota(costs(Settings(), Load(messages_per_day=10_000)))


def test_slower_renewals_cost_less_and_more_standbys_cost_more() -> None:
    fast = costs(Settings(), Load())
    slow = costs(Settings(lease_ttl_s=60, lease_renew_s=20), Load())
    two = costs(Settings(), Load(standbys=2))
    assert slow[0].writes == fast[0].writes / 4
    assert two[1].reads == 2 * fast[1].reads
    assert two[2].reads == 2 * fast[2].reads


def test_received_messages_are_written_with_their_keys_read_once_and_deleted() -> None:
    (row,) = (row for row in costs(Settings(), Load()) if row.what == "messages received")
    assert (row.reads, row.writes, row.deletes) == (30_000, 90_000, 30_000)
    (none,) = (row for row in costs(Settings(), LEASE_ONLY) if row.what == "messages received")
    assert none.dollars == 0


def test_total_is_the_sum_of_the_rows() -> None:
    told = report(Settings(), Load())
    rows = told["rows"]
    assert isinstance(rows, list)
    assert told["dollarsPerMonth"] == pytest.approx(sum(row["dollars"] for row in rows), abs=0.01)


def test_command_names_the_source_of_the_prices() -> None:
    shown = CliRunner().invoke(app, ["cost"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "518,400" in shown.stdout
    assert "cloud.google.com/firestore/pricing" in shown.stdout
    assert json.loads(CliRunner().invoke(app, ["cost", "--json"]).stdout)["rows"][0]["reads"] == 0
