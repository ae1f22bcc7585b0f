"""The process that runs.py forks ranks from, one for all of pytest-xdist's processes: its imports take eight seconds.

    python -m tests.fork_server NAME     # listens at the abstract socket NAME, which is a lock as well

A connection receives the pid of the process that will fork its ranks. Then it sends a request per line, and receives exit codes
per line: see `spawn` in runs.py. The server ends after the process that started it and its last connection have ended.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import NoReturn


def main(name: str) -> None:
    parent = os.getppid()
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.bind(f"\0{name}")
        except OSError:  # another process has started a server at the same time
            return
        server.listen()
        from tests import forked

        forked.prepare()
        server.settimeout(0.5)
        connections: set[int] = set()
        while connections or os.getppid() == parent:
            try:
                connection, _ = server.accept()
            except TimeoutError:
                pass
            else:
                if not (child := os.fork()):
                    server.close()
                    connection.setblocking(True)
                    answer(connection)
                connection.close()
                connections.add(child)
            connections = {child for child in connections if not os.waitpid(child, os.WNOHANG)[0]}


def answer(connection: socket.socket) -> NoReturn:
    """In the child: run what is asked for until the other side ends."""
    from tests import forked

    with connection.makefile("rw") as lines:
        lines.write(f"{os.getpid()}\n")
        lines.flush()
        for line in lines:
            request = json.loads(line)
            codes = forked.run_each(**request) if "ranks" in request else forked.run(**request)
            lines.write(json.dumps(codes) + "\n")
            lines.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
