"""Ports of loopback for servers that start later. As a program: `ports.py COUNT` prints so many.

A port that the kernel hands out is free again until its server listens, and every outgoing connection of
this machine may be given it meanwhile. So these are from outside the range that the kernel gives from. Each
process begins at a random place, and gives none twice before it has given all.
"""

from __future__ import annotations

import itertools
import random
import socket
import sys
import time
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_FIRST, _LAST = 10_000, 65_535
"""Below them live services that are known by their numbers."""
_FEW = 1000


def _outside(first: int, last: int) -> list[int]:
    """What the kernel never gives by itself; all that there are, where it gives nearly all."""
    ports = [port for port in range(_FIRST, _LAST + 1) if not first <= port <= last]
    return ports if len(ports) >= _FEW else list(range(_FIRST, _LAST + 1))


def _ephemeral() -> tuple[int, int]:
    try:
        first, last = _EPHEMERAL.read_text().split()
    except OSError:
        return 32_768, 65_535
    return int(first), int(last)


_ports = _outside(*_ephemeral())
_start = random.SystemRandom().randrange(len(_ports))  # not the generator that a test may have seeded
_next = itertools.cycle(_ports[_start:] + _ports[:_start])


def is_free(port: int) -> bool:
    """Whether a server could listen there now, as servers do: what closed connections linger over is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, each another."""
    found = list(itertools.islice(filter(is_free, itertools.islice(_next, len(_ports))), count))
    assert len(found) == count, "every port is taken"
    return found


def free_port() -> int:
    """One of them."""
    return free_ports(1)[0]


def until_free(port: int, within_s: float = 30.0) -> None:
    """Wait for the end of whoever listens there: who was told to go takes a moment."""
    deadline = time.monotonic() + within_s
    while not is_free(port):
        assert time.monotonic() < deadline, f"port {port} is still taken"
        time.sleep(0.02)


if __name__ == "__main__":
    print(*free_ports(int(sys.argv[1])))
