"""Documents in Firestore of the wrong shape: quarantined or refused, and not one byte overwritten.

A real daemon on a fresh disk, so that the damaged copy is the only one there is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from daemon.firestore.client import FirestoreClient, open_firestore
from daemon.firestore.documents import delete_write, encode, update_write
from daemon.firestore.layout import ACCOUNTS, PARTS, Layout
from daemon.firestore.lease import COLLECTION, FirestoreLeaseStore
from daemon.firestore.protos import Proto
from machine.ports import StoreMisconfigured
from tests.contracts.samples import acquire
from tests.emulator import new_project
from tests.seed import seed_accounts
from tests.system.cluster import Cluster, firestore_env
from tests.system.steps import ALONE, restored, statuses, wait_logged

pytestmark = [pytest.mark.system, pytest.mark.emulator]

GROUP = "default"
GONE = object()
"""In the place of a value: the field is not there."""

WRONG: tuple[tuple[str, Mapping[str, object]], ...] = (
    *((f"no {name}", {name: GONE}) for name in ("format", "name", "status", "epoch", "revision")),
    *((f"no {name}", {name: GONE}) for name in ("createdAt", "updatedAt", "since", "commitId")),
    ("no packed", {"packed": GONE}),
    ("no list of parts", {"parts": GONE}),
    ("a format of a later version", {"format": 99}),
    ("a format that is text", {"format": "1"}),
    ("a name that is a number", {"name": 7}),
    ("a phone that is a number", {"phone": 4915112345678}),
    ("a status that nobody knows", {"status": "asleep"}),
    ("a status that is a number", {"status": 1}),
    ("a moment that is text", {"since": "2025-01-31"}),
    ("a moment that is a number", {"createdAt": 1.5}),
    ("an error that is a flag", {"lastError": True}),
    ("an epoch that is text", {"epoch": "1"}),
    ("an epoch below zero", {"epoch": -1}),
    ("a revision that is a float", {"revision": 1.0}),
    ("a revision below zero", {"revision": -5}),
    ("a commit that is a number", {"commitId": 3}),
    ("packed as text", {"packed": "WKAP"}),
    ("packed and empty", {"packed": b""}),
    ("packed and nothing of ours", {"packed": b"\x00" * 400}),
    ("parts that are a list", {"parts": ["contacts-1"]}),
    ("a part that is not there", {"parts": {"contacts-1": 3, "nowhere": 5}}),
)
KNOWN_AT_ONCE = {"parts that are a list"}


@asynccontextmanager
async def opened(env: Mapping[str, str]) -> AsyncIterator[tuple[FirestoreClient, Layout]]:
    project, host = env["WATCHKEEPER_FIRESTORE_PROJECT"], env["FIRESTORE_EMULATOR_HOST"]
    async with open_firestore(project, "(default)", host) as client:
        yield client, Layout(client, GROUP)


def changing(name: Any, values: Mapping[str, object]) -> Proto:
    """A write of these fields alone; `GONE` deletes one."""
    write = update_write(name, {})
    for key, value in values.items():
        write.update_mask.field_paths.append(key)
        if value is not GONE:
            encode(write.update.fields[key], value)  # type: ignore[arg-type]
    return write


async def documents(client: FirestoreClient, layout: Layout) -> dict[str, Proto]:
    """Every account and part as it is, the moment of its last write included."""
    found: dict[str, Proto] = {}
    for account in await client.list_documents(layout.parent, ACCOUNTS):
        for document in [account, *await client.list_documents(account.name, PARTS)]:
            found[document.name] = document
    return found


def keys_in(document: Proto) -> dict[str, bytes]:
    """What a document holds beside the seal, which a new holder writes before it reads parts."""
    return {
        name: value.SerializeToString(deterministic=True)
        for name, value in document.fields.items()
        if name not in {"epoch", "commitId"}
    }


@pytest.fixture
def store_env(tmp_path: Path, firestore_emulator: str) -> dict[str, str]:
    return firestore_env(tmp_path, firestore_emulator)


@pytest.mark.long
async def test_an_account_of_the_wrong_shape_is_quarantined_and_left_as_it_is(
    cluster: Cluster,
) -> None:
    ids = await seed_accounts(cluster.env, len(WRONG) + 3, contacts=3)
    damaged = dict(zip(ids, WRONG, strict=False))
    whole = ids[len(WRONG) :]
    part_gone, part_text = whole.pop(), whole.pop()
    async with opened(cluster.env) as (client, layout):
        await client.commit(
            [changing(layout.account(each), values) for each, (_, values) in damaged.items()]
        )
        for each, values in ((part_gone, None), (part_text, {"packed": "text"})):
            (part, *_) = await client.list_documents(layout.account(each), PARTS)
            await client.commit(
                [delete_write(part.name) if values is None else changing(part.name, values)]
            )
        before = await documents(client, layout)
        node = await cluster.start("a", state="ACTIVE", **ALONE)
        report = await restored(cluster, node)
        status = await statuses(cluster, node)
        told = {each: what for each, (what, _) in damaged.items()}
        told |= {part_gone: "a part is gone", part_text: "a part is text"}
        answers = {told[each]: await cluster.send(node, each, "x") for each in told}
        assert await node.stop() == 0
        after = await documents(client, layout)
    codes = {what: answer.json().get("error") for what, answer in answers.items()}
    assert codes == dict.fromkeys(codes, "account_quarantined")
    assert {told[each]: status[each] for each in told} == dict.fromkeys(
        told.values(), "quarantined"
    )
    assert [status[each] for each in whole] == ["connected"]
    # Each with a sentence of its own in the report.
    assert {each["accountId"] for each in report["failures"]} == set(told)
    # What is wrong with the other parts is seen when the account is opened, after its seal.
    sealed = {each for each, what in told.items() if "part" in what and what not in KNOWN_AT_ONCE}
    assert len(sealed) == 4
    for name, document in before.items():
        if any(f"/{each}" in name for each in whole):
            continue
        assert keys_in(after[name]) == keys_in(document), name
        if not any(f"/{each}" in name for each in sealed):
            assert after[name] == document, name


LEASE_FIELDS = ("holder", "incarnation", "epoch", "nonce", "ttlMs", "state")
FENCE_FIELDS = ("epoch", "holder", "incarnation", "address", "state", "paused", "history")
IMPOSSIBLE = (
    ("lease", "epoch", -1),
    ("lease", "epoch", 2**63 - 1),
    ("lease", "ttlMs", -5000),
    ("lease", "state", "asleep"),
    ("fence", "epoch", 2**63 - 1),
    ("fence", "paused", "perhaps"),
)


@pytest.mark.parametrize(
    ("which", "field", "value"),
    [
        *(("lease", field, GONE) for field in LEASE_FIELDS),
        *(("fence", field, GONE) for field in FENCE_FIELDS),
        *IMPOSSIBLE,
    ],
    ids=str,
)
async def test_a_lease_of_the_wrong_shape_is_refused_and_left_as_it_is(
    firestore_emulator: str, which: str, field: str, value: object
) -> None:
    async with open_firestore(new_project(), emulator_host=firestore_emulator) as client:
        store = FirestoreLeaseStore(client, GROUP)
        await store.initialise()
        await acquire(store)
        name = client.document(COLLECTION, f"{GROUP}-{which}")
        await client.commit([changing(name, {field: value})])
        before = await client.get(name)
        with pytest.raises(StoreMisconfigured, match="not of our format"):
            await store.read()
        assert await client.get(name) == before


@pytest.mark.long
async def test_an_instance_whose_lease_means_nothing_waits_and_says_so(cluster: Cluster) -> None:
    await seed_accounts(cluster.env, 1)
    async with opened(cluster.env) as (client, _):
        name = client.document(COLLECTION, f"{GROUP}-lease")
        await client.commit([changing(name, {"ttlMs": -1, "state": "held"})])
        before = await client.get(name)
        node = await cluster.start("a", state="PASSIVE", **ALONE)
        await wait_logged(node, "lease could not be read: .*not of our format.*ttlMs")
        await trio.sleep(1)
        assert await cluster.answers(node, "/passive")
        assert await client.get(name) == before
        # Mended by hand, it goes on by itself.
        await client.commit([changing(name, {"ttlMs": 1000, "state": "released"})])
        await cluster.wait_state(node, "ACTIVE")
        assert await node.stop() == 0
