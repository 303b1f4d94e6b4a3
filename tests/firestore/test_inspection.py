"""What `init` and `doctor` say of a database: of an emulator, and of one that lacks something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
import trio
from google.cloud.firestore_admin_v1.types import Database

from daemon.findings import Finding, Verdict
from daemon.firestore.client import FirestoreClient, open_firestore
from daemon.firestore.inspection import CHECK_S, EXEMPT, inspect
from daemon.firestore.lease import COLLECTION, FirestoreLeaseStore
from daemon.firestore.queries import every_query
from machine.ports import StoreMisconfigured
from tests.emulator import new_project, start_emulator
from tests.fault_proxy import Fault, open_fault_proxy
from tests.firestore.front_server import (
    Front,
    an_exempt_field,
    an_expiring_field,
    start_front,
    the_defaults,
)
from tests.firestore.refusing_server import start_refusing_server

pytestmark = pytest.mark.emulator

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "deploy" / "firestore" / "firestore.rules"
QUERIES = 6
S = grpc.StatusCode


@pytest.fixture(scope="module")
def strict_emulator() -> Iterator[str]:
    """An emulator with the rules that are deployed: any other lets everybody in."""
    with start_emulator(f"--rules={RULES}") as emulator:
        yield emulator.host


@pytest.fixture
def front(strict_emulator: str) -> Iterator[Front]:
    """A database in order: the Admin API says so, and the emulator behind it does the rest."""
    with start_front(strict_emulator) as front:
        front.fields = [the_defaults(), *(an_exempt_field(*names) for names in EXEMPT)]
        yield front


@pytest.fixture
async def client(front: Front) -> AsyncIterator[FirestoreClient]:
    async with open_firestore(new_project(), "db", front.host) as client:
        await FirestoreLeaseStore(client, "g").initialise()
        yield client


async def findings_of(client: FirestoreClient, *, emulated: bool = False) -> dict[str, Finding]:
    """The one line of each check; none is told twice."""
    with trio.fail_after(3 * CHECK_S):
        findings = await inspect(client, "g", emulated=emulated)
    assert len({finding.check for finding in findings}) == len(findings), findings
    return {finding.check: finding for finding in findings}


def troubles(findings: dict[str, Finding]) -> dict[str, Verdict]:
    return {
        check: finding.verdict
        for check, finding in findings.items()
        if finding.verdict is not Verdict.OK
    }


async def test_a_database_in_order_has_only_good_lines_and_is_left_as_it_was(
    front: Front, client: FirestoreClient
) -> None:
    before = await client.list_documents(client.root, COLLECTION)
    findings = await findings_of(client)
    assert troubles(findings) == {}
    assert {"read", "write", "listen", "rules", "database", "time to live", "exemptions"} < set(
        findings
    )
    assert sum(check.startswith("query: ") for check in findings) == QUERIES
    after = await client.list_documents(client.root, COLLECTION)
    assert [(one.name, one.update_time) for one in after] == [
        (one.name, one.update_time) for one in before
    ]
    assert "authorization" not in front.metadata["GetDocument"], "a stranger has no credentials"
    assert front.metadata["ListFields"]["x-goog-request-params"].startswith("parent=projects/")
    assert [asked.page_token for name, asked in front.asked if name == "ListFields"] == [
        "",
        "2",
        "4",
    ]


async def test_an_emulator_is_tried_and_what_it_does_not_have_is_said(
    firestore_emulator: str,
) -> None:
    async with open_firestore(new_project(), emulator_host=firestore_emulator) as client:
        findings = await findings_of(client, emulated=True)
    unchecked = Verdict.UNCHECKED
    assert troubles(findings) == dict.fromkeys(
        ("indexes", "rules", "database", "fields"), unchecked
    )
    assert all(
        "emulator" in finding.found
        for finding in findings.values()
        if finding.verdict is Verdict.UNCHECKED
    )


def test_every_query_that_the_stores_make_is_tried() -> None:
    made = sum(
        path.read_text().count(".run_query(")
        for path in (ROOT / "daemon" / "firestore").glob("*.py")
        if path.stem != "inspection"
    )
    assert made == QUERIES


async def test_without_the_role_each_line_says_how_to_grant_it(
    front: Front, client: FirestoreClient
) -> None:
    words = "Missing or insufficient permissions."
    for method in ("BatchGetDocuments", "Commit", "RunQuery", "Listen"):
        front.refused[method] = (S.PERMISSION_DENIED, words)
    findings = await findings_of(client)
    refused = troubles(findings)
    assert set(refused.values()) == {Verdict.FAIL}
    assert set(refused) == {check for check in findings if check.startswith("query: ")} | {
        *("read", "write", "listen")
    }
    for check in refused:
        assert "--role=roles/datastore.user --member=serviceAccount:ACCOUNT" in (
            findings[check].advice
        )
        assert words in findings[check].found


async def test_only_reading_is_allowed(front: Front, client: FirestoreClient) -> None:
    front.refused["Commit"] = (S.PERMISSION_DENIED, "Missing or insufficient permissions.")
    assert troubles(await findings_of(client)) == {"write": Verdict.FAIL}


@pytest.mark.parametrize(
    "words",
    [
        "The query requires an index. You can create it here: <address>",
        "The query requires a COLLECTION_ASC index for collection outbox and field state.",
    ],
)
async def test_a_missing_index_is_named_with_what_deploys_it(
    front: Front, client: FirestoreClient, words: str
) -> None:
    front.refused["RunQuery"] = (S.FAILED_PRECONDITION, words)
    findings = await findings_of(client)
    assert len(troubles(findings)) == QUERIES
    finding = findings["query: messages to send"]
    assert words in finding.found
    assert "firebase deploy --only firestore" in finding.advice
    # For a running instance it is the store's fault too, and no precondition that did not hold.
    with pytest.raises(StoreMisconfigured, match="index"):
        await client.run_query(next(iter(_queries(client))), lambda documents: None)


def _queries(client: FirestoreClient) -> Iterator[object]:
    from daemon.firestore.layout import Layout

    yield from every_query(Layout(client, "g")).values()


@pytest.mark.parametrize(
    ("status", "words", "command"),
    [
        (
            S.NOT_FOUND,
            "The database db does not exist for project p",
            "gcloud firestore databases create --location=REGION --type=firestore-native",
        ),
        (
            S.FAILED_PRECONDITION,
            "The Cloud Firestore API is not available for Firestore in Datastore Mode database",
            "gcloud firestore databases create --location=REGION --type=firestore-native",
        ),
        (
            S.PERMISSION_DENIED,
            "Cloud Firestore API has not been used in project p before or it is disabled.",
            "gcloud services enable firestore.googleapis.com",
        ),
        (S.UNAUTHENTICATED, "Request had invalid credentials", "gcloud auth application-default"),
    ],
)
async def test_what_is_wrong_with_the_whole_database_is_told_with_its_command(
    status: grpc.StatusCode, words: str, command: str
) -> None:
    with start_refusing_server(status, words) as server, trio.fail_after(30):
        async with open_firestore("p", "db", server.host) as client:
            findings = await findings_of(client)
    assert findings["read"].advice.startswith(command)
    assert findings["read"].verdict is Verdict.FAIL


async def test_a_stranger_who_can_read_the_lease_is_a_fault(firestore_emulator: str) -> None:
    # An emulator without rules lets everybody in, as a database in "test mode" does.
    with start_front(firestore_emulator) as open_to_all:
        open_to_all.fields = [an_exempt_field(*names) for names in EXEMPT]
        async with open_firestore(new_project(), "db", open_to_all.host) as client:
            missing = await findings_of(client)
            await FirestoreLeaseStore(client, "g").initialise()
            there = await findings_of(client)
    for findings in (missing, there):
        assert findings["rules"].verdict is Verdict.FAIL
        assert "firebase deploy" in findings["rules"].advice


async def test_what_the_admin_api_tells_is_judged(front: Front, client: FirestoreClient) -> None:
    front.database = Database(location_id="nam5", type_=Database.DatabaseType.DATASTORE_MODE)
    front.fields = [
        *front.fields[:-1],
        an_expiring_field(COLLECTION, "expireAt"),
        an_expiring_field("somebody-elses", "expireAt"),
    ]
    findings = await findings_of(client)
    assert troubles(findings) == {
        "database": Verdict.FAIL,
        "recovery": Verdict.WARN,
        "protection": Verdict.WARN,
        "time to live": Verdict.FAIL,
        "exemptions": Verdict.WARN,
    }
    where = f"--database=db --project={client.database.split('/')[1]}"
    assert findings["recovery"].advice == f"gcloud firestore databases update --enable-pitr {where}"
    assert findings["protection"].advice.endswith(f"update --delete-protection {where}")
    assert findings["time to live"].advice == (
        "gcloud firestore fields ttls update expireAt --collection-group=watchkeeper "
        f"--disable-ttl {where}"
    )
    assert findings["exemptions"].advice == (
        "gcloud firestore indexes fields update text --collection-group=inbox "
        f"--disable-indexes {where}"
    )


async def test_who_may_not_ask_the_admin_api_is_told_who_may(
    front: Front, client: FirestoreClient
) -> None:
    for method in ("GetDatabase", "ListFields"):
        front.refused[method] = (S.PERMISSION_DENIED, "The caller does not have permission")
    findings = await findings_of(client)
    unchecked = Verdict.UNCHECKED
    assert troubles(findings) == {"database": unchecked, "fields": unchecked}
    assert "roles/datastore.viewer" in findings["fields"].advice


@pytest.mark.long
async def test_a_database_that_does_not_answer_costs_one_deadline(firestore_emulator: str) -> None:
    async with (
        open_fault_proxy(firestore_emulator) as proxy,
        open_firestore(new_project(), "db", proxy.host) as client,
    ):
        await proxy.set_fault(Fault.DROP_REPLIES)
        began = trio.current_time()
        findings = await findings_of(client)
        assert trio.current_time() - began < CHECK_S + 5
    assert set(troubles(findings).values()) == {Verdict.FAIL}
    assert all("no answer" in finding.found for finding in findings.values())


# --- the command -----------------------------------------------------------------------------


def init(emulator: str, *arguments: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daemon", "init", *arguments],
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "FIRESTORE_EMULATOR_HOST": emulator,
            "WATCHKEEPER_STORE": "firestore",
            "WATCHKEEPER_FIRESTORE_PROJECT": "commands",
            "WATCHKEEPER_GROUP": directory.name[:30].lower().replace("_", "-"),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_init_makes_the_lease_and_tells_what_it_checked(
    firestore_emulator: str, tmp_path: Path
) -> None:
    first = init(firestore_emulator, directory=tmp_path)
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].endswith("is there: released, at epoch 0.")
    assert "ok          write: documents can be made, changed on conditions, and deleted" in lines
    assert "not checked rules: an emulator has none of its own" in lines
    again = json.loads(init(firestore_emulator, "--json", directory=tmp_path).stdout)
    assert (again["ok"], again["created"]) == (True, False)


def test_init_that_may_not_write_says_so_and_ends_with_1(front: Front, tmp_path: Path) -> None:
    front.refused["Commit"] = (S.PERMISSION_DENIED, "Missing or insufficient permissions.")
    refused = init(front.host, "--json", directory=tmp_path)
    assert refused.returncode == 1, refused.stderr
    told = json.loads(refused.stdout)
    assert (told["ok"], told["created"]) == (False, False)
    failed = [one["check"] for one in told["findings"] if one["verdict"] == "fail"]
    assert failed == ["lease", "write"]
