"""A daemon's part as far as its bridge goes, run as a process so that it can be killed.

Prints the pids of its bridge processes once an account is open in each, and then waits.
"""

from __future__ import annotations

import sys
from contextlib import AsyncExitStack

import trio

from daemon.bridge.connector import BridgeLimits
from machine.records import AccountId
from tests.bridge.steps import connected, connector, message_id


async def main(text: str) -> None:
    async with (
        connector(limits=BridgeLimits(accounts_max=1)) as (made, _),
        made.open_bridge() as bridge,
        AsyncExitStack() as stack,
        trio.open_nursery() as nursery,
    ):
        for number in range(2):
            account_id = AccountId(f"account-{number}")
            connection = await stack.enter_async_context(connected(bridge, account_id))
            nursery.start_soon(connection.send_text, message_id(number), "49151", text)
        await trio.sleep(0.3)
        print(" ".join(str(process.pid) for process in made._processes), flush=True)
        await trio.sleep_forever()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
