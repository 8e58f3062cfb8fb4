"""A real HTTPS server on loopback that can misbehave: it cuts, drips, lies and never ends."""

from __future__ import annotations

import contextlib
import re
import ssl
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sim.pki import Authority

_RANGE = re.compile(r"^bytes=(\d+)-$")
_CHUNK = 16 << 10


@dataclass
class Fault:
    """What goes wrong on one path, for the next `times` requests (None: always)."""

    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    drip: bool = False
    """Send a byte every half second."""
    drip_headers: bool = False
    endless: bool = False
    """No Content-Length, and a body without end."""
    ignore_range: bool = False
    wrong_range: bool = False
    status: int | None = None
    times: int | None = None


@dataclass(frozen=True)
class Request:
    """What a handler gets."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Reply:
    """What a handler gives."""

    status: int
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Server:
    """Serves `files` (path -> bytes) and `handlers` ((method, path) -> function) over TLS."""

    def __init__(self, authority: Authority, directory: Path) -> None:
        self.files: dict[str, bytes] = {}
        self.handlers: dict[tuple[str, str], Callable[[Request], Reply]] = {}
        self.faults: dict[str, Fault] = {}
        self.requests: list[Request] = []
        self.sent: Counter[str] = Counter()
        """Bytes of bodies sent, by path."""
        self.closing = threading.Event()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*authority.write_server(directory))
        self._http = _Listener(self, context)
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Its base address."""
        return f"https://127.0.0.1:{self._http.server_address[1]}"

    def close(self) -> None:
        """Stop, and wait for all of its threads."""
        self.closing.set()
        self._http.shutdown()
        self._http.hang_up()
        self._http.server_close()
        self._thread.join()

    def fault(self, path: str) -> Fault:
        """The fault of this request; one with `times` wears off."""
        fault = self.faults.get(path)
        if fault is None:
            return Fault()
        if fault.times is not None:
            fault.times -= 1
            if fault.times <= 0:
                del self.faults[path]
        return fault


class _Listener(ThreadingHTTPServer):
    daemon_threads = False
    block_on_close = True

    def __init__(self, simulator: Server, context: ssl.SSLContext) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.simulator = simulator
        self._context = context
        self._open: set[Any] = set()

    def get_request(self) -> tuple[Any, Any]:
        raw, address = super().get_request()
        raw.settimeout(60)
        connection = self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False)
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(2)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away as part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def do_GET(self) -> None:  # http.server's name
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def _serve(self, method: str) -> None:
        length = int(self.headers.get("Content-Length", 0))
        request = Request(method, self.path, dict(self.headers.items()), self.rfile.read(length))
        self._simulator.requests.append(request)
        fault = self._simulator.fault(self.path)
        if fault.drip_headers:
            self._drip(b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 10_000)
            return
        handler = self._simulator.handlers.get((method, self.path))
        if fault.status is not None:
            self._answer(Reply(fault.status, b"fault"), fault)
        elif handler is not None:
            self._answer(handler(request), fault)
        elif method == "GET" and self.path in self._simulator.files:
            self._file(self._simulator.files[self.path], fault)
        else:
            self._answer(Reply(404, b"not here"), fault)

    def _file(self, data: bytes, fault: Fault) -> None:
        asked = _RANGE.match(self.headers.get("Range", ""))
        if not asked or fault.ignore_range:
            self._answer(Reply(200, data), fault)
            return
        first, total = int(asked[1]), len(data)
        if first >= total:
            self._answer(Reply(416, b"", {"Content-Range": f"bytes */{total}"}), fault)
            return
        shown = first + 1 if fault.wrong_range else first
        headers = {"Content-Range": f"bytes {shown}-{total - 1}/{total}"}
        self._answer(Reply(206, data[first:], headers), fault)

    def _answer(self, reply: Reply, fault: Fault) -> None:
        self.send_response_only(reply.status)
        headers = {"Date": self.date_time_string(), **reply.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        if fault.endless:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if fault.drip:
            self._drip(reply.body)
            return
        for chunk in self._chunks(reply.body, fault):
            self.wfile.write(chunk)
            self._simulator.sent[self.path] += len(chunk)
        if fault.cut_after is not None:
            self.wfile.flush()
            self.close_connection = True

    def _chunks(self, body: bytes, fault: Fault) -> Iterator[bytes]:
        if fault.endless:
            while not self._simulator.closing.is_set():
                yield b" " * _CHUNK
        body = body if fault.cut_after is None else body[: fault.cut_after]
        for start in range(0, len(body), _CHUNK):
            yield body[start : start + _CHUNK]

    def _drip(self, data: bytes) -> None:
        for value in data:
            if self._simulator.closing.wait(0.5):
                break
            self.wfile.write(bytes([value]))
            self.wfile.flush()
        self.close_connection = True

    @property
    def _simulator(self) -> Server:
        assert isinstance(self.server, _Listener)
        return self.server.simulator
