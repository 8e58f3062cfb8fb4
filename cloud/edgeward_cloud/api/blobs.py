"""Blobs: devices and operators fetch them, operators store them."""

from __future__ import annotations

from typing import Annotated

import anyio
from fastapi import APIRouter, Path, Request, Response

from edgeward_cloud.api.needs import Operator, Reader, TheCloud
from edgeward_cloud.api.serving import IMMUTABLE, serve_file
from edgeward_cloud.problem import Refused
from edgeward_wire.identifiers import SHA256_PATTERN

router = APIRouter(tags=["blobs"])
Hex = Annotated[str, Path(pattern=SHA256_PATTERN)]
_BINARY = "application/octet-stream"
_ANY_BODY = {"requestBody": {"content": {_BINARY: {"schema": {"type": "string", "format": "binary"}}}}}
_GATHER = 1 << 20
"""Bytes that are handed to the disk's thread at a time."""


@router.head("/blobs/sha256/{sha256}", include_in_schema=False)
@router.get(
    "/blobs/sha256/{sha256}",
    response_class=Response,
    responses={200: {"content": {_BINARY: {}}}, 206: {"description": "The range that was asked for."}},
)
async def fetch(the: TheCloud, request: Request, sha256: Hex, _: Reader) -> Response:
    """A blob, or a range of it."""
    return await serve_file(
        request,
        the.parts.registry.blobs.path(sha256),
        missing=Refused(404, f"There is no blob {sha256}.", "Publish the model again: agent-ctl deploy"),
        cache=IMMUTABLE,
        media_type=_BINARY,
        etag=f'"{sha256}"',
        ranges=True,
    )


@router.head("/v1/blobs/sha256/{sha256}", status_code=200, response_class=Response)
async def exists(the: TheCloud, sha256: Hex, _: Operator) -> Response:
    """200 with its length when it is there, else 404: missing, or damaged, so that an upload mends it."""
    blobs = the.parts.registry.blobs
    length = await anyio.to_thread.run_sync(blobs.length, sha256)
    if length is None or not await anyio.to_thread.run_sync(blobs.sound, sha256):
        raise Refused(404, f"There is no blob {sha256}.", "Upload it.")
    return Response(headers={"Content-Length": str(length)}, media_type=_BINARY)


@router.put(
    "/v1/blobs/sha256/{sha256}",
    status_code=201,
    response_class=Response,
    responses={200: {"description": "It was there already."}},
    openapi_extra=_ANY_BODY,
)
async def store(the: TheCloud, request: Request, sha256: Hex, _: Operator) -> Response:
    """Store a blob: 201, or 200 when a sound one is there. Its sha256 is verified before it gets its name."""
    blobs = the.parts.registry.blobs
    if await anyio.to_thread.run_sync(blobs.sound, sha256):
        return Response(status_code=200)
    declared = request.headers.get("content-length", "")
    length = int(declared) if declared.isdecimal() else None
    writer = await anyio.to_thread.run_sync(blobs.writer, sha256, length)
    with writer:
        pending = bytearray()
        async for chunk in request.stream():
            pending += chunk
            if len(pending) >= _GATHER:
                await anyio.to_thread.run_sync(writer.write, bytes(pending))
                pending.clear()
        await anyio.to_thread.run_sync(writer.write, bytes(pending))
        stored = await anyio.to_thread.run_sync(writer.commit)
    return Response(status_code=201 if stored else 200)
