"""A small WhatsApp of our own: the connector for `make run`, demos and tests.

Lives here: WhatsApp's server, the phone and the recipients, played on one SQLite file that the
instances of a host share through a directory; and the connector that logs in to it.
Never lives here: anything of the real WhatsApp, its protocol or its cryptography.

Like the real service it knows nothing of leases: it evicts the first of two logins of one device
(440) and shows a message as unreadable when the sender's ratchet was rolled back. What the stores
and the machine get wrong becomes visible here.
"""

from daemon.loopback.behaviour import Behaviour
from daemon.loopback.connection import LoopbackTiming
from daemon.loopback.connector import LoopbackConnector
from daemon.loopback.routes import loopback_router
from daemon.loopback.world import LoopbackWorld

__all__ = [
    "Behaviour",
    "LoopbackConnector",
    "LoopbackTiming",
    "LoopbackWorld",
    "loopback_router",
]
