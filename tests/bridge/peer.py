"""A bridge process in a few lines of Python: the other side of docs/bridge.md, as tests want it.

It runs as a real child, on the real descriptor. Any account connects, any send is acknowledged with
a step of its recipient's session; a `send` whose text begins with `do:` is a script instead.
"""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

line = socket.socket(fileno=3)
phones: dict[int, str] = {}
sessions: dict[tuple[str, str], int] = {}
closing_hangs: set[int] = set()
last_words: dict[int, dict[str, object]] = {}
"""What a connection still has to tell when it is closed."""


def write(frame: dict[str, object]) -> None:
    line.sendall(json.dumps({"v": 1, **frame}).encode() + b"\n")


def act(call: dict[str, object], action: dict[str, object]) -> None:
    """One step of a script."""
    match action:
        case {"frame": dict(frame)}:
            write({"connection": call["connection"], **frame})
        case {"reply": dict(reply)}:
            write({"reply": call["id"], **reply})
        case {"raw": str(raw)}:
            line.sendall(raw.encode())
        case {"long": int(size)}:
            line.sendall(b"x" * size)
        case {"exit": int(code)}:
            os._exit(code)
        case {"signal": int(number)}:
            os.kill(os.getpid(), number)
        case {"hang": float(seconds)}:
            time.sleep(seconds)
        case {"print": str(text)}:
            sys.stderr.write(text)
            sys.stderr.flush()
        case {"close": "line"}:
            line.shutdown(socket.SHUT_RDWR)
            time.sleep(60)
        case {"close": "hangs"}:
            closing_hangs.add(int(str(call["connection"])))
        case {"close": dict(keys)}:
            last_words[int(str(call["connection"]))] = keys
        case {"tell": "deadline"}:
            told_ms = str(call["deadlineMs"])
            write({"reply": call["id"], "ok": {"keys": {"deadlineMs": told_ms}}})
        case {"tell": "environment"}:
            told = {name: value for name, value in os.environ.items() if name != "LC_CTYPE"}
            answer = {
                "environment": told,
                "descriptors": sorted(int(one.name) for one in Path("/proc/self/fd").iterdir()),
                "group": os.getpgid(0),
                "parent": os.getppid(),
                "arguments": sys.argv[1:],
            }
            write({"reply": call["id"], "ok": {"keys": {"told": json.dumps(answer)}}})
        case _:
            raise AssertionError(action)


def open_connection(call: dict[str, object]) -> None:
    account, keys = str(call["account"]), call["keys"]
    number = int(str(call["connection"]))
    if account == "stays-closed":
        write(
            {
                "reply": call["id"],
                "error": {"kind": "closed", "code": 402, "message": "no", "expireS": 60},
            }
        )
        return
    if isinstance(keys, dict) and "creds" not in keys:
        write({"reply": call["id"], "error": {"kind": "unusable", "message": "no creds"}})
        return
    write({"reply": call["id"], "ok": {}})
    phones[number] = account
    if account == "poison":
        write({"event": "connected", "connection": number, "phone": "4915100000"})
        os._exit(1)
    if keys is None:
        write({"event": "qr", "connection": number, "qr": f"qr-{account}", "expiresAt": 2e9})
        return
    assert isinstance(keys, dict)
    dropped = {
        name: None
        for name in keys
        for to in call["doubtful"]  # type: ignore[attr-defined]
        if name.startswith(f"session-{to}.")
    }
    if call["distrustSessions"]:
        dropped |= {name: None for name in keys if name.startswith("session-")}
    for name, value in keys.items():
        if name.startswith("session-"):
            sessions[account, name] = 0 if name in dropped else int(str(value))
    if dropped:
        write({"ask": "keys", "id": 900 + number, "connection": number, "values": dropped})
    if account != "never-connects":
        write({"event": "connected", "connection": number, "phone": "4915100000"})


def send(call: dict[str, object]) -> None:
    text, to = str(call["text"]), str(call["to"])
    if text.startswith("do:"):
        for action in json.loads(text[3:]):
            act(call, action)
        return
    name = f"session-{to}.0"
    account = phones[int(str(call["connection"]))]
    position = sessions[account, name] = sessions.get((account, name), 0) + 1
    write({"reply": call["id"], "ok": {"keys": {name: str(position)}}})


def serve_call(call: dict[str, object]) -> None:
    reply, connection = {"reply": call["id"]}, call.get("connection")
    if connection is not None and call["call"] != "open" and connection not in phones:
        error = {"kind": "closed", "code": 428, "message": "no such connection"}
        write({**reply, "error": error})
        return
    match call["call"]:
        case "hello":
            write({**reply, "ok": {"node": "0", "baileys": "none", "pid": os.getpid()}})
        case "open":
            open_connection(call)
        case "send":
            send(call)
        case "onWhatsApp" if str(call["to"]).endswith("999"):
            write({**reply, "error": {"kind": "failed", "message": "the server did not say"}})
        case "onWhatsApp":
            write({**reply, "ok": {"exists": not str(call["to"]).endswith("0")}})
        case "pairingCode":
            write({**reply, "ok": {"code": "ABCD1234", "expiresAt": 2e9}})
        case "logout":
            event = {"event": "closed", "connection": connection, "code": 401, "message": "out"}
            write(event)
            write({**reply, "ok": {}})
        case "close" if connection not in closing_hangs:
            number = int(str(connection))
            if number in last_words:
                values = last_words[number]
                write({"ask": "keys", "id": 800 + number, "connection": number, "values": values})
            del phones[number]
            write({**reply, "ok": {}})
        case "close":
            pass
        case "ping":
            write({**reply, "ok": {"rssBytes": 1, "cpuS": 0.1, "connections": len(phones)}})


def answered(frame: dict[str, object]) -> None:
    """Say what an ask was answered, as a log record."""
    write({"event": "log", "level": "debug", "message": f"answered {json.dumps(frame)}"})


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if "refuse-hello" in sys.argv:
        sys.exit(9)
    if "mute" in sys.argv:
        time.sleep(60)
    for raw in line.makefile("rb"):
        frame = json.loads(raw)
        if "answer" in frame:
            answered(frame)
        else:
            serve_call(frame)


if __name__ == "__main__":
    main()
