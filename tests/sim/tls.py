"""TLS in front of a simulator that speaks none: what comes is passed on, and what is answered too."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
from pathlib import Path

from sim.pki import Authority


class TlsFront:
    """Listens on loopback with a certificate of `authority` for localhost, before the server at `port`."""

    def __init__(self, authority: Authority, directory: Path, port: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*authority.write_server(directory))
        self._behind = port
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> TlsFront:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._relay, args=(connection,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _relay(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:  # who does not trust us hangs up in the middle
            connection.settimeout(10)
            with (
                self._context.wrap_socket(connection, server_side=True) as outer,
                socket.create_connection(("127.0.0.1", self._behind)) as inner,
            ):
                self._pass_on(outer, inner)

    def _pass_on(self, outer: ssl.SSLSocket, inner: socket.socket) -> None:
        other: dict[socket.socket, socket.socket] = {outer: inner, inner: outer}
        while not self._closing.is_set():
            ready = [outer] if outer.pending() else select.select([outer, inner], [], [], 0.05)[0]
            for one in ready:
                if not (raw := one.recv(1 << 16)):
                    return
                other[one].sendall(raw)
