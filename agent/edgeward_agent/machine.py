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

from edgeward_agent import commands, pipeline_report, states
from edgeward_agent.bench import Ask, Means
from edgeward_agent.commands import Commands
from edgeward_agent.config import Config
from edgeward_agent.journal import Journal, Saved
from edgeward_agent.lifetime import Pulse
from edgeward_agent.pipeline import Pipeline, SecurityFloors, Shared
from edgeward_agent.qualifying import prune_engines
from edgeward_agent.reporting import Reporter
from edgeward_agent.running import Patience
from edgeward_agent.sensors import Sensors, Throttling
from edgeward_agent.states import Deployment, Event, Op, Record, Want
from edgeward_agent.supply import Supply
from edgeward_agent.sysinfo import Machine as Hardware
from edgeward_agent.sysinfo import release_memory
from edgeward_agent.workers import Programs
from edgeward_wire.assignment import Assignment, RemoteConfig
from edgeward_wire.document import parse
from edgeward_wire.errors import Rejected, Unavailable

log = logging.getLogger(__name__)

PULSE_S = 30.0
TICK_S = 0.5
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


@dataclass(frozen=True)
class Wanted:
    """A verified assignment: each row with its manifest's text, or with the reason why it was refused."""

    assignment: Assignment
    raw: bytes
    manifests: Mapping[str, str]
    refused: Mapping[str, str] = field(default_factory=dict)
    """Pipelines in neither mapping cannot be judged now and stay as they are."""


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
        self._shared = Shared(
            config=config,
            state=state,
            hardware=hardware,
            floors=floors,
            supply=supply,
            reporter=reporter,
            programs=programs,
            patience=patience,
            remote=lambda: self.remote,
            post=self._post,
        )
        self._journal = journal
        self._reporter = reporter
        self._clock = clock
        self._sensors = sensors or Sensors()
        self._throttling = Throttling()
        self._sensed_at = -_SENSE_S
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._events: deque[tuple[str, Event]] = deque()
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
        kept = {name for name, record in saved.pipelines.items() if self._matters(name, record)}
        self._pipelines = {
            name: self._pipeline(name, saved.pipelines.get(name, Record()))
            for name in sorted({*config.pipelines, *kept})
        }

    def _pipeline(self, name: str, record: Record) -> Pipeline:
        return Pipeline(name, record, self._shared, partial(self._emit, name))

    def _matters(self, name: str, record: Record) -> bool:
        """Without a place in agent.toml, a row in the assignment or a model, a name is not kept.

        An assignment may name what other devices of the fleet have; without this, all that were ever
        named would stay.
        """
        asked = self._assignment.pipelines if self._assignment else {}
        known = name in self._shared.config.pipelines or name in asked
        return known or record.committed is not None or record.candidate is not None

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
        shared = self._shared
        self._commands.attach(
            Means(
                config=shared.config,
                hardware=shared.hardware,
                state=shared.state,
                supply=shared.supply,
                qualify=shared.programs.qualify,
                post=self._post,
                ask=ask,
                floor=shared.floors.security,
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
        self._forget()
        self._commands.turn(time.monotonic())
        self._report()

    def _resume(self) -> None:
        self._save_or_say()
        if self._journal.fault:
            self._reporter.fault("journal", self._journal.fault)
        for pipeline in self._pipelines.values():
            record = pipeline.record
            where = f" in {record.state}" if record.state != "idle" else ""
            what = f", committed {record.committed.title}" if record.committed else ""
            log.info("Pipeline %s starts%s%s.", pipeline.name, where, what)
            for event in states.resume_events(record, orderly=self._was_orderly):
                self._emit(pipeline.name, event)
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

    def _emit(self, name: str, event: Event) -> None:
        self._events.append((name, event))

    def _drain(self) -> None:
        while self._events and not self._stopping:
            name, event = self._events.popleft()
            if name in self._pipelines:  # a late word about one that is forgotten is harmless too
                self._apply(self._pipelines[name], event)
            if not self._events:
                for pipeline in self._pipelines.values():
                    self._consider(pipeline)

    def _apply(self, pipeline: Pipeline, event: Event) -> None:
        event = replace(event, at=self._clock())
        before = pipeline.record
        step = states.step(before, event)
        if step.record == before and not step.effects:
            return
        try:
            for op in states.EARLY:
                if op in step.effects:
                    pipeline.raise_floor()
            self._put(pipeline, step.record)
        except Unavailable as error:
            step = self._without_journal(pipeline, event, step, error)
        if step.record.state != before.state:
            pipeline.progress, pipeline.detail = 0.0, ""
        self._announce(pipeline, before, event)
        for op in step.effects:
            if op is Op.PRUNE:
                self._prune()
            elif op not in states.EARLY:
                pipeline.carry_out(op)

    def _put(self, pipeline: Pipeline, record: Record) -> None:
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
        self, pipeline: Pipeline, event: Event, step: states.Step, error: Unavailable
    ) -> states.Step:
        """An update that cannot be journalled fails; everything else goes on in memory and is saved later."""
        self._not_saved(error)
        if isinstance(event, _ADVANCES) and pipeline.record.state != "rolling_back":
            started = pipeline.record.state in ("idle", "pending")
            base = step.record if started else pipeline.record
            step = states.step(base, states.Failed(str(error), at=event.at))
        pipeline.record = step.record
        return step

    def _announce(self, pipeline: Pipeline, before: Record, event: Event) -> None:
        told = pipeline_report.happening(pipeline.name, before, pipeline.record, event)
        if told is None:
            return
        update = told.update
        what = f"{update.model.name} {update.model.version} {update.result or update.state}"
        log.info("%s: %s%s", pipeline.name, what, f": {update.reason}" if update.reason else "")
        self._reporter.happening(told)

    def _save(self, *, orderly: bool = False) -> None:
        self._models = frozenset(deployment.row.model.sha256 for deployment in self._deployments())
        records = {name: pipeline.record for name, pipeline in self._pipelines.items()}
        self._journal.save(Saved(orderly=orderly, assignment=self._raw, pipelines=records))
        if self._unsaved_at is not None:
            self._unsaved_at = None
            self._reporter.fault("disk", "")

    def _save_or_say(self) -> None:
        """What the journal does not take now is true nevertheless; it is said, and saved later."""
        try:
            self._save()
        except Unavailable as error:
            self._not_saved(error)

    def _not_saved(self, error: Unavailable) -> None:
        self._unsaved_at = time.monotonic()
        self._reporter.fault("disk", str(error))

    # --- what is asked for

    def _want(self, wanted: Wanted) -> None:
        if wanted.raw.decode() != self._raw:
            self._raw, self._assignment = wanted.raw.decode(), wanted.assignment
            log.info("Assignment revision %d.", wanted.assignment.revision)
            self._save_or_say()
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

    def _forget(self) -> None:
        """Pipelines that mean nothing any more, once what ended them is journalled and told."""
        gone = [name for name, p in self._pipelines.items() if not self._matters(name, p.record)]
        for name in gone:
            log.info("Pipeline %s is forgotten: neither agent.toml nor the assignment has it.", name)
            del self._pipelines[name]
            self._wants.pop(name, None)
        if gone:
            self._save_or_say()

    def _consider(self, pipeline: Pipeline) -> None:
        if pipeline.name in self._wants:
            pipeline.consider(self._wants[pipeline.name])

    def _set_registry(self, fault: str) -> None:
        self._registry = fault
        self._reporter.fault("registry", fault)

    # --- what may still be served

    def _prune(self) -> None:
        """Forget the blobs and the engine caches that nothing needs any more."""
        deployments = self._deployments()
        manifests = [deployment.contents for deployment in deployments]
        for name, want in self._wants.items():
            if want is not None and want.manifest is not None and self._pipelines[name].configured:
                manifests.append(Deployment(row=want.row, manifest=want.manifest).contents)
        needed = {ref.sha256 for manifest in manifests for ref in manifest.blobs()}
        self._shared.supply.prune(needed | {ref.sha256 for ref in self._commands.blobs})
        models = {deployment.row.model.sha256 for deployment in deployments}
        prune_engines(self._shared.state, models | {*self._commands.models})
        release_memory()

    def _deployments(self) -> list[Deployment]:
        """All that may still be served."""
        return [deployment for p in self._pipelines.values() for deployment in p.deployments()]

    # --- commands

    def _command_desk(self) -> Commands:
        return Commands(
            self._reporter.boot_id,
            commands.Hooks(
                respond=self._reporter.response,
                update=lambda: pipeline_report.under_way(self._pipelines.values()),
                beside=lambda: pipeline_report.what_serves(self._pipelines.values()),
                prune=self._prune,
                now=lambda: max(self._clock(), self._shared.floors.last_authenticated_time),
            ),
        )

    # --- time

    def _tick(self, now: float) -> None:
        if now - self._sensed_at >= _SENSE_S:
            self._sensed_at = now
            vitals = self._sensors.read()
            self._reporter.vitals(vitals)
            self._reporter.fault("throttling", self._throttling.look(vitals, now))
        for pipeline in self._pipelines.values():
            pipeline.tick(now)
        if self._unsaved_at is not None and now - self._unsaved_at > _JOURNAL_AGAIN_S:
            self._save_or_say()

    # --- reports

    def _report(self) -> None:
        for pipeline in self._pipelines.values():
            self._reporter.fault(f"runner:{pipeline.name}", pipeline.running.fault)
        shown, left_out = pipeline_report.shown(self._pipelines.values())
        self._reporter.fault("pipelines", left_out)
        self._reporter.reported(
            {p.name: pipeline_report.report(p, self._shared.floors.security) for p in shown},
            revision=self._assignment.revision if self._assignment else 0,
            registry=self._registry,
            now=time.monotonic(),
        )


def _assignment(raw: str) -> Assignment | None:
    if not raw:
        return None
    try:
        return parse(Assignment, raw)
    except Rejected as error:
        log.error("The journalled assignment is damaged and is fetched again: %s", error)
        return None
