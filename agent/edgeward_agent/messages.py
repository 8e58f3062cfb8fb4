"""What the daemon and its children say to each other: newline-delimited JSON over a socket pair.

The socket is the child's file descriptor 3 (`--fd 3`). End of file on it ends the child. One message
is one line of at most `MAX_LINE` bytes. The union is closed: an unknown message is a bug, and crashes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, model_validator

from edgeward_wire.document import Document
from edgeward_wire.identifiers import Key, PipelineName, Reason, ShortText, SourceName
from edgeward_wire.manifest import Manifest, ModelRef
from edgeward_wire.result import ResultMessage
from edgeward_wire.telemetry import Measures
from edgeward_wire.verdict import Plan, Verdict

MAX_LINE = 4 << 20
BUDGET_S = 900.0
"""For trying plans, unless somebody is in more of a hurry."""


Share = Annotated[float, Field(ge=0, le=1)]
Polygon = Annotated[tuple[tuple[Share, Share], ...], Field(min_length=3, max_length=64)]


class SourceSpec(Document):
    """One `[[pipelines.NAME.sources]]` of the device's own agent.toml."""

    name: SourceName
    uri: str = Field(min_length=1, max_length=4096)
    """Camera, stream, file, directory of pictures, or sound: see edgeward_runtime.sources.options."""
    slot: Literal["latest", "every"] | None = None
    """None: `latest` for live and paced sources, `every` for files."""
    realtime: bool = False
    """Play a file at its own frame rate, as a camera would."""
    loop: bool = False
    width: int | None = Field(default=None, ge=16, le=8192)
    height: int | None = Field(default=None, ge=16, le=8192)
    fps: float | None = Field(default=None, gt=0, le=1000)
    format: str | None = Field(default=None, pattern=r"^[A-Za-z0-9]{3}[A-Za-z0-9 ]$")
    """FOURCC that a camera is asked for, like MJPG or YUYV."""
    rotate: Literal[0, 90, 180, 270] = 0
    """Degrees clockwise."""
    crop: tuple[Share, Share, Share, Share] | None = None
    """(x1, y1, x2, y2) of the turned frame; 0, 0 is its upper left corner and 1, 1 its lower right."""
    thresholds: dict[ShortText, Share] = Field(default_factory=dict, max_length=256)
    """Least score by label; `*` for every other."""
    classes: tuple[ShortText, ...] = Field(default=(), max_length=256)
    """Only these labels; empty: all."""
    zones: dict[Key, Polygon] = Field(default_factory=dict, max_length=16)
    """Areas of the frame by name, as corners (x, y)."""
    results: Literal["interval", "change", "every"] = "interval"
    """Which answers are told over MQTT: one in each interval, those that are new, or all."""

    @model_validator(mode="after")
    def _cuts(self) -> SourceSpec:
        if self.crop is not None and not (self.crop[0] < self.crop[2] and self.crop[1] < self.crop[3]):
            raise ValueError("crop is (x1, y1, x2, y2) with x1 < x2 and y1 < y2")
        return self


class SamplesSpec(Document):
    """`[pipelines.NAME.samples]` of the device's own agent.toml: frames that are kept for calibration."""

    directory: str = Field(default="", max_length=4096)
    """Empty: samples/NAME in the agent's state directory."""
    below: Share | None = None
    """Keep what the model is less sure of than this."""
    every: int | None = Field(default=None, ge=1, le=1 << 40)
    """Keep one of so many answers."""
    drift: Share | None = None
    """Keep while the labels' distribution is further than this from the usual one (0 same, 1 disjoint)."""
    apart_s: float = Field(default=10, ge=0, le=86_400)
    """Least time between two samples of a source."""
    most_files: int = Field(default=500, ge=1, le=100_000)
    most_mb: float = Field(default=256, gt=0, le=1_000_000)

    @model_validator(mode="after")
    def _some(self) -> SamplesSpec:
        if self.below is None and self.every is None and self.drift is None:
            raise ValueError("samples are kept for a reason: set below, every or drift")
        return self


# --- daemon -> runner


class Configure(Document):
    """First message to a runner, and again when a window or interval changes."""

    kind: Literal["configure"] = "configure"
    pipeline: PipelineName
    sources: tuple[SourceSpec, ...] = Field(max_length=64)
    samples: SamplesSpec | None = None
    """With its directory filled in."""
    window_s: float = Field(default=30, ge=0.1, le=3600)
    result_interval_s: float = Field(default=1, ge=0.05, le=3600)
    run: str = Field(default="", max_length=4096)
    """Directory of the runners' local sockets; empty: none."""


class Serve(Document):
    """Prepare this model beside the one that runs, then let it take the next frame."""

    kind: Literal["serve"] = "serve"
    id: int = Field(ge=0)
    model: ModelRef
    manifest: Manifest
    blobs: str
    """Directory of blobs: `<blobs>/<sha256>`."""
    plan: Plan


# --- runner -> daemon


class Ready(Document):
    """The runner is up and waits for `Configure`."""

    kind: Literal["ready"] = "ready"
    runtime: dict[Key, str] = Field(default_factory=dict)
    """Versions: onnxruntime, numpy, opencv."""


class ServingNow(Document):
    """The model of `Serve` number `id` takes frames from now on."""

    kind: Literal["serving"] = "serving"
    id: int
    gap_ms: float = Field(default=0, ge=0)
    """Time in which no model could take a frame."""


class ServeFailed(Document):
    """The model of `Serve` number `id` could not be prepared; whatever ran before runs on."""

    kind: Literal["serve_failed"] = "serve_failed"
    id: int
    reason: Reason


class WindowClosed(Document):
    """The measures of every source in one window."""

    kind: Literal["window"] = "window"
    measures: tuple[Measures, ...] = Field(max_length=64)


class ResultSeen(Document):
    """The newest result of a source, at most one per `result_interval_s`."""

    kind: Literal["result"] = "result"
    result: ResultMessage


class SourceChanged(Document):
    """A source went up or down (not there, no frames, end of file)."""

    kind: Literal["source"] = "source"
    source: SourceName
    up: bool
    detail: str = Field(default="", max_length=200)


class Heartbeat(Document):
    """Sent each second by the inference thread's owner; `frames` counts all that were served.

    `stalled_s` is how long the inference thread has been inside one run: 0 between runs.
    """

    kind: Literal["heartbeat"] = "heartbeat"
    frames: int = Field(ge=0)
    errors: int = Field(default=0, ge=0)
    stalled_s: float = Field(default=0, ge=0)


# --- daemon -> qualify


class Qualify(Document):
    """The only message to qualify: try all plans of this model and report one verdict."""

    kind: Literal["qualify"] = "qualify"
    model: ModelRef
    manifest: Manifest
    blobs: str
    threads: int = Field(ge=1, le=1024)
    """The budget: cores / pipelines."""
    key: str
    """What the verdict is cached under."""
    lock: str
    """Path of the machine's lock file: one qualify at a time."""
    providers: tuple[Key, ...] = ()
    """Manual override: only these; empty means all that may work."""
    incumbent: Plan | None = None
    """The plan in service if it is the same model: another needs 10 % to win."""
    scratch: str
    """A directory of its own for engine caches."""
    budget_s: float = Field(default=BUDGET_S, gt=0)
    """Plans that were not tried by then are skipped; time spent on cooling does not count."""
    max_temp_c: float | None = None
    """Hotter than this, nothing is measured; None: only throttling keeps it waiting."""
    cool_s: float = Field(default=600, ge=0)
    """For cooling, all in all; then it measures all the same, provisionally."""
    root: str = "/"
    """Where /proc and /sys are."""


# --- qualify -> daemon


class QualifyProgress(Document):
    """How far qualify is: `preparing` (sessions, engines) then `validating` (parity, latency).

    `waiting` comes in between as long as another qualify is at work, or the device is too hot.
    """

    kind: Literal["progress"] = "progress"
    phase: Literal["waiting", "preparing", "validating"]
    done: int = Field(ge=0)
    total: int = Field(ge=0)
    note: str = Field(default="", max_length=200)


class QualifyDone(Document):
    """The last message of qualify."""

    kind: Literal["verdict"] = "verdict"
    verdict: Verdict


RunnerMessage = Ready | ServingNow | ServeFailed | WindowClosed | ResultSeen | SourceChanged | Heartbeat
QualifyMessage = QualifyProgress | QualifyDone

ToRunner = Annotated[Configure | Serve, Field(discriminator="kind")]
FromRunner = Annotated[RunnerMessage, Field(discriminator="kind")]
FromQualify = Annotated[QualifyMessage, Field(discriminator="kind")]

TO_RUNNER: TypeAdapter[Configure | Serve] = TypeAdapter(ToRunner)
FROM_RUNNER: TypeAdapter[RunnerMessage] = TypeAdapter(FromRunner)
FROM_QUALIFY: TypeAdapter[QualifyMessage] = TypeAdapter(FromQualify)


def encode(message: Document) -> bytes:
    """One line."""
    return message.to_bytes() + b"\n"
