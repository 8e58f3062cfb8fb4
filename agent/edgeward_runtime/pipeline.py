"""Frames of several sources through one model at a time, and the change from one model to the next.

    capture threads → slots → the inference thread of the model in service

Each model has an inference thread of its own, which opens, warms, runs and closes its session. A new
one prepares itself beside the one in service and takes over between two frames: the old thread finishes
its frame, then ends. Invariants: one thread takes frames at any time; a model that cannot be prepared
changes nothing; no frame is lost beyond what its slot allows.

What happens comes out through `emit`, from several threads: it must only pass it on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from edgeward_runtime.capture import Capture
from edgeward_runtime.doubts import doubt
from edgeward_runtime.engine import Engine, Look, Recipe
from edgeward_runtime.jobs import Job
from edgeward_runtime.meter import Meter, Series
from edgeward_runtime.resources import give_back
from edgeward_runtime.sampling import Choosing, SampleOptions, Sampler
from edgeward_runtime.shots import Shots
from edgeward_runtime.slots import Frame, Slots
from edgeward_runtime.sources.options import SourceOptions, Why
from edgeward_runtime.tasks.answer import signs
from edgeward_runtime.telling import Telling
from edgeward_wire.errors import EdgewardError, Unavailable
from edgeward_wire.telemetry import Measures, Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Served:
    """The model of order `id` takes frames from now on; no model could for `gap_ms`."""

    id: int
    gap_ms: float
    doubts: Mapping[str, str] = field(default_factory=dict)
    """By source: which of its settings do nothing with this model."""


@dataclass(frozen=True)
class NotServed:
    """The model of order `id` could not be prepared, or a newer order came before it was."""

    id: int
    reason: str


@dataclass(frozen=True)
class Saw:
    """A frame's answer: when its source's policy wants it told, or somebody listens to all of them."""

    source: str
    recipe: Recipe
    look: Look
    stages: dict[Stage, float]
    time: float
    """Unix seconds."""
    why: Why | None
    """Which policy wants it told; None: only a listener does."""


@dataclass(frozen=True)
class SourceChange:
    """A source went up or down."""

    source: str
    up: bool
    detail: str


@dataclass(frozen=True)
class WindowClosed:
    """A model's measures up to a change of model."""

    measures: tuple[Measures, ...]


@dataclass(frozen=True)
class Crashed:
    """A thread met what nobody foresaw: the process should end."""

    error: BaseException


Happening = Served | NotServed | Saw | SourceChange | WindowClosed | Crashed
Emit = Callable[[Happening], None]


@dataclass
class Totals:
    """Since the start, over all models. Written by the inference thread in service."""

    frames: int = 0
    errors: int = 0


class Pipeline:
    """Start it, give it models, read its windows, stop it: all from one thread."""

    def __init__(
        self,
        name: str,
        sources: Sequence[SourceOptions],
        emit: Emit,
        *,
        result_interval_s: float = 1.0,
        samples: SampleOptions | None = None,
    ) -> None:
        self.totals = Totals()
        self.result_interval_s = result_interval_s
        self.listening = False
        """Whether somebody wants every answer, whatever the sources' policies."""
        self._name = name
        self._sources = tuple(sources)
        self._names = tuple(source.name for source in sources)
        self._emit = emit
        self._slots = Slots([source.policy for source in sources])
        self.shots: Shots[Saw] = Shots(self._names)
        """Pictures for those who ask."""
        self._captures = [
            Capture(
                index,
                options,
                self._slots,
                on_change=lambda *change: emit(SourceChange(*change)),
                on_crash=lambda error: emit(Crashed(error)),
            )
            for index, options in enumerate(sources)
        ]
        self.sampler: Sampler | None = None
        if samples is not None:
            self.sampler = Sampler(samples, self._names, lambda error: emit(Crashed(error)))
        self._hand_over = threading.Lock()
        self._workers: list[_Worker] = []
        self._newest: _Worker | None = None
        self._serving: _Worker | None = None

    def start(self) -> None:
        """Begin to capture."""
        if self.sampler is not None:
            self.sampler.start()
        for capture in self._captures:
            capture.start()

    def serve(self, id: int, recipe: Recipe) -> None:
        """Prepare a model on a thread of its own; it takes over when ready: `Served`, or `NotServed`."""
        self._workers = [worker for worker in self._workers if worker.is_alive()]
        worker = _Worker(self, id, recipe)
        self._newest = worker
        self._workers.append(worker)
        worker.start()

    def tick(self, now: float) -> None:
        """Look for sources that stopped in the middle of a read. `now` is monotonic."""
        for capture in self._captures:
            capture.check_stale(now)

    def close_window(self, now: float, wall: float) -> tuple[Measures, ...]:
        """The measures since the last window; empty while no model serves."""
        with self._hand_over:
            serving = self._serving
            return serving.meter.close(now, wall, self._slots.take_dropped()) if serving else ()

    @property
    def serving(self) -> Recipe | None:
        """The model that takes frames. For any thread."""
        serving = self._serving
        return serving.recipe if serving else None

    def submit(self, job: Job) -> None:
        """Run this between frames. For any thread. Raises Busy, or Unavailable when no model serves."""
        if self._serving is None:
            raise Unavailable("No model serves yet.", "See `edgeward-agent status`.")
        self._slots.submit(job)

    def idle(self) -> bool:
        """Whether every frame that was captured has been answered, and its answer emitted."""
        return self._slots.idle()

    def stalled_s(self, now: float) -> float:
        """How long the inference thread has been busy with one frame; 0 between frames."""
        serving = self._serving
        since = serving.busy_since if serving else 0.0
        return max(0.0, now - since) if since else 0.0

    def stop(self, wait_s: float = 5.0) -> None:
        """End all threads; one that hangs in a driver is left behind after `wait_s`."""
        self._newest = None
        for capture in self._captures:
            capture.stop()
        for worker in self._workers:
            worker.retire()
        self._slots.close()
        deadline = time.monotonic() + wait_s
        threads: list[Capture | _Worker] = [*self._captures, *self._workers]
        for thread in threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        if self.sampler is not None:
            self.sampler.stop()

    # --- called by the workers

    def _take_over(self, worker: _Worker) -> bool:
        """Make `worker` the one in service, once the old one has left. False: it is not wanted any more."""
        with self._hand_over:
            if self._newest is not worker:
                return False
            old, gap_ms = self._serving, 0.0
            if old is not None:
                old.retire()
                self._slots.wake()
                old.left.wait()
            now, wall = time.monotonic(), time.time()
            dropped = self._slots.take_dropped()
            if old is not None:
                gap_ms = (now - old.left_at) * 1e3
                closed = old.meter.close(now, wall, dropped)
                if closed:
                    self._emit(WindowClosed(closed))
            series = Series(self._name, self._names, worker.recipe.model, worker.recipe.plan)
            worker.meter = Meter(series, now)
            self._serving = worker
        self._emit(Served(worker.id, gap_ms, self._doubts(worker.recipe)))
        return True

    def _doubts(self, recipe: Recipe) -> dict[str, str]:
        below = self.sampler.options.below if self.sampler is not None else None
        found = {
            source.name: doubt(recipe.contract.task, recipe.labels, source.rules, below)
            for source in self._sources
        }
        for name, what in found.items():
            if what:
                log.warning("source %s: %s", name, what)
        return {name: what for name, what in found.items() if what}


class _Worker(threading.Thread):
    """The inference thread of one model."""

    meter: Meter
    """There once the worker is in service."""

    def __init__(self, pipeline: Pipeline, id: int, recipe: Recipe) -> None:
        super().__init__(name=f"inference-{id}", daemon=True)
        self.id, self.recipe = id, recipe
        self.left = threading.Event()
        self.left_at = 0.0
        self.busy_since = 0.0
        self._pipeline = pipeline
        self._emit = pipeline._emit
        self._slots = pipeline._slots
        self._retired = threading.Event()
        self._telling = [Telling(source.results) for source in pipeline._sources]
        self._sampler = pipeline.sampler
        # This model's: what is usual for one is not for another.
        self._choosing = [Choosing(self._sampler.options) for _ in pipeline._sources] if self._sampler else []
        self._failing: set[int] = set()
        """The sources whose last frame failed: each is told once, and once when it works again."""

    def retire(self) -> None:
        """Take no more frames."""
        self._retired.set()

    def run(self) -> None:
        try:
            engine = self._prepare()
            if engine is None:
                return
            if self._pipeline._take_over(self):
                self._serve(engine)
            else:
                self._emit(NotServed(self.id, "A newer model was asked for before this one was ready."))
            engine.close()
            give_back()
        except BaseException as error:  # noqa: BLE001  the thread's last act: its owner stops the process
            self._emit(Crashed(error))

    def _prepare(self) -> Engine | None:
        try:
            engine = Engine(self.recipe, [source.rules for source in self._pipeline._sources])
            engine.warm()
        except EdgewardError as error:
            self._emit(NotServed(self.id, error.what))
            return None
        give_back()  # loading takes twice what serving does
        return engine

    def _serve(self, engine: Engine) -> None:
        try:
            while (work := self._slots.take(self._retired.is_set)) is not None:
                self.busy_since = time.monotonic()
                if isinstance(work, Job):
                    self._step(engine, work)
                else:
                    self._frame(engine, work)
                self.busy_since = 0.0
        finally:
            self.left_at = time.monotonic()
            self.left.set()

    def _keep(self, frame: Frame, look: Look, now: float) -> None:
        """Hand the frame to the sampler, if it is one of those that are kept."""
        if self._sampler is not None:
            kept = self._choosing[frame.source].why(look.answer, now)
            if kept is not None:
                self._sampler.keep(frame, kept)

    def _frame(self, engine: Engine, frame: Frame) -> None:
        # What may be wanted once its answer is known must not be overwritten until then.
        frame.held = self._sampler is not None or self._pipeline.shots.wanted(frame.source)
        try:
            self._look(engine, frame)
        except EdgewardError as error:
            self._failed(frame.source, error)
        frame.let_go()

    def _step(self, engine: Engine, job: Job) -> None:
        more = job.step(engine, self.recipe.model.sha256)
        self._slots.served(time.monotonic() - self.busy_since)
        if more:
            try:
                self._slots.submit(job, again=True)
            except Unavailable as error:
                job.fail(error)

    def _look(self, engine: Engine, frame: Frame) -> None:
        if self._sampler is not None:
            self._sampler.hear(frame)
        for look in engine.looks(frame):
            now = time.monotonic()
            stages: dict[Stage, float] = {
                "capture": frame.capture_ms,
                "decode": frame.decode_ms,
                "preprocess": look.preprocess_ms,
                "inference": look.inference_ms,
                "postprocess": look.postprocess_ms,
                "end_to_end": (now - frame.captured_at) * 1e3,
            }
            self.meter.record(frame.source, stages, look.answer.labels())
            self._keep(frame, look, now)
            self._pipeline.totals.frames += 1
            why = self._telling[frame.source].why(signs(look.answer), now, self._pipeline.result_interval_s)
            # Only of a frame that is held: who asks in the middle of one gets the next.
            wanted = (frame.held or frame.rate is not None) and self._pipeline.shots.wanted(frame.source)
            if why is not None or self._pipeline.listening or wanted:
                name = self._pipeline._names[frame.source]
                saw = Saw(name, self.recipe, look, stages, time.time(), why)
                if wanted:
                    self._pipeline.shots.give(frame, saw)
                if why is not None or self._pipeline.listening:
                    self._emit(saw)
            if frame.source in self._failing:
                self._failing.remove(frame.source)
                log.info("%s: inference works again", self._pipeline._names[frame.source])

    def _failed(self, source: int, error: EdgewardError) -> None:
        self.meter.record_error(source)
        self._pipeline.totals.errors += 1
        if source not in self._failing:
            self._failing.add(source)
            log.error("%s: inference fails: %s", self._pipeline._names[source], error.what)
