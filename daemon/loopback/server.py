"""WhatsApp's side: who is paired, who is logged in, what the recipients have seen.

Lives here: the rules, as synchronous methods that run inside one transaction each.
Never lives here: threads, tasks and waiting (`connector`, `world`), and the file (`database`).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from daemon.loopback.behaviour import Behaviour, dump_behaviour, load_behaviour
from daemon.loopback.database import is_alive, open_database, ring, sweep_signs
from daemon.loopback.device import Device, Session, phone_of
from daemon.loopback.mail import Mail, read_mail
from daemon.loopback.waiting import (
    WAITING_MAX,
    Letter,
    count_waiting,
    forget,
    list_waiting,
    put,
)
from machine.ports import ConnectionClosed, SendRefused
from machine.records import AccountId, MessageId
from machine.refusals import AccountNotPaired, NotAwaitingScan, OutboxFull, Refusal

MESSAGES_MAX = 100_000
"""Messages kept, duplicates included; the oldest are dropped. A message id that was dropped is no
longer recognised as a duplicate."""
RATCHETS_MAX = 500_000
"""Sessions kept; a position reused in a dropped one goes unnoticed."""
SESSIONS_PER_CONTACT_MAX = 40
"""As in libsignal (ARCHIVED_STATES_MAX_LENGTH)."""
EVICTIONS_MAX = 1_000
DEVICES_MAX = 100_000
BEHAVIOURS_MAX = 10_000
TEXT_CHARACTERS_MAX = 65_536
TO_CHARACTERS_MAX = 64
PAGE_BYTES_MAX = 8 * 2**20
"""A page of messages ends early once its texts are this large."""

EVERYONE = ""
"""The account id under which the behaviour for all accounts is kept."""

T = TypeVar("T")
Action = Callable[["LoopbackServer"], T]
Answer = tuple[object, Exception | None]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the server reaches a connection."""

    account_id: AccountId
    bridge_id: str
    connection_id: str


@dataclass(frozen=True, slots=True)
class Envelope:
    """One message on the wire, encrypted at `session`'s position."""

    message_id: MessageId
    to: str
    text: str = field(repr=False)
    session: Session


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a message that was taken: how its sender is to hear of it, or not."""

    readable: bool
    lost: bool
    behaviour: Behaviour


@dataclass(frozen=True, slots=True)
class Arrival:
    """One message as it reached its recipient. `at` is wall time."""

    seq: int
    account_id: AccountId
    to: str
    message_id: MessageId
    text: str = field(repr=False)
    at: float
    readable: bool
    """False: encrypted at a ratchet position that was used before, the recipient sees no text."""
    duplicate: bool
    """The recipient had read this message id before, and shows nothing new."""


@dataclass(frozen=True, slots=True)
class Page:
    """Arrivals in order. `next_seq` continues after them; `dropped` were forgotten (limit)."""

    arrivals: tuple[Arrival, ...]
    next_seq: int
    more: bool
    dropped: int


@dataclass(frozen=True, slots=True)
class Eviction:
    """One login that ended another one alive (440)."""

    account_id: AccountId
    at: float


class LoopbackServer:
    """The server on a database connection of its own. Every instance sees the same state.

    Its methods check first and write then; a refusal that one raises leaves the transaction going.
    For one thread at a time.
    """

    def __init__(
        self, directory: Path, wall: Callable[[], float], *, messages_max: int = MESSAGES_MAX
    ) -> None:
        self._directory = directory
        self._wall = wall
        self._limits = {
            "message": messages_max,
            "ratchet": RATCHETS_MAX,
            "eviction": EVICTIONS_MAX,
        }
        self._database = open_database(directory)
        self._behaviours: dict[str, Behaviour] = {}
        self._behaviours_seen = -1
        self._grown: set[str] = set()
        self._addressed: set[str] = set()

    def close(self) -> None:
        self._database.close()

    # --- transactions ------------------------------------------------------------------------

    def perform(self, actions: Sequence[Action[object]], *, reading: bool = False) -> list[Answer]:
        """Run actions in one transaction, in order: for each its result, or its refusal.

        `reading`: none of them writes, and no writer waits for them.
        Raises `sqlite3.Error`: nothing of any of them was done.
        """
        self._database.execute("BEGIN" if reading else "BEGIN IMMEDIATE")
        try:
            self._refresh_behaviours()
            answers = [self._attempt(action) for action in actions]
            self._prune()
            self._database.execute("COMMIT")
            # Only now can they see their mail.
            for bridge_id in self._addressed:
                ring(self._directory, bridge_id)
            return answers
        finally:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
                self._behaviours_seen = -1
            self._addressed.clear()

    def _attempt(self, action: Action[object]) -> Answer:
        try:
            return action(self), None
        except (ConnectionClosed, SendRefused, Refusal) as refusal:
            return None, refusal

    def _prune(self) -> None:
        """Drop the oldest rows of what has grown in this transaction."""
        for table in self._grown:
            self._database.execute(
                f"DELETE FROM {table} WHERE seq <= (SELECT max(seq) FROM {table}) - ?",  # noqa: S608 (our own names)
                (self._limits[table],),
            )
        self._grown.clear()

    # --- pairing -----------------------------------------------------------------------------

    def begin_pairing(self, place: Place, device_id: str, proof: str, until: float) -> None:
        """Await a scan for a new device, until a wall time. The newest pairing is scanned."""
        if self._count("device") >= DEVICES_MAX:
            raise ConnectionClosed(503, "the loopback world is full of devices")
        self._database.execute(
            "INSERT INTO pairing (connection_id, bridge_id, account_id, device_id, proof, until)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (place.connection_id, place.bridge_id, place.account_id, device_id, proof, until),
        )

    def offer_code(self, place: Place, phone: str, code: str, until: float) -> None:
        """Let the pairing be completed by typing `code` on the phone with this number."""
        changed = self._database.execute(
            "UPDATE pairing SET code = ?, code_until = ?, code_phone = ? WHERE connection_id = ?",
            (code, until, phone, place.connection_id),
        )
        if changed.rowcount == 0:
            raise NotAwaitingScan("the pairing is over: it was scanned already")

    def scan(self, account_id: AccountId, phone: str | None, code: str | None) -> str:
        """Be the phone: link the device whose QR code (or `code`) is shown; the phone's number.

        Raises `NotAwaitingScan`.
        """
        now = self._wall()
        rows = self._database.execute(
            "SELECT connection_id, bridge_id, device_id, proof, code, code_until, code_phone"
            " FROM pairing WHERE account_id = ? AND until > ? ORDER BY seq DESC",
            (account_id, now),
        ).fetchall()
        alive = next((row for row in rows if is_alive(self._directory, row[1])), None)
        if alive is None:
            raise NotAwaitingScan(f"account {account_id} shows no QR code now: begin its pairing")
        connection_id, bridge_id, device_id, proof, right_code, code_until, code_phone = alive
        if code is not None:
            if code != right_code or now >= code_until:
                raise NotAwaitingScan("this pairing code is wrong or has expired: ask for another")
            phone = phone or code_phone
        phone = phone or self._known_phone(account_id)
        self._database.execute(
            "INSERT INTO device VALUES (?, ?, ?, ?, 0, ?)",
            (device_id, account_id, proof, phone, now),
        )
        self._database.execute("DELETE FROM pairing WHERE connection_id = ?", (connection_id,))
        self._post(bridge_id, connection_id, "scanned", phone=phone)
        return phone

    def _known_phone(self, account_id: AccountId) -> str:
        row = self._database.execute(
            "SELECT phone FROM device WHERE account_id = ? ORDER BY paired_at DESC LIMIT 1",
            (account_id,),
        ).fetchone()
        return str(row[0]) if row else phone_of(account_id)

    # --- logging in and out ------------------------------------------------------------------

    def login_delay_s(self, account_id: AccountId) -> float:
        return self.behaviour(account_id).login_delay_s

    def log_in(self, place: Place, device: Device) -> str:
        """Log a device in, evicting an earlier login of it that is still alive; its phone number.

        Raises `ConnectionClosed` (401 for a device that is not, or no longer, linked).
        """
        told = self.behaviour(place.account_id)
        if told.login_refused is not None:
            if told.login_times is not None:
                self._spend(place.account_id, told.after_login())
            raise ConnectionClosed(
                told.login_refused, "login refused by command", expire_s=told.login_expire_s
            )
        phone = self._linked_phone(place, device)
        row = self._database.execute(
            "SELECT connection_id, bridge_id, account_id FROM login WHERE device_id = ?",
            (device.device_id,),
        ).fetchone()
        if row is not None and self._is_alive(row[1], place):
            self._post(row[1], row[0], "closed", code=440, detail="conflict, replaced")
            self._note_eviction(row[2])
        self._database.execute(
            "INSERT OR REPLACE INTO login VALUES (?, ?, ?, ?)",
            (device.device_id, place.connection_id, place.bridge_id, place.account_id),
        )
        for letter in list_waiting(self._database, place.account_id):
            self._post(place.bridge_id, place.connection_id, "received", **asdict(letter))
        return phone

    def _linked_phone(self, place: Place, device: Device) -> str:
        row = self._database.execute(
            "SELECT proof, phone, removed FROM device WHERE device_id = ?", (device.device_id,)
        ).fetchone()
        if row is None and device.adopted and self._count("device") < DEVICES_MAX:
            row = (device.proof, device.phone, 0)
            self._database.execute(
                "INSERT INTO device VALUES (?, ?, ?, ?, 0, ?)",
                (device.device_id, place.account_id, device.proof, device.phone, self._wall()),
            )
        if row is None or row[0] != device.proof:
            raise ConnectionClosed(401, "no such device is linked")
        if row[2]:
            raise ConnectionClosed(401, "the device was removed")
        return str(row[1])

    def _is_alive(self, bridge_id: str, place: Place) -> bool:
        return bridge_id == place.bridge_id or is_alive(self._directory, bridge_id)

    def _note_eviction(self, account_id: str) -> None:
        self._grown.add("eviction")
        self._database.execute(
            "INSERT INTO eviction (account_id, at) VALUES (?, ?)", (account_id, self._wall())
        )
        self._database.execute("UPDATE meta SET value = value + 1 WHERE name = 'evictions'")

    def disconnect(self, place: Place, device_id: str) -> None:
        """Forget a connection that its own side has closed."""
        self._database.execute(
            "DELETE FROM login WHERE device_id = ? AND connection_id = ?",
            (device_id, place.connection_id),
        )
        self._database.execute(
            "DELETE FROM pairing WHERE connection_id = ?", (place.connection_id,)
        )

    def unlink(self, account_id: AccountId) -> int:
        """Remove an account's devices on its phone: they end with 401; how many there were."""
        changed = self._database.execute(
            "UPDATE device SET removed = 1 WHERE account_id = ? AND removed = 0", (account_id,)
        )
        self.cut(account_id, 401, "the device was removed on the phone")
        return changed.rowcount

    def log_out(self, place: Place, device_id: str) -> None:
        """Unlink a device on its own wish. Raises `ConnectionClosed`."""
        self._require_current(place, device_id)
        self._database.execute("UPDATE device SET removed = 1 WHERE device_id = ?", (device_id,))
        self.disconnect(place, device_id)

    def cut(
        self,
        account_id: AccountId | None,
        code: int,
        detail: str = "cut by command",
        expire_s: float | None = None,
    ) -> int:
        """Close an account's connections (`None`: everyone's) now; how many there were."""
        where, values = ("", ()) if account_id is None else (" WHERE account_id = ?", (account_id,))
        count = 0
        for table in ("login", "pairing"):
            rows = self._database.execute(
                f"SELECT bridge_id, connection_id FROM {table}{where}",  # noqa: S608 (our own names)
                values,
            ).fetchall()
            alive = {row[0] for row in rows if is_alive(self._directory, row[0])}
            for bridge_id, connection_id in rows:
                if bridge_id in alive:
                    count += 1
                    self._post(
                        bridge_id,
                        connection_id,
                        "closed",
                        code=code,
                        detail=detail,
                        expire_s=expire_s,
                    )
            self._database.execute(f"DELETE FROM {table}{where}", values)  # noqa: S608 (the same)
        return count

    def sweep(self) -> None:
        """Forget what belongs to bridges that are gone."""
        sweep_signs(self._directory)
        for table in ("login", "pairing", "mail"):
            rows = self._database.execute(f"SELECT DISTINCT bridge_id FROM {table}").fetchall()  # noqa: S608 (our own names)
            for (bridge_id,) in rows:
                if not is_alive(self._directory, bridge_id):
                    self._database.execute(
                        f"DELETE FROM {table} WHERE bridge_id = ?",  # noqa: S608 (the same)
                        (bridge_id,),
                    )

    def list_connected(self) -> tuple[AccountId, ...]:
        """The accounts whose connection is open, wherever it is; without order."""
        rows = self._database.execute("SELECT account_id, bridge_id FROM login").fetchall()
        alive = {bridge for bridge in {row[1] for row in rows} if is_alive(self._directory, bridge)}
        return tuple(AccountId(row[0]) for row in rows if row[1] in alive)

    # --- mail to the bridges -----------------------------------------------------------------

    def _post(self, bridge_id: str, connection_id: str, kind: str, **body: object) -> None:
        self._addressed.add(bridge_id)
        self._database.execute(
            "INSERT INTO mail (bridge_id, connection_id, kind, body) VALUES (?, ?, ?, ?)",
            (bridge_id, connection_id, kind, json.dumps(body)),
        )

    def discard_mail(self, bridge_id: str, seq: int) -> None:
        """Forget a bridge's mail up to `seq`: it was read."""
        self._database.execute(
            "DELETE FROM mail WHERE bridge_id = ? AND seq <= ?", (bridge_id, seq)
        )

    def _require_current(self, place: Place, device_id: str) -> None:
        row = self._database.execute(
            "SELECT connection_id FROM login WHERE device_id = ?", (device_id,)
        ).fetchone()
        self._require_same(place, row[0] if row else None)

    def _require_same(self, place: Place, connection_id: str | None) -> None:
        """Refuse a connection that the server has closed, with the code that it closed it with."""
        if connection_id == place.connection_id:
            return
        row = self._database.execute(
            "SELECT seq, connection_id, kind, body FROM mail"
            " WHERE bridge_id = ? AND connection_id = ? AND kind = 'closed' LIMIT 1",
            (place.bridge_id, place.connection_id),
        ).fetchone()
        mail = read_mail(row) if row else Mail(0, place.connection_id, "closed", 440, "replaced")
        raise ConnectionClosed(mail.code, mail.detail, expire_s=mail.expire_s)

    # --- messages ----------------------------------------------------------------------------

    def deliver(self, place: Place, device_id: str, envelope: Envelope) -> Fate:
        """Take a message and show it to its recipient.

        Raises `ConnectionClosed` when the connection is no longer the device's; `SendRefused`.
        """
        _require_well_formed(envelope)
        found = self._database.execute(
            "SELECT (SELECT connection_id FROM login WHERE device_id = ?1),"
            " (SELECT position FROM ratchet"
            "  WHERE device_id = ?1 AND contact = ?2 AND session_id = ?3),"
            " EXISTS (SELECT 1 FROM message WHERE account_id = ?4 AND recipient = ?2"
            "  AND message_id = ?5 AND readable)",
            (
                device_id,
                envelope.to,
                envelope.session.session_id,
                place.account_id,
                envelope.message_id,
            ),
        ).fetchone()
        current, position, duplicate = found
        self._require_same(place, current)
        told = self.behaviour(place.account_id)
        self._require_acceptable(place, envelope, told)
        readable = position is None or envelope.session.position >= position
        if readable:
            self._advance_ratchet(device_id, envelope, is_new=position is None)
        self._grown.add("message")
        self._database.execute(
            "INSERT INTO message"
            " (account_id, recipient, message_id, text, at, readable, duplicate)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                place.account_id,
                envelope.to,
                envelope.message_id,
                envelope.text,
                self._wall(),
                readable,
                duplicate,
            ),
        )
        if told.ack_lost and told.ack_times is not None:
            self._spend(place.account_id, told.after_ack())
        return Fate(readable, told.ack_lost, told)

    def _require_acceptable(self, place: Place, envelope: Envelope, told: Behaviour) -> None:
        if envelope.to in told.not_on_whatsapp:
            raise SendRefused(404, f"{envelope.to} is not on WhatsApp")
        if told.ack_refused is not None:
            if told.ack_times is not None:
                self._spend(place.account_id, told.after_ack())
            raise SendRefused(told.ack_refused, "refused by command")

    def _advance_ratchet(self, device_id: str, envelope: Envelope, *, is_new: bool) -> None:
        """The recipient has used this position: a message at it or before is unreadable now."""
        name = (device_id, envelope.to)
        following = envelope.session.position + 1
        if not is_new:
            self._database.execute(
                "UPDATE ratchet SET position = ?"
                " WHERE device_id = ? AND contact = ? AND session_id = ?",
                (following, *name, envelope.session.session_id),
            )
            return
        self._grown.add("ratchet")
        self._database.execute(
            "INSERT INTO ratchet (device_id, contact, session_id, position) VALUES (?, ?, ?, ?)",
            (*name, envelope.session.session_id, following),
        )
        self._database.execute(
            "DELETE FROM ratchet WHERE device_id = ? AND contact = ? AND seq NOT IN"
            " (SELECT seq FROM ratchet WHERE device_id = ? AND contact = ?"
            "  ORDER BY seq DESC LIMIT ?)",
            (*name, *name, SESSIONS_PER_CONTACT_MAX),
        )

    def receive(
        self,
        account_id: AccountId,
        sender: str,
        text: str,
        *,
        sender_name: str | None = None,
        message_id: str | None = None,
        copies: int = 1,
    ) -> str:
        """Send an account a message; its id.

        It waits until a device of the account acknowledges it, and is delivered at each login
        until then, and at once, `copies` times, to one that is logged in.
        Raises `AccountNotPaired`, `OutboxFull`.
        """
        linked = self._database.execute(
            "SELECT 1 FROM device WHERE account_id = ? AND removed = 0", (account_id,)
        ).fetchone()
        if linked is None:
            raise AccountNotPaired(f"account {account_id} has no linked device: scan its QR code")
        if count_waiting(self._database, account_id) >= WAITING_MAX:
            raise OutboxFull(
                f"{WAITING_MAX} messages wait for account {account_id} already: connect it first"
            )
        message_id = message_id or f"3A{secrets.token_hex(9).upper()}"
        letter = put(
            self._database,
            account_id,
            Letter(0, message_id, sender, sender_name, text, self._wall()),
        )
        logins = self._database.execute(
            "SELECT bridge_id, connection_id FROM login WHERE account_id = ?", (account_id,)
        ).fetchall()
        for bridge_id, connection_id in logins:
            if is_alive(self._directory, bridge_id):
                for _ in range(copies):
                    self._post(bridge_id, connection_id, "received", **asdict(letter))
        return message_id

    def acknowledge(self, place: Place, device_id: str, numbers: Sequence[int]) -> None:
        """A device has stored these. Raises `ConnectionClosed`."""
        self._require_current(place, device_id)
        forget(self._database, place.account_id, numbers)

    def count_waiting(self, account_id: AccountId) -> int:
        return count_waiting(self._database, account_id)

    def is_on_whatsapp(self, place: Place, device_id: str, to: str) -> bool:
        """Raises `ConnectionClosed`."""
        self._require_current(place, device_id)
        return to not in self.behaviour(place.account_id).not_on_whatsapp

    def list_messages(
        self, account_id: AccountId | None, *, raw: bool, after: int, limit: int
    ) -> Page:
        """What the recipients see, in order of arrival; with `raw` everything that arrived."""
        rows = self._database.execute(
            "SELECT seq, account_id, recipient, message_id, text, at, readable, duplicate"
            " FROM message WHERE seq > ?1 AND (?2 IS NULL OR account_id = ?2)"
            " AND (?3 OR readable AND NOT duplicate)"
            " ORDER BY seq LIMIT ?4",
            (after, account_id, raw, limit + 1),
        )
        arrivals: list[Arrival] = []
        size, more = 0, False
        for row in rows:
            size += 4 * len(row[4])
            more = len(arrivals) == limit or (size > PAGE_BYTES_MAX and bool(arrivals))
            if more:
                break
            arrivals.append(_arrival(row))
        rows.close()
        oldest = self._database.execute("SELECT min(seq) FROM message").fetchone()[0]
        next_seq = arrivals[-1].seq if arrivals else after
        return Page(tuple(arrivals), next_seq, more, (oldest or 1) - 1)

    def list_evictions(self) -> tuple[int, tuple[Eviction, ...]]:
        """How many there ever were, and the newest, oldest first."""
        total = self._database.execute(
            "SELECT value FROM meta WHERE name = 'evictions'"
        ).fetchone()[0]
        rows = self._database.execute("SELECT account_id, at FROM eviction ORDER BY seq")
        return total, tuple(Eviction(AccountId(row[0]), row[1]) for row in rows)

    # --- behaviour ---------------------------------------------------------------------------

    def behaviour(self, account_id: AccountId | None) -> Behaviour:
        """What holds for an account: its own behaviour, else everyone's, else none."""
        own = self._behaviours.get(account_id or EVERYONE)
        return own or self._behaviours.get(EVERYONE) or Behaviour()

    def set_behaviour(self, account_id: AccountId | None, behaviour: Behaviour | None) -> None:
        """Command an account (`None`: all that have none of their own); `None` takes it back.

        Raises `ValueError` when there are too many.
        """
        name = account_id or EVERYONE
        if behaviour is None:
            self._database.execute("DELETE FROM behaviour WHERE account_id = ?", (name,))
        else:
            if name not in self._behaviours and len(self._behaviours) >= BEHAVIOURS_MAX:
                raise ValueError(f"at most {BEHAVIOURS_MAX} accounts may have their own behaviour")
            self._database.execute(
                "INSERT OR REPLACE INTO behaviour VALUES (?, ?)", (name, dump_behaviour(behaviour))
            )
        self._database.execute("UPDATE meta SET value = value + 1 WHERE name = 'behaviour'")
        self._refresh_behaviours()

    def _spend(self, account_id: AccountId, remaining: Behaviour) -> None:
        """One of a limited number of times is used up, of whoever's behaviour it was."""
        own = account_id in self._behaviours
        self.set_behaviour(account_id if own else None, replace(remaining))

    def _refresh_behaviours(self) -> None:
        """Reload the commands if anyone has changed them since."""
        seen = self._database.execute("SELECT value FROM meta WHERE name = 'behaviour'").fetchone()
        if seen[0] != self._behaviours_seen:
            rows = self._database.execute("SELECT account_id, body FROM behaviour")
            self._behaviours = {row[0]: load_behaviour(row[1]) for row in rows}
            self._behaviours_seen = seen[0]

    def _count(self, table: str) -> int:
        return int(self._database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608 (our own names)


def _arrival(row: tuple[int, str, str, str, str, float, int, int]) -> Arrival:
    return Arrival(
        seq=row[0],
        account_id=AccountId(row[1]),
        to=row[2],
        message_id=MessageId(row[3]),
        text=row[4],
        at=row[5],
        readable=bool(row[6]),
        duplicate=bool(row[7]),
    )


def _require_well_formed(envelope: Envelope) -> None:
    if len(envelope.text) > TEXT_CHARACTERS_MAX or not 0 < len(envelope.to) <= TO_CHARACTERS_MAX:
        raise SendRefused(479, "malformed stanza: text too long, or no recipient")
    try:
        f"{envelope.message_id}{envelope.to}{envelope.text}".encode()
    except UnicodeEncodeError:
        # JSON can spell half a character ("\\ud800"); neither SQLite nor the wire can. The cause
        # would show the text.
        raise SendRefused(479, "malformed stanza: the text is not Unicode") from None
