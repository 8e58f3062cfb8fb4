"""What anyone may ask: health, the CA to pin, TUF metadata and targets, enrolment."""

from __future__ import annotations

import re

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

from edgeward_cloud.api.needs import TheCloud
from edgeward_cloud.api.serving import IMMUTABLE, serve_file
from edgeward_cloud.problem import Refused
from edgeward_wire.enrolment import EnrolRequest, EnrolResponse
from edgeward_wire.errors import Unavailable

router = APIRouter(tags=["public"])
_METADATA = re.compile(r"[0-9a-z][0-9a-z-]{0,40}(\.[0-9a-z][0-9a-z-]{0,40}){1,2}")
_VERSIONED = re.compile(r"[0-9]+\..*")
_TARGET = re.compile(
    r"(models/[a-z0-9][a-z0-9._-]{0,62}|devices|agent/[a-z0-9][a-z0-9._-]{0,62})/[0-9a-f]{64}\.[0-9A-Za-z][0-9A-Za-z.+_-]{0,80}"
)
_SHORT_LIVED = "no-cache"


@router.get("/health", response_model=dict[str, str])
async def health(the: TheCloud) -> dict[str, str]:
    """Whether the cloud can do its work: 503 when database, ingest or its own broker cannot; says which."""
    await the.parts.store.check()
    if faults := the.parts.faults():
        raise Unavailable(faults, "The cloud keeps trying; its log says more.")
    return {"status": "ok"}


@router.get("/v1/ca.pem", response_class=Response)
async def server_ca(the: TheCloud) -> Response:
    """The server CA. Whoever fetches it compares its sha256 (DER) with the pin of the enrolment string."""
    return Response(the.parts.pki.server_ca_pem, media_type="application/x-pem-file")


@router.post("/v1/enroll", response_model=EnrolResponse, responses={202: {"model": EnrolResponse}})
async def enrol(the: TheCloud, request: EnrolRequest, response: Response) -> EnrolResponse:
    """Enrol a device: 200 with a certificate, or 202: ask again with the same request later."""
    answer = await the.enrolment.enrol(request)
    response.status_code = 202 if answer.admission == "pending" else 200
    return answer


@router.head("/tuf/metadata/{file}", include_in_schema=False)
@router.get("/tuf/metadata/{file}", response_class=JSONResponse)
async def metadata(the: TheCloud, request: Request, file: str) -> Response:
    """TUF metadata. A 404 for the next root is how a client learns that it has the newest."""
    missing = Refused(404, f"There is no metadata {file[:80]}.", "Start from timestamp.json.")
    if not _METADATA.fullmatch(file) or not file.endswith(".json"):
        raise missing
    cache = IMMUTABLE if _VERSIONED.fullmatch(file) else _SHORT_LIVED
    path = the.parts.settings.metadata / file
    return await serve_file(request, path, missing=missing, cache=cache, media_type="application/json")


@router.head("/tuf/targets/{path:path}", include_in_schema=False)
@router.get("/tuf/targets/{path:path}", response_class=JSONResponse)
async def target(the: TheCloud, request: Request, path: str) -> Response:
    """TUF targets, by consistent snapshot: the name carries the sha256."""
    missing = Refused(404, f"There is no target {path[:200]}.", "Take the name from signed metadata.")
    if not _TARGET.fullmatch(path):
        raise missing
    file = the.parts.settings.targets / path
    return await serve_file(request, file, missing=missing, cache=IMMUTABLE, media_type="application/json")
