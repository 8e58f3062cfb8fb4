"""`edgeward-agent status`: what the daemon wrote last, and whether it lives.

The daemon replaces status.json whenever something changes; nobody has to ask it, so a stuck daemon cannot
keep its status from being read. A lock that dies with the daemon says whether it lives. Light: no
network, no TUF, no TLS.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from pydantic import Field

from edgeward_wire.document import Open, parse
from edgeward_wire.errors import Rejected
from edgeward_wire.identifiers import Count, DeviceId, Key, ShortText, UnixTime
from edgeward_wire.reported import PipelineReport, Reported

STATUS_FILE = "status.json"
LOCK_FILE = "lock"
MAX_STATUS_BYTES = 4 << 20
FULL_BYTES = 64 << 10
"""With less free than this, the daemon may not have been able to write the newest."""


class Figures(Open):
    """The newest window of one source."""

    fps: float
    p50_ms: float
    p99_ms: float
    dropped: Count = 0
    errors: Count = 0
    seen: ShortText = ""
    """The most frequent result."""
    stages: dict[Key, tuple[float, float]] = Field(default_factory=dict, max_length=16)
    """Stage -> p50 and p99 in milliseconds."""


class StatusFile(Open):
    """status.json."""

    schema_: Literal["edgeward.agent-status/1"] = Field(default="edgeward.agent-status/1", alias="schema")
    agent: ShortText
    pid: int
    device: DeviceId
    fleet: ShortText = ""
    started_at: UnixTime
    broker: bool
    broker_trouble: ShortText = ""
    """Why there is no connection."""
    reported: Reported
    figures: dict[Key, dict[Key, Figures]] = Field(default_factory=dict)
    """Pipeline -> source -> figures."""


@contextlib.contextmanager
def only_daemon(state: Path) -> Iterator[None]:
    """Hold the state directory's lock, so that one daemon runs on it.

    Raises:
        Rejected: another one holds it, or the directory cannot be written.
    """
    try:
        state.mkdir(parents=True, exist_ok=True)
        file = (state / LOCK_FILE).open("a+")
    except OSError as error:
        raise Rejected(
            f"{state} cannot be used as a state directory: {error.strerror}.",
            "Run as a user who may write there, or name another with --state.",
        ) from error
    with file:
        if not _locked(file, fcntl.LOCK_EX, patience_s=2.0):
            raise Rejected(
                f"Another edgeward-agent runs on {state}.", "Stop it first, or name another --state."
            )
        yield


def daemon_lives(state: Path) -> bool:
    """Whether a daemon holds the lock."""
    try:
        with (state / LOCK_FILE).open() as file:
            return not _locked(file, fcntl.LOCK_SH, patience_s=0.0)
    except OSError:
        return False


def _locked(file: IO[str], how: int, *, patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not _try_lock(file, how):
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)  # `status` may hold it for an instant
    return True


def _try_lock(file: IO[str], how: int) -> bool:
    try:
        fcntl.flock(file.fileno(), how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_status(path: Path, status: StatusFile) -> None:
    """Replace the file. Not fsynced: it says what is, and after a power cut that is something else.

    Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(status.to_bytes())
    os.replace(temporary, path)


def read_status(state: Path) -> StatusFile:
    """Raises Rejected when no daemon has run here, or the file is damaged."""
    path = state / STATUS_FILE
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_STATUS_BYTES + 1)
    except FileNotFoundError:
        raise Rejected(f"No edgeward-agent has run on {state} yet.", "Start it: edgeward-agent run") from None
    except OSError as error:
        raise Rejected(f"{path} cannot be read: {error.strerror}.") from error
    return parse(StatusFile, raw, limit=MAX_STATUS_BYTES, name=str(path))


def show_status(state: Path, *, as_json: bool) -> tuple[str, int]:
    """The text to print and the exit code: 0 when the daemon lives and nothing is at fault, else 1.

    A broker that is away is said and is no fault: the device polls, and goes on serving.
    """
    status = read_status(state)
    lives = daemon_lives(state)
    full = shutil.disk_usage(state).free < FULL_BYTES
    healthy = lives and not full and not any(p.fault for p in status.reported.pipelines.values())
    if as_json:
        plain = {"running": lives, **status.model_dump(mode="json", exclude_none=True)}
        return json.dumps(plain, sort_keys=True), 0 if healthy else 1
    if full:
        lines = [f"The disk of {state} is full: what follows may be old.", *_lines(status, lives=lives)]
        return "\n".join(lines), 1
    return "\n".join(_lines(status, lives=lives)), 0 if healthy else 1


def _lines(status: StatusFile, *, lives: bool) -> Iterator[str]:
    reported = status.reported
    fleet = f" of fleet {status.fleet}" if status.fleet else ""
    state = f"running (pid {status.pid})" if lives else "not running; this is what it wrote last"
    yield f"device {status.device}{fleet}: {state}, agent {status.agent}"
    age = max(0.0, time.time() - reported.time)
    yield f"{_broker(status, lives=lives)}, " + (
        f"registry: {reported.registry}"
        if reported.registry
        else f"registry fine, revision {reported.revision}"
    )
    yield f"changed {age:.0f} s ago"
    if reported.vitals is not None and reported.vitals.title:
        yield f"sensors: {reported.vitals.title}"
    if not reported.pipelines:
        yield "no pipelines: add [[pipelines.main.sources]] to agent.toml"
    for name, pipeline in sorted(reported.pipelines.items()):
        yield ""
        yield from _pipeline(name, pipeline, status.figures.get(name, {}))


def _broker(status: StatusFile, *, lives: bool) -> str:
    if status.broker and lives:
        return "broker connected"
    return "broker not connected" + (f" ({status.broker_trouble})" if status.broker_trouble else "")


def _pipeline(name: str, pipeline: PipelineReport, figures: dict[str, Figures]) -> Iterator[str]:
    serving = pipeline.serving
    if serving is None:
        yield f"{name}: serves nothing"
    else:
        notes = [] if serving.committed else ["on probation"]
        notes += ["below the security floor"] if serving.below_floor else []
        notes += ["its verdict is stale"] if serving.stale else []
        more = f" ({', '.join(notes)})" if notes else ""
        yield f"{name}: {serving.model.name} {serving.model.version}, {serving.plan.title}{more}"
    if pipeline.fault:
        yield f"  fault: {pipeline.fault}"
    if update := pipeline.update:
        what = update.result or f"{update.state} {update.progress:.0%}"
        why = update.reason or update.detail
        yield f"  update to {update.model.name} {update.model.version}: {what}{f': {why}' if why else ''}"
    if pipeline.sources or figures:
        yield f"  {'source':<16} {'state':<6} {'fps':>7} {'p50 ms':>8} {'p99 ms':>8} {'drops':>6}  sees"
    for source in sorted({*pipeline.sources, *figures}):
        report, figure = pipeline.sources.get(source), figures.get(source)
        up = "up" if report is None or report.up else "down"
        numbers = (
            f"{figure.fps:7.1f} {figure.p50_ms:8.1f} {figure.p99_ms:8.1f} {figure.dropped:6d}  {figure.seen}"
            if figure
            else f"{'-':>7} {'-':>8} {'-':>8} {'-':>6}  "
        )
        detail = f" {report.detail}" if report and report.detail else ""
        yield f"  {source:<16} {up:<6} {numbers}{detail}".rstrip()
