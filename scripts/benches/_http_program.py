"""Clients of a completion server, on plain sockets, so that they take little of the cores:

    python _http_program.py PORT < BODIES

Each line is the body of a request; all are sent at once, each on a connection of its own, and read
to their ends. Clients of a server are elsewhere as a rule and take none of its cores: once one has
its first event, the system wakes it for 64 KiB or the end, not for every token. Says as JSON the
seconds from the first sending to the last end, and of each request the seconds to its first event,
and how many tokens its server counted.
"""

from __future__ import annotations

import json
import re
import selectors
import socket
import sys
import time
from typing import Any

PATH = "/v1/completions"
END = 4096  # bytes of an answer that hold its usage
MUCH = 65536  # bytes that are worth waking for


def main() -> None:
    port, bodies = int(sys.argv[1]), [line.strip().encode() for line in sys.stdin]
    chosen = selectors.DefaultSelector()
    requests = []
    for body in bodies:
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        connection = socket.create_connection(("127.0.0.1", port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        requests.append((connection, head.encode() + body))
    start = time.perf_counter()
    sent: dict[Any, float] = {}
    first: dict[Any, float] = {}
    ends: dict[Any, bytes] = {}
    for connection, data in requests:
        connection.sendall(data)
        sent[connection] = time.perf_counter()
        chosen.register(connection, selectors.EVENT_READ)
        ends[connection] = b""
    while chosen.get_map():
        for key, _ in chosen.select():
            ready: Any = key.fileobj
            data = ready.recv(MUCH)
            if ready not in first and b"data: " in data:
                first[ready] = time.perf_counter() - sent[ready]
                ready.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, MUCH)
            ends[ready] = (ends[ready] + data)[-END:] if data else ends[ready]
            if not data:
                chosen.unregister(ready)
    seconds = time.perf_counter() - start
    if not all(b"[DONE]" in end for end in ends.values()):
        raise SystemExit(f"an answer did not come to its end: {ends}")
    counts = [re.findall(rb'"completion_tokens": ?(\d+)', end)[-1] for end in ends.values()]
    found = {"seconds": seconds, "first": list(first.values()), "tokens": [*map(int, counts)]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
