"""Every error of the HTTP API is a problem document (RFC 9457) that says what to do next.

Invariant: no answer of 400 or above leaves this server in any other form, and none carries a traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from edgeward_cloud.registry import Conflict
from edgeward_wire.api import Problem
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable

MEDIA_TYPE = "application/problem+json"
_SHOWN_FAULTS = 3
_NEXT = {
    404: "Check the address against /openapi.json.",
    405: "Check the method against /openapi.json.",
    408: "Send the body without pauses.",
    413: "Send less.",
}


class Refused(Rejected):
    """A request's fault with its HTTP status."""

    def __init__(
        self, status: int, what: str, next_step: str = "", headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(what, next_step)
        self.status = status
        self.headers = dict(headers or {})


def problem(
    status: int, what: str, next_step: str = "", headers: Mapping[str, str] | None = None
) -> Response:
    """The answer itself."""
    title = HTTPStatus(status).phrase
    body = Problem(title=title, status=status, detail=what, next_step=next_step).to_bytes()
    # Nothing that failed may be kept by a cache: the next try may find what this one did not.
    return Response(body, status, {"Cache-Control": "no-store", **(headers or {})}, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Answer every kind of failure with a problem document."""
    app.add_exception_handler(EdgewardError, _on_ours)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_bug)


async def _on_ours(_: Request, error: Exception) -> Response:
    assert isinstance(error, EdgewardError)
    if isinstance(error, Refused):
        return problem(error.status, error.what, error.next_step, error.headers)
    if isinstance(error, Conflict):
        return problem(412, error.what, error.next_step)
    if isinstance(error, Unavailable):
        return problem(503, error.what, error.next_step or "Try again in a while.", {"Retry-After": "5"})
    return problem(422, error.what, error.next_step)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    shown = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in found[:_SHOWN_FAULTS]]
    more = f" (and {len(found) - _SHOWN_FAULTS} more)" if len(found) > _SHOWN_FAULTS else ""
    return problem(422, "; ".join(shown) + more, "Correct the request; /openapi.json says what it must be.")


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    next_step = _NEXT.get(error.status_code, "")
    return problem(error.status_code, str(error.detail), next_step, error.headers)


async def _on_bug(_: Request, error: Exception) -> Response:
    # Starlette logs the traceback after this answer is sent; the client gets none of it.
    return problem(
        500, f"The cloud made a mistake ({type(error).__name__}).", "Its log says more; report it."
    )
