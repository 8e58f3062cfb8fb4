"""One pipeline's trials: from a candidate to a verdict that may be served, or to a reason why not.

Invariants: everything here runs on the machine's thread. A verdict in the cache spares the trial. What was
the world's fault (the lock, memory) is tried again, bounded; what was the model's own is denied.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Set
from pathlib import Path

from edgeward_agent import messages, states
from edgeward_agent.backoff import Backoff
from edgeward_agent.config import Config
from edgeward_agent.gates import verdict_numbers
from edgeward_agent.running import Post
from edgeward_agent.sensors import power_mode
from edgeward_agent.states import Deployment, Event
from edgeward_agent.sysinfo import Machine, available_mb
from edgeward_agent.trial import Trial, Verdicts
from edgeward_agent.variants import usable_variants
from edgeward_wire.errors import Rejected, Unavailable
from edgeward_wire.manifest import Manifest, ModelRef
from edgeward_wire.verdict import Plan, Verdict

log = logging.getLogger(__name__)

FRUITLESS = 6
_ENGINES = "engines"
"""In the state directory: a directory for each model, named by its manifest's sha256."""


class Qualifying:
    """Qualify for one pipeline."""

    def __init__(
        self,
        pipeline: str,
        *,
        command: tuple[str, ...],
        config: Config,
        hardware: Machine,
        state: Path,
        post: Post,
        emit: Callable[[Event], None],
    ) -> None:
        self._pipeline = pipeline
        self._command = command
        self._config = config
        self._hardware = hardware
        self._state = state
        self._post = post
        self._emit = emit
        self._verdicts = Verdicts(state / "verdicts")
        self._trial: Trial | None = None
        self._asked: tuple[Deployment, Plan | None] | None = None
        self._validating = False
        self._backoff = Backoff(2.0, 300.0)
        self._again_at: float | None = None
        self.progress = 0.0
        self.detail = ""

    def start(self, candidate: Deployment, incumbent: Plan | None) -> None:
        """`Prepared` and `Validated`, or `Failed`, follow. `incumbent`: the same model's plan in service."""
        self.stop()
        self._backoff.reset()
        self._asked = (candidate, incumbent)
        self._begin(candidate, incumbent)

    def stop(self) -> None:
        """Nobody wants to know any more."""
        self._again_at, self._asked, self._validating = None, None, False
        self.progress, self.detail = 0.0, ""
        if self._trial is not None:
            self._trial.kill()
            self._trial = None

    def tick(self, now: float) -> None:
        """Deadlines."""
        if self._trial is not None:
            self._trial.tick(now)
        elif self._asked is not None and self._again_at is not None and now >= self._again_at:
            self._begin(*self._asked)

    def forget(self, deployment: Deployment) -> None:
        """Its verdict does not hold any more: the next update measures again."""
        self._verdicts.forget(self._key(deployment))

    def _begin(self, candidate: Deployment, incumbent: Plan | None) -> None:
        self._again_at = None
        model, key = candidate.row.model, self._key(candidate)
        cached = self._verdicts.get(key, model.sha256)
        usable = usable_variants(candidate.contents, self._hardware, self._config.qualify.providers)
        if cached is not None and cached.chosen is not None and cached.chosen.variant in usable:
            log.info("%s: the verdict on %s is known.", self._pipeline, candidate.title)
            self._judged(cached)
            return
        try:
            self._trial = Trial(
                f"qualify-{self._pipeline}",
                self._command,
                qualify_order(
                    model,
                    candidate.contents,
                    config=self._config,
                    hardware=self._hardware,
                    state=self._state,
                    incumbent=incumbent,
                ),
                self._post,
                progressed=self._progressed,
                ended=self._judged,
            )
        except OSError as error:
            self._emit(states.Failed(f"Qualify cannot be started: {error}."))

    def _progressed(self, message: messages.QualifyProgress) -> None:
        if message.phase == "validating":
            self._prepared()
        self.progress = min(1.0, message.done / message.total) if message.total else 0.0
        self.detail = message.note or message.phase

    def _prepared(self) -> None:
        if not self._validating:
            self._validating = True
            self._emit(states.Prepared())

    def _judged(self, verdict: Verdict | Rejected | Unavailable) -> None:
        self._trial = None
        if isinstance(verdict, Unavailable):
            self._try_again(verdict)
        elif isinstance(verdict, Rejected):
            self._emit(states.Failed(str(verdict), deny=True))
        elif verdict.chosen is None:
            reason = verdict.reason or "No execution plan passed."
            self._emit(states.Failed(reason, verdict_numbers(verdict), deny=True))
        else:
            self._verdicts.put(verdict)
            self._admit(verdict)

    def _admit(self, verdict: Verdict) -> None:
        numbers = verdict_numbers(verdict)
        memory, free = numbers.get("memory_mb", 0.0), available_mb()
        if free and memory > free:
            reason = f"It needs {memory:.0f} MB of memory and {free:.0f} MB are available."
            self._emit(states.Failed(reason, numbers))
            return
        self._prepared()
        self._emit(states.Validated(verdict, numbers))

    def _try_again(self, error: Unavailable) -> None:
        pause = self._backoff.next()
        if self._backoff.failures >= FRUITLESS:
            self._emit(states.Failed(f"{error} Given up after {FRUITLESS} tries."))
            return
        self._again_at = time.monotonic() + pause
        self.detail = f"{error.what} Again in {pause:.0f} s."[:200]

    def _key(self, deployment: Deployment) -> str:
        return _key(deployment.row.model, self._config, self._hardware)


def qualify_order(
    model: ModelRef,
    manifest: Manifest,
    *,
    config: Config,
    hardware: Machine,
    state: Path,
    incumbent: Plan | None = None,
    threads: int | None = None,
    budget_s: float = messages.BUDGET_S,
) -> messages.Qualify:
    """What qualify is told of a model whose blobs are here; makes its directory for engine caches.

    Raises:
        OSError: that directory cannot be made.
    """
    scratch = state / _ENGINES / model.sha256
    scratch.mkdir(parents=True, exist_ok=True)
    return messages.Qualify(
        model=model,
        manifest=manifest,
        blobs=str(state / "blobs"),
        threads=threads or config.thread_budget(hardware.cores),
        key=_key(model, config, hardware, threads),
        lock=str(config.lock_path()),
        providers=config.qualify.providers,
        incumbent=incumbent,
        scratch=str(scratch),
        budget_s=budget_s,
        max_temp_c=config.qualify.max_temp_c,
        cool_s=min(config.qualify.cool_s, budget_s),
    )


def prune_engines(state: Path, keep: Set[str]) -> None:
    """Remove the engine caches of all models but those in `keep`."""
    engines = state / _ENGINES
    for path in engines.iterdir() if engines.is_dir() else ():
        if path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _key(model: ModelRef, config: Config, hardware: Machine, threads: int | None = None) -> str:
    return hardware.verdict_key(
        model.sha256,
        threads=threads or config.thread_budget(hardware.cores),
        providers=config.qualify.providers,
        power=power_mode(),
    )
