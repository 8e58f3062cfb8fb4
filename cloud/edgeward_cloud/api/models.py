"""Released models: what the `models` role has signed, and how operators publish the next."""

from __future__ import annotations

import re
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Response
from starlette.responses import JSONResponse

from edgeward_cloud.api.needs import Operator, TheCloud
from edgeward_cloud.problem import Refused
from edgeward_cloud.store import operations
from edgeward_wire import api

router = APIRouter(prefix="/v1", tags=["models"])
_ETAG = re.compile(r'"(\d{1,15})"')


@router.get("/models")
async def listed(the: TheCloud, _: Operator) -> list[api.ModelEntry]:
    """All released models."""
    return await anyio.to_thread.run_sync(the.parts.registry.models)


@router.get("/registry/models", response_class=JSONResponse)
async def metadata(the: TheCloud, _: Operator) -> Response:
    """The signed `models` metadata; its version is the ETag."""
    raw, version = await anyio.to_thread.run_sync(the.parts.registry.models_metadata)
    headers = {"ETag": f'"{version}"', "Cache-Control": "no-cache"}
    return Response(raw, headers=headers, media_type="application/json")


@router.put("/registry/models")
async def publish(
    the: TheCloud, request: api.Publish, operator: Operator, if_match: Annotated[str | None, Header()] = None
) -> api.Published:
    """Put the next `models` metadata into force: 412 when somebody else was first."""
    match = _ETAG.fullmatch(if_match or "")
    if match is None:
        raise Refused(428, 'If-Match: "<version>" is needed.', "Send the ETag of GET /v1/registry/models.")
    version = await anyio.to_thread.run_sync(
        the.parts.registry.publish_models, request.metadata.encode(), request.manifests, int(match[1])
    )
    async with the.parts.store.write() as session:
        paths = sorted(request.manifests)
        await operations.record(
            session, the.parts.clock(), operator, "publish", f"models {version}", manifests=paths
        )
    return api.Published(version=version)
