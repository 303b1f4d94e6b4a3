"""Who stands by: the hellos between instances, and what is known from them.

Hellos are for people and for `step-down`'s question whether anyone could take over. Nothing here
decides who may act: that is the lease alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import httpx
import msgspec
import trio

from daemon.http.links import build_request, is_me
from daemon.http.ports import ApiSettings, InstancePort
from daemon.http.server import Note
from machine.states import State

HELLO_PATH = "/api/internal/hello"
PEERS_MAX = 100
"""More than this are not remembered: a group is a handful of instances."""

HELLO_APART_S = 0.2
"""Two hellos are at least this far apart, however often the state changes."""

HELLO_ANSWER_BYTES_MAX = 256 * 1024


class WallClock(Protocol):
    """Seconds since 1970."""

    def __call__(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Peer:
    """Another instance as it last told of itself. `seen_at` is wall time, of the holder's clock."""

    name: str
    incarnation: str
    state: str
    address: str
    version: str
    seen_at: float


class Peers:
    """Remembers who said hello. Silent ones are forgotten after `ttl_s`, on Trio's clock."""

    def __init__(self, ttl_s: float, wall: WallClock, note: Note) -> None:
        self._ttl_s = ttl_s
        self.wall = wall
        self._note = note
        self._seen: dict[str, tuple[Peer, float]] = {}

    def see(self, *, name: str, incarnation: str, state: str, address: str, version: str) -> None:
        """Take a hello: the peer is there now."""
        known = self._seen.pop(name, None)
        self._forget_silent()
        if known is None or known[0].state != state:
            self._note("peer.seen", peer=name, state=state, address=address)
        while len(self._seen) >= PEERS_MAX:
            self._seen.pop(next(iter(self._seen)))
        peer = Peer(name, incarnation, state, address, version, self.wall())
        self._seen[name] = (peer, trio.current_time())

    def learn(self, peers: Iterable[Peer], own_name: str) -> None:
        """Take over what the holder knows, in place of what was known."""
        now = trio.current_time()
        self._seen = {
            peer.name: (peer, now) for peer in list(peers)[:PEERS_MAX] if peer.name != own_name
        }

    def known(self) -> tuple[Peer, ...]:
        """Everyone heard of within the last `ttl_s`, by name."""
        self._forget_silent()
        return tuple(sorted((peer for peer, _ in self._seen.values()), key=lambda p: p.name))

    def standbys(self) -> tuple[Peer, ...]:
        """Those who could take the lease."""
        return tuple(peer for peer in self.known() if peer.state == State.PASSIVE.value)

    def _forget_silent(self) -> None:
        oldest = trio.current_time() - self._ttl_s
        for name in [name for name, (_, at) in self._seen.items() if at < oldest]:
            del self._seen[name]
            self._note("peer.forgotten", peer=name, ttl_s=self._ttl_s)


async def keep_saying_hello(
    instance: InstancePort, settings: ApiSettings, client: httpx.AsyncClient, peers: Peers
) -> None:
    """Tell the holder every `hello_s` that we stand by, and learn from it who else does.

    A change of state or holder is told at once. Unanswered: asks again every `hello_first_s`.
    Loops until cancelled.
    """
    while True:
        answered = await _say_hello(instance, settings, client, peers)
        pause_s = settings.hello_s if answered else settings.hello_first_s
        with trio.move_on_after(pause_s):
            await instance.wait_changed()
        await trio.sleep(HELLO_APART_S)


async def _say_hello(
    instance: InstancePort, settings: ApiSettings, client: httpx.AsyncClient, peers: Peers
) -> bool:
    holder = instance.holder
    told = instance.state in {State.PASSIVE, State.DRAINING}
    if not told or holder is None or is_me(holder, instance.identity):
        return False
    said = {
        "id": instance.identity.name,
        "incarnation": instance.identity.incarnation,
        "state": instance.state.value,
        "address": instance.identity.address,
        "version": settings.version,
    }
    headers = [
        (b"authorization", f"Bearer {settings.tokens.own}".encode()),
        (b"content-type", b"application/json"),
    ]
    try:
        with trio.fail_after(settings.connect_s):
            url = holder.address.rstrip("/") + HELLO_PATH
            request = build_request(client, "POST", url, headers, msgspec.json.encode(said))
            response = await client.send(request)
    except (httpx.HTTPError, httpx.InvalidURL, trio.TooSlowError):
        return False
    found = _read_peers(response)
    if found is None:
        return False
    peers.learn(found, instance.identity.name)
    return True


class _SaidPeer(msgspec.Struct, rename="camel"):
    id: str
    incarnation: str
    state: str
    address: str
    version: str
    seen_at: float


class _SaidPeers(msgspec.Struct):
    peers: list[_SaidPeer]


def _read_peers(response: httpx.Response) -> list[Peer] | None:
    if response.status_code != 200 or len(response.content) > HELLO_ANSWER_BYTES_MAX:
        return None
    try:
        said = msgspec.json.decode(response.content, type=_SaidPeers)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return [
        Peer(peer.id, peer.incarnation, peer.state, peer.address, peer.version, peer.seen_at)
        for peer in said.peers
    ]


def peer_json(peer: Peer) -> Mapping[str, object]:
    """A peer as it goes over the wire between instances; `seenAt` in seconds since 1970."""
    return {
        "id": peer.name,
        "incarnation": peer.incarnation,
        "state": peer.state,
        "address": peer.address,
        "version": peer.version,
        "seenAt": peer.seen_at,
    }
