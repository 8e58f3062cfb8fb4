"""A camera that speaks RTSP on loopback: JPEG over RTP (RFC 2435), interleaved in the connection (RFC 2326).

It can refuse, stall, drop its connections and go away.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator

from sim.listener import Listener
from sim.mjpeg import Auth, authorised, challenge

_FRAGMENT = 1300
_CLOCK = 90_000


class RtspCamera(Listener):
    """Plays `pictures` (baseline JPEG, 4:2:0, sides a multiple of 8) in turn at /stream, `fps` a second."""

    def __init__(self, pictures: list[bytes], *, port: int = 0, auth: Auth = "none", fps: int = 50) -> None:
        self.auth: Auth = auth
        self.fps = fps
        self.mute = False
        """Take connections and say nothing."""
        self.on_request: Callable[[], object] = lambda: None
        self.stalled = threading.Event()
        self.methods: list[str] = []
        self.transports: list[str] = []
        self._frames = [Jpeg(raw) for raw in pictures]
        super().__init__(port)

    def url(self, user: str = "", path: str = "/stream") -> str:
        """Its address; `user` as user:password@."""
        return f"rtsp://{user}127.0.0.1:{self.port}{path}"

    def _serve(self, connection: socket.socket) -> None:
        stopped = threading.Event()
        player: threading.Thread | None = None
        with contextlib.suppress(OSError), connection:
            for request in _requests(connection):
                self.on_request()
                if self.mute:
                    continue
                method = request.split()[0]
                self.methods.append(method)
                connection.sendall(self._reply(method, request))
                if method == "PLAY" and player is None:
                    player = threading.Thread(target=self._play, args=(connection, stopped), daemon=True)
                    player.start()
                if method == "TEARDOWN":
                    break
        stopped.set()
        if player is not None:
            player.join(5)

    def _reply(self, method: str, request: str) -> bytes:
        found = re.search(r"(?im)^cseq: *(\d+)", request)
        head = f"CSeq: {found[1] if found else 0}\r\n"
        body = ""
        if method == "OPTIONS":
            head += "Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN\r\n"
        elif not authorised(self.auth, request, method):
            return f"RTSP/1.0 401 Unauthorized\r\n{head}{challenge(self.auth)}\r\n".encode()
        elif not re.match(r"rtsps?://[^/]+/stream(/|$)", request.split()[1]):
            return f"RTSP/1.0 404 Not Found\r\n{head}\r\n".encode()
        elif method == "DESCRIBE":
            body = (
                "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=sim\r\nc=IN IP4 0.0.0.0\r\nt=0 0\r\n"
                f"m=video 0 RTP/AVP 26\r\na=control:track1\r\na=framerate:{self.fps}\r\n"
            )
            head += f"Content-Type: application/sdp\r\nContent-Base: {request.split()[1]}/\r\n"
        elif method == "SETUP":
            transport = re.search(r"(?im)^transport: *(.*?)\r?$", request)
            self.transports.append(transport[1] if transport else "")
            head += "Session: 1\r\nTransport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n"
        elif method == "PLAY":
            head += "Session: 1\r\nRange: npt=0-\r\n"
        length = f"Content-Length: {len(body)}\r\n" if body else ""
        return f"RTSP/1.0 200 OK\r\n{head}{length}\r\n{body}".encode()

    def _play(self, connection: socket.socket, stopped: threading.Event) -> None:
        number = sequence = 0
        with contextlib.suppress(OSError):
            while not stopped.wait(1 / self.fps) and not self.closing.is_set():
                if self.stalled.is_set():
                    continue
                frame = self._frames[number % len(self._frames)]
                for packet in frame.packets(sequence, number * _CLOCK // self.fps):
                    connection.sendall(struct.pack("!cBH", b"$", 0, len(packet)) + packet)
                    sequence += 1
                number += 1


def _requests(connection: socket.socket) -> Iterator[str]:
    """The head of each request; what a client interleaves (RTCP) is passed over."""
    read = b""
    while True:
        while read[:1] == b"$" and len(read) >= 4 + int.from_bytes(read[2:4], "big"):
            read = read[4 + int.from_bytes(read[2:4], "big") :]
        if read[:1] != b"$" and b"\r\n\r\n" in read:
            head, read = read.split(b"\r\n\r\n", 1)
            yield head.decode()
            continue
        if not (raw := connection.recv(4096)):
            return
        read += raw


class Jpeg:
    """A baseline JPEG, taken apart as RFC 2435 sends it: tables of quantisation, and the scan."""

    def __init__(self, raw: bytes) -> None:
        tables: dict[int, bytes] = {}
        at = 2
        while True:
            kind, length = raw[at + 1], int.from_bytes(raw[at + 2 : at + 4], "big")
            body = raw[at + 4 : at + 2 + length]
            if kind == 0xDB:
                while body:
                    tables[body[0]], body = body[1:65], body[65:]
            elif kind == 0xC0:
                self._height, self._width = struct.unpack_from("!HH", body, 1)
                assert body[7] == 0x22, "4:2:0, which is type 1"
            elif kind == 0xDA:
                break
            at += 2 + length
        self._scan = raw[at + 2 + length :].removesuffix(b"\xff\xd9")
        self._tables = tables[0] + tables[1]

    def packets(self, sequence: int, stamp: int) -> Iterator[bytes]:
        """The RTP packets of one frame."""
        for offset in range(0, len(self._scan), _FRAGMENT):
            part = self._scan[offset : offset + _FRAGMENT]
            last = offset + _FRAGMENT >= len(self._scan)
            rtp = struct.pack("!BBHII", 0x80, 26 | last << 7, sequence & 0xFFFF, stamp & 0xFFFFFFFF, 1)
            jpeg = struct.pack("!IBBBB", offset, 1, 255, self._width // 8, self._height // 8)
            tables = struct.pack("!BBH", 0, 0, len(self._tables)) + self._tables if not offset else b""
            yield rtp + jpeg + tables + part
            sequence += 1
