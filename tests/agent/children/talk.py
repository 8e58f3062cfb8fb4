"""What the test programs share: lines of JSON on the socket that the daemon passed."""

from __future__ import annotations

import argparse
import select
import socket
from collections.abc import Iterator
from typing import Any

from edgeward_agent.messages import encode
from edgeward_wire.document import Document


class Talk:
    """The child's end of the conversation."""

    def __init__(self) -> None:
        parser = argparse.ArgumentParser()
        parser.add_argument("--fd", type=int, required=True)
        self.socket = socket.socket(fileno=parser.parse_args().fd)
        self.buffer = b""

    def say(self, message: Document) -> None:
        self.socket.sendall(encode(message))

    def lines(self, pause_s: float | None) -> Iterator[bytes | None]:
        """Each line that comes; None after each `pause_s` without one. Ends with the conversation."""
        while True:
            *lines, self.buffer = self.buffer.split(b"\n")
            yield from lines
            ready, _, _ = select.select([self.socket], [], [], pause_s)
            if not ready:
                yield None
                continue
            data: Any = self.socket.recv(1 << 16)
            if not data:
                return
            self.buffer += data
