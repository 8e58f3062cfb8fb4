"""The HTTP application: a table of contents."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from starlette.types import ASGIApp

from edgeward_cloud import problem
from edgeward_cloud.api import blobs, commands, devices, fleets, models, public, rollouts, telemetry
from edgeward_cloud.api.needs import Cloud
from edgeward_cloud.bounds import Bounds
from edgeward_cloud.services import Services
from edgeward_wire import __version__
from edgeward_wire.api import Problem

ROUTERS = (
    public.router,
    blobs.router,
    fleets.router,
    devices.router,
    commands.router,
    models.router,
    rollouts.router,
    telemetry.router,
)


def create_app(services: Services) -> ASGIApp:
    """What the server serves: the API within its bounds."""
    return Bounds(build_api(services), clock=services.clock)


def build_api(services: Services) -> FastAPI:
    """The API over these services."""
    app = FastAPI(
        title="Edgeward cloud",
        version=__version__,
        docs_url=None,  # its page would be fetched from somebody else's server
        redoc_url=None,
        generate_unique_id_function=_operation_id,
        responses={422: {"model": Problem}, "4XX": {"model": Problem}, "5XX": {"model": Problem}},
    )
    app.state.cloud = Cloud.of(services)
    for router in ROUTERS:
        app.include_router(router)
    problem.install(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _operation_id(route: APIRoute) -> str:
    return f"{route.tags[0]}-{route.name}" if route.tags else route.name


def _openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document, with errors as what they are: problem documents."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                for status, answer in operation["responses"].items():
                    if status.startswith(("4", "5")):
                        answer["content"] = {problem.MEDIA_TYPE: answer["content"]["application/json"]}
        app.openapi_schema = document
    return app.openapi_schema
