"""A camera that sends MJPEG over HTTP on loopback, and can misbehave: it stalls, drops, refuses and lies."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import socket
import threading
from collections.abc import Callable
from typing import Literal

from sim.listener import Listener

Auth = Literal["none", "basic", "digest", "sha256", "several", "bearer"]
_BOUNDARY = "frontier"
USER, PASSWORD = "eve", "s3cret/word"


class MjpegCamera(Listener):
    """Sends `pictures` in turn, `period_s` apart, to whoever asks for /video."""

    def __init__(self, pictures: list[bytes], *, port: int = 0, auth: Auth = "none") -> None:
        self.pictures = pictures
        self.period_s = 0.01
        self.auth: Auth = auth
        self.lengths = True
        """Whether a part says how long it is."""
        self.kind = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"
        self.hostile: Callable[[socket.socket], None] | None = None
        """Talks in place of the camera."""
        self.stalled = threading.Event()
        self.stalling = threading.Event()
        """Set once a connection really waits."""
        self.asked: list[str] = []
        super().__init__(port)

    def url(self, user: str = "", path: str = "/video") -> str:
        """Its address; `user` as user:password@."""
        return f"http://{user}127.0.0.1:{self.port}{path}"

    def close(self) -> None:
        self.closing.set()
        self.stalled.clear()  # who waits there looks whether it is over
        super().close()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (raw := connection.recv(4096)):
                    return
                head += raw
            if self.hostile is not None:
                self.hostile(connection)
                return
            self._answer(connection, head.decode())

    def _answer(self, connection: socket.socket, head: str) -> None:
        path = head.split()[1]
        self.asked.append(head)
        if not authorised(self.auth, head, "GET"):
            connection.sendall(f"HTTP/1.0 401 Unauthorized\r\n{challenge(self.auth)}\r\n".encode())
        elif path != "/video":
            connection.sendall(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n")
        else:
            connection.sendall(f"HTTP/1.0 200 OK\r\nContent-Type: {self.kind}\r\n\r\n".encode())
            self._stream(connection)

    def _stream(self, connection: socket.socket) -> None:
        number = 0
        while not self.closing.wait(self.period_s):
            if self.stalled.is_set():
                self.stalling.set()
                continue
            raw = self.pictures[number % len(self.pictures)]
            number += 1
            length = f"Content-Length: {len(raw)}\r\n" if self.lengths else ""
            connection.sendall(
                f"--{_BOUNDARY}\r\nContent-Type: image/jpeg\r\n{length}\r\n".encode() + raw + b"\r\n"
            )


_ASKED: dict[Auth, str] = {
    "basic": 'Basic realm="camera"',
    "digest": 'Digest realm="camera", nonce="abc123", algorithm=MD5, qop="auth"',
    "sha256": 'Digest realm="camera", nonce="abc123", algorithm=SHA-256, qop="auth-int, auth"',
    "bearer": 'Bearer realm="a basic, digest", Digest realm="camera", algorithm=SHA-512-256, nonce="x"',
}


def challenge(auth: Auth) -> str:
    """The header that asks who one is; of several, each on a line of its own."""
    asked = [_ASKED["sha256"], _ASKED["digest"], _ASKED["basic"]] if auth == "several" else [_ASKED[auth]]
    return "".join(f"WWW-Authenticate: {one}\r\n" for one in asked)


def authorised(auth: Auth, head: str, method: str) -> bool:
    """Whether a request comes from USER with PASSWORD."""
    if auth == "none":
        return True
    found = re.search(r"(?im)^authorization: (\w+) (.*)$", head)
    if found is None:
        return False
    if auth == "basic":
        return found[2].strip() == base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    said = dict(re.findall(r'(\w+)="?([^",\s]+)"?', found[2]))
    better = said.get("algorithm") == "SHA-256"
    if auth == "bearer" or (auth == "digest" and better) or (auth in ("sha256", "several") and not better):
        return False  # of several, the better one is to be chosen

    def hash_of(text: str) -> str:
        return hashlib.new("sha256" if better else "md5", text.encode()).hexdigest()

    known, wanted = hash_of(f"{USER}:camera:{PASSWORD}"), hash_of(f"{method}:{said.get('uri')}")
    middle = f"{said['nc']}:{said['cnonce']}:{said['qop']}:" if "qop" in said else ""
    return said.get("response") == hash_of(f"{known}:{said.get('nonce')}:{middle}{wanted}")
