"""The real API over a cloud made by the real ceremony, called without a network, and devices that enrol."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import jwt

from cloud.kit import Operator, make_cloud, make_manifest, ref_of
from edgeward_cloud.app import create_app
from edgeward_cloud.auth import Operators
from edgeward_cloud.operators import new_token
from edgeward_cloud.pki import Pki, new_csr
from edgeward_cloud.registry import Registry
from edgeward_cloud.services import Services
from edgeward_cloud.store import rollouts
from edgeward_cloud.store.database import open_store
from edgeward_wire.document import Document
from edgeward_wire.enrolment import EnrolmentString
from edgeward_wire.manifest import ModelRef
from edgeward_wire.result import ResultMessage


@dataclass
class Clock:
    """The cloud's clock, for tests to move."""

    ahead: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


@dataclass
class DeviceKit:
    """A device's key, and what it sends."""

    id: str
    key_pem: str = ""
    csr_pem: str = ""

    def __post_init__(self) -> None:
        self.key_pem, self.csr_pem = new_csr(self.id)

    def request(self, token: str) -> dict[str, Any]:
        return {"device": self.id, "token": token, "csr_pem": self.csr_pem}

    def token(self, now: float | None = None, **claims: Any) -> str:
        at = int(time.time() if now is None else now)
        body = {"iss": self.id, "aud": "edgeward", "iat": at, "exp": at + 300, "jti": secrets.token_hex(8)}
        chosen = {k: v for k, v in {**body, **claims}.items() if v is not None}
        return jwt.encode(chosen, self.key_pem, algorithm="ES256", headers={"kid": self.id})

    def headers(self, **claims: Any) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token(**claims)}"}


@dataclass
class Api:
    """The API, as an operator calls it."""

    http: httpx.AsyncClient
    services: Services
    clock: Clock
    told: list[tuple[str, str, Document]]
    results: dict[str, tuple[ResultMessage, ...]]
    operator: dict[str, str] = field(default_factory=dict)

    async def call(self, method: str, path: str, expect: int = 200, **more: Any) -> Any:
        """An operator's request; the JSON of its answer, or the answer itself when it is none."""
        answer = await self.http.request(method, path, **{"headers": self.operator, **more})
        assert answer.status_code == expect, answer.text
        kind = answer.headers.get("content-type", "")
        return answer.json() if kind.endswith("json") else answer

    async def problem(self, method: str, path: str, expect: int, **more: Any) -> dict[str, Any]:
        """A request that must fail, as a problem document that says what to do."""
        answer = await self.http.request(method, path, **{"headers": self.operator, **more})
        assert answer.status_code == expect, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["cache-control"] == "no-store"
        body: dict[str, Any] = answer.json()
        assert body["status"] == expect
        assert body["title"]
        assert body["detail"]
        return body

    async def token(self, fleet: str = "edge", **more: Any) -> str:
        made = await self.call("POST", "/v1/enroll-tokens", 201, json={"fleet": fleet, **more})
        return EnrolmentString.decode(made["enrolment"]).token

    async def enrol(self, *names: str, fleet: str = "edge") -> list[DeviceKit]:
        """Make the fleet if need be, and enrol devices."""
        if fleet not in [f["name"] for f in await self.call("GET", "/v1/fleets")]:
            await self.call("POST", "/v1/fleets", 201, json={"name": fleet})
        token = await self.token(fleet, uses=len(names))
        kits = [DeviceKit(name) for name in names]
        for kit in kits:
            await self.call("POST", "/v1/enroll", json=kit.request(token), headers={})
        return kits

    def release(self, version: str, name: str = "net") -> ModelRef:
        """Publish a model as an operator does, past HTTP."""
        manifest = make_manifest(self.services.registry.blobs, name, version)
        Operator(self.services.settings).publish(self.services.registry, manifest)
        return ref_of(manifest)

    async def deploy(self, ref: ModelRef, expect: int = 201, **more: Any) -> Any:
        body = {"model": ref.model_dump(), **({"fleet": "edge"} if "device" not in more else {}), **more}
        return await self.call("POST", "/v1/rollouts", expect, json=body)

    async def succeed(self, rollout: str, result: str = "succeeded") -> None:
        """Every target of a rollout reports its result, as ingest would store it."""
        from edgeward_cloud import rollout as decisions
        from edgeward_wire.reported import Update

        async with self.services.store.write() as session:
            before = await rollouts.get(session, rollout)
            assert before is not None
            update = Update.model_validate(
                {
                    "rollout": rollout,
                    "model": before.model,
                    "attempt": before.attempt,
                    "state": "idle",
                    "result": result,
                }
            )
            heard = {target.device: update for target in before.targets}
            await rollouts.save(session, before, decisions.advance(before, heard, self.clock()))


@asynccontextmanager
async def running_api(directory: Path, **more: Any) -> AsyncIterator[Api]:
    """A fresh cloud's API. `more` replaces parts of it."""
    settings = make_cloud(directory)
    clock, told, results = Clock(), [], {}  # type: ignore[var-annotated]

    async def deliver(downs: Sequence[tuple[str, str, Document]]) -> bool:
        told.extend(downs)
        return True

    async with open_store(settings.database_url) as store:
        services = Services(
            settings=settings,
            store=store,
            registry=Registry(settings, clock=clock),
            pki=Pki(settings.pki),
            operators=Operators(settings.operators_file),
            clock=clock,
            deliver=deliver,
            results=lambda device: results.get(device, ()),
            **more,
        )
        transport = httpx.ASGITransport(app=create_app(services), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="https://cloud") as http:
            token = new_token(settings.operators_file, "ann")
            yield Api(http, services, clock, told, results, {"Authorization": f"Bearer {token}"})
