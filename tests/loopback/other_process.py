"""A process of its own that logs an account in, sends if told to, and says what becomes of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trio

from daemon.loopback import LoopbackConnector
from machine.ports import Connected, ConnectionClosed
from machine.records import AccountId, KeyName, MessageId


async def main(keys: dict[KeyName, bytes]) -> None:
    connector = LoopbackConnector(Path(sys.argv[1]))
    async with (
        connector.open_bridge() as bridge,
        bridge.open_connection(AccountId("anna"), keys) as connection,
    ):
        try:
            while True:
                if isinstance(await connection.next_event(), Connected):
                    print("connected", flush=True)
                    break
            for number in range(int(sys.argv[2])):
                await connection.send_text(MessageId(str(number)), "4915187654321", "x")
                print(f"acknowledged {number}", flush=True)
            while True:
                await connection.next_event()
        except ConnectionClosed as closed:
            print(f"closed with {closed.code}", flush=True)


if __name__ == "__main__":
    told = json.loads(sys.stdin.readline())
    trio.run(main, {KeyName(name): value.encode() for name, value in told.items()})
