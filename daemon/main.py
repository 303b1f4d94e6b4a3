"""The composition root: settings in, a running instance out. The one place that knows every part.

Never lives here: a decision. What becomes of the lease and the accounts is `machine`'s.
"""

from __future__ import annotations

import gc
import math
import os
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, TypeAlias

import trio
from msgspec import UNSET

import daemon
from daemon.auth_codec import EncryptionKey, Keyring, PackedAuthCodec
from daemon.baileys_import import LegacyDirectories
from daemon.bridge.connector import BaileysConnector, BridgeLimits, open_baileys
from daemon.bridge.events import BRIDGE_EVENTS
from daemon.bridge.frames import Options
from daemon.bridge.install import (
    NODE_MAJOR_GOOD,
    PROGRAM,
    SOURCES,
    BridgeUnusable,
    check_install,
    find_node,
)
from daemon.bridge.process import ProcessPlan
from daemon.crash_release import firestore_store, sqlite_store
from daemon.guard import PipeGuard
from daemon.http.app import serve_api, serve_metrics
from daemon.http.auth import Tokens
from daemon.http.documented import WITH_BODY, errors
from daemon.http.errors import ErrorCode
from daemon.http.events import HTTP_EVENTS
from daemon.http.ports import ApiSettings
from daemon.http.server import BindFailed, Listening, bind_http, raise_files_limit
from daemon.initialise import SHARED_FILE
from daemon.journal import LoguruJournal, open_journal
from daemon.loopback.connector import LoopbackConnector
from daemon.loopback.routes import loopback_router
from daemon.loopback.world import LoopbackWorld
from daemon.notify import Notifier, keep_notified
from daemon.reload import RELOAD_EVENTS, Reloader
from daemon.settings import ConnectorKind, Settings, StoreKind
from daemon.sqlite.local import StateDirInUse, open_local
from daemon.warden import boottime
from machine.events import EVENTS, EventKind
from machine.instance import Instance
from machine.outbox import make_message_id
from machine.ports import (
    AccountStore,
    Connector,
    Guard,
    InboxStore,
    LeaseStore,
    Level,
    LocalStore,
    OutboxStore,
    Ports,
    StoreMisconfigured,
    StoreUnavailable,
    Unguarded,
)
from machine.records import AccountStatus, Identity

if TYPE_CHECKING:
    from fastapi import APIRouter

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_SETTINGS = 2

DAEMON_EVENTS = {
    "instance.refused": EventKind(Level.ERROR, "not started: {error}"),
    "store.troubled": EventKind(Level.WARNING, "{sentence}"),
    **RELOAD_EVENTS,
    **BRIDGE_EVENTS,
}
"""What the composition root tells, and the connectors that it opens."""

CONNECT_MS = 20_000
DEVICE = ("Ubuntu", "Chrome", "22.04.4")
"""What the phone lists an account's device as; pairing codes are given to known browsers only."""
BRIDGE_SILENT_S_MIN = 2.0
"""With a ttl so short that less would be left, a busy moment of the daemon's must not end them."""
BRIDGE_ACCOUNTS_MAX = 200
BRIDGE_ACCOUNTS_MAX_OLD_NODE = 50


LOOPBACK_ERRORS = (
    ErrorCode.NOT_AWAITING_SCAN,
    ErrorCode.ACCOUNT_NOT_PAIRED,
    ErrorCode.OUTBOX_FULL,
    ErrorCode.STORE_UNAVAILABLE,
    *WITH_BODY,
)
"""What the loopback world's routes can be answered, besides what every route can."""


class HostClocks:
    """The host's own clocks."""

    def wall(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def boottime(self) -> float:
        """Seconds since boot, suspend included."""
        return boottime()


@dataclass(frozen=True, slots=True)
class SharedStores:
    """The shared store, as its ports."""

    lease: LeaseStore
    accounts: AccountStore
    outbox: OutboxStore
    inbox: InboxStore


@asynccontextmanager
async def open_shared(settings: Settings, journal: LoguruJournal) -> AsyncIterator[SharedStores]:
    """Open the configured shared store. Raises `StoreMisconfigured`, `StoreUnavailable`."""
    if settings.store is StoreKind.SQLITE:
        from daemon.sqlite.shared import open_sqlite_shared

        path = settings.shared_dir / SHARED_FILE
        await trio.to_thread.run_sync(_make_private_dir, settings.shared_dir)
        fresh = not path.exists()
        async with open_sqlite_shared(path) as store:
            if fresh:
                # Embedded mode on a fresh directory: there is nobody else who could have an epoch.
                await store.initialise()
            yield SharedStores(store, store, store, store)
        return
    from daemon.firestore.accounts import FirestoreAccountStore
    from daemon.firestore.client import open_firestore
    from daemon.firestore.inbox import FirestoreInboxStore
    from daemon.firestore.lease import FirestoreLeaseStore
    from daemon.firestore.outbox import FirestoreOutboxStore

    def note_trouble(sentence: str) -> None:
        journal.note("store.troubled", sentence=sentence)

    async with open_firestore(
        settings.firestore_project or "",
        settings.firestore_database,
        settings.firestore_emulator_host,
    ) as client:
        journal.metrics.watch_labelled(
            "store_operations",
            "Firestore operations, as they are billed.",
            "kind",
            lambda: {kind: float(n) for kind, n in asdict(client.operations).items()},
        )
        lease = FirestoreLeaseStore(client, settings.group, note_trouble=note_trouble)
        journal.metrics.watch_count(
            "fence_listener_restarts",
            "How often the listener of the fence had to open its stream again.",
            lambda: float(lease.listen_restarts),
        )
        yield SharedStores(
            lease,
            FirestoreAccountStore(client, settings.group),
            FirestoreOutboxStore(client, settings.group, note_trouble=note_trouble),
            FirestoreInboxStore(client, settings.group, note_trouble=note_trouble),
        )


OpenStores: TypeAlias = Callable[
    [Settings, LoguruJournal], AbstractAsyncContextManager[SharedStores]
]
"""What `open_shared` is; the benches have one that answers late."""


def _make_private_dir(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the settings choose: how accounts connect, and the routes that come with it."""

    connector: Connector
    routers: tuple[APIRouter, ...]


@asynccontextmanager
async def open_connector(settings: Settings, journal: LoguruJournal) -> AsyncIterator[Parts]:
    """Make the configured connector. Raises `BridgeUnusable`."""
    clocks = HostClocks()
    if settings.connector is ConnectorKind.BAILEYS:
        async with _open_baileys(settings, journal, clocks) as connector:
            yield Parts(connector, ())
        return
    world = LoopbackWorld(settings.loopback_dir, clocks=clocks)
    try:
        yield Parts(
            LoopbackConnector(settings.loopback_dir, clocks=clocks),
            (loopback_router(world, errors(*LOOPBACK_ERRORS)),),
        )
    finally:
        world.close()


@asynccontextmanager
async def _open_baileys(
    settings: Settings, journal: LoguruJournal, clocks: HostClocks
) -> AsyncIterator[BaileysConnector]:
    """Open the real connector, a bridge process on its way. Raises `BridgeUnusable`."""
    directory = settings.bridge_dir or SOURCES
    node = await trio.to_thread.run_sync(find_node, settings.node)
    await trio.to_thread.run_sync(check_install, directory)
    old = node.major < NODE_MAJOR_GOOD
    limits = BridgeLimits(
        accounts_max=settings.bridge_accounts_max
        or (BRIDGE_ACCOUNTS_MAX_OLD_NODE if old else BRIDGE_ACCOUNTS_MAX),
        deaths_max=settings.bridge_deaths_max,
        deaths_within_s=settings.bridge_deaths_within_s,
        spare_after_s=settings.drain_linger_s + 1,
    )
    if old:
        journal.note(
            "bridge.node_old",
            node=node.version,
            better=NODE_MAJOR_GOOD,
            accounts_max=limits.accounts_max,
        )
    plan = ProcessPlan(
        (node.path, str(directory.absolute() / PROGRAM)),
        make_bridge_options(settings),
        ping_every_s=min(settings.bridge_ping_s / 2, bridge_silent_s(settings) / 3),
        ping_s=settings.bridge_ping_s,
    )
    async with open_baileys(
        plan, limits, journal=journal, clocks=clocks, rng=SystemRandom()
    ) as connector:
        watch = journal.metrics.watch
        watch("bridge_processes", "Bridge processes.", lambda: connector.process_count)
        watch("bridge_started", "Bridge processes started so far.", lambda: connector.started)
        watch("bridge_connections", "Accounts in them.", lambda: connector.connection_count)
        watch("bridge_resident_bytes", "Their memory.", lambda: connector.rss_bytes)
        yield connector


def make_bridge_options(settings: Settings) -> Options:
    """What all connections of a bridge process have in common, from the settings."""
    return Options(
        browser=DEVICE,
        # Baileys' own log is for those who ask for everything.
        log_level="debug" if settings.log_level is Level.DEBUG else "warning",
        connect_timeout_ms=CONNECT_MS,
        url=settings.whatsapp_url or UNSET,
        url_insecure=True if settings.whatsapp_url_insecure else UNSET,
        silent_ms=math.ceil(bridge_silent_s(settings) * 1000),
    )


def bridge_silent_s(settings: Settings) -> float:
    """How long a bridge process goes on without a word from its daemon.

    A daemon that hangs has renewed its lease a whole interval before its last word, at worst; what
    is left of the ttl then, less the margin, is over before anybody else may take the lease.
    """
    left_s = settings.lease_ttl_s - settings.lease_renew_s - settings.lease_margin_s
    return max(left_s, BRIDGE_SILENT_S_MIN)


def make_codec(settings: Settings) -> PackedAuthCodec:
    """The codec under the configured encryption keys; without a key it writes plain parts."""
    active = settings.encryption_key_bytes()
    if active is None:
        return PackedAuthCodec(None)
    older = tuple(EncryptionKey(key) for key in settings.encryption_keys_old_bytes())
    return PackedAuthCodec(Keyring(EncryptionKey(active), older))


def make_api_settings(settings: Settings, tokens: Tokens) -> ApiSettings:
    """The API's numbers, from the settings. Raises `ValueError` when they contradict."""
    return ApiSettings(
        tokens=tokens,
        version=daemon.__version__,
        bind=settings.http_bind,
        handoff_wait_s=settings.handoff_wait_s,
        send_wait_s=settings.send_wait_s,
        body_bytes_max=settings.http_body_bytes_max,
        connections_max=settings.http_connections_max,
        forward_connections_max=settings.forward_connections_max,
        # Who waits here for the next holder is answered before this instance ends; whom a holder
        # does not answer is told so in time (`daemon.http.closing`).
        stop_s=settings.handoff_wait_s + 1,
    )


def make_guard(settings: Settings, told: int | None) -> Guard:
    """Tell the warden on the file descriptor `told`; with `None` there is none.

    Raises `StoreMisconfigured`.
    """
    if told is None:
        return Unguarded()
    if settings.store is StoreKind.SQLITE:
        store = sqlite_store(settings.shared_dir / SHARED_FILE)
    else:
        store = firestore_store(
            settings.firestore_project or "",
            settings.firestore_database,
            settings.firestore_emulator_host,
            settings.group,
        )
    try:
        return PipeGuard(
            told,
            instance=settings.instance_name,
            json_lines=settings.log_format == "json",
            lease=store,
        )
    except ValueError as error:
        raise StoreMisconfigured(str(error)) from error


async def serve(
    settings: Settings, told: int | None = None, *, open_stores: OpenStores = open_shared
) -> int:
    """Run one instance until it is asked to end; the process's exit code.

    `told` is where its warden listens, if it has one. `open_stores` opens the shared store.
    SIGTERM and SIGINT ask for a drain; a second one of either ends the process at once. SIGHUP
    reads the settings again.
    """
    given = [*settings.admin_tokens()]
    for secret in (settings.encryption_key, settings.encryption_keys_old):
        if secret is not None:
            given.extend(secret.get_secret_value().split())
    with open_journal(
        settings.instance_name,
        json_lines=settings.log_format == "json",
        level=settings.log_level,
        secrets=given,
        events={**EVENTS, **HTTP_EVENTS, **DAEMON_EVENTS},
    ) as journal:
        journal.metrics.introduce(settings.instance_name, settings.group, daemon.__version__)
        code = EXIT_OK
        try:
            await _serve(settings, journal, told, open_stores)
        except* (StoreMisconfigured, StateDirInUse, BindFailed, BridgeUnusable) as refused:
            code = EXIT_SETTINGS
            _tell(journal, refused)
        except* StoreUnavailable as away:
            code = EXIT_FAILED
            _tell(journal, away)
        return code


def _tell(journal: LoguruJournal, errors: BaseExceptionGroup[BaseException]) -> None:
    """One line for each thing that kept the instance from starting, or from going on."""
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            _tell(journal, error)
        else:
            journal.note("instance.refused", error=str(error))


async def _serve(
    settings: Settings, journal: LoguruJournal, told: int | None, open_stores: OpenStores
) -> None:
    raise_files_limit()
    guard = make_guard(settings, told)
    # What the imports made lives as long as the process. Left in the collector's view, every
    # collection walks it, and a drain of 1,000 accounts spends a fifth of its time there.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    # The port is bound first: the address that others are told must be the one that answers.
    listening = bind_http(settings.http_bind)
    try:
        identity = Identity(
            settings.instance_name, secrets.token_hex(8), settings.address(listening.port)
        )
        await trio.to_thread.run_sync(_make_private_dir, settings.state_dir)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with (
                open_local(settings.state_dir) as local,
                open_stores(settings, journal) as shared,
                open_connector(settings, journal) as parts,
            ):
                ports = _make_ports(settings, journal, local, shared, parts.connector, guard)
                instance = Instance(
                    identity,
                    ports=ports,
                    timing=settings.lease_timing(),
                    limits=settings.limits(),
                    durability=settings.durability,
                )
                _watch_instance(journal, instance)
                await _run(settings, journal, instance, parts, listening, signals)
    finally:
        listening.close()


def _make_ports(
    settings: Settings,
    journal: LoguruJournal,
    local: LocalStore,
    shared: SharedStores,
    connector: Connector,
    guard: Guard,
) -> Ports:
    return Ports(
        lease=shared.lease,
        accounts=shared.accounts,
        outbox=shared.outbox,
        inbox=shared.inbox,
        local=local,
        codec=make_codec(settings),
        connector=connector,
        legacy=LegacyDirectories(settings.legacy_sessions_dir),
        journal=journal,
        clocks=HostClocks(),
        rng=SystemRandom(),
        guard=guard,
    )


def _count_accounts(instance: Instance) -> dict[str, float]:
    """How many accounts in memory have which status."""
    counts = dict.fromkeys((status.value for status in AccountStatus), 0.0)
    if instance.term is not None:
        for session in instance.term.sessions.values():
            counts[session.status.value] += 1
    return counts


def _oldest_s(instance: Instance) -> float:
    """How long the oldest pending message has waited; 0 without one."""
    oldest_at = instance.term.desk.outbox_oldest_at if instance.term is not None else None
    return 0.0 if oldest_at is None else max(0.0, time.time() - oldest_at)


def _phases(instance: Instance) -> dict[str, float]:
    """The phases of the newest restore, as its report names them."""
    report = instance.restore_report
    return {} if report is None else dict(report.durations)


def _watch_instance(journal: LoguruJournal, instance: Instance) -> None:
    """Gauges that are read from the machine at each scrape."""

    def remaining_s() -> float:
        status = instance.lease_status
        return (status.remaining_s or 0.0) if status is not None else 0.0

    def depth() -> float:
        return float(instance.term.desk.outbox_depth) if instance.term is not None else 0.0

    watch = journal.metrics.watch
    journal.metrics.watch_labelled(
        "accounts", "Accounts in memory.", "status", partial(_count_accounts, instance)
    )
    watch(
        "client_refused",
        "1 while WhatsApp refuses this client's version in this term.",
        lambda: float(instance.term is not None and instance.term.client_refused is not None),
    )
    watch("lease_remaining_seconds", "Until the lease ends if not renewed.", remaining_s)
    watch("outbox_messages", "Messages accepted and not yet acknowledged.", depth)
    watch(
        "outbox_oldest_seconds",
        "How long the message that waits longest has waited, since it was accepted.",
        partial(_oldest_s, instance),
    )
    journal.metrics.watch_labelled(
        "restore_phase_seconds",
        "How long each phase of the last restore took.",
        "phase",
        partial(_phases, instance),
    )


async def _run(
    settings: Settings,
    journal: LoguruJournal,
    instance: Instance,
    parts: Parts,
    listening: Listening,
    signals: AsyncIterator[int],
) -> None:
    """The API around the machine: it answers before the first state and after the last."""
    shutdown = trio.Event()
    tokens = Tokens(settings.admin_tokens())
    api_settings = make_api_settings(settings, tokens)

    async def serve_http(task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        await serve_api(
            instance,
            api_settings,
            make_message_id=make_message_id,
            listening=listening,
            routers=parts.routers,
            render_metrics=journal.metrics.render,
            note=journal.note,
            shutdown=shutdown,
            task_status=task_status,
        )

    async def serve_metrics_http(metrics_listening: Listening) -> None:
        await serve_metrics(
            api_settings,
            journal.metrics.render,
            listening=metrics_listening,
            note=journal.note,
            shutdown=shutdown,
        )

    with closing(Notifier()) as notifier:
        async with trio.open_nursery() as nursery:
            reloader = Reloader(settings, journal=journal, tokens=tokens)
            nursery.start_soon(_heed_signals, signals, instance, reloader)
            nursery.start_soon(
                keep_notified, instance, notifier, partial(_count_accounts, instance)
            )
            async with trio.open_nursery() as api:
                await api.start(serve_http)
                if settings.metrics_bind is not None:
                    api.start_soon(serve_metrics_http, bind_http(settings.metrics_bind))
                await instance.run()
                # The API ends by itself once what is in flight is answered.
                shutdown.set()
            nursery.cancel_scope.cancel()


async def _heed_signals(
    signals: AsyncIterator[int], instance: Instance, reloader: Reloader
) -> None:
    """Ask for a drain at the first signal; a second one ends the process at once.

    SIGHUP reads the settings again instead.
    """
    asked = False
    async for number in signals:
        if number == signal.SIGHUP:
            await reloader.reload()
            continue
        if asked:
            os._exit(128 + number)
        asked = True
        instance.request_drain(signal.Signals(number).name)
