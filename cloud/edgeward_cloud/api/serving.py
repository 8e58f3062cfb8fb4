"""Files from the disk: streamed in pieces, with Range (RFC 9110 §14) where resuming matters.

Invariant: no file is read into memory as a whole; what was announced as the length is what is sent.
"""

from __future__ import annotations

import re
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import anyio
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from edgeward_cloud.problem import Refused

PIECE = 256 << 10
IMMUTABLE = "public, max-age=31536000, immutable"
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def parse_range(header: str, length: int) -> tuple[int, int] | None:
    """First and last byte of one range; None when the header is to be ignored (not bytes, or several).

    Raises:
        Refused: 416, it lies outside of the file.
    """
    match = _RANGE.fullmatch(header.replace(" ", ""))
    if match is None or not (match[1] or match[2]):
        return None
    if match[1]:
        first, last = int(match[1]), min(int(match[2]) if match[2] else length - 1, length - 1)
        if match[2] and int(match[2]) < first:
            return None
    else:
        first, last = max(0, length - int(match[2])), length - 1
    if first >= length or first > last:
        what = f"There are {length} bytes; none of {header[:80]!r}."
        raise Refused(416, what, "Start anew without Range.", {"Content-Range": f"bytes */{length}"})
    return first, last


async def serve_file(
    request: Request,
    path: Path,
    *,
    missing: Refused,
    cache: str,
    media_type: str,
    etag: str | None = None,
    ranges: bool = False,
) -> Response:
    """The file, a range of it, or 304.

    Raises:
        Refused: `missing` when there is no such file; 416.
    """
    try:
        status = await anyio.to_thread.run_sync(path.stat)
    except (FileNotFoundError, NotADirectoryError):
        raise missing from None
    if not stat.S_ISREG(status.st_mode):
        raise missing
    tag = etag or f'"{status.st_mtime_ns:x}-{status.st_size:x}"'
    headers = {"ETag": tag, "Cache-Control": cache}
    if _matches(request.headers.get("if-none-match", ""), tag):
        return Response(status_code=304, headers=headers)
    first, last, code = 0, status.st_size - 1, 200
    if ranges:
        headers["Accept-Ranges"] = "bytes"
        wanted = _wanted(request, tag, status.st_size)
        if wanted is not None:
            (first, last), code = wanted, 206
            headers["Content-Range"] = f"bytes {first}-{last}/{status.st_size}"
    headers["Content-Length"] = str(last - first + 1)
    if request.method == "HEAD":
        return Response(status_code=code, headers=headers, media_type=media_type)
    return StreamingResponse(_pieces(path, first, last - first + 1), code, headers, media_type)


def _wanted(request: Request, tag: str, length: int) -> tuple[int, int] | None:
    header = request.headers.get("range")
    if header is None or request.headers.get("if-range", tag) != tag:
        return None
    return parse_range(header, length)


def _matches(header: str, tag: str) -> bool:
    return tag in (part.strip().removeprefix("W/") for part in header.split(","))


async def _pieces(path: Path, first: int, length: int) -> AsyncIterator[bytes]:
    async with await anyio.open_file(path, "rb") as file:
        await file.seek(first)
        while length > 0:
            piece = await file.read(min(PIECE, length))
            if not piece:
                raise OSError(f"{path} became shorter while it was sent")
            length -= len(piece)
            yield piece
