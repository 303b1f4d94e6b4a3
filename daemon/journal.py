"""Where events go: the log, the metrics and whoever listens. The adapter of `machine`'s Journal.

Loguru does the logging; the standard library's loggers (hypercorn, grpc, transitions) flow into it
from WARNING on. Nothing here waits: lines go through a bounded queue to a thread of their own, and
what does not fit is counted and dropped, so that a stuck pipe can never stop the event loop that
keeps the lease.

Never lives here: the events themselves (`machine.events`), and any secret: fields with telling
names, bearer tokens and the secrets of the settings are masked on the way in.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import trio
from loguru import logger
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from daemon import journald
from machine.events import EVENTS, EventKind
from machine.ports import Level
from machine.states import INITIAL, State

if TYPE_CHECKING:
    from loguru import Message

LINES_WAITING_MAX = 10_000
"""Log lines between the event loop and the stream; then lines are dropped and counted."""

BATCH_LINES_MAX = 200
LINE_CHARACTERS_MAX = 16_384
VALUE_CHARACTERS_MAX = 2_000
DEPTH_MAX = 5
SUBSCRIPTION_EVENTS_MAX = 1_000
CLOSE_WAIT_S = 1.0


@dataclass(eq=False, slots=True)
class _Request:
    """A request that is being answered, until it is `over`."""

    request_id: str
    over: bool = False


_REQUEST: ContextVar[_Request | None] = ContextVar("watchkeeper_request", default=None)


@contextmanager
def answering(request_id: str) -> Iterator[None]:
    """Let every line that is told meanwhile carry the request's id.

    A task that is begun meanwhile inherits it, and keeps it only until the request is over: an
    account that a request opened is nobody's request an hour later.
    """
    request = _Request(request_id)
    former = _REQUEST.set(request)
    try:
        yield
    finally:
        request.over = True
        _REQUEST.reset(former)


def present_request() -> str | None:
    """The id of the request that this task answers, or was begun by, if that still lasts."""
    request = _REQUEST.get()
    return None if request is None or request.over else request.request_id


MASK = "***"
SECRET_CHARACTERS_MIN = 8
"""A shorter text holds no secret of ours: masking it would only tear words apart."""

SECRET_WORDS = frozenset(
    {
        *("auth", "authorization", "cookie", "cred", "creds", "credential", "credentials"),
        *("key", "keys", "passphrase", "passwd", "password", "secret", "secrets"),
        *("token", "tokens"),
    }
)
NO_SECRETS = frozenset({"key_id", "keyId"})
"""Names that sound like a secret and are none."""

_BEARER = re.compile(r"(?i)\b(bearer|basic)(\s+)[A-Za-z0-9._~+/=-]+")
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=str)
_EPOCH_EVENTS = frozenset({"instance.booted", "lease.acquired", "transition.made"})
_SEVERITY = {Level.DEBUG: 10, Level.INFO: 20, Level.WARNING: 30, Level.ERROR: 40}
_COLOURS = {"DEBUG": "\x1b[2m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31;1m"}


@dataclass(frozen=True, slots=True)
class Noted:
    """An event as listeners get it. `at` is wall time; `fields` are masked and JSON-able."""

    at: float
    level: Level
    event: str
    message: str
    fields: Mapping[str, object]


class Redaction:
    """Masks secrets by the name of their field, by their form, and by their value."""

    def __init__(self, secrets: Collection[str] = ()) -> None:
        self._secrets: set[str] = set()
        self.learn(secrets)

    def learn(self, secrets: Collection[str]) -> None:
        """Mask these too from now on. What was a secret once stays one."""
        self._secrets.update(secret for secret in secrets if len(secret) >= SECRET_CHARACTERS_MIN)
        # Longest first, so that a secret that contains another one is masked whole.
        known = sorted(self._secrets, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def text(self, text: str) -> str:
        """Mask bearer tokens and known secrets."""
        if len(text) < SECRET_CHARACTERS_MIN:
            return text
        masked = _BEARER.sub(rf"\1\2{MASK}", text)
        return self._known.sub(MASK, masked) if self._known else masked

    def value(self, name: str, value: object, depth: int = 0) -> Any:
        """Make a field's value plain JSON, without secrets, of bounded size."""
        if value is None or isinstance(value, bool | int):
            return value
        if _is_secret(name):
            return MASK
        if isinstance(value, float):
            return round(value, 6)
        if isinstance(value, Enum):
            return self.value(name, value.value, depth)
        if isinstance(value, bytes | bytearray | memoryview):
            # Bytes are credentials, keys or frames; none of them belongs into a log.
            return f"<{len(value)} bytes>"
        if depth < DEPTH_MAX and isinstance(value, Mapping):
            return {
                self.text(str(key))[:200]: self.value(str(key), inner, depth + 1)
                for key, inner in list(value.items())[:100]
            }
        if depth < DEPTH_MAX and isinstance(value, list | tuple | set | frozenset):
            return [self.value(name, inner, depth + 1) for inner in list(value)[:100]]
        text = self.text(str(value))
        return text if len(text) <= VALUE_CHARACTERS_MAX else text[:VALUE_CHARACTERS_MAX] + "…"


@lru_cache(maxsize=2048)
def _is_secret(name: str) -> bool:
    if name in NO_SECRETS:
        return False
    return any(word.lower() in SECRET_WORDS for word in _WORDS.findall(name))


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the log as text, and as systemd's journal gets it where that is where it goes."""

    text: str
    level: str = "warning"
    entry: bytes = b""


class LineWriter:
    """A bounded queue of lines and the thread that writes them. `put` never waits."""

    def __init__(
        self, write: Callable[[Sequence[Line]], object], *, lines_max: int = LINES_WAITING_MAX
    ) -> None:
        self.dropped = 0
        self._write = write
        self._lines: queue.Queue[Line | None] = queue.Queue(lines_max)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def put(self, line: Line) -> None:
        """Queue a line, or count it as dropped when the queue is full or closed."""
        if self._closing.is_set():
            self.dropped += 1
            return
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, for at most `CLOSE_WAIT_S`: a stuck stream keeps nobody here."""
        self._closing.set()
        # With the queue full, the thread looks at `_closing` once it has caught up.
        with suppress(queue.Full):
            self._lines.put_nowait(None)
        self._thread.join(CLOSE_WAIT_S)

    def _run(self) -> None:
        reported = 0
        while True:
            self._write_batch(self._lines.get())
            missing = self.dropped - reported
            if missing and self._lines.empty():
                reported += missing
                told = f"{missing} log lines were dropped: nobody read them fast enough"
                self._try_write([Line(told)])
            if self._closing.is_set() and self._lines.empty():
                return

    def _write_batch(self, first: Line | None) -> None:
        """Write what has come together: one system call a line would cost more than the line."""
        lines = [first]
        with suppress(queue.Empty):
            while len(lines) < BATCH_LINES_MAX:
                lines.append(self._lines.get_nowait())
        if written := [line for line in lines if line is not None]:
            self._try_write(written)

    def _try_write(self, lines: Sequence[Line]) -> None:
        try:
            self._write(lines)
        except (OSError, ValueError):
            # The stream is closed or broken. Nobody is left to tell, but the count.
            self.dropped += 1


class _LabelledGauge(Collector):
    """A gauge read at each scrape: one value for each value of one label."""

    def __init__(
        self, name: str, help_text: str, label: str, read: Callable[[], Mapping[str, float]]
    ) -> None:
        self._name, self._help, self._label, self._read = name, help_text, label, read

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._help, labels=[self._label])
        for label, value in self._read().items():
            family.add_metric([label], value)
        yield family


class _CountElsewhere(Collector):
    """A counter read at each scrape."""

    def __init__(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        self._name, self._help, self._read = name, help_text, read

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily(self._name, self._help, value=self._read())


class Metrics:
    """Everything that `/metrics` shows. Names begin with `watchkeeper_` and end in their unit."""

    def __init__(self) -> None:
        # Twice as many series, and no dashboard of ours asks when a counter was born.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # it has no annotations
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.events = self._counter("events", "Events, by name.", ("event",))
        self.transitions = self._counter(
            "transitions", "Transitions made.", ("source", "dest", "trigger")
        )
        self.state = Gauge(
            "watchkeeper_state",
            "1 for the state that the instance is in.",
            ("state",),
            registry=self.registry,
        )
        self.epoch = self._gauge("epoch", "The epoch acted under, or last seen.")
        self.renewals = self._counter("lease_renewals", "Renewals of the lease.", ())
        self.renewal_failures = self._counter(
            "lease_renewal_failures", "Tries to renew the lease that failed, by cause.", ("cause",)
        )
        self.losses = self._counter("lease_losses", "Terms that ended without being asked to.", ())
        self.send = Histogram(
            "watchkeeper_send_seconds",
            "From accepting a message to the server's acknowledgement.",
            registry=self.registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600),
        )
        self.last_renewal = self._gauge(
            "lease_last_renewal_timestamp_seconds", "When the lease was last renewed here."
        )
        self.restore_duration = self._gauge(
            "restore_duration_seconds", "How long the last restore took."
        )
        self.restore_accounts = Gauge(
            "watchkeeper_restore_accounts",
            "Accounts of the last restore, by what became of them.",
            ("outcome",),
            registry=self.registry,
        )
        self.session_restore = Histogram(
            "watchkeeper_session_restore_seconds",
            "From opening an account to connected, in a restore.",
            registry=self.registry,
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )
        self.journal_faults = self._counter(
            "journal_faults", "Events that could not be told as they should.", ()
        )
        # Looking a label up costs more than counting, and every send counts several events.
        self._event_counts = {event: self.events.labels(event) for event in EVENTS}
        self.show_state(INITIAL)

    def _counter(self, name: str, help_text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"watchkeeper_{name}_total", help_text, labels, registry=self.registry)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(f"watchkeeper_{name}", help_text, registry=self.registry)

    def introduce(self, name: str, group: str, version: str) -> None:
        """Say who this is, for the rules that speak of a whole group."""
        info = Gauge(
            "watchkeeper_instance_info",
            "1, with the instance's name, its group and its version.",
            ("name", "group", "version"),
            registry=self.registry,
        )
        info.labels(name, group, version).set(1)

    def show_state(self, present: State) -> None:
        """Set the state gauge: 1 for the present one, 0 for the others."""
        for state in State:
            self.state.labels(state.value).set(1 if state is present else 0)

    def watch(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Add a gauge `watchkeeper_<name>` that is read at each scrape; `read` must not wait."""
        self._gauge(name, help_text).set_function(read)

    def watch_count(self, name: str, help_text: str, read: Callable[[], float]) -> None:
        """Add a counter `watchkeeper_<name>_total` that somebody else counts."""
        self.registry.register(_CountElsewhere(f"watchkeeper_{name}", help_text, read))

    def watch_labelled(
        self, name: str, help_text: str, label: str, read: Callable[[], Mapping[str, float]]
    ) -> None:
        """Add a gauge with one label, read at each scrape, such as accounts by status."""
        self.registry.register(_LabelledGauge(f"watchkeeper_{name}", help_text, label, read))

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)

    def count(self, event: str, fields: Mapping[str, object]) -> None:
        """Count an event, and take over the figures it carries."""
        counter = self._event_counts.get(event)
        if counter is None:
            counter = self._event_counts[event] = self.events.labels(event)
        counter.inc()
        if event == "transition.made":
            source, dest = State(str(fields["source"])), State(str(fields["dest"]))
            self.transitions.labels(source.value, dest.value, str(fields["trigger"])).inc()
            self.show_state(dest)
        elif event == "lease.renewed":
            self.renewals.inc()
            self.last_renewal.set_to_current_time()
        elif event == "lease.renewal_failed":
            self.renewal_failures.labels(str(fields.get("cause") or "unknown")).inc()
        elif event == "lease.lost":
            self.losses.inc()
        elif event == "message.acked":
            self.send.observe(_number(fields, "duration_s"))
        elif event == "session.restored":
            self.session_restore.observe(_number(fields, "duration_s"))
        elif event == "restore.finished":
            self.restore_duration.set(_number(fields, "duration_s"))
            for outcome in ("restored", "pairing", "listed", "failed"):
                self.restore_accounts.labels(outcome).set(_number(fields, outcome))
        if event in _EPOCH_EVENTS and "epoch" in fields:
            self.epoch.set(_number(fields, "epoch"))


def _number(fields: Mapping[str, object], name: str) -> float:
    value = fields.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


@dataclass(eq=False, slots=True)
class Subscription:
    """One listener's events. `dropped` counts those that it was too slow for."""

    events: trio.MemoryReceiveChannel[Noted]
    dropped: int = 0
    _send: trio.MemorySendChannel[Noted] = field(kw_only=True)
    _run: trio.lowlevel.TrioToken = field(kw_only=True)

    def offer(self, noted: Noted) -> None:
        """Hand over an event, from whichever thread it comes."""
        if trio.lowlevel.in_trio_run():
            self._offer_here(noted)
            return
        try:
            self._run.run_sync_soon(self._offer_here, noted)
        except trio.RunFinishedError:
            self.dropped += 1

    def _offer_here(self, noted: Noted) -> None:
        try:
            self._send.send_nowait(noted)
        except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
            self.dropped += 1


class LoguruJournal:
    """Implements `machine.ports.Journal`. Made by `open_journal`, which also takes it down."""

    def __init__(
        self,
        instance: str,
        *,
        metrics: Metrics,
        redaction: Redaction,
        events: Mapping[str, EventKind],
        level: Level,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.metrics = metrics
        self.instance = instance
        self._redaction = redaction
        self.level = level
        self._kinds = events
        self._epoch = 0
        self._wall = wall
        self._logger = logger.bind(journal=id(self))
        self._subscriptions: list[Subscription] = []

    def learn_secrets(self, secrets: Collection[str]) -> None:
        """Mask these too, wherever they turn up from now on."""
        self._redaction.learn(secrets)

    def note(self, event: str, /, **fields: object) -> None:
        """Record an event. Never waits, never raises: what goes wrong here is counted."""
        try:
            self._note(event, fields)
        except Exception:  # noqa: BLE001  # a log line must never be what ends a term
            self.metrics.journal_faults.inc()

    def _note(self, event: str, fields: Mapping[str, object]) -> None:
        kind = self._kinds.get(event)
        if kind is None:
            self.metrics.journal_faults.inc()
            kind = EventKind(Level.WARNING, event)
        else:
            try:
                self.metrics.count(event, fields)
            except (KeyError, ValueError):
                # A field is missing or wrong; the line is still told, with what there is.
                self.metrics.journal_faults.inc()
            if event in _EPOCH_EVENTS:
                self._epoch = int(_number(fields, "epoch")) or self._epoch
        if not self._subscriptions and _SEVERITY[kind.level] < _SEVERITY[self.level]:
            return  # Every send has debug events; making sentences for nobody would be its cost.
        plain = {name: self._redaction.value(name, value) for name, value in fields.items()}
        noted = Noted(self._wall(), kind.level, event, self._sentence(kind, event, plain), plain)
        for subscription in self._subscriptions:
            subscription.offer(noted)
        self._logger.bind(noted=noted, epoch=self._epoch).log(
            kind.level.value.upper(), noted.message
        )

    def _sentence(self, kind: EventKind, event: str, plain: Mapping[str, object]) -> str:
        """Fill in the event's sentence; with a field missing, tell all that is there."""
        shown = {"instance": self.instance, **{name: _shown(v) for name, v in plain.items()}}
        try:
            if event in self._kinds:
                return self._redaction.text(kind.text.format(**shown))
        except (KeyError, IndexError, ValueError, AttributeError):
            self.metrics.journal_faults.inc()
        listed = " ".join(f"{name}={_shown(value)}" for name, value in plain.items())
        return self._redaction.text(f"{event} {listed}".strip())

    @contextmanager
    def subscribe(self, *, events_max: int = SUBSCRIPTION_EVENTS_MAX) -> Iterator[Subscription]:
        """Listen to every event from here on, whatever the log's level.

        A listener that falls `events_max` behind loses the newest ones, and `dropped` says so.
        """
        send, receive = trio.open_memory_channel[Noted](events_max)
        run = trio.lowlevel.current_trio_token()
        subscription = Subscription(receive, _send=send, _run=run)
        self._subscriptions = [*self._subscriptions, subscription]
        try:
            yield subscription
        finally:
            self._subscriptions = [s for s in self._subscriptions if s is not subscription]
            send.close()
            receive.close()


def _shown(value: object) -> object:
    """Show a float without digits that nobody needs."""
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


class _Lines:
    """Makes a line of a loguru message, as text or as JSON."""

    def __init__(
        self, instance: str, redaction: Redaction, *, json_lines: bool, colours: bool, entries: bool
    ):
        self._instance = instance
        self._redaction = redaction
        self._json = json_lines
        self._colours = colours
        self._entries = entries

    def line(self, message: Message) -> Line:
        """One line, never more: line breaks in what others wrote are escaped."""
        record = message.record
        noted = record["extra"].get("noted")
        at = noted.at if noted else record["time"].timestamp()
        stamp = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
        level = record["level"].name
        text = noted.message if noted else self._redaction.text(record["message"])
        if record["exception"] is not None:
            text += " | " + self._redaction.text(_traceback(record["exception"]))
        known = self._context(noted, record["extra"])
        clean = self._clean(text, known)
        if self._json:
            told = {
                "ts": stamp,
                "level": level.lower(),
                "event": known["event"],
                "message": text[:LINE_CHARACTERS_MAX],
                **known,
                "fields": dict(noted.fields) if noted else {},
            }
            shown = full = _JSON.encode(told)
        else:
            # The journal shows when, how bad and whose it is by itself.
            shown, full = clean, self._text_line(stamp, level, clean)
        if not self._entries:
            return Line(full)
        fields = {_in_journal(name): value for name, value in known.items()}
        return Line(full, level.lower(), journald.encode(level.lower(), shown, fields))

    def _context(self, noted: Noted | None, extra: Mapping[str, Any]) -> dict[str, object]:
        """What a line is about, as far as that is known, by JSON's names."""
        known: dict[str, object] = {
            "event": noted.event if noted else "library.logged",
            "instance": self._instance,
        }
        fields = noted.fields if noted else {}
        if epoch := fields.get("epoch", extra.get("epoch")):
            known["epoch"] = epoch
        if account_id := fields.get("account_id"):
            known["accountId"] = account_id
        if (request_id := present_request()) is not None:
            known["requestId"] = request_id
        if "logger" in extra:
            known["logger"] = extra["logger"]
        return known

    def _clean(self, text: str, known: Mapping[str, object]) -> str:
        suffix = f" [request {known['requestId']}]" if "requestId" in known else ""
        return _CONTROL.sub(_escaped, text + suffix)[:LINE_CHARACTERS_MAX]

    def _text_line(self, stamp: str, level: str, clean: str) -> str:
        moment = stamp.replace("T", " ").replace("+00:00", "Z")
        line = f"{moment} {level:<7} {self._instance} | {clean}"
        if self._colours and level in _COLOURS:
            return f"{_COLOURS[level]}{line}\x1b[0m"
        return line


@lru_cache(maxsize=64)
def _in_journal(name: str) -> str:
    """A name as the journal spells it: accountId is ACCOUNT_ID there."""
    return re.sub(r"([A-Z])", r"_\1", name).upper()


def _escaped(match: re.Match[str]) -> str:
    return " / " if match[0] == "\n" else f"\\x{ord(match[0]):02x}"


def _traceback(exception: Any) -> str:
    """Show frames and messages; no values of local variables, which may be secrets."""
    kind, value, frames = exception
    return "".join(traceback.format_exception(kind, value, frames, limit=-20)).strip()


class _Intercept(logging.Handler):
    """Hands the standard library's log records to loguru."""

    def __init__(self, journal: LoguruJournal) -> None:
        super().__init__(logging.WARNING)
        self._logger = journal._logger

    def emit(self, record: logging.LogRecord) -> None:
        level = "ERROR" if record.levelno >= logging.ERROR else "WARNING"
        exception: (
            tuple[type[BaseException], BaseException, TracebackType | None]
            | tuple[None, None, None]
            | None
        ) = record.exc_info
        try:
            self._logger.bind(logger=record.name).opt(exception=exception).log(
                level, f"{record.name}: {record.getMessage()}"
            )
        except Exception:  # noqa: BLE001  # a library's bad log call is not our end
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's own name
        """Stay silent: the default prints the record's arguments to stderr, secrets included."""


@contextmanager
def open_journal(
    instance: str,
    *,
    json_lines: bool = False,
    level: Level = Level.INFO,
    secrets: Collection[str] = (),
    stream: TextIO | None = None,
    events: Mapping[str, EventKind] = EVENTS,
    metrics: Metrics | None = None,
    system_journal: str = journald.SOCKET,
) -> Iterator[LoguruJournal]:
    """Log to `stream` (stderr) from `level` on, until the block ends; then flush for up to 1 s.

    Where systemd has connected that stream to its journal, entries with fields go there directly,
    to the socket `system_journal`; only what it does not take goes to the stream.
    `secrets` are masked wherever they turn up. Takes over the root logger for that time.
    """
    out = stream if stream is not None else sys.stderr
    redaction = Redaction(secrets)
    journal = LoguruJournal(
        instance, metrics=metrics or Metrics(), redaction=redaction, events=events, level=level
    )
    colours = not json_lines and out.isatty() and not os.environ.get("NO_COLOR")
    descriptor = _descriptor_of(out)
    system = None
    write = _write_to(out, descriptor)
    if descriptor is not None and journald.is_behind(descriptor):
        system = journald.Journald(system_journal)
        write = _write_to_journal(system, write)
    lines = _Lines(
        instance, redaction, json_lines=json_lines, colours=colours, entries=system is not None
    )
    writer = LineWriter(write)
    journal.metrics.watch(
        "log_lines_dropped", "Log lines dropped: nobody read them.", lambda: writer.dropped
    )

    def sink(message: Message) -> None:
        writer.put(lines.line(message))

    _remove_default_sink()
    sink_id = logger.add(
        sink,
        level=0,
        format="{message}",
        filter=lambda record: (
            record["extra"].get("journal") == id(journal)
            and record["level"].no >= _SEVERITY[journal.level]
        ),
        # Both would print the values of local variables, and with them secrets.
        backtrace=False,
        diagnose=False,
        catch=False,
    )
    intercept = _Intercept(journal)
    root = logging.getLogger()
    former_level = root.level
    root.addHandler(intercept)
    root.setLevel(logging.WARNING)
    try:
        yield journal
    finally:
        root.removeHandler(intercept)
        root.setLevel(former_level)
        logger.remove(sink_id)
        writer.close()
        if system is not None:
            system.close()


Write = Callable[[Sequence[Line]], object]


def _descriptor_of(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def _write_to(stream: TextIO, descriptor: int | None) -> Write:
    """Write past the stream's own buffer where there is a file behind it.

    A thread that is stuck in a buffered write holds the buffer's lock, and Python aborts at exit
    when it cannot get it.
    """

    def write(lines: Sequence[Line]) -> None:
        text = "".join(f"{line.text}\n" for line in lines)
        if descriptor is None:
            stream.write(text)
            return
        rest = memoryview(text.encode("utf-8", "backslashreplace"))
        while rest:
            rest = rest[os.write(descriptor, rest) :]

    return write


def _write_to_journal(system: journald.Journald, otherwise: Write) -> Write:
    """Send each line as an entry; what the journal does not take goes the other way, marked."""

    def write(lines: Sequence[Line]) -> None:
        for line in lines:
            if not (line.entry and system.send(line.entry)):
                otherwise([Line(journald.prefixed(line.level, line.text))])

    return write


def _remove_default_sink() -> None:
    """Take away loguru's own stderr sink: it would print every line twice, and wait for stderr."""
    try:
        logger.remove(0)
    except ValueError:
        return  # It is gone already.
