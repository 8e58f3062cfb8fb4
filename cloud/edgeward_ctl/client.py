"""The operator's side of the HTTP API. The only importer of httpx here.

Invariants: TLS is anchored in the profile's server CA and nothing else, no proxy or netrc of the
environment is used, every answer is bounded, and every fault becomes one of our two errors: `Rejected`
when asking again changes nothing, `Unavailable` when it may help.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from edgeward_ctl.profile import Profile
from edgeward_wire import __version__
from edgeward_wire.api import (
    REACHES_BACK_TO,
    AdmissionChange,
    CommandCreate,
    CommandStatus,
    Device,
    Fleet,
    FleetCreate,
    LogEntry,
    ModelEntry,
    Problem,
    Publish,
    Published,
    RollbackCreate,
    Rollout,
    RolloutCreate,
    Telemetry,
    TokenCreate,
    TokenCreated,
    ViewerCertificate,
    ViewerCertificateIssued,
    WhoAmI,
)
from edgeward_wire.document import Document, faults
from edgeward_wire.errors import EdgewardError, Rejected, Unavailable
from edgeward_wire.identifiers import blob_path
from edgeward_wire.manifest import BlobRef

MAX_ANSWER_BYTES = 32 << 20
_CHUNK = 256 << 10
_TIMEOUT = httpx.Timeout(30, connect=10)
_BLOB_TIMEOUT = httpx.Timeout(120, connect=10)
T = TypeVar("T")


class Conflict(Rejected):
    """412: someone else published in between. Fetch, merge, sign again."""


class NotFound(Rejected):
    """404: no such thing."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a cloud answers about telemetry: it merges so many windows at once, and no more."""

    rows: list[Telemetry]
    complete_since: float
    """Unix seconds; later than what was asked for when there were too many windows."""


class Client:
    """One operator's session with one cloud. Use as a context manager."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._http = httpx.Client(
            base_url=profile.url,
            verify=_anchored(profile.server_ca),
            headers={"Authorization": f"Bearer {profile.token}", "User-Agent": f"agent-ctl/{__version__}"},
            timeout=_TIMEOUT,
            trust_env=False,
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    # --- who, where

    def whoami(self) -> WhoAmI:
        """GET /v1/whoami: the cheapest proof that the cloud is there and knows us."""
        return self._get("/v1/whoami", WhoAmI)

    def fleets(self) -> list[Fleet]:
        """GET /v1/fleets."""
        return self._get("/v1/fleets", list[Fleet])

    def create_fleet(self, name: str) -> Fleet:
        """POST /v1/fleets."""
        return self._post("/v1/fleets", FleetCreate(name=name), Fleet)

    def devices(self, fleet: str | None = None) -> list[Device]:
        """GET /v1/devices."""
        return self._get("/v1/devices", list[Device], fleet=fleet)

    def device(self, device: str) -> Device:
        """GET /v1/devices/{id}."""
        return self._get(f"/v1/devices/{device}", Device)

    def admit(self, device: str, change: AdmissionChange) -> Device:
        """POST /v1/devices/{id}/admission."""
        return self._post(f"/v1/devices/{device}/admission", change, Device)

    def create_token(self, request: TokenCreate) -> TokenCreated:
        """POST /v1/enroll-tokens."""
        return self._post("/v1/enroll-tokens", request, TokenCreated)

    # --- commands

    def send_command(self, device: str, request: CommandCreate) -> CommandStatus:
        """POST /v1/devices/{id}/commands."""
        return self._post(f"/v1/devices/{device}/commands", request, CommandStatus)

    def command(self, device: str, n: int) -> CommandStatus:
        """GET /v1/devices/{id}/commands/{n}."""
        return self._get(f"/v1/devices/{device}/commands/{n}", CommandStatus)

    def commands(self, device: str, limit: int = 10) -> list[CommandStatus]:
        """GET /v1/devices/{id}/commands, newest first."""
        return self._get(f"/v1/devices/{device}/commands", list[CommandStatus], limit=limit)

    # --- what happened

    def log(self, device: str, limit: int) -> list[LogEntry]:
        """GET /v1/devices/{id}/log, newest first."""
        return self._get(f"/v1/devices/{device}/log", list[LogEntry], limit=limit)

    def telemetry(self, *, fleet: str | None = None, device: str | None = None, since: float) -> Figures:
        """GET /v1/telemetry: a row a series since that time (Unix seconds)."""
        asked = {"fleet": fleet, "device": device, "since": since}
        params = {key: value for key, value in asked.items() if value is not None}
        answer = self._send("GET", "/v1/telemetry", params=params)
        rows = _read(list[Telemetry], answer.content, "/v1/telemetry")
        return Figures(rows, _reaches_back_to(answer.headers.get(REACHES_BACK_TO, ""), since))

    # --- models

    def models(self) -> list[ModelEntry]:
        """GET /v1/models."""
        return self._get("/v1/models", list[ModelEntry])

    def models_metadata(self) -> tuple[bytes, str]:
        """GET /v1/registry/models: the signed bytes, and their ETag for `publish`."""
        response = self._send("GET", "/v1/registry/models")
        return response.content, response.headers.get("ETag", "")

    def publish(self, publish: Publish, etag: str) -> Published:
        """PUT /v1/registry/models.

        Raises:
            Conflict: the metadata changed since `etag`.
        """
        return self._body("PUT", "/v1/registry/models", publish, Published, {"If-Match": etag})

    def has_blob(self, ref: BlobRef) -> bool:
        """HEAD /v1/blobs/sha256/{hex}."""
        try:
            # The cloud reads all of it, to be sure that it is undamaged.
            self._send("HEAD", f"/v1/{blob_path(ref.sha256)}", timeout=_BLOB_TIMEOUT)
        except NotFound:
            return False
        return True

    def put_blob(self, ref: BlobRef, file: Path, progress: Callable[[int], None]) -> None:
        """PUT /v1/blobs/sha256/{hex}; `progress` gets the bytes sent since its last call."""
        self._send(
            "PUT",
            f"/v1/{blob_path(ref.sha256)}",
            content=_chunks(file, ref.length, progress),
            headers={"Content-Length": str(ref.length), "Content-Type": "application/octet-stream"},
            timeout=_BLOB_TIMEOUT,
        )

    def fetch(self, url: str, limit: int) -> tuple[int, bytes]:
        """Status and at most `limit` bytes of a public file below the cloud's address."""
        with self._mapped(), self._http.stream("GET", url) as response:
            return response.status_code, _bounded(response, limit)

    # --- rollouts

    def create_rollout(self, request: RolloutCreate) -> Rollout:
        """POST /v1/rollouts."""
        return self._post("/v1/rollouts", request, Rollout)

    def create_rollback(self, request: RollbackCreate) -> Rollout:
        """POST /v1/rollbacks."""
        return self._post("/v1/rollbacks", request, Rollout)

    def rollout(self, rollout: str) -> Rollout:
        """GET /v1/rollouts/{id}."""
        return self._get(f"/v1/rollouts/{rollout}", Rollout)

    def rollouts(self, *, fleet: str | None = None, limit: int = 20) -> list[Rollout]:
        """GET /v1/rollouts."""
        return self._get("/v1/rollouts", list[Rollout], fleet=fleet, limit=limit)

    def viewer_certificate(self, request: ViewerCertificate) -> ViewerCertificateIssued:
        """POST /v1/mqtt-certificates."""
        return self._post("/v1/mqtt-certificates", request, ViewerCertificateIssued)

    # --- plumbing

    def _get(self, path: str, kind: type[T], **query: str | float | None) -> T:
        asked = {key: value for key, value in query.items() if value is not None}
        return _read(kind, self._send("GET", path, params=asked).content, path)

    def _post(self, path: str, body: Document, kind: type[T]) -> T:
        return self._body("POST", path, body, kind, {})

    def _body(self, method: str, path: str, body: Document, kind: type[T], headers: dict[str, str]) -> T:
        headers = {"Content-Type": "application/json", **headers}
        return _read(kind, self._send(method, path, content=body.to_bytes(), headers=headers).content, path)

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        with self._mapped(), self._http.stream(method, path, **options) as response:
            body = _bounded(response, MAX_ANSWER_BYTES)
        whole = httpx.Response(response.status_code, headers=_plain(response.headers), content=body)
        if not whole.is_success:
            raise self._problem(method, path, whole)
        return whole

    def _mapped(self) -> _Mapped:
        return _Mapped(self.profile)

    def _problem(self, method: str, path: str, response: httpx.Response) -> EdgewardError:
        """The error that an answer stands for."""
        status = response.status_code
        said = _said(response)
        what = f"{said.detail or said.title}".rstrip(".") + "."
        if status == 401:
            return Rejected(
                "The cloud does not accept this operator's token: it is unknown, expired or revoked.",
                said.next_step
                or "Make a new one on the cloud's machine, as its owner, with `edgeward-cloud token --dir DIR"
                f" {self.profile.operator or 'NAME'}`, and put it into {self.profile.directory}/profile.toml",
            )
        if status == 404:
            return NotFound(what, said.next_step)
        if status == 412:
            return Conflict(what, said.next_step or "Fetch, merge and sign again.")
        if status == 413:
            return Rejected(f"The cloud refuses the size of {path}: {what}", said.next_step)
        if status >= 500 or status in (408, 425, 429):
            return Unavailable(
                f"The cloud could not answer {method} {path} ({status}): {what}",
                said.next_step or "Try again; if it stays so, look at the cloud's log.",
            )
        return Rejected(what, said.next_step)


class _Mapped:
    """Turns httpx's errors into ours."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, httpx.HTTPError | httpx.InvalidURL):
            raise _fault(error, self._profile) from error


def _fault(error: Exception, profile: Profile) -> EdgewardError:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        why = text.partition("certificate verify failed:")[2].partition("(_ssl")[0].strip()
        return Rejected(
            f"{profile.url} shows a certificate that the profile's {profile.server_ca.name} does not vouch"
            f" for: {why or text}.",
            "Either something stands between you and the cloud, or the profile is of another cloud: get"
            " server-ca.pem from the cloud's operators again, over a way that you trust.",
        )
    if isinstance(error, httpx.TimeoutException):
        return Unavailable(f"{profile.url} did not answer in time.", "Is the machine reachable? Try again.")
    if isinstance(error, httpx.ConnectError):
        return Unavailable(
            f"Nothing answers at {profile.url}: {text}.",
            f"Is `edgeward-cloud up` running there? The address is in {profile.directory / 'profile.toml'}.",
        )
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return Rejected(f"{profile.url!r} is no address: {text}.", "Correct `url` in profile.toml.")
    return Unavailable(
        f"The connection to {profile.url} broke: {text or type(error).__name__}.", "Try again."
    )


def _anchored(server_ca: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(server_ca))
    except ssl.SSLError as error:
        raise Rejected(
            f"{server_ca} is not a certificate.", "Get server-ca.pem from the cloud again."
        ) from error


def _bounded(response: httpx.Response, limit: int) -> bytes:
    body = bytearray()
    for chunk in response.iter_bytes():
        body += chunk
        if len(body) > limit:
            raise Rejected(f"{response.url.path} answers with more than {limit} bytes.")
    return bytes(body)


def _plain(headers: httpx.Headers) -> dict[str, str]:
    """Without what described the transfer: the body has been decoded already."""
    dropped = ("content-encoding", "content-length", "transfer-encoding")
    return {key: value for key, value in headers.items() if key not in dropped}


def _said(response: httpx.Response) -> Problem:
    try:
        return Problem.model_validate_json(response.content)
    except ValidationError:
        return Problem(title=f"{response.status_code} {response.reason_phrase}", status=response.status_code)


def _read(kind: type[T], raw: bytes, path: str) -> T:
    try:
        return TypeAdapter(kind).validate_json(raw)
    except ValidationError as error:
        raise Rejected(
            f"The cloud's answer to {path} is not understood: {faults(error)}.",
            "Cloud and agent-ctl understand each other across two minor versions: compare them.",
        ) from error


def _reaches_back_to(header: str, since: float) -> float:
    """What the header says, which has milliseconds; `since` when that is no later, or there is no header."""
    try:
        said = float(header)
    except ValueError:
        return since
    return said if said > since + 0.001 else since


def _chunks(file: Path, length: int, progress: Callable[[int], None]) -> Iterator[bytes]:
    """The file's bytes. Raises Rejected when it is no longer as long as it was."""
    left = length
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            left -= len(chunk)
            if left < 0:
                break
            yield chunk
            progress(len(chunk))
    if left:
        raise Rejected(f"{file} changed while it was sent.", "Deploy again when nothing writes to it.")
