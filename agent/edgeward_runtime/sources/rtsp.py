"""A camera or server that speaks RTSP, through OpenCV's FFmpeg, over TCP.

FFmpeg only says that it could not open a stream; why not, one short conversation of our own finds out.
"""

from __future__ import annotations

import time

from edgeward_runtime.images import U8, Reader
from edgeward_runtime.sources import address as addresses
from edgeward_runtime.sources.address import Address, Line, credentials, refusal
from edgeward_runtime.sources.base import PictureBase
from edgeward_runtime.sources.options import SourceOptions
from edgeward_wire.errors import EdgewardError, Unavailable

OPEN_S = 10.0
READ_S = 10.0
_ASK_S = 5.0
_FFMPEG_HASHES = {"MD5": "md5"}
"""Of Digest, what FFmpeg knows: with any other it only says that it could not open."""


class RtspSource(PictureBase):
    """Frames as they come. Opening takes at most `OPEN_S` after the server was reached, a read `READ_S`."""

    def __init__(self, options: SourceOptions) -> None:
        self._address = addresses.parse(options.uri)
        # Outside FFmpeg at first: it gives no reason, and may keep others from opening while it waits.
        Line(self._address).close()
        try:
            self._reader = Reader.of_stream(options.uri, self._address.shown, OPEN_S, READ_S)
        except Unavailable as error:
            raise why_not(self._address) or error from None

    @property
    def fps(self) -> float | None:
        return self._reader.fps

    def grab(self) -> bool:
        if not self._reader.grab():
            raise Unavailable(f"{self._address.shown} stopped sending.", "Check the camera and the network.")
        return True

    def retrieve(self, buffer: U8 | None) -> U8:
        return self._reader.retrieve(buffer)

    def rewind(self) -> None:
        """A stream has no first frame: `grab` never says that it ended."""

    def close(self) -> None:
        self._reader.close()


def why_not(address: Address) -> EdgewardError | None:
    """What stands in the way of a stream, as far as asking for its description shows."""
    deadline = time.monotonic() + _ASK_S
    try:
        line = Line(address)
        try:
            return _ask(line, address, deadline)
        finally:
            line.close()
    except EdgewardError as error:
        return error


def _ask(line: Line, address: Address, deadline: float) -> EdgewardError | None:
    proof, target = "", address.bare
    for number in (1, 2):
        line.send(
            f"DESCRIBE {target} RTSP/1.0\r\nCSeq: {number}\r\nAccept: application/sdp\r\n{proof}\r\n".encode()
        )
        reply = line.head("RTSP", deadline)
        if reply.status == 200:
            return None
        said = credentials(
            address, "DESCRIBE", target, reply.headers.get("www-authenticate", ""), _FFMPEG_HASHES
        )
        if reply.status != 401 or said is None or proof:
            return refusal(reply, address, bool(proof))
        line.exactly(reply.length, deadline)
        proof = f"Authorization: {said}\r\n"
    return None
