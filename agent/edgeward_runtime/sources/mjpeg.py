"""A camera or server that sends pictures over HTTP, one JPEG after the other (multipart, "MJPEG").

We read such streams ourselves: FFmpeg keeps whatever a server sends until a picture ends, gives no
reason when it refuses, and knows no limit of size. Anything else that HTTP brings goes to FFmpeg: a film,
which has a length, plays like a file, and what has none (a transport stream) is live. Invariants: a picture
has at most `MAX_FRAME_BYTES`, and is looked at before it is decoded; opening and each have a deadline.
"""

from __future__ import annotations

import re
import time

from edgeward_runtime import images
from edgeward_runtime.images import U8, Reader
from edgeward_runtime.sources import address as addresses
from edgeward_runtime.sources.address import Address, Line, Reply, credentials, refusal
from edgeward_runtime.sources.base import PictureBase
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable

OPEN_S = 10.0
READ_S = 10.0
MAX_FRAME_BYTES = 16 << 20
_MAX_PART_HEAD = 4 << 10
_NEARLY = 0.9
"""Of the frames that a film claims to have: what ends before that was cut off."""
_BOUNDARY = re.compile(r'boundary=(?:"([^"]{1,200})"|([^\s;]{1,200}))', re.IGNORECASE)
_LENGTH = re.compile(rb"(?im)^content-length[ \t]*:[ \t]*(\d{1,9})[ \t\r]*$")


def open_http(options: SourceOptions) -> MjpegSource | FilmSource:
    """What the address gives: pictures one by one, or something for FFmpeg. Raises Unavailable, Rejected."""
    address = addresses.parse(options.uri)
    deadline = time.monotonic() + OPEN_S
    line, reply = _request(address, deadline)
    kind = reply.headers.get("content-type", "")
    if kind.lower().startswith("multipart/"):
        return MjpegSource(address, line, kind)
    line.close()
    if kind.lower().startswith(("text/", "application/json", "image/")):
        raise Rejected(
            f"{address.shown} is {kind.split(';')[0][:80]}, not a stream.",
            "Name the address of its MJPEG stream.",
        )
    return FilmSource(options.uri, address, recorded="content-length" in reply.headers)


def _request(address: Address, deadline: float) -> tuple[Line, Reply]:
    """A connection on which the body comes next, and the head before it."""
    proof = ""
    while True:
        line = Line(address)
        try:
            # HTTP/1.0: the body then comes as it is, and not in chunks.
            line.send(
                f"GET {address.target} HTTP/1.0\r\nHost: {address.where}\r\nUser-Agent: edgeward\r\n"
                f"Accept: multipart/x-mixed-replace, */*\r\n{proof}\r\n".encode()
            )
            reply = line.head("HTTP", deadline)
            if reply.status == 200 and "chunked" not in reply.headers.get("transfer-encoding", "").lower():
                return line, reply
            if reply.status == 200:
                raise Rejected(f"{address.shown} sends chunks though HTTP/1.0 was asked for.")
            said = credentials(address, "GET", address.target, reply.headers.get("www-authenticate", ""))
            if reply.status != 401 or said is None or proof:
                raise refusal(reply, address, bool(proof))
        except EdgewardError:
            line.close()
            raise
        line.close()
        proof = f"Authorization: {said}\r\n"


class MjpegSource(PictureBase):
    """Pictures as they come. `retrieve` raises Rejected for one that is not readable: the next may be."""

    fps: float | None = None

    def __init__(self, address: Address, line: Line, kind: str) -> None:
        self._where, self._line = address.shown, line
        self._raw = b""
        named = _BOUNDARY.search(kind)
        if named is None:
            line.close()
            raise Rejected(f"{self._where} does not say where its pictures end: it names no boundary.")
        # Some cameras write the two dashes into the name, others do not.
        self._mark = b"--" + (named[1] or named[2]).removeprefix("--").encode("latin-1")
        self._at_mark = False

    def grab(self) -> bool:
        """Reads the next picture; `retrieve` decodes it."""
        deadline = time.monotonic() + READ_S
        if not self._at_mark:
            self._line.until(self._mark, MAX_FRAME_BYTES, deadline)
        self._at_mark = False
        head = self._line.until(b"\r\n\r\n", _MAX_PART_HEAD, deadline)
        if head.startswith(b"--"):
            raise Unavailable(f"{self._where} ended its stream.", "Check the camera.")
        length = _LENGTH.search(head)
        if length is None:
            self._raw = self._line.until(b"\r\n" + self._mark, MAX_FRAME_BYTES, deadline)
            self._at_mark = True
            return True
        size = int(length[1])
        if size > MAX_FRAME_BYTES:
            raise Rejected(
                f"{self._where} announces a picture of {size} bytes; at most {MAX_FRAME_BYTES} are taken."
            )
        self._raw = self._line.exactly(size, deadline)
        return True

    def retrieve(self, buffer: U8 | None) -> U8:
        del buffer  # OpenCV decodes into memory of its own
        images.check_jpeg(self._raw, self._where)
        return images.decode(self._raw, self._where)

    def rewind(self) -> None:
        """A stream has no first frame: `grab` never says that it ended."""

    def close(self) -> None:
        self._line.close()


class FilmSource(PictureBase):
    """A film or transport stream over HTTP, through FFmpeg."""

    def __init__(self, uri: str, address: Address, *, recorded: bool) -> None:
        self._uri, self._where, self.recorded = uri, address.shown, recorded
        self._reader = self._opened()
        self._given = 0

    def _opened(self) -> Reader:
        return Reader.of_stream(self._uri, self._where, OPEN_S, READ_S)

    @property
    def fps(self) -> float | None:
        return self._reader.fps

    def grab(self) -> bool:
        if self._reader.grab():
            self._given += 1
            return True
        if self.recorded and self._given >= _NEARLY * self._reader.frames:
            return False
        raise Unavailable(f"{self._where} ended, or stopped sending.", "Check the server.")

    def retrieve(self, buffer: U8 | None) -> U8:
        return self._reader.retrieve(buffer)

    def rewind(self) -> None:
        """Of a film: asked for anew, since not every server can go back."""
        self._reader.close()
        self._reader, self._given = self._opened(), 0

    def close(self) -> None:
        self._reader.close()
