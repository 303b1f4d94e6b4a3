"""Whether a database has all that an instance will ask of it, and the command that mends what not.

What can be tried is tried: reads, conditional writes, the listener, every query, a stranger's
read. What only the Admin API knows is asked there. Changes nothing that was there: it writes
documents of its own and removes them. Never lives here: making the lease.
"""

from __future__ import annotations

import secrets
import shlex
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import grpc
import trio

from daemon.findings import Finding, fail, ok, unchecked, warn
from daemon.firestore import protos
from daemon.firestore.client import FirestoreClient
from daemon.firestore.documents import (
    DocumentName,
    check_group,
    delete_write,
    stamp_from,
    update_write,
    verify_write,
)
from daemon.firestore.errors import Forbidden, Refused, error_for
from daemon.firestore.layout import ACCOUNTS, ARCHIVE, INBOX, OUTBOX, PARTS, Layout
from daemon.firestore.lease import COLLECTION, fence_name
from daemon.firestore.protos import Proto
from daemon.firestore.queries import every_query
from machine.ports import StoreUnavailable

CHECK_S = 10.0
"""How long each check may take. They run beside each other, so all of them take no longer."""

EXEMPT = (
    *((collection, "packed") for collection in (ACCOUNTS, PARTS, ARCHIVE)),
    *((collection, "text") for collection in (OUTBOX, INBOX)),
)
"""Fields without an index: `deploy/firestore/firestore.indexes.json`."""

REMOVE_S = 2.0
"""How long taking our own documents away may take after that."""

OURS = frozenset({COLLECTION, ACCOUNTS, PARTS, ARCHIVE, OUTBOX, INBOX})
"""Our collection groups."""

API_OFF = "has not been used"
EMULATED = "an emulator has none of its own"

Check = Callable[[], Awaitable[list[Finding]]]


async def inspect(client: FirestoreClient, group: str, *, emulated: bool) -> tuple[Finding, ...]:
    """Do every check, in at most about `CHECK_S`; in a fixed order, one or more lines for each.

    With `emulated` what an emulator does not have is told as not checked.
    """
    inspection = _Inspection(client, group)
    checks: dict[str, Check] = {
        "read": inspection.check_reads,
        "write": inspection.check_writes,
        "listen": inspection.check_listener,
        **inspection.query_checks(),
    }
    behind = {
        "rules": inspection.check_rules,
        "database": inspection.check_database,
        "fields": inspection.check_fields,
    }
    if not emulated:
        checks |= behind
    found: dict[str, list[Finding]] = {}

    async def run(name: str, check: Check) -> None:
        found[name] = await _told(name, check, client)

    async with trio.open_nursery() as nursery:
        for name, check in checks.items():
            nursery.start_soon(run, name, check)
    findings = [finding for name in checks for finding in found[name]]
    if emulated:
        findings += [unchecked(name, EMULATED) for name in ("indexes", *behind)]
    return tuple(findings)


async def _told(name: str, check: Check, client: FirestoreClient) -> list[Finding]:
    """What a check found, also when it was refused or not answered."""
    try:
        with trio.fail_after(CHECK_S):
            return await check()
    except Forbidden as refused:
        advice = _Commands(client).against(refused)
        return [fail(name, f"{refused.status.name.lower()}: {refused.details}", advice)]
    except Refused as refused:
        return [fail(name, str(refused), "Report this: nobody else writes what was written here.")]
    except StoreUnavailable as error:
        return [fail(name, f"no answer: {error}", "Check the network, then ask again.")]
    except trio.TooSlowError:
        told = f"no answer within {CHECK_S:g} s"
        return [fail(name, told, "Check the network, then ask again.")]


class _Commands:
    """The commands that mend something, with this database's names."""

    def __init__(self, client: FirestoreClient) -> None:
        _, project, _, database = client.database.split("/")
        self._project = shlex.quote(project)
        self._database = f"--database={shlex.quote(database)} --project={self._project}"
        self._account = client.account or "ACCOUNT"

    def against(self, refused: Forbidden) -> str:
        """What to do about a refusal."""
        words = refused.details.lower()
        if API_OFF in words:
            return f"gcloud services enable firestore.googleapis.com --project={self._project}"
        if refused.status is grpc.StatusCode.PERMISSION_DENIED:
            return self.grant("roles/datastore.user")
        if "datastore mode" in words:
            return f"{self.create()} (a new database: this one's mode stays)"
        if refused.status is grpc.StatusCode.NOT_FOUND:
            return self.create()
        if "index" in words:
            return f"{self.deploy()} (an exemption of a field that is asked for by value must go)"
        if refused.status is grpc.StatusCode.UNAUTHENTICATED:
            return "gcloud auth application-default login, or a service account's credentials"
        return "Check WATCHKEEPER_FIRESTORE_PROJECT and WATCHKEEPER_FIRESTORE_DATABASE."

    def grant(self, role: str) -> str:
        return (
            f"gcloud projects add-iam-policy-binding {self._project} --role={role} "
            f"--member=serviceAccount:{self._account}"
        )

    def create(self) -> str:
        return (
            f"gcloud firestore databases create --location=REGION --type=firestore-native "
            f"{self._database}"
        )

    def deploy(self) -> str:
        return (
            "firebase deploy --only firestore --config deploy/firestore/firebase.json "
            f"--project {self._project}"
        )

    def update(self, what: str) -> str:
        return f"gcloud firestore databases update {what} {self._database}"

    def exempt(self, collection: str, field: str) -> str:
        return (
            f"gcloud firestore indexes fields update {field} --collection-group={collection} "
            f"--disable-indexes {self._database}"
        )

    def never_expire(self, collection: str, field: str) -> str:
        return (
            f"gcloud firestore fields ttls update {shlex.quote(field)} "
            f"--collection-group={collection} --disable-ttl {self._database}"
        )


@dataclass(frozen=True, slots=True)
class _Inspection:
    """The checks of one database, for one group."""

    client: FirestoreClient
    group: str

    @property
    def _commands(self) -> _Commands:
        return _Commands(self.client)

    def _probe(self) -> DocumentName:
        """A document that nobody has, where the lease is."""
        name = f"{check_group(self.group)}-check-{secrets.token_hex(8)}"
        return self.client.document(COLLECTION, name)

    async def check_reads(self) -> list[Finding]:
        await self.client.batch_get([fence_name(self.client, self.group)])
        return [ok("read", "documents can be read")]

    async def check_writes(self) -> list[Finding]:
        """What a lease stands on: writes on conditions, and none of them when one fails."""
        probe, other = self._probe(), self._probe()
        try:
            made = await self.client.commit([update_write(probe, {"tries": 1}, exists=False)])
            old = stamp_from(made.write_results[0].update_time)
            await self.client.commit([update_write(probe, {"tries": 2}, stamp=old)])
            try:
                await self.client.commit(
                    [update_write(other, {"tries": 1}, exists=False), verify_write(probe, old)]
                )
            except Refused:
                return [ok("write", "documents can be made, changed on conditions, and deleted")]
            return [
                fail(
                    "write",
                    "a write was accepted although its condition did not hold",
                    "This is no Firestore that a lease can stand on. Use another.",
                )
            ]
        finally:
            with trio.move_on_after(REMOVE_S, shield=True):
                await self._remove(probe, other)

    async def _remove(self, *names: DocumentName) -> None:
        try:
            await self.client.commit([delete_write(name) for name in names])
        except (Refused, StoreUnavailable):
            # The check itself has failed with the same, or says that it did what it should; a
            # document that stays is asked for by nobody.
            return

    async def check_listener(self) -> list[Finding]:
        request = protos.ListenRequest(database=self.client.database)
        request.add_target.target_id = 1
        request.add_target.documents.documents.append(fence_name(self.client, self.group))
        try:
            async with self.client.open_listen(request) as stream:
                while batch := await stream.next_batch():
                    for message in batch:
                        change = message.target_change
                        if change.target_change_type == type(change).CURRENT:
                            return [ok("listen", "changes of the lease are told")]
        except grpc.RpcError as error:
            raise error_for("Listen", error.code(), error.details() or "") from None
        raise StoreUnavailable("the server ended the stream", code="ended")

    def query_checks(self) -> dict[str, Check]:
        """A check for each query that an instance makes: whether there is an index for it."""

        def check_of(name: str, request: Proto) -> Check:
            async def check() -> list[Finding]:
                # One document is enough to see that the query can be answered.
                request.structured_query.limit.value = 1
                await self.client.run_query(request, lambda documents: None)
                return [ok(name, "answered")]

            return check

        queries = every_query(Layout(self.client, self.group))
        return {
            f"query: {what}": check_of(f"query: {what}", query) for what, query in queries.items()
        }

    async def check_rules(self) -> list[Finding]:
        """The lease, asked for without credentials, as a browser or a phone would."""
        mend = self._commands.deploy()
        try:
            await self.client.get_as_stranger(fence_name(self.client, self.group))
        except Forbidden as refused:
            if refused.status in (
                grpc.StatusCode.PERMISSION_DENIED,
                grpc.StatusCode.UNAUTHENTICATED,
            ):
                return [ok("rules", "who has no credentials is refused")]
            raise
        except Refused:
            # Let in, and nothing is there yet.
            pass
        return [fail("rules", "anybody may read the lease, without credentials", mend)]

    async def check_database(self) -> list[Finding]:
        from daemon.firestore import admin

        try:
            database = await admin.get_database(self.client)
        except Forbidden as refused:
            return [self._may_not_look("database", refused)]
        return list(self._judge_database(database))

    def _judge_database(self, database: Proto) -> Iterator[Finding]:
        kinds, commands = type(database), self._commands
        where = f"in {database.location_id}"
        if database.type_ != kinds.FIRESTORE_NATIVE:
            made = f"{commands.create()} (a new database: this one's mode stays)"
            yield fail("database", f"not in Native mode, {where}", made)
        elif database.database_edition == kinds.ENTERPRISE:
            made = f"{commands.create()} --edition=standard"
            yield warn("database", f"Enterprise edition, {where}: never tried", made)
        else:
            yield ok("database", f"Native mode, Standard edition, {where}")
        if database.point_in_time_recovery_enablement != kinds.POINT_IN_TIME_RECOVERY_ENABLED:
            mend = commands.update("--enable-pitr")
            yield warn("recovery", "point-in-time recovery is off", mend)
        else:
            yield ok("recovery", "point-in-time recovery is on")
        if database.delete_protection_state != kinds.DELETE_PROTECTION_ENABLED:
            mend = commands.update("--delete-protection")
            yield warn("protection", "one command deletes the whole database", mend)
        else:
            yield ok("protection", "the database is protected from deletion")

    async def check_fields(self) -> list[Finding]:
        from daemon.firestore import admin

        try:
            fields = await admin.list_set_fields(self.client)
        except Forbidden as refused:
            return [self._may_not_look("fields", refused)]
        return [*self._judge_expiry(fields), *self._judge_exemptions(fields)]

    def _judge_expiry(self, fields: list[Proto]) -> Iterator[Finding]:
        expiring = [
            names for field in fields if field.HasField("ttl_config") for names in _names_of(field)
        ]
        for collection, name in expiring:
            mend = self._commands.never_expire(collection, name)
            if collection == COLLECTION:
                said = f"{collection}/ has a TTL policy ({name}): the lease would be deleted"
                yield fail("time to live", said, mend)
            elif collection in OURS:
                said = f"collections {collection} have a TTL policy ({name}); ours want none"
                yield warn("time to live", said, mend)
        if not {collection for collection, _ in expiring} & OURS:
            yield ok("time to live", "no TTL policy on what is ours")

    def _judge_exemptions(self, fields: list[Proto]) -> Iterator[Finding]:
        exempt = {
            names
            for field in fields
            if field.HasField("index_config")
            and not (field.index_config.uses_ancestor_config or field.index_config.indexes)
            for names in _names_of(field)
        }
        missing = [names for names in EXEMPT if names not in exempt]
        for collection, name in missing:
            said = f"{collection}.{name} is indexed: each write pays for what nobody asks for"
            yield warn("exemptions", said, self._commands.exempt(collection, name))
        if not missing:
            yield ok("exemptions", "packed keys and texts are not indexed")

    def _may_not_look(self, check: str, refused: Forbidden) -> Finding:
        return unchecked(
            check,
            f"{refused.status.name.lower()}: {refused.details}",
            f"Ask as somebody who may: {self._commands.grant('roles/datastore.viewer')}",
        )


def _names_of(field: Proto) -> Iterator[tuple[str, str]]:
    """The collection group and the field that a setting is for; nothing for the defaults' own."""
    # projects/…/databases/…/collectionGroups/{collection}/fields/{field}
    parts = field.name.split("/", 7)
    if len(parts) == 8 and parts[5] != "__default__":
        yield parts[5], parts[7].strip("`")
