"""The machine: one thread that owns the journal and every pipeline's record, and does what the table says.

Invariants: all state is touched on this thread only; whoever else has something to say posts it to the
inbox. Order of every transition: floor fsynced -> journal -> effect. What cannot be journalled does not
happen: the update fails with the disk's reason, and the old model goes on. A timer is a deadline that `_tick`
looks at; nothing in here sleeps or waits for the network.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from edgeward_agent import commands, messages, states
from edgeward_agent.bench import Ask, Means
from edgeward_agent.commands import Commands
from edgeward_agent.config import Config
from edgeward_agent.fetching import Fetching
from edgeward_agent.gates import LatencyWatch, Probation
from edgeward_agent.journal import Journal, Saved
from edgeward_agent.lifetime import Pulse
from edgeward_agent.local_socket import RUN
from edgeward_agent.qualifying import Qualifying, prune_engines
from edgeward_agent.reporting import Reporter
from edgeward_agent.running import Hooks, Patience, Running, served_blobs
from edgeward_agent.sensors import Sensors, Throttling
from edgeward_agent.states import Deployment, Event, Facts, Op, Record, Want
from edgeward_agent.supply import Supply
from edgeward_agent.sysinfo import Machine as Hardware
from edgeward_agent.sysinfo import release_memory
from edgeward_agent.variants import needed_blobs, usable_variants
from edgeward_agent.workers import Programs
from edgeward_wire.assignment import Assignment, RemoteConfig
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.event import Finished, StateChanged
from edgeward_wire.manifest import BlobRef
from edgeward_wire.reported import PipelineReport, Serving, SourceReport, State, Update
from edgeward_wire.telemetry import Measures

log = logging.getLogger(__name__)

PULSE_S = 30.0
TICK_S = 0.5
RESTORES = 3
"""Tries to serve the committed model on the way back."""
_JOURNAL_AGAIN_S = 30.0
_SENSE_S = 5.0
_PROGRAMS = Programs()
_PATIENCE = Patience()
_ADVANCES = (
    states.Assigned,
    states.Fetched,
    states.Missing,
    states.Verified,
    states.Prepared,
    states.Validated,
    states.Served,
    states.Held,
)


class SecurityFloors(Protocol):
    """The part of `floors.Floors` that is used here."""

    @property
    def last_authenticated_time(self) -> float: ...

    def security(self, model: str) -> int: ...

    def raise_security(self, model: str, epoch: int) -> None: ...


@dataclass(frozen=True)
class Wanted:
    """A verified assignment: each row with its manifest's text, or with the reason why it was refused."""

    assignment: Assignment
    raw: bytes
    manifests: Mapping[str, str]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Pipelines in neither mapping cannot be judged now and stay as they are."""


@dataclass
class _Pipeline:
    """What the machine knows of one pipeline: the journalled record, and what lives only while we do."""

    name: str
    record: Record
    running: Running
    fetching: Fetching
    qualifying: Qualifying
    probation: Probation | None = None
    latency: LatencyWatch = field(default_factory=LatencyWatch)
    progress: float = 0.0
    detail: str = ""


class Machine:
    """Sole owner of the journal and of the pipelines."""

    def __init__(
        self,
        *,
        config: Config,
        state: Path,
        journal: Journal,
        floors: SecurityFloors,
        supply: Supply,
        reporter: Reporter,
        hardware: Hardware,
        programs: Programs = _PROGRAMS,
        patience: Patience = _PATIENCE,
        clock: Callable[[], float] = time.time,
        sensors: Sensors | None = None,
    ) -> None:
        self._config = config
        self._state = state
        self._blobs = state / "blobs"
        self._journal = journal
        self._floors = floors
        self._supply = supply
        self._reporter = reporter
        self._hardware = hardware
        self._programs = programs
        self._patience = patience
        self._clock = clock
        self._sensors = sensors or Sensors()
        self._throttling = Throttling()
        self._sensed_at = -_SENSE_S
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._events: deque[tuple[_Pipeline, Event]] = deque()
        self._stopping = False
        self._orderly = False
        self._registry = ""
        self._unsaved_at: float | None = None
        self._wants: dict[str, Want | None] = {}
        self._models: frozenset[str] = frozenset()
        self._commands = self._command_desk()
        saved = journal.load()
        self._was_orderly = saved.orderly
        self._raw = saved.assignment
        self._assignment = _assignment(saved.assignment)
        self._pipelines = {
            name: self._pipeline(name, saved.pipelines.get(name, Record()))
            for name in sorted({*config.pipelines, *saved.pipelines})
        }

    # --- from other threads

    def wanted(self, wanted: Wanted) -> None:
        """The registry thread has verified an assignment."""
        self._post(partial(self._want, wanted))

    def registry(self, fault: str) -> None:
        """How the last look at the registry went; empty when well."""
        self._post(partial(self._set_registry, fault))

    def connected(self) -> None:
        """The broker has accepted us."""
        self._post(self._reporter.connected)
        self._post(self._commands.connected)

    def command(self, number: int, payload: bytes) -> None:
        """A command came, whatever it says."""
        self._post(partial(self._commands.take, number, payload))

    def attach(self, ask: Ask) -> None:
        """Whom to ask for the manifest of a model that nobody has assigned. Before `run`."""
        self._commands.attach(
            Means(
                config=self._config,
                hardware=self._hardware,
                state=self._state,
                supply=self._supply,
                qualify=self._programs.qualify,
                post=self._post,
                ask=ask,
                floor=self._floors.security,
            )
        )

    def poke(self, do: Callable[[], None]) -> None:
        """Do this on the machine's thread."""
        self._post(do)

    def stop(self, orderly: bool) -> None:
        """End the thread; an orderly stop lets a probation go on at the next start."""

        def end() -> None:
            self._stopping, self._orderly = True, orderly

        self._post(end)

    @property
    def models(self) -> frozenset[str]:
        """sha256 of the manifests of all models that may still be served. For any thread."""
        return self._models

    @property
    def remote(self) -> RemoteConfig:
        """The settings of the newest known assignment."""
        return self._assignment.config if self._assignment else RemoteConfig()

    # --- the thread

    def run(self, pulse: Pulse) -> None:
        """Resume every pipeline, then follow the inbox until `stop`."""
        try:
            self._resume()
            while not self._stopping:
                self._turn()
                pulse.beat()
        finally:
            self._end()

    def _turn(self) -> None:
        try:
            self._inbox.get(timeout=TICK_S)()
            while not self._stopping and not self._inbox.empty():
                self._inbox.get()()
        except queue.Empty:
            pass
        self._tick(time.monotonic())
        self._drain()
        self._commands.turn(time.monotonic())
        self._report()

    def _resume(self) -> None:
        try:
            self._save()
        except Unavailable as error:
            self._not_saved(error)
        if self._journal.fault:
            self._reporter.fault("journal", self._journal.fault)
        for pipeline in self._pipelines.values():
            record = pipeline.record
            where = f" in {record.state}" if record.state != "idle" else ""
            what = f", committed {record.committed.title}" if record.committed else ""
            log.info("Pipeline %s starts%s%s.", pipeline.name, where, what)
            for event in states.resume_events(record, orderly=self._was_orderly):
                self._events.append((pipeline, event))
        self._drain()
        self._report()

    def _end(self) -> None:
        self._commands.stop()
        for pipeline in self._pipelines.values():
            pipeline.fetching.stop_all()
            pipeline.qualifying.stop()
            if pipeline.probation is not None:
                spent = pipeline.probation.spent_s(time.monotonic())
                pipeline.record = pipeline.record.model_copy(update={"probation_spent_s": spent})
        try:
            self._save(orderly=self._orderly)  # first of all: what follows may be cut short
        except Unavailable as error:
            log.error("%s", error)
        for pipeline in self._pipelines.values():
            pipeline.running.hang_up()  # all at once, so that waiting for them is waiting for the slowest
        for pipeline in self._pipelines.values():
            pipeline.running.end()
        self._stopping = True
        while not self._inbox.empty():  # the runners' last windows
            self._inbox.get()()
        self._events.clear()

    def _post(self, do: Callable[[], None]) -> None:
        self._inbox.put(do)

    # --- transitions

    def _emit(self, pipeline: _Pipeline, event: Event) -> None:
        self._events.append((pipeline, event))

    def _drain(self) -> None:
        while self._events and not self._stopping:
            self._apply(*self._events.popleft())
            if not self._events:
                for pipeline in self._pipelines.values():
                    self._consider(pipeline)

    def _apply(self, pipeline: _Pipeline, event: Event) -> None:
        event = replace(event, at=self._clock())
        before = pipeline.record
        step = states.step(before, event)
        if step.record == before and not step.effects:
            return
        try:
            for op in states.EARLY:
                if op in step.effects:
                    self._raise_floor(pipeline)
            self._put(pipeline, step.record)
        except Unavailable as error:
            step = self._without_journal(pipeline, event, step, error)
        if step.record.state != before.state:
            pipeline.progress, pipeline.detail = 0.0, ""
        self._announce(pipeline, before, event)
        for op in step.effects:
            if op not in states.EARLY:
                _EFFECTS[op](self, pipeline)

    def _put(self, pipeline: _Pipeline, record: Record) -> None:
        """Journal this record, then let it be true."""
        before, pipeline.record = pipeline.record, record
        if record == before:
            return
        try:
            self._save()
        except Unavailable:
            pipeline.record = before
            raise

    def _without_journal(
        self, pipeline: _Pipeline, event: Event, step: states.Step, error: Unavailable
    ) -> states.Step:
        """An update that cannot be journalled fails; everything else goes on in memory and is saved later."""
        self._not_saved(error)
        if isinstance(event, _ADVANCES) and pipeline.record.state != "rolling_back":
            started = pipeline.record.state in ("idle", "pending")
            base = step.record if started else pipeline.record
            step = states.step(base, states.Failed(str(error), at=event.at))
        pipeline.record = step.record
        return step

    def _announce(self, pipeline: _Pipeline, before: Record, event: Event) -> None:
        update, old = pipeline.record.update, before.update
        if update is None:
            return
        title = f"{update.model.name} {update.model.version}"
        if update.result is not None:
            if old is None or old.result is None or old.started_at != update.started_at:
                why = f": {update.reason}" if update.reason else ""
                log.info("%s: %s %s%s", pipeline.name, title, update.result, why)
                self._reporter.happening(Finished(pipeline=pipeline.name, update=update))
        elif update.state != before.state or isinstance(event, states.Lacking):
            why = f": {update.reason}" if update.reason else ""
            log.info("%s: %s %s%s", pipeline.name, title, update.state, why)
            self._reporter.happening(StateChanged(pipeline=pipeline.name, state=update.state, update=update))

    def _save(self, *, orderly: bool = False) -> None:
        self._models = frozenset(deployment.row.model.sha256 for deployment in self._deployments())
        records = {name: pipeline.record for name, pipeline in self._pipelines.items()}
        self._journal.save(Saved(orderly=orderly, assignment=self._raw, pipelines=records))
        if self._unsaved_at is not None:
            self._unsaved_at = None
            self._reporter.fault("disk", "")

    def _not_saved(self, error: Unavailable) -> None:
        self._unsaved_at = time.monotonic()
        self._reporter.fault("disk", str(error))

    # --- what is asked for

    def _want(self, wanted: Wanted) -> None:
        if wanted.raw.decode() != self._raw:
            self._raw, self._assignment = wanted.raw.decode(), wanted.assignment
            log.info("Assignment revision %d.", wanted.assignment.revision)
            try:
                self._save()
            except Unavailable as error:
                self._not_saved(error)
            for pipeline in self._pipelines.values():
                pipeline.running.reconfigure()
        rows = wanted.assignment.pipelines
        for name in sorted({*rows, *self._pipelines}):
            if name not in self._pipelines:
                self._pipelines[name] = self._pipeline(name, Record())
            if name not in rows:
                self._wants[name] = None
            elif name in wanted.manifests or name in wanted.refused:
                manifest = wanted.manifests.get(name)
                self._wants[name] = Want(rows[name], manifest, wanted.refused.get(name, ""))
            self._consider(self._pipelines[name])

    def _consider(self, pipeline: _Pipeline) -> None:
        name = pipeline.name
        if name not in self._wants:
            return
        want = self._wants[name]
        facts = Facts(
            configured=name in self._config.pipelines,
            fingerprint=self._hardware.runtime_fingerprint,
            floor=self._floors.security(want.row.model.name) if want else 0,
            stale=pipeline.latency.stale,
        )
        event = states.consider(pipeline.record, want, facts)
        if event is not None:
            self._emit(pipeline, event)

    def _set_registry(self, fault: str) -> None:
        self._registry = fault
        self._reporter.fault("registry", fault)

    # --- effects: supply

    def _fetch(self, pipeline: _Pipeline) -> None:
        manifest, hardware = _candidate(pipeline).contents, self._hardware
        if usable_variants(manifest, hardware, self._config.qualify.providers):
            pipeline.fetching.fetch(self._refs(pipeline))
            return
        what = f"{hardware.arch}, {', '.join(hardware.providers)}"
        reason = f"No variant of it is meant for this device ({what})."
        self._emit(pipeline, states.Failed(reason, result="rejected"))

    def _stop_fetch(self, pipeline: _Pipeline) -> None:
        pipeline.fetching.stop()

    def _verify(self, pipeline: _Pipeline) -> None:
        pipeline.fetching.verify(self._refs(pipeline))

    def _refs(self, pipeline: _Pipeline) -> tuple[BlobRef, ...]:
        return needed_blobs(_candidate(pipeline).contents, self._hardware, self._config.qualify.providers)

    def _repair(self, pipeline: _Pipeline, deployment: Deployment, refs: tuple[BlobRef, ...]) -> None:
        """Blobs of a model that should be served are gone: fetch them again, then serve it."""
        running = pipeline.running
        running.fault = f"A blob of {deployment.title} is missing; it is fetched again."

        def done(fault: Rejected | Unavailable | None) -> None:
            if running.target != deployment:
                return
            if fault is not None:
                reason = f"A blob of {deployment.title} is missing: {fault}"
                self._emit(pipeline, states.ServeFailed(reason))
                return
            running.fault = ""
            running.serve(deployment)

        pipeline.fetching.repair(refs, done)

    def _prune(self, _pipeline: _Pipeline | None = None) -> None:
        deployments = self._deployments()
        manifests = [deployment.contents for deployment in deployments]
        for name, want in self._wants.items():
            if want is not None and want.manifest is not None:
                asked = Deployment(row=want.row, manifest=want.manifest)
                manifests += [asked.contents] if name in self._config.pipelines else []
        needed = {ref.sha256 for manifest in manifests for ref in manifest.blobs()}
        self._supply.prune(needed | {ref.sha256 for ref in self._commands.blobs})
        models = {deployment.row.model.sha256 for deployment in deployments}
        prune_engines(self._state, models | {*self._commands.models})
        release_memory()

    def _deployments(self) -> list[Deployment]:
        """All that may still be served."""
        found = [
            deployment
            for p in self._pipelines.values()
            for deployment in (p.record.candidate, p.record.committed, p.record.previous, p.running.target)
        ]
        return [deployment for deployment in found if deployment is not None]

    # --- effects: qualify

    def _qualify(self, pipeline: _Pipeline) -> None:
        candidate, committed = _candidate(pipeline), pipeline.record.committed
        same = committed is not None and committed.row.model == candidate.row.model
        incumbent = committed.verdict.chosen if committed and committed.verdict and same else None
        pipeline.qualifying.start(candidate, incumbent)

    def _kill_qualify(self, pipeline: _Pipeline) -> None:
        pipeline.qualifying.stop()

    # --- effects: the runner

    def _serve_candidate(self, pipeline: _Pipeline) -> None:
        pipeline.running.serve(_candidate(pipeline))

    def _serve_committed(self, pipeline: _Pipeline) -> None:
        committed = pipeline.record.committed
        if committed is not None:
            if pipeline.name in self._config.pipelines:
                pipeline.running.serve(committed)
        elif pipeline.record.state == "rolling_back":
            self._emit(pipeline, states.Unrestorable("There is no committed model to go back to."))

    def _restart(self, pipeline: _Pipeline) -> None:
        running, record = pipeline.running, pipeline.record
        fault = running.fault
        if running.pid is not None and running.serving is None:
            running.drop("It could not load the model.")
            if record.committed is not None:  # it could once, so its blobs are suspect
                pipeline.fetching.suspect(served_blobs(record.committed))
        if record.state == "rolling_back":
            if record.committed is None:
                self._serve_committed(pipeline)
                return
            if running.backoff.failures >= RESTORES:
                what = f"{record.committed.title} could not be served either."
                self._emit(pipeline, states.Unrestorable(f"{what} {fault}".strip()))
                return
        if record.committed is None:
            running.serve_nothing()
            return
        pause = running.serve_later(record.committed)
        log.info("%s: the runner is started again in %.1f s.", pipeline.name, pause)

    def _let_go(self, pipeline: _Pipeline) -> None:
        record, running = pipeline.record, pipeline.running
        if record.committed is not None:
            if running.serving is None or running.serving.row.model != record.committed.row.model:
                running.drop("It serves a model that failed.")
                running.serve_later(record.committed)
        elif running.serving is None or not (record.update and record.update.result == "superseded"):
            # What was merely superseded may serve on until its successor is ready.
            running.serve_nothing()

    # --- effects: probation

    def _start_probation(self, pipeline: _Pipeline) -> None:
        if pipeline.probation is None:
            pipeline.probation = Probation(
                _candidate(pipeline), now=time.monotonic(), spent_s=pipeline.record.probation_spent_s
            )

    def _stop_probation(self, pipeline: _Pipeline) -> None:
        pipeline.probation = None

    def _raise_floor(self, pipeline: _Pipeline) -> None:
        candidate = _candidate(pipeline)
        self._floors.raise_security(candidate.row.model.name, candidate.contents.security_epoch)

    # --- commands

    def _command_desk(self) -> Commands:
        return Commands(
            self._reporter.boot_id,
            commands.Hooks(
                respond=self._reporter.response,
                update=self._update_under_way,
                beside=self._beside,
                prune=self._prune,
                now=lambda: max(self._clock(), self._floors.last_authenticated_time),
            ),
        )

    def _update_under_way(self) -> str:
        busy = [p for p in self._pipelines.values() if p.record.state not in ("idle", "pending")]
        return ", ".join(f"pipeline {p.name} is {p.record.state.replace('_', ' ')}" for p in busy)

    def _beside(self) -> tuple[str, ...]:
        """What serves, a line a pipeline."""
        served = [(p.name, p.running.serving) for p in self._pipelines.values()]
        return tuple(
            f"{name}: {d.title}, {d.verdict.chosen.title}"
            for name, d in served
            if d and d.verdict and d.verdict.chosen
        )

    # --- time

    def _tick(self, now: float) -> None:
        if now - self._sensed_at >= _SENSE_S:
            self._sensed_at = now
            vitals = self._sensors.read()
            self._reporter.vitals(vitals)
            self._reporter.fault("throttling", self._throttling.look(vitals, now))
        for pipeline in self._pipelines.values():
            pipeline.running.tick(now)
            pipeline.fetching.tick(now)
            pipeline.qualifying.tick(now)
            if pipeline.probation is not None and pipeline.record.state == "probation":
                self._judge_probation(pipeline, pipeline.probation, now)
        if self._unsaved_at is not None and now - self._unsaved_at > _JOURNAL_AGAIN_S:
            try:
                self._save()
            except Unavailable as error:
                self._not_saved(error)

    def _judge_probation(self, pipeline: _Pipeline, probation: Probation, now: float) -> None:
        sources = pipeline.running.sources
        pipeline.progress = probation.progress(now)
        pipeline.detail = probation.detail(now, sources)
        if pipeline.running.serving is None:
            return
        event = probation.judge(now, sources)
        if event is not None:
            self._emit(pipeline, event)

    # --- what the runner tells

    def _windows(self, pipeline: _Pipeline, measures: tuple[Measures, ...]) -> None:
        self._reporter.windows(measures)
        if pipeline.probation is not None:
            pipeline.probation.windows(measures)
        committed = pipeline.record.committed
        if committed is None or pipeline.running.serving != committed:
            return
        if pipeline.latency.look(committed, measures):
            pipeline.qualifying.forget(committed)
            log.warning("%s: %s", pipeline.name, pipeline.latency.finding)

    def _heartbeat(self, pipeline: _Pipeline, message: messages.Heartbeat) -> None:
        if pipeline.probation is not None:
            pipeline.probation.heartbeat(message.frames, message.errors, time.monotonic())

    def _source(self, pipeline: _Pipeline, name: str, source: SourceReport) -> None:
        subject = f"source:{pipeline.name}/{name}"
        self._reporter.fault(subject, "" if source.up else source.detail or "down")

    # --- reports

    def _report(self) -> None:
        for pipeline in self._pipelines.values():
            self._reporter.fault(f"runner:{pipeline.name}", pipeline.running.fault)
        self._reporter.reported(
            {name: self._pipeline_report(p) for name, p in self._pipelines.items()},
            revision=self._assignment.revision if self._assignment else 0,
            registry=self._registry,
            now=time.monotonic(),
        )

    def _pipeline_report(self, pipeline: _Pipeline) -> PipelineReport:
        record, running = pipeline.record, pipeline.running
        update = record.update
        if update is not None and update.result is None:
            update = self._live(pipeline, update)
        return PipelineReport(
            serving=self._serving(pipeline),
            update=update,
            sources=dict(running.sources),
            fault=running.fault or self._unconfigured(pipeline),
        )

    def _unconfigured(self, pipeline: _Pipeline) -> str:
        """Why a committed model is not served although nothing failed."""
        committed = pipeline.record.committed
        if committed is None or pipeline.name in self._config.pipelines:
            return ""
        return f"{committed.title} is not served: agent.toml has no pipeline {pipeline.name}."

    @staticmethod
    def _live(pipeline: _Pipeline, update: Update) -> Update:
        parts: dict[State, Fetching | Qualifying] = {
            "downloading": pipeline.fetching,
            "verifying": pipeline.fetching,
            "preparing": pipeline.qualifying,
            "validating": pipeline.qualifying,
        }
        part = parts.get(pipeline.record.state, pipeline)
        change: dict[str, object] = {"progress": round(part.progress, 3)}
        if part.detail:
            change["detail"] = part.detail[:200]
        return update.model_copy(update=change)

    def _serving(self, pipeline: _Pipeline) -> Serving | None:
        serving = pipeline.running.serving
        plan = serving.verdict.chosen if serving and serving.verdict else None
        if serving is None or plan is None:
            return None
        committed = pipeline.record.committed
        return Serving(
            model=serving.row.model,
            variant=plan.variant,
            provider=plan.provider,
            plan=plan,
            committed=committed is not None
            and committed.row.model == serving.row.model
            and pipeline.probation is None,
            below_floor=serving.contents.security_epoch < self._floors.security(serving.row.model.name),
            stale=pipeline.latency.stale,
        )

    # --- parts

    def _pipeline(self, name: str, record: Record) -> _Pipeline:
        """Knots the record and its runner together."""

        def this() -> _Pipeline:
            return pipeline

        running = Running(
            name,
            command=self._programs.runner,
            blobs=self._blobs,
            configure=partial(self._configure, name),
            post=self._post,
            hooks=Hooks(
                emit=lambda event: self._emit(this(), event),
                windows=lambda measures: self._windows(this(), measures),
                result=self._reporter.result,
                heartbeat=lambda message: self._heartbeat(this(), message),
                source=lambda source, report: self._source(this(), source, report),
                missing=lambda deployment, refs: self._repair(this(), deployment, refs),
            ),
            patience=self._patience,
        )
        fetching = Fetching(
            self._blobs, self._supply, self._post, emit=lambda event: self._emit(this(), event)
        )
        qualifying = Qualifying(
            name,
            command=self._programs.qualify,
            config=self._config,
            hardware=self._hardware,
            state=self._state,
            post=self._post,
            emit=lambda event: self._emit(this(), event),
        )
        pipeline = _Pipeline(name, record, running, fetching, qualifying)
        return pipeline

    def _samples(self, name: str, wanted: messages.SamplesSpec | None) -> messages.SamplesSpec | None:
        if wanted is None or wanted.directory:
            return wanted
        return wanted.model_copy(update={"directory": str((self._state / "samples" / name).absolute())})

    def _configure(self, name: str) -> messages.Configure:
        local, remote = self._config.telemetry, self.remote
        settings = self._config.pipelines.get(name)
        return messages.Configure(
            pipeline=name,
            sources=settings.sources if settings else (),
            samples=self._samples(name, settings.samples if settings else None),
            window_s=remote.telemetry_window_s or local.window_s,
            result_interval_s=remote.result_interval_s or local.result_interval_s,
            run=str((self._state / RUN).absolute()),
        )


_EFFECTS: Mapping[Op, Callable[[Machine, _Pipeline], None]] = {
    Op.FETCH: Machine._fetch,
    Op.STOP_FETCH: Machine._stop_fetch,
    Op.VERIFY: Machine._verify,
    Op.QUALIFY: Machine._qualify,
    Op.KILL_QUALIFY: Machine._kill_qualify,
    Op.SERVE_CANDIDATE: Machine._serve_candidate,
    Op.SERVE_COMMITTED: Machine._serve_committed,
    Op.RESTART: Machine._restart,
    Op.LET_GO: Machine._let_go,
    Op.START_PROBATION: Machine._start_probation,
    Op.STOP_PROBATION: Machine._stop_probation,
    Op.PRUNE: Machine._prune,
}


def _candidate(pipeline: _Pipeline) -> Deployment:
    candidate = pipeline.record.candidate
    if candidate is None:
        raise RuntimeError(f"{pipeline.name} has no candidate in {pipeline.record.state}")
    return candidate


def _assignment(raw: str) -> Assignment | None:
    if not raw:
        return None
    try:
        return parse(Assignment, raw)
    except Rejected as error:
        log.error("The journalled assignment is damaged and is fetched again: %s", error)
        return None
