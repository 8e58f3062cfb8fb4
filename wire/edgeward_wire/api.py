"""The operator's HTTP API: requests and answers, shared by the cloud and `agent-ctl`.

All under `/v1`, `Authorization: Bearer <operator token>`. Errors are RFC 9457 problem documents.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeward_wire.command import MAX_SECONDS, SECONDS, CommandResponse, Number
from edgeward_wire.document import Open
from edgeward_wire.enrolment import Admission
from edgeward_wire.event import Event
from edgeward_wire.histogram import Histogram
from edgeward_wire.identifiers import (
    Count,
    DeviceId,
    FleetName,
    Key,
    ModelName,
    PipelineName,
    Reason,
    Revision,
    Sha256,
    ShortText,
    SourceName,
    UnixTime,
    VariantName,
    Version,
)
from edgeward_wire.manifest import ModelRef, Precision
from edgeward_wire.problem import Problem as Problem  # noqa: PLC0414  # part of the API, too
from edgeward_wire.reported import Reported, Result, State
from edgeward_wire.result import ResultMessage
from edgeward_wire.status import Birth
from edgeward_wire.telemetry import Stage

REACHES_BACK_TO = "Edgeward-Since"
"""The header of an answer about telemetry: from when on it is complete, in Unix seconds."""

DELEGATION = "models"
"""The TUF role that release keys sign."""


class WhoAmI(Open):
    """GET /v1/whoami."""

    operator: ShortText
    cloud: ShortText
    """The cloud's version."""
    server_time: UnixTime


class FleetCreate(Open):
    """POST /v1/fleets."""

    name: FleetName


class Fleet(Open):
    """GET /v1/fleets -> list."""

    name: FleetName
    devices: Count = 0
    online: Count = 0
    assigned: dict[PipelineName, ModelRef] = Field(default_factory=dict)


class TokenCreate(Open):
    """POST /v1/enroll-tokens."""

    fleet: FleetName
    uses: int = Field(default=1, ge=1, le=100_000)
    ttl_s: float = Field(default=86_400, ge=1, le=31_536_000)
    preauthorised: bool = True
    """False: who enrols with it stays pending until an operator accepts."""


class TokenCreated(Open):
    """The enrolment string is shown once; the cloud keeps only a hash of the token."""

    enrolment: str
    fleet: FleetName
    uses: int
    expires_at: UnixTime


class Device(Open):
    """GET /v1/devices[?fleet=] -> list, GET /v1/devices/{id}."""

    id: DeviceId
    fleet: FleetName
    admission: Admission
    online: bool = False
    last_seen: UnixTime | None = None
    certificate_expires_at: UnixTime | None = None
    certificate_revoked: bool = False
    """By a rejection: once accepted again, it needs a new one, by renewal or by enrolling again."""
    birth: Birth | None = None
    reported: Reported | None = None
    results: tuple[ResultMessage, ...] = ()
    """The newest result of each source, if one came lately; not stored."""


class AdmissionChange(Open):
    """POST /v1/devices/{id}/admission."""

    admission: Literal["accepted", "rejected"]


class ModelEntry(Open):
    """GET /v1/models -> list: what the models role has signed."""

    name: ModelName
    version: Version
    path: ShortText
    sha256: Sha256
    length: Count
    created: ShortText = ""
    content: Sha256 | None = None
    """The bundle's content digest (`Manifest.content_digest`)."""
    variants: dict[VariantName, Precision] = Field(default_factory=dict)


class Publish(Open):
    """PUT /v1/registry/models with `If-Match: "<version>"` of the metadata it follows.

    The server accepts only version n+1, signed by a release key, that keeps every entry, whose new
    manifests are valid and whose blobs are all there. 412 on a conflict: fetch, merge, sign again.
    """

    metadata: str = Field(max_length=16 << 20)
    """The signed `models` metadata, as TUF JSON."""
    manifests: dict[ShortText, str] = Field(max_length=64)
    """Target path -> manifest text, for the entries that are new."""


class Published(Open):
    """What the registry now holds."""

    version: Count


class RolloutCreate(Open):
    """POST /v1/rollouts. Exactly one of fleet and device."""

    fleet: FleetName | None = None
    device: DeviceId | None = None
    pipeline: PipelineName = "main"
    model: ModelRef
    probation_s: float | None = Field(default=None, ge=0, le=86_400)


class RollbackCreate(Open):
    """POST /v1/rollbacks: assign what the fleet (or device) had finished with before. Exactly one of both."""

    fleet: FleetName | None = None
    device: DeviceId | None = None
    pipeline: PipelineName = "main"


class TargetProgress(Open):
    """One device of a rollout."""

    device: DeviceId
    online: bool
    state: State
    """`pending` until the device reports this rollout."""
    result: Result | None = None
    reason: Reason = ""
    progress: float = 0
    detail: ShortText = ""
    numbers: dict[Key, float] = Field(default_factory=dict)
    variant: VariantName | None = None
    provider: Key | None = None


RolloutState = Literal["running", "finished", "superseded", "canceled"]


class Rollout(Open):
    """GET /v1/rollouts[?fleet=], GET /v1/rollouts/{id}."""

    id: Key
    fleet: FleetName | None = None
    pipeline: PipelineName
    model: ModelRef
    state: RolloutState
    created_at: UnixTime
    created_by: ShortText = ""
    revision: Revision = 0
    probation_s: float = 300
    targets: tuple[TargetProgress, ...] = ()


class LogEntry(Open):
    """GET /v1/devices/{id}/log?limit= -> list, newest first."""

    received_at: UnixTime
    event: Event


class CommandCreate(Open):
    """POST /v1/devices/{id}/commands: measure a released model on a device. One at a time on each."""

    kind: Literal["bench"] = "bench"
    model: ModelRef
    threads: int | None = Field(default=None, ge=1, le=1024)
    seconds: float = Field(default=SECONDS, ge=5, le=MAX_SECONDS)


Standing = Literal["sent", "accepted", "running", "done", "refused", "failed", "expired"]
"""`CommandState`, or `sent` before the device answers."""


class CommandStatus(Open):
    """GET /v1/devices/{id}/commands -> list, newest first; GET /v1/devices/{id}/commands/{n}."""

    device: DeviceId
    n: Number
    kind: Key
    model: ModelRef
    state: Standing
    """What the device never took is `expired`, what it never ended `failed`."""
    reason: Reason = ""
    issued_at: UnixTime
    expires_at: UnixTime
    created_by: ShortText = ""
    online: bool = False
    response: CommandResponse | None = None
    """The newest that the device said."""


class StageFigures(Open):
    """True percentiles of merged histograms, in milliseconds."""

    count: Count
    p50: float
    p90: float
    p99: float
    max: float


class Telemetry(Open):
    """GET /v1/telemetry?fleet=&device=&since= -> list, a row a series."""

    device: DeviceId | None = None
    """None in a row that merges a fleet (`merged=true`)."""
    pipeline: PipelineName
    source: SourceName | None = None
    model: ModelRef
    variant: VariantName
    provider: Key
    windows: Count
    frames: Count
    dropped: Count
    errors: Count
    fps: float
    """Frames over the merged duration, per source."""
    last: UnixTime
    stages: dict[Stage, StageFigures]
    labels: dict[ShortText, Count] = Field(default_factory=dict)


def figures(histogram: Histogram) -> StageFigures:
    """A histogram's figures for people."""
    return StageFigures(
        count=histogram.count,
        p50=round(histogram.percentile(0.5), 3),
        p90=round(histogram.percentile(0.9), 3),
        p99=round(histogram.percentile(0.99), 3),
        max=round(histogram.max, 3),
    )


class ViewerCertificate(Open):
    """POST /v1/mqtt-certificates: a client certificate `_viewer-<name>` for read-only dashboards."""

    name: FleetName
    csr_pem: str = Field(max_length=16_384)


class ViewerCertificateIssued(Open):
    """PEM of the certificate (leaf, then the device CA), of the server CA, and where the broker is."""

    username: ShortText
    certificate_pem: str
    server_ca_pem: str
    host: ShortText
    port: int
    expires_at: UnixTime
