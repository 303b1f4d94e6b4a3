"""Every port's fake, held to the same contract suite as the adapters."""

from tests.fakes.clocks import WALL_AT_START, FakeClocks
from tests.fakes.codec import BROKEN, FakeCodec
from tests.fakes.connector import (
    Delivered,
    FakeBridge,
    FakeConnection,
    FakeConnector,
    FakeWhatsApp,
    Script,
)
from tests.fakes.journal import RecordingJournal
from tests.fakes.local_store import FakeLocalStore
from tests.fakes.shared_store import (
    LOST_REPLY,
    LOST_REQUEST,
    Archived,
    FakeSharedState,
    FakeSharedStore,
    Passage,
    applied_then_failing,
    failing,
)

__all__ = [
    "BROKEN",
    "LOST_REPLY",
    "LOST_REQUEST",
    "WALL_AT_START",
    "Archived",
    "Delivered",
    "FakeBridge",
    "FakeClocks",
    "FakeCodec",
    "FakeConnection",
    "FakeConnector",
    "FakeLocalStore",
    "FakeSharedState",
    "FakeSharedStore",
    "FakeWhatsApp",
    "Passage",
    "RecordingJournal",
    "Script",
    "applied_then_failing",
    "failing",
]
