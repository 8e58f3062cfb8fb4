"""One pipeline's runner: what it should serve, what it serves, and bringing it back.

Invariants: everything here runs on the machine's thread; children's callbacks only post to it. At most one
runner per pipeline. What an earlier runner still says is ignored (`generation`). A runner that is silent, or
stuck in one run, is killed: a hung driver is a death like any other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from edgeward_agent import local_socket, messages
from edgeward_agent.backoff import Backoff
from edgeward_agent.states import Deployment, Event, RunnerDied, Served, ServeFailed
from edgeward_agent.workers import Child, Exit
from edgeward_wire.manifest import BlobRef, Variant
from edgeward_wire.reported import SourceReport
from edgeward_wire.result import ResultMessage
from edgeward_wire.telemetry import Measures

log = logging.getLogger(__name__)

Post = Callable[[Callable[[], None]], None]
"""Run this on the machine's thread, soon."""


@dataclass(frozen=True)
class Patience:
    """How long a runner may take, in seconds."""

    start_s: float = 120.0
    serve_s: float = 600.0
    silence_s: float = 60.0
    stall_s: float = 30.0
    end_s: float = 5.0
    steady_s: float = 60.0
    """Up for so long: the next death starts a new count."""
    base_s: float = 1.0
    cap_s: float = 60.0


@dataclass(frozen=True)
class Hooks:
    """What a runner tells the machine."""

    emit: Callable[[Event], None]
    windows: Callable[[tuple[Measures, ...]], None]
    result: Callable[[ResultMessage], None]
    heartbeat: Callable[[messages.Heartbeat], None]
    source: Callable[[str, SourceReport], None]
    missing: Callable[[Deployment, tuple[BlobRef, ...]], None]
    """Blobs of a model that it should serve are not there."""


@dataclass
class _Life:
    """One runner process."""

    generation: int
    child: Child[messages.RunnerMessage]
    born: float
    heard: float
    ready: bool = False
    asked_at: float | None = None
    runtime: dict[str, str] = field(default_factory=dict)


class Running:
    """The runner of one pipeline."""

    def __init__(
        self,
        pipeline: str,
        *,
        command: tuple[str, ...],
        blobs: Path,
        configure: Callable[[], messages.Configure],
        post: Post,
        hooks: Hooks,
        patience: Patience,
    ) -> None:
        self._pipeline = pipeline
        self._command = command
        self._blobs = blobs
        self._configure = configure
        self._post = post
        self._hooks = hooks
        self._patience = patience
        self._life: _Life | None = None
        self._generation = 0
        self._serve_id = 0
        self._again_at: float | None = None
        self.backoff = Backoff(patience.base_s, patience.cap_s)
        self.target: Deployment | None = None
        self.serving: Deployment | None = None
        """What frames go through now."""
        self.sources: dict[str, SourceReport] = {}
        self.fault = ""

    @property
    def pid(self) -> int | None:
        """Of the runner, if there is one."""
        return self._life.child.pid if self._life else None

    def serve(self, deployment: Deployment) -> None:
        """Make the runner serve this; `Served`, `ServeFailed` or `RunnerDied` follows."""
        self.target = deployment
        self._again_at = None
        if self._missing(_loaded_blobs(deployment)):
            self._mend(deployment)
        elif self._life is None:
            self._start()
        elif self._life.ready:
            self._ask(self._life)

    def serves(self, deployment: Deployment) -> bool:
        """Whether frames go through just this model and plan now, whatever row asked for it."""
        return _same(deployment, self.serving)

    def serve_later(self, deployment: Deployment) -> float:
        """The same after a pause; returns its length in seconds."""
        self.target = deployment
        pause = self.backoff.next()
        self._again_at = time.monotonic() + pause
        return pause

    def serve_nothing(self) -> None:
        """End the runner and forget the target."""
        self.target = None
        self._again_at = None
        self.fault = ""
        self.drop("It is not needed any more.")

    def drop(self, why: str) -> None:
        """Kill the runner without an event."""
        life, self._life = self._life, None
        self.serving = None
        if life is not None:
            life.child.kill(why)
            self._forget_socket()
        self._sources_down("the runner is not running")

    def reconfigure(self) -> None:
        """Settings changed."""
        if self._life is not None and self._life.ready:
            self._life.child.send(self._configure())

    def hang_up(self) -> None:
        """The daemon stops: let the runner hand over its last windows."""
        self.target, self._again_at = None, None
        if self._life is not None:
            self._life.child.hang_up()

    def end(self) -> None:
        """Wait for it, or end it."""
        if self._life is not None:
            self._life.child.end(self._patience.end_s)

    def tick(self, now: float) -> None:
        """Deadlines."""
        life = self._life
        if self._again_at is not None and now >= self._again_at and self.target is not None:
            self.serve(self.target)
        elif life is None:
            return
        elif not life.ready:
            if now - life.born > self._patience.start_s:
                life.child.kill(f"It was not ready within {self._patience.start_s:g} s.")
        elif life.asked_at is not None and now - life.asked_at > self._patience.serve_s:
            life.child.kill(f"It could not serve the model within {self._patience.serve_s:g} s.")
        elif now - life.heard > self._patience.silence_s:
            life.child.kill(f"It was silent for {self._patience.silence_s:g} s.")
        elif self.backoff.failures and self._steady(life, now):
            self.backoff.reset()

    def _steady(self, life: _Life, now: float) -> bool:
        return bool(self.serving and not self.fault and now - life.born > self._patience.steady_s)

    # --- the process

    def _start(self) -> None:
        self._generation += 1
        generation = self._generation
        now = time.monotonic()
        try:
            child: Child[messages.RunnerMessage] = Child(
                f"runner-{self._pipeline}",
                self._command,
                messages.FROM_RUNNER,
                lambda message: self._post(partial(self._said, generation, message)),
                lambda ended: self._post(partial(self._exited, generation, ended)),
            )
        except OSError as error:
            self._post(partial(self._hooks.emit, RunnerDied(f"The runner cannot be started: {error}.")))
            return
        self._life = _Life(generation, child, born=now, heard=now)

    def _ask(self, life: _Life) -> None:
        target = self.target
        if target is None:
            return
        if life.asked_at is None and self.serves(target):
            self.fault = ""
            self._post(partial(self._hooks.emit, Served()))
            self._mend(target)
            return
        plan = target.verdict.chosen if target.verdict else None
        if plan is None:
            self._post(partial(self._hooks.emit, ServeFailed("No execution plan was ever chosen for it.")))
            return
        self._serve_id += 1
        life.asked_at = time.monotonic()
        life.child.send(
            messages.Serve(
                id=self._serve_id,
                model=target.row.model,
                manifest=target.contents,
                blobs=str(self._blobs),
                plan=plan,
            )
        )

    def _said(self, generation: int, message: messages.RunnerMessage) -> None:
        life = self._life
        if life is None or life.generation != generation:
            return
        life.heard = time.monotonic()
        match message:
            case messages.Ready():
                life.ready, life.runtime = True, dict(message.runtime)
                life.child.send(self._configure())
                self._ask(life)
            case messages.ServingNow():
                self._serves(life, message)
            case messages.ServeFailed():
                if message.id == self._serve_id:
                    life.asked_at = None
                    self._could_not_load(message.reason)
            case messages.Heartbeat():
                if message.stalled_s > self._patience.stall_s:
                    life.child.kill(f"It was stuck in one inference for {message.stalled_s:.0f} s.")
                self._hooks.heartbeat(message)
            case messages.SourceChanged():
                self._source(message.source, SourceReport(up=message.up, detail=message.detail))
            case messages.WindowClosed():
                self._hooks.windows(message.measures)
            case messages.ResultSeen():
                self._hooks.result(message.result)

    def _serves(self, life: _Life, message: messages.ServingNow) -> None:
        if message.id != self._serve_id or self.target is None:
            return
        life.asked_at = None
        self.serving = self.target
        if self.fault:
            log.info("%s: the runner serves again.", self._pipeline)
        self.fault = ""
        self._hooks.emit(Served({"gap_ms": message.gap_ms}))
        if self.target is not None:
            self._mend(self.target)

    def _could_not_load(self, why: str) -> None:
        reason = f"The runner could not load it: {why}"
        if self.serving is None and self.target is not None:
            self.fault = f"{self.target.title} does not load: {why}"[:2000]
            log.error("%s: %s", self._pipeline, self.fault)
        self._hooks.emit(ServeFailed(reason))

    def _exited(self, generation: int, ended: Exit) -> None:
        life = self._life
        if life is None or life.generation != generation:
            return
        self._life, self.serving = None, None
        self._forget_socket()
        self._sources_down("the runner is not running")
        if self.target is not None:
            self.fault = f"The runner died: {ended.text}"[:2000]
            log.error("%s: %s", self._pipeline, self.fault)
            self._hooks.emit(RunnerDied(self.fault))

    # --- details

    def _forget_socket(self) -> None:
        """A runner that was killed could not remove its socket."""
        if run := self._configure().run:
            local_socket.forget(Path(run), self._pipeline)

    def _missing(self, refs: tuple[BlobRef, ...]) -> tuple[BlobRef, ...]:
        return tuple(ref for ref in refs if not (self._blobs / ref.sha256).is_file())

    def _mend(self, deployment: Deployment) -> None:
        """Ask for what is gone. What only proves the model is no reason not to serve it meanwhile."""
        if missing := self._missing(served_blobs(deployment)):
            self._hooks.missing(deployment, missing)

    def _source(self, name: str, report: SourceReport) -> None:
        if self.sources.get(name) != report:
            self.sources[name] = report
            self._hooks.source(name, report)

    def _sources_down(self, detail: str) -> None:
        for name in self.sources:
            self.sources[name] = SourceReport(up=False, detail=detail)


def served_blobs(deployment: Deployment) -> tuple[BlobRef, ...]:
    """What the runner reads while it serves it: the vectors that prove it to /health are among them."""
    variant = _variant(deployment)
    return (*_loaded_blobs(deployment), *((variant.golden,) if variant else ()))


def _loaded_blobs(deployment: Deployment) -> tuple[BlobRef, ...]:
    """Those without which it cannot serve it."""
    variant, labels = _variant(deployment), deployment.contents.labels
    return tuple(ref for ref in (variant.model if variant else None, labels) if ref)


def _variant(deployment: Deployment) -> Variant | None:
    plan = deployment.verdict.chosen if deployment.verdict else None
    return deployment.contents.variants.get(plan.variant) if plan else None


def _same(a: Deployment, b: Deployment | None) -> bool:
    """Whether the runner would do the very same thing for both."""
    if b is None or a.row.model != b.row.model or a.verdict is None or b.verdict is None:
        return False
    return a.verdict.chosen == b.verdict.chosen
