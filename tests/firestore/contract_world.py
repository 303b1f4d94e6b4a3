"""The Firestore emulator as a world for the contract suite (`tests/contracts/worlds.py`)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from daemon.firestore.accounts import FirestoreAccountStore
from daemon.firestore.client import Line, open_firestore
from daemon.firestore.documents import FieldValue, delete_write, update_write
from daemon.firestore.inbox import FirestoreInboxStore
from daemon.firestore.layout import Layout
from daemon.firestore.lease import COLLECTION, FirestoreLeaseStore
from daemon.firestore.outbox import FirestoreOutboxStore
from machine.ports import StoreUnavailable
from machine.records import AccountId, MessageId
from tests.contracts.samples import an_inbound
from tests.contracts.worlds import Document, Record, SharedWorld
from tests.emulator import new_project
from tests.fault_proxy import Fault, open_fault_proxy
from tests.upgrades.documents import read_documents

GROUP = "contract"


@asynccontextmanager
async def open_firestore_world(host: str) -> AsyncIterator[SharedWorld]:
    """An empty project of the emulator at `host`, behind a proxy that can lose replies."""
    project = new_project()
    async with (
        open_fault_proxy(host) as proxy,
        open_firestore(project, emulator_host=proxy.host) as client,
        open_firestore(project, emulator_host=host) as direct,
    ):
        layout = Layout(direct, GROUP)

        async def delete_document(which: Document) -> None:
            await direct.commit([delete_write(direct.document(COLLECTION, f"{GROUP}-{which}"))])

        async def damage_account(account_id: AccountId) -> None:
            await direct.commit([update_write(layout.account(account_id), {"status": 7})])

        async def make_newer(record: Record, name: str) -> None:
            values: dict[str, FieldValue] = {"format": 2}
            if record in ("lease", "fence"):
                document = direct.document(COLLECTION, f"{GROUP}-{record}")
            elif record == "account":
                document = layout.account(AccountId(name))
                # Its version is somewhere else now, for all we know.
                values |= {"epoch": "2.5", "revision": None}
            elif record == "message":
                document = layout.message(MessageId(name))
            else:
                document = layout.inbound(an_inbound(name))
            await direct.commit([update_write(document, values)])

        async def dump() -> object:
            found = await read_documents(project, host, GROUP)
            return [document.SerializeToString(deterministic=True) for document in found]

        @asynccontextmanager
        async def lost_replies() -> AsyncIterator[None]:
            # Only over a connection that stands already can a request still get through.
            for line in (Line.HEARTBEAT, Line.DATA):
                await client.get(client.document(COLLECTION, "nothing"), line=line)
            await proxy.set_fault(Fault.LOSE_REPLIES)
            try:
                yield
            finally:
                await proxy.set_fault(Fault.PASS)
                # It has cut the connections; the first call may still meet one that is ending.
                for line in (Line.HEARTBEAT, Line.DATA):
                    with trio.fail_after(5.0):
                        await reach(line)

        async def reach(line: Line) -> None:
            while True:
                try:
                    await client.get(client.document(COLLECTION, "nothing"), line=line)
                    return
                except StoreUnavailable:
                    await trio.sleep(0.05)

        yield SharedWorld(
            lease=FirestoreLeaseStore(client, GROUP),
            accounts=FirestoreAccountStore(client, GROUP),
            outbox=FirestoreOutboxStore(client, GROUP),
            inbox=FirestoreInboxStore(client, GROUP),
            age_lease=trio.sleep,
            delete_document=delete_document,
            damage_account=damage_account,
            make_newer=make_newer,
            dump=dump,
            lost_replies=lost_replies,
        )
