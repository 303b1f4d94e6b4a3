"""Releasing in a dead daemon's name: its own lease, nobody else's, on both stores."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio

from daemon.crash_release import firestore_store, main, sqlite_store
from daemon.firestore.client import open_firestore
from daemon.firestore.lease import FirestoreLeaseStore
from daemon.sqlite.shared import open_sqlite_shared
from daemon.warden import FAILED, NOT_OURS, RELEASED
from machine.lease import HeldLease, LeaseTiming, renew_once, try_acquire
from machine.ports import LeaseStore
from machine.records import Identity, LeaseState, LeaseView
from tests.emulator import new_project
from tests.fakes.clocks import FakeClocks

DEAD = Identity("a", "a-1", "http://a")
TIMING = LeaseTiming(ttl_s=60.0)

Work = Callable[[LeaseStore], Awaitable[object]]


@dataclass(frozen=True)
class Place:
    """A store, and what names it to the one who releases."""

    named: dict[str, Any]

    def lease(self, epoch: int = 1, incarnation: str = "a-1") -> dict[str, Any]:
        return {**self.named, "epoch": epoch, "incarnation": incarnation}

    def work(self, work: Work) -> Any:
        """Do something in the store, as another process would."""

        async def run() -> object:
            async with self._open() as store:
                return await work(store)

        return trio.run(run)

    def view(self) -> LeaseView:
        seen: LeaseView = self.work(lambda store: store.read())
        return seen

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[LeaseStore]:
        if self.named["store"] == "sqlite":
            async with open_sqlite_shared(Path(self.named["path"])) as sqlite:
                yield sqlite
            return
        async with open_firestore(self.named["project"], "(default)", self.named["emulator"]) as it:
            yield FirestoreLeaseStore(it, self.named["group"])


@pytest.fixture(params=["sqlite", pytest.param("firestore", marks=pytest.mark.emulator)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite":
        made = Place(sqlite_store(tmp_path / "shared.db"))
    else:
        emulator = request.getfixturevalue("firestore_emulator")
        made = Place(firestore_store(new_project(), "(default)", emulator, "group"))
    made.work(lambda store: store.initialise())
    return made


async def acquire(store: LeaseStore, who: Identity = DEAD) -> HeldLease:
    held = await try_acquire(store, await store.read(), who, TIMING, FakeClocks(), random.Random(1))
    assert held is not None
    return held


def test_the_lease_of_a_dead_daemon_is_free_at_once(place: Place) -> None:
    place.work(acquire)
    assert main(place.lease()) == RELEASED
    view = place.view()
    assert (view.lease.state, view.fence.state) == (LeaseState.RELEASED, LeaseState.RELEASED)
    assert view.fence.epoch == 1
    assert view.fence.history[-1].reason == "its process died; released in its name"
    assert view.fence.history[-1].changed_by == "a"


def test_a_renewal_that_was_never_told_is_the_dead_ones_own(place: Place) -> None:
    async def renew(store: LeaseStore) -> None:
        held = await acquire(store)
        assert await renew_once(held, store, TIMING, FakeClocks(), random.Random(2))

    place.work(renew)
    assert main(place.lease()) == RELEASED


def test_an_epoch_that_was_never_told_is_the_dead_ones_own(place: Place) -> None:
    async def acquire_twice(store: LeaseStore) -> None:
        await acquire(store)
        await acquire(store)

    place.work(acquire_twice)
    assert main(place.lease(epoch=1)) == RELEASED
    assert place.view().fence.epoch == 2


@pytest.mark.parametrize("who", [Identity("b", "b-1", "http://b"), replace(DEAD, incarnation="x")])
def test_the_lease_of_another_process_is_left_alone(place: Place, who: Identity) -> None:
    """Also that of the same name's next process, which is up already."""
    place.work(lambda store: acquire(store, who))
    before = place.view()
    assert main(place.lease()) == NOT_OURS
    assert replace(place.view(), age_s=0.0) == replace(before, age_s=0.0)


def test_an_older_epoch_than_the_dead_one_held_is_left_alone(place: Place) -> None:
    """Documents from a backup: whatever they say, it is not what died."""
    place.work(acquire)
    assert main(place.lease(epoch=2)) == NOT_OURS


def test_a_lease_that_is_released_is_not_written_again(place: Place) -> None:
    place.work(acquire)
    assert main(place.lease()) == RELEASED
    before = place.view()
    assert main(place.lease()) == NOT_OURS
    assert place.view().lease_stamp == before.lease_stamp


def test_a_store_that_cannot_be_read_is_said_in_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "shared.db"
    broken.write_text("not a database, and long enough to be looked at" * 100)
    assert main({**sqlite_store(broken), "epoch": 1, "incarnation": "a-1"}) == FAILED
    told = capfd.readouterr().err
    assert told.startswith("watchkeeper: the dead daemon's lease: ")
    assert "Traceback" not in told


@pytest.mark.emulator
def test_a_store_that_does_not_answer_is_given_up_in_time() -> None:
    # Nobody listens on this port; the process has some seconds to live.
    lease = firestore_store("p", "(default)", "127.0.0.1:9", "group")
    began = time.monotonic()
    assert main({**lease, "epoch": 1, "incarnation": "a-1"}) == FAILED
    assert time.monotonic() - began < 4
