"""Bounds of every HTTP request, and the date of every answer, around the whole application.

Invariants: no body grows past its route's limit, whether it is announced or streamed; a sender that pauses
is not waited for; each answer has exactly one `Date`, the cloud's clock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from email.utils import formatdate

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgeward_cloud.problem import problem
from edgeward_wire.manifest import MAX_BLOB_BYTES

MAX_BODY = 64 << 10
MAX_PUBLISH = 40 << 20
"""16 MiB of metadata and 64 manifests of 256 KiB, with JSON's escapes."""

PAUSE_S = 30.0
"""The longest pause between two pieces of a body."""


def limit_of(method: str, path: str) -> int:
    """The most bytes that a request's body may have."""
    if method == "PUT" and path.startswith("/v1/blobs/"):
        return MAX_BLOB_BYTES
    if method == "PUT" and path == "/v1/registry/models":
        return MAX_PUBLISH
    return MAX_BODY


class Bounds:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, *, clock: Callable[[], float]) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request within the bounds."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = limit_of(scope["method"], scope["path"])
        dated = self._dated(send)
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > limit:
            await problem(413, _too_long(limit), "Send less.")(scope, receive, dated)
            return
        await self._app(scope, _bounded(receive, limit), dated)

    def _dated(self, send: Send) -> Send:
        async def dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                date = formatdate(self._clock(), usegmt=True).encode()
                message = {**message, "headers": [*message.get("headers", ()), (b"date", date)]}
            await send(message)

        return dated


def _bounded(receive: Receive, limit: int) -> Receive:
    taken, ended = 0, False

    async def bounded() -> Message:
        nonlocal taken, ended
        if ended:
            return await receive()  # waits for the client to go away: as long as it likes
        try:
            message = await asyncio.wait_for(receive(), PAUSE_S)
        except asyncio.TimeoutError:
            raise HTTPException(408, f"The body paused for {PAUSE_S:.0f} s.") from None
        ended = message["type"] != "http.request" or not message.get("more_body", False)
        taken += len(message.get("body", b""))
        if taken > limit:
            raise HTTPException(413, _too_long(limit))
        return message

    return bounded


def _too_long(limit: int) -> str:
    return f"The body is longer than {limit} bytes."
