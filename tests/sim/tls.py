"""TLS in front of a simulator that speaks none: what comes is passed on, and what is answered too."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
from pathlib import Path

from sim.listener import Listener
from sim.pki import Authority


class TlsFront(Listener):
    """Listens on loopback with a certificate of `authority` for localhost, before the server at `port`."""

    def __init__(self, authority: Authority, directory: Path, port: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*authority.write_server(directory))
        self._behind = port
        super().__init__()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:  # who does not trust us hangs up in the middle
            connection.settimeout(10)
            with (
                self._context.wrap_socket(connection, server_side=True) as outer,
                socket.create_connection(("127.0.0.1", self._behind)) as inner,
            ):
                self._pass_on(outer, inner)

    def _pass_on(self, outer: ssl.SSLSocket, inner: socket.socket) -> None:
        other: dict[socket.socket, socket.socket] = {outer: inner, inner: outer}
        while not self.closing.is_set():
            ready = [outer] if outer.pending() else select.select([outer, inner], [], [], 0.05)[0]
            for one in ready:
                if not (raw := one.recv(1 << 16)):
                    return
                other[one].sendall(raw)
