"""One pipeline: its journalled record, the parts that work on it, and what the table's effects do with them.

Invariants: everything here runs on the machine's thread. `record` is only read here: the machine alone
changes it, and journals it before an effect is carried out. What an effect comes to is an event, told
through `emit`. Probation, live latency and progress are not journalled and end with the process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgeward_agent import messages, states
from edgeward_agent.config import Config
from edgeward_agent.fetching import Fetching
from edgeward_agent.gates import LatencyWatch, Probation
from edgeward_agent.local_socket import RUN
from edgeward_agent.qualifying import Qualifying
from edgeward_agent.reporting import Reporter
from edgeward_agent.running import Hooks, Patience, Post, Running, served_blobs
from edgeward_agent.states import Deployment, Event, Facts, Op, Record, Want
from edgeward_agent.supply import Supply
from edgeward_agent.sysinfo import Machine as Hardware
from edgeward_agent.variants import needed_blobs, usable_variants
from edgeward_agent.workers import Programs
from edgeward_wire.assignment import RemoteConfig
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import BlobRef
from edgeward_wire.reported import SourceReport
from edgeward_wire.telemetry import Measures

log = logging.getLogger(__name__)

RESTORES = 3
"""Tries to serve the committed model on the way back."""
_UNHEARD = SourceReport(up=False, detail="no frame yet")


class SecurityFloors(Protocol):
    """The part of `floors.Floors` that the machine and its pipelines use."""

    @property
    def last_authenticated_time(self) -> float: ...

    def security(self, model: str) -> int: ...

    def raise_security(self, model: str, epoch: int) -> None: ...


@dataclass(frozen=True)
class Shared:
    """What all pipelines of one device stand on."""

    config: Config
    state: Path
    hardware: Hardware
    floors: SecurityFloors
    supply: Supply
    reporter: Reporter
    programs: Programs
    patience: Patience
    remote: Callable[[], RemoteConfig]
    """The settings of the newest known assignment."""
    post: Post


class Pipeline:
    """One pipeline. The machine decides what becomes of it, and reads its parts."""

    def __init__(self, name: str, record: Record, shared: Shared, emit: Callable[[Event], None]) -> None:
        self.name = name
        self.record = record
        self.probation: Probation | None = None
        self.latency = LatencyWatch()
        self.progress = 0.0
        """Of the update, while none of the parts below has one."""
        self.detail = ""
        self._shared = shared
        self._emit = emit
        blobs = shared.state / "blobs"
        self.running = Running(
            name,
            command=shared.programs.runner,
            blobs=blobs,
            configure=self.configure,
            post=shared.post,
            hooks=Hooks(
                emit=emit,
                windows=self._windows,
                result=shared.reporter.result,
                heartbeat=self._heartbeat,
                source=self._source,
                missing=self._repair,
            ),
            patience=shared.patience,
        )
        self.fetching = Fetching(blobs, shared.supply, shared.post, emit)
        self.qualifying = Qualifying(
            name,
            command=shared.programs.qualify,
            config=shared.config,
            hardware=shared.hardware,
            state=shared.state,
            post=shared.post,
            emit=emit,
        )

    @property
    def configured(self) -> bool:
        """Whether agent.toml has it."""
        return self.name in self._shared.config.pipelines

    def deployments(self) -> list[Deployment]:
        """All of its models that may still be served."""
        record = self.record
        found = (record.candidate, record.committed, record.previous, self.running.target)
        return [deployment for deployment in found if deployment is not None]

    def consider(self, want: Want | None) -> None:
        """Emit what a verified assignment means for it now, if anything."""
        floors = self._shared.floors
        facts = Facts(
            configured=self.configured,
            fingerprint=self._shared.hardware.runtime_fingerprint,
            floor=floors.security(want.row.model.name) if want else 0,
            stale=self.latency.stale,
        )
        event = states.consider(self.record, want, facts)
        if event is not None:
            self._emit(event)

    def configure(self) -> messages.Configure:
        """What its runner is told: this device's own settings, and the assignment's where they may differ."""
        local, remote = self._shared.config.telemetry, self._shared.remote()
        settings = self._shared.config.pipelines.get(self.name)
        return messages.Configure(
            pipeline=self.name,
            sources=settings.sources if settings else (),
            samples=self._samples(settings.samples if settings else None),
            window_s=remote.telemetry_window_s or local.window_s,
            result_interval_s=remote.result_interval_s or local.result_interval_s,
            run=str((self._shared.state / RUN).absolute()),
        )

    def _samples(self, wanted: messages.SamplesSpec | None) -> messages.SamplesSpec | None:
        if wanted is None or wanted.directory:
            return wanted
        directory = self._shared.state / "samples" / self.name
        return wanted.model_copy(update={"directory": str(directory.absolute())})

    # --- time

    def tick(self, now: float) -> None:
        """Deadlines, and the gates of probation."""
        self.running.tick(now)
        self.fetching.tick(now)
        self.qualifying.tick(now)
        if self.probation is not None and self.record.state == "probation":
            self._judge(self.probation, now)

    def _judge(self, probation: Probation, now: float) -> None:
        sources = self._all_sources()
        self.progress = probation.progress(now)
        self.detail = probation.detail(now, sources)
        if self.running.serving is None:
            return
        event = probation.judge(now, sources)
        if event is not None:
            self._emit(event)

    def _all_sources(self) -> dict[str, SourceReport]:
        """All that agent.toml has. One that was not heard of yet may never come, and is no reason to pass."""
        settings = self._shared.config.pipelines.get(self.name)
        names = [source.name for source in settings.sources] if settings else []
        return {name: self.running.sources.get(name, _UNHEARD) for name in names}

    # --- what the runner tells

    def _windows(self, measures: tuple[Measures, ...]) -> None:
        self._shared.reporter.windows(measures)
        if self.probation is not None:
            self.probation.windows(measures)
        committed = self.record.committed
        if committed is None or not self.running.serves(committed):
            return
        if self.latency.look(committed, measures):
            self.qualifying.forget(committed)
            log.warning("%s: %s", self.name, self.latency.finding)

    def _heartbeat(self, message: messages.Heartbeat) -> None:
        if self.probation is not None:
            self.probation.heartbeat(message.frames, message.errors, time.monotonic())

    def _source(self, source: str, report: SourceReport) -> None:
        detail = "" if report.up else report.detail or "down"
        self._shared.reporter.fault(f"source:{self.name}/{source}", detail)

    def _repair(self, deployment: Deployment, refs: tuple[BlobRef, ...]) -> None:
        """Blobs of a model that should be served are gone: fetch them again, then serve it."""
        running = self.running
        running.fault = f"A blob of {deployment.title} is missing; it is fetched again."

        def done(fault: Rejected | Unavailable | None) -> None:
            if running.target != deployment:
                return
            if fault is not None:
                reason = f"A blob of {deployment.title} is missing: {fault}"
                self._emit(states.ServeFailed(reason))
                return
            running.fault = ""
            running.serve(deployment)

        self.fetching.repair(refs, done)

    # --- effects

    def raise_floor(self) -> None:
        """Nothing below the candidate's security epoch from now on. Raises Unavailable: the disk."""
        candidate = self._candidate
        self._shared.floors.raise_security(candidate.row.model.name, candidate.contents.security_epoch)

    def carry_out(self, op: Op) -> None:
        """One of the effects that concern this pipeline alone."""
        _EFFECTS[op](self)

    @property
    def _candidate(self) -> Deployment:
        candidate = self.record.candidate
        if candidate is None:
            raise RuntimeError(f"{self.name} has no candidate in {self.record.state}")
        return candidate

    # --- effects: supply

    def _fetch(self) -> None:
        manifest, hardware = self._candidate.contents, self._shared.hardware
        if usable_variants(manifest, hardware, self._shared.config.qualify.providers):
            self.fetching.fetch(self._refs())
            return
        what = f"{hardware.arch}, {', '.join(hardware.providers)}"
        reason = f"No variant of it is meant for this device ({what})."
        self._emit(states.Failed(reason, result="rejected"))

    def _stop_fetch(self) -> None:
        self.fetching.stop()

    def _verify(self) -> None:
        self.fetching.verify(self._refs())

    def _refs(self) -> tuple[BlobRef, ...]:
        shared = self._shared
        return needed_blobs(self._candidate.contents, shared.hardware, shared.config.qualify.providers)

    # --- effects: qualify

    def _qualify(self) -> None:
        candidate, committed = self._candidate, self.record.committed
        same = committed is not None and committed.row.model == candidate.row.model
        incumbent = committed.verdict.chosen if committed and committed.verdict and same else None
        self.qualifying.start(candidate, incumbent)

    def _kill_qualify(self) -> None:
        self.qualifying.stop()

    # --- effects: the runner

    @property
    def _home(self) -> Deployment | None:
        """What is served when no update says otherwise. agent.toml may have lost the pipeline meanwhile."""
        return self.record.committed if self.configured else None

    def _serve_candidate(self) -> None:
        if self.configured:
            self.running.serve(self._candidate)
        else:  # without its sources it would prove nothing, and pass
            self._emit(states.Failed("This device's agent.toml has lost the pipeline."))

    def _serve_committed(self) -> None:
        home = self._home
        if home is not None:
            self.running.serve(home)
        elif self.record.state == "rolling_back":
            why = "There is no committed model to go back to."
            if not self.configured:
                why = "Nothing can be served: agent.toml has no such pipeline."
            self._emit(states.Unrestorable(why))

    def _restart(self) -> None:
        running, record = self.running, self.record
        fault = running.fault
        if running.pid is not None and running.serving is None:
            running.drop("It could not load the model.")
            if record.committed is not None:  # it could once, so its blobs are suspect
                self.fetching.suspect(served_blobs(record.committed))
        home = self._home
        if record.state == "rolling_back":
            if home is None:
                self._serve_committed()
                return
            if running.backoff.failures >= RESTORES:
                what = f"{home.title} could not be served either."
                self._emit(states.Unrestorable(f"{what} {fault}".strip()))
                return
        if home is None:
            running.serve_nothing()
            return
        pause = running.serve_later(home)
        log.info("%s: the runner is started again in %.1f s.", self.name, pause)

    def _let_go(self) -> None:
        record, running, home = self.record, self.running, self._home
        if home is not None:
            if running.serving is None or running.serving.row.model != home.row.model:
                running.drop("It serves a model that failed.")
                running.serve_later(home)
        elif running.serving is None or not (record.update and record.update.result == "superseded"):
            # What was merely superseded may serve on until its successor is ready.
            running.serve_nothing()

    # --- effects: probation

    def _start_probation(self) -> None:
        if self.probation is None:
            self.probation = Probation(
                self._candidate, now=time.monotonic(), spent_s=self.record.probation_spent_s
            )

    def _stop_probation(self) -> None:
        self.probation = None


_EFFECTS: Mapping[Op, Callable[[Pipeline], None]] = {
    Op.FETCH: Pipeline._fetch,
    Op.STOP_FETCH: Pipeline._stop_fetch,
    Op.VERIFY: Pipeline._verify,
    Op.QUALIFY: Pipeline._qualify,
    Op.KILL_QUALIFY: Pipeline._kill_qualify,
    Op.SERVE_CANDIDATE: Pipeline._serve_candidate,
    Op.SERVE_COMMITTED: Pipeline._serve_committed,
    Op.RESTART: Pipeline._restart,
    Op.LET_GO: Pipeline._let_go,
    Op.START_PROBATION: Pipeline._start_probation,
    Op.STOP_PROBATION: Pipeline._stop_probation,
}
