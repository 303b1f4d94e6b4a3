"""The same API, whose sends do nothing: `python -m bench.nothing PORT`.

Everything around the route is the product's (sockets, HTTP, token, validation, answer); only the
desk behind it is a stand-in that calls every message acknowledged at once.
"""

from __future__ import annotations

import sys

import trio

from daemon.http.app import serve_api
from daemon.http.auth import Tokens
from daemon.http.ports import ApiSettings
from machine.outbox import make_message_id
from machine.records import AccountId, Message, MessageId, MessageState
from machine.states import State
from tests.http.fakes import NOW, FakeDesk, FakeInstance, World
from tests.system.cluster import TOKEN


class NothingDesk(FakeDesk):
    """Accepts everything, keeps nothing."""

    async def accept(
        self,
        *,
        message_id: MessageId,
        account_id: AccountId,
        to: str,
        text: str,
        idempotency_key: str | None,
    ) -> Message:
        """Answer at once, as for a message that the server has."""
        return Message(
            message_id=message_id,
            account_id=account_id,
            to=to,
            text=text,
            state=MessageState.SERVER_ACK,
            epoch=self.epoch,
            created_at=NOW,
            updated_at=NOW,
            idempotency_key=idempotency_key,
            state_at={MessageState.SERVER_ACK: NOW},
        )


async def serve(port: int) -> None:
    """Serve until the process is ended."""
    world = World()
    instance = FakeInstance(world)
    world.activate(instance)
    instance.desk = NothingDesk(world, 1)
    instance.state = State.ACTIVE
    settings = ApiSettings(tokens=Tokens((TOKEN,)), version="bench", bind=f"127.0.0.1:{port}")
    await serve_api(instance, settings, make_message_id=make_message_id)


if __name__ == "__main__":
    trio.run(serve, int(sys.argv[1]))
