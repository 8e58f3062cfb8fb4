"""HTTP/1.1 for a handful of local clients, on the standard library's server.

Invariants: at most `MAX_CONNECTIONS` threads, and one more connection is told so; a request's header comes
within `header_s`, its body at `LEAST_RATE` or faster, an idle connection is closed after `IDLE_S` (a clock
in a thread of its own cuts those that drip); the bodies in memory are bounded all together; what is refused
is one line of JSON; a client that goes away is nobody's fault.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from edgeward_agent.hosts import LOCAL, known_host
from edgeward_agent.serving.faults import Fault

log = logging.getLogger("edgeward.serving")

MAX_CONNECTIONS = 64
HEADER_S = 10.0
IDLE_S = 30.0
LINGER_S, LINGER_BYTES = 2.0, 16 << 20
"""How long, and how much, a refused sender may go on before it is cut off."""
LEAST_RATE = 256 << 10
"""Bytes a second of a body."""
_BODIES = 4
"""So many of the largest bodies may be in memory."""
_CLOCK_S = 0.5
_PART = 1 << 18
_FULL = b'{"error": "Too many are connected already."}'


@dataclass(frozen=True)
class Query:
    """One request."""

    method: str
    path: str
    parameters: str
    header: Callable[[str], str | None]
    body: bytes = field(repr=False, default=b"")


@dataclass(frozen=True)
class Reply:
    """One answer."""

    status: int
    parts: Sequence[bytes]
    kind: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()
    route: str = ""


Answer = Callable[[Query], Reply]


def told(status: int, said: Any, route: str = "", headers: Sequence[tuple[str, str]] = ()) -> Reply:
    """JSON."""
    return Reply(status, [json.dumps(said, ensure_ascii=False).encode()], headers=headers, route=route)


def refusal(fault: Fault, route: str = "") -> Reply:
    """{"error": ...}."""
    headers = [("Retry-After", str(fault.retry_s))] if fault.retry_s is not None else []
    return told(fault.status, {"error": fault.reason}, route, headers)


class Server(ThreadingHTTPServer):
    """Binds at once. Raises OSError."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        address: tuple[str, int],
        answer: Answer,
        count: Callable[[str, int, float], None],
        *,
        token: str = "",
        max_body: int,
        header_s: float = HEADER_S,
    ) -> None:
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        self.answer, self.count, self.token, self.max_body = answer, count, token, max_body
        self.header_s = header_s
        self._room = threading.Semaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        self._due: dict[socket.socket, float] = {}
        self._bytes_left = max_body * _BODIES
        super().__init__(address, _Handler)
        threading.Thread(target=self._watch, name="clock", daemon=True).start()

    def server_bind(self) -> None:
        """As http.server does, without asking DNS for our own name."""
        socket.socket.setsockopt(self.socket, socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        """One more connection."""
        if not self._room.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.settimeout(1)
                request.sendall(
                    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
                    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(_FULL), _FULL)
                )
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """On the connection's thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.expect(request, None)
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A bug of ours, in one connection: say so, and serve the others."""
        log.exception("a request of %s failed", client_address)

    def expect(self, link: socket.socket, within_s: float | None) -> None:
        """Cut the connection when it is not over with what it does by then; None: never."""
        with self._lock:
            if within_s is None:
                self._due.pop(link, None)
            else:
                self._due[link] = time.monotonic() + within_s

    def _watch(self) -> None:
        while True:
            time.sleep(_CLOCK_S)
            now = time.monotonic()
            with self._lock:
                late = [link for link, due in self._due.items() if due < now]
            for link in late:
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RD)  # it may still be told why

    def take(self, length: int) -> None:
        """Memory for a body. Raises Fault."""
        with self._lock:
            if length > self._bytes_left:
                raise Fault(429, "Too many bodies are on their way.", 1)
            self._bytes_left -= length

    def give(self, length: int) -> None:
        """The body is read no more."""
        with self._lock:
            self._bytes_left += length


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]  # what socketserver sets
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    _asks_first = False

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # it went away
            super().handle()

    def handle_one_request(self) -> None:
        self.server.expect(self.connection, IDLE_S)
        if not self.rfile.peek(1):  # type: ignore[attr-defined]  # http.server makes a buffered reader
            self.close_connection = True
            return
        self.server.expect(self.connection, self.server.header_s)
        self._asks_first = False
        super().handle_one_request()

    def handle_expect_100(self) -> bool:
        """Who asks before it sends its body is told to go on once we want it, and else why not."""
        self._asks_first = True
        return True

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        began, taken = time.perf_counter(), 0
        try:
            taken = self._length()
            self._admit()
            self.server.take(taken)
        except Fault as fault:
            self.close_connection = True
            self._reply(refusal(fault), began)
            self._let_finish()
            return
        try:
            self._go_on()
            body = self._body(taken)
            self.server.expect(self.connection, None)
            path, _, parameters = self.path.partition("?")
            method = "GET" if self.command == "HEAD" else self.command
            query = Query(method, path, parameters, self.headers.get, body)
            try:
                reply = self.server.answer(query)
            except Fault as fault:
                reply = refusal(fault, "other")
            self._reply(reply, began)
        except Fault as fault:
            self.close_connection = True
            self._reply(refusal(fault), began)
        finally:
            self.server.give(taken)

    def _go_on(self) -> None:
        if self._asks_first:
            self.send_response_only(100)
            self.end_headers()
            self.wfile.flush()

    def _admit(self) -> None:
        token = self.server.token
        if token:
            said = self.headers.get("Authorization", "")
            if not hmac.compare_digest(said.encode(), f"Bearer {token}".encode()):
                raise Fault(401, "The token is missing or wrong: Authorization: Bearer TOKEN.")
        elif self.headers.get("Origin") is not None:
            # A page from anywhere could ask through the browser of whoever sits at this device.
            raise Fault(403, "Pages of other sites are not served.")
        elif (host := self.headers.get("Host")) and not known_host(host, LOCAL):
            raise Fault(403, "Ask for localhost or an address: this name may be another site's.")

    def _length(self) -> int:
        if self.headers.get("Transfer-Encoding") is not None:
            raise Fault(411, "Say Content-Length: bodies of unknown length are not read.")
        if self.headers.get("Content-Encoding", "identity") != "identity":
            raise Fault(415, "Send the body as it is, not compressed.")
        said = self.headers.get_all("Content-Length", [])
        if not said and self.command in ("GET", "HEAD"):
            return 0
        if len(said) != 1 or not said[0].isascii() or not said[0].isdecimal() or len(said[0]) > 12:
            raise Fault(411 if not said else 400, "Content-Length is one whole number.")
        if int(said[0]) > self.server.max_body:
            raise Fault(413, f"A body has at most {self.server.max_body} bytes.")
        return int(said[0])

    def _body(self, length: int) -> bytes:
        if not length:
            return b""
        self.server.expect(self.connection, self.server.header_s + length / LEAST_RATE)
        body = bytearray()
        while len(body) < length:  # what came takes memory, not what was announced
            part = self.rfile.read1(min(_PART, length - len(body)))
            if not part:
                raise Fault(400, f"The body ended after {len(body)} of {length} bytes, or came too slowly.")
            body += part
        return bytes(body)

    def _let_finish(self) -> None:
        """Throw away what is still coming, within bounds: who is cut off while it sends never reads why."""
        self.server.expect(self.connection, LINGER_S)
        left = LINGER_BYTES
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (part := self.rfile.read1(min(_PART, left))):
                left -= len(part)

    def _reply(self, reply: Reply, began: float) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(sum(map(len, reply.parts))))
        for name, value in reply.headers:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        for part in reply.parts if self.command != "HEAD" else ():
            self.wfile.write(part)
        self.wfile.flush()
        self.server.count(reply.route or "refused", reply.status, time.perf_counter() - began)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server refuses by itself: one line of JSON as well."""
        self.close_connection = True
        said = (message or explain or "This request is not understood.")[:200]
        if not hasattr(self, "request_version") or self.request_version == "HTTP/0.9":
            self.request_version = "HTTP/1.1"
        self._reply(refusal(Fault(int(code), said)), time.perf_counter())

    def version_string(self) -> str:
        return "edgeward"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)
