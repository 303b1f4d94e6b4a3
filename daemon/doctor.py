"""Looks for what would keep an instance from running well, and says what to do about each.

It changes nothing that was there, and starts nothing. Never lives here: what the settings refuse by
themselves (`daemon.settings`), though it is reported here too.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import trio

from daemon.bridge.install import (
    NODE_MAJOR_GOOD,
    SOURCES,
    BridgeUnusable,
    check_install,
    find_node,
)
from daemon.findings import Finding, fail, ok, warn
from daemon.initialise import SHARED_FILE, STORE_S, inspect_store, open_lease_store
from daemon.settings import (
    SECRET_FIELDS,
    ConnectorKind,
    Loaded,
    Settings,
    StoreKind,
    parse_bind,
    serving_problems,
)
from machine.ports import LeaseMissing, StoreMisconfigured, StoreUnavailable

FREE_BYTES_MIN = 256 * 1024 * 1024
FILES_SPARE = 200


async def examine(loaded: Loaded) -> tuple[Finding, ...]:
    """Do every check, one after the other. Takes at most about half a minute."""
    settings = loaded.settings
    findings = [*check_settings(loaded)]
    checks: tuple[Callable[[Settings], Iterable[Finding]], ...] = (
        check_secrets,
        check_directories,
        check_clocks,
        check_files_limit,
        check_port,
        check_node,
        check_baileys,
    )
    for check in checks:
        # They touch the disk and other programs: a thread, so that Ctrl+C ends the command.
        findings += await trio.to_thread.run_sync(_run_check, check, settings)
    return (*findings, await check_store(settings), *await inspect_store(settings))


def _run_check(
    check: Callable[[Settings], Iterable[Finding]], settings: Settings
) -> tuple[Finding, ...]:
    return tuple(check(settings))


def check_settings(loaded: Loaded) -> Iterator[Finding]:
    """What would be refused at the start of an instance, and what is merely doubtful."""
    problems = serving_problems(loaded.settings)
    for problem in problems:
        yield fail("settings", problem, "Set it, then ask again.")
    for warning in loaded.warnings:
        yield warn("settings", warning, "See docs/settings.md.")
    if not problems:
        yield ok("settings", "complete, and free of contradictions")
    if loaded.settings.firestore_emulator_host:
        yield warn(
            "settings",
            f"FIRESTORE_EMULATOR_HOST is {loaded.settings.firestore_emulator_host}",
            "An emulator forgets everything when it ends; unset it to use the real Firestore.",
        )


def check_secrets(settings: Settings) -> Iterator[Finding]:
    """Secret files are readable by us and by nobody else."""
    for field in SECRET_FIELDS:
        path: Path | None = getattr(settings, f"{field}_file")
        if path is None:
            continue
        mode = path.stat().st_mode & 0o777
        if mode & 0o077:
            yield warn(
                "secrets", f"{path} has mode {mode:04o}: others can read it", f"chmod 600 {path}"
            )
        else:
            yield ok("secrets", f"{path} has mode {mode:04o}")
    if settings.encryption_key is not None:
        yield ok("encryption key", "valid: 32 bytes")


def check_directories(settings: Settings) -> Iterator[Finding]:
    """The directories can be written, are private, and have room."""
    named = [("state directory", settings.state_dir)]
    if settings.store is StoreKind.SQLITE:
        named.append(("shared directory", settings.shared_dir))
    for check, path in named:
        nearest = path
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not nearest.is_dir():
            yield fail(check, f"{nearest} is not a directory", "Move it away, or set another.")
        elif not os.access(nearest, os.W_OK | os.X_OK):
            yield fail(
                check,
                f"{nearest} cannot be written by this user",
                f"chown it to the user who runs the daemon (uid {os.getuid()}), or set another.",
            )
        elif shutil.disk_usage(nearest).free < FREE_BYTES_MIN:
            free = shutil.disk_usage(nearest).free // (1024 * 1024)
            yield warn(check, f"{nearest} has {free} MiB left", "Make room before it is full.")
        elif nearest == path and path.stat().st_mode & 0o077:
            mode = path.stat().st_mode & 0o777
            yield warn(check, f"{path} has mode {mode:04o}", f"chmod 700 {path}")
        else:
            made = "" if nearest == path else " (made at the first start)"
            yield ok(check, f"{path} can be written{made}")


def check_clocks(settings: Settings) -> Iterator[Finding]:
    """The clock that the lease counts on exists, and has counted all the time."""
    try:
        boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (AttributeError, OSError):
        yield fail("clock", "this system has no CLOCK_BOOTTIME", "Run on Linux.")
        return
    # Monotonic time stands still while a host is suspended; a lease must not.
    suspended_s = boot - time.clock_gettime(time.CLOCK_MONOTONIC)
    if suspended_s > 1:
        yield warn(
            "clock",
            f"this host has been suspended for {suspended_s:.0f} s since it booted",
            "A suspended holder loses its lease (safely). Servers should not suspend.",
        )
    else:
        yield ok("clock", "boot time and monotonic time agree")


def check_files_limit(settings: Settings) -> Iterator[Finding]:
    """Enough open files are allowed for the connections that are."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    needed = settings.http_connections_max + settings.forward_connections_max + FILES_SPARE
    if hard != resource.RLIM_INFINITY and hard < needed:
        yield warn(
            "open files",
            f"{hard} are allowed, {needed} may be needed",
            "Raise LimitNOFILE (systemd) or `ulimit -Hn`, or lower "
            "WATCHKEEPER_HTTP_CONNECTIONS_MAX.",
        )
    else:
        yield ok("open files", f"{needed} may be needed and are allowed")


def check_port(settings: Settings) -> Iterator[Finding]:
    """The addresses to listen on are there and free."""
    for check, bind in (("port", settings.http_bind), ("metrics port", settings.metrics_bind)):
        if bind is None:
            continue
        host, port = parse_bind(bind)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                yield warn(
                    check,
                    f"{bind} is taken",
                    "Fine if it is this very instance that runs; else choose another port.",
                )
            else:
                yield fail(
                    check,
                    f"{bind} cannot be listened on: {error.strerror or error}",
                    "Choose an address of this host and a port above 1023.",
                )
        else:
            yield ok(check, f"{bind} is free")


def check_node(settings: Settings) -> Iterator[Finding]:
    """Node.js is there and new enough, where the connector needs it."""
    if settings.connector is not ConnectorKind.BAILEYS:
        return
    try:
        node = find_node(settings.node)
    except BridgeUnusable as error:
        yield fail("node", *_cause_and_advice(error))
        return
    if node.major < NODE_MAJOR_GOOD:
        yield warn(
            "node",
            f"{node.path} is version {node.version}",
            f"It works. With many accounts Node.js {NODE_MAJOR_GOOD} takes a fraction of the "
            "processor time.",
        )
    else:
        yield ok("node", f"{node.path} is version {node.version}")


def check_baileys(settings: Settings) -> Iterator[Finding]:
    """Baileys is set up, in the version that this one is written for."""
    if settings.connector is not ConnectorKind.BAILEYS:
        return
    try:
        baileys = check_install(settings.bridge_dir or SOURCES)
    except BridgeUnusable as error:
        yield fail("baileys", *_cause_and_advice(error))
    else:
        yield ok("baileys", f"version {baileys}")


def _cause_and_advice(error: BridgeUnusable) -> tuple[str, str]:
    cause, _, advice = str(error).rpartition(": ")
    return cause, f"{advice[:1].upper()}{advice[1:]}."


async def check_store(settings: Settings) -> Finding:
    """The shared store answers, and has the lease of this group."""
    where = "shared store"
    if settings.store is StoreKind.FIRESTORE and not settings.firestore_project:
        return fail(where, "no project is set", "Set WATCHKEEPER_FIRESTORE_PROJECT.")
    if settings.store is StoreKind.SQLITE:
        path = settings.shared_dir / SHARED_FILE
        if not await trio.to_thread.run_sync(path.exists):
            return ok(where, f"{path} does not exist yet; the first start makes it")
    try:
        with trio.fail_after(STORE_S):
            async with open_lease_store(settings) as store:
                view = await store.read()
    except LeaseMissing as error:
        return fail(
            where,
            f"it answers, but the lease is not there: {error}",
            "Run `watchkeeper init`, once for the group. If the group has run before, restore the "
            "backup instead: a new lease would begin at epoch 0.",
        )
    except StoreMisconfigured as error:
        return fail(where, str(error), "Change that, then ask again.")
    except StoreUnavailable as error:
        return fail(where, f"no answer: {error}", "Check the network and the store.")
    except trio.TooSlowError:
        return fail(where, f"no answer within {STORE_S:g} s", "Check the network and the store.")
    holder = f"held by {view.fence.holder}" if view.fence.state == "held" else view.fence.state
    return ok(where, f"answers; lease {holder}, epoch {view.fence.epoch}")
