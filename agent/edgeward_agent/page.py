"""The local page: what this device sees and does, for whoever stands beside it: `edgeward_agent.page --fd N`.

A child of the daemon; its first line on descriptor N is its settings, it answers one line whether it
listens, and end of file ends it. It reads status.json and the runners' sockets and changes nothing: a page
that is attacked, or hangs, holds up neither the daemon nor inference.

Invariants: loopback, unless there is a token. The Host header must be one that no other page on the web can
have (DNS rebinding). Connections, requests and what is kept are bounded. No numpy, OpenCV, ONNX Runtime or
pydantic.
"""

from __future__ import annotations

import argparse
import base64
import hmac
import http.cookies
import http.server
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from edgeward_agent import local_socket
from edgeward_agent.hosts import LOCAL, known_host
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable

MAX_CLIENTS = 16
MAX_STATUS = 4 << 20
MAX_SIDE = 960
FRESH_S = 0.2
"""Everybody who looks shares one copy of a frame for so long."""
_MAX_KEPT = 64
_MAX_QUERY = 1000
_MAX_FIELDS = 8
_IDLE_S = 10.0
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_COOKIE = "edgeward"
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Settings:
    """What the daemon says first."""

    state: Path
    host: str
    port: int
    token: str | None
    window_s: float
    """How often the status is written anew while a model serves."""


def own_names(host: str) -> frozenset[str]:
    """The names that this device answers to."""
    if host in LOCAL:
        return LOCAL
    name = socket.gethostname().lower()
    return LOCAL | {name, name.partition(".")[0], f"{name.partition('.')[0]}.local", host.lower()}


class Frames:
    """The newest frame of each source as JSON, asked for at most once in `FRESH_S`."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock = threading.Lock()
        self._kept: dict[tuple[str, str], _Kept] = {}

    def get(self, pipeline: str, source: str) -> bytes:
        """Raises Rejected, Unavailable."""
        if not (_NAME.fullmatch(pipeline) and _NAME.fullmatch(source)):
            raise Rejected("That is not the name of a pipeline and a source.")
        with self._lock:
            if len(self._kept) >= _MAX_KEPT and (pipeline, source) not in self._kept:
                self._kept.clear()
            kept = self._kept.setdefault((pipeline, source), _Kept())
        with kept.lock:
            if time.monotonic() - kept.at > FRESH_S:
                header, jpeg = local_socket.frame(self._run, pipeline, source, MAX_SIDE)
                shown = {**header, "jpeg": base64.b64encode(jpeg).decode()}
                kept.json, kept.at = json.dumps(shown).encode(), time.monotonic()
            return kept.json


class _Kept:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.json = b""
        self.at = -FRESH_S * 2


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = MAX_CLIENTS

    def __init__(self, settings: Settings) -> None:
        self.address_family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        self.settings = settings
        self.names = own_names(settings.host)
        self.frames = Frames(settings.state / local_socket.RUN)
        self.html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        self._seats = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__((settings.host, settings.port), _Handler)

    def server_bind(self) -> None:
        """Without HTTPServer's look at the name service, which may take seconds."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._seats.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._seats.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is told as one line, by its type."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            print(f"page: {type(error).__name__}: {error}", file=sys.stderr)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "edgeward", ""
    timeout = _IDLE_S
    _pages: ClassVar[dict[str, str]] = {"/": "_page", "/state.json": "_state", "/frame.json": "_frame"}

    def do_GET(self) -> None:
        """One of the three."""
        path, _, query = self.path.partition("?")
        said = _fields(query)
        if said is None:
            self._answer(400, "text/plain", b"That is more than this page is asked.\n")
        elif not known_host(self.headers.get("Host"), self._our.names):
            self._answer(403, "text/plain", b"This name is not this device's: use its address.\n")
        elif not self._allowed(said):
            self._answer(401, "text/plain", b"Open the page with ?token=... : agent.toml has it in [page].\n")
        elif path == "/" and "token" in said:
            self._let_in()
        elif path not in self._pages:
            self._answer(404, "text/plain", b"There is only /.\n")
        else:
            getattr(self, self._pages[path])(said)

    @property
    def _our(self) -> _Server:
        assert isinstance(self.server, _Server)
        return self.server

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: who looks is not news."""

    def _allowed(self, said: dict[str, str]) -> bool:
        token = self._our.settings.token
        if token is None:
            return True
        cookies = http.cookies.SimpleCookie()
        try:
            cookies.load(self.headers.get("Cookie", "")[:4096])
        except http.cookies.CookieError:
            cookies.clear()
        kept = cookies[_COOKIE].value if _COOKIE in cookies else ""
        bearer = self.headers.get("Authorization", "").removeprefix("Bearer ")
        offered = (said.get("token", ""), kept, bearer)
        return any(hmac.compare_digest(one.encode(), token.encode()) for one in offered)

    def _let_in(self) -> None:
        """The token out of the address bar, into a cookie."""
        cookie = f"{_COOKIE}={self._our.settings.token or ''}; HttpOnly; SameSite=Strict; Path=/"
        self._answer(303, "text/plain", b"", {"Location": "/", "Set-Cookie": cookie})

    def _page(self, _said: dict[str, str]) -> None:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:;"
            " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        body = self._our.html.replace("{{nonce}}", nonce).encode()
        self._answer(200, "text/html; charset=utf-8", body, {"Content-Security-Policy": policy})

    def _state(self, _said: dict[str, str]) -> None:
        try:
            with (self._our.settings.state / "status.json").open("rb") as file:
                status = json.loads(file.read(MAX_STATUS))
                written = os.fstat(file.fileno()).st_mtime
        except (OSError, ValueError):
            self._refuse(Unavailable("The agent has not written its status yet.", "Wait a moment."))
            return
        window_s = self._our.settings.window_s
        self._json({"now": time.time(), "written": written, "window_s": window_s, "status": status})

    def _frame(self, said: dict[str, str]) -> None:
        try:
            body = self._our.frames.get(said.get("pipeline", ""), said.get("source", ""))
        except EdgewardError as error:
            self._refuse(error)
        else:
            self._answer(200, "application/json", body)

    def _refuse(self, error: EdgewardError) -> None:
        said = {"ok": False, "error": error.what, "next_step": error.next_step}
        self._answer(503, "application/json", json.dumps(said).encode())

    def _json(self, value: object) -> None:
        self._answer(200, "application/json", json.dumps(value).encode())

    def _answer(self, code: int, kind: str, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {**_HEADERS, "Content-Type": kind, **(more or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _fields(query: str) -> dict[str, str] | None:
    """What stands behind the question mark; None when it is too much."""
    if len(query) > _MAX_QUERY:
        return None
    try:
        return dict(urllib.parse.parse_qsl(query, max_num_fields=_MAX_FIELDS))
    except ValueError:
        return None


def _serve(link: socket.socket, settings: Settings) -> int:
    try:
        server = _Server(settings)
    except OSError as error:
        where = f"{settings.host} port {settings.port}"
        reason = f"The page cannot listen on {where}: {error.strerror or error}."
        link.sendall(json.dumps({"kind": "page_failed", "reason": reason}).encode() + b"\n")
        return 1
    link.sendall(json.dumps({"kind": "page_ready", "port": server.server_port}).encode() + b"\n")
    threading.Thread(target=server.serve_forever, name="page", daemon=True).start()
    while link.recv(4096):
        pass
    server.socket.close()
    return 0


def main() -> int:
    """Exit code 0 when the daemon closed the socket, 1 when the page cannot listen."""
    parser = argparse.ArgumentParser(prog="edgeward-page")
    parser.add_argument("--fd", type=int, required=True, help="the socket to the daemon")
    with socket.socket(fileno=parser.parse_args().fd) as link:
        link.setblocking(True)
        with link.makefile("rb") as stream:
            line = stream.readline(1 << 16)
        if not line:
            return 0
        said = json.loads(line)
        settings = Settings(Path(said["state"]), said["host"], said["port"], said["token"], said["window_s"])
        return _serve(link, settings)


if __name__ == "__main__":
    sys.exit(main())
