"""One model ready for frames: preparation, session and task, all on the thread that made it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_runtime import parity
from edgeward_runtime.feeds import Feed, Feeder, feeder
from edgeward_runtime.ports import constants, initial_states, next_states
from edgeward_runtime.sessions import Port, RunFailed, Session, open_session
from edgeward_runtime.slots import Frame
from edgeward_runtime.sources.options import Rules
from edgeward_runtime.tasks import check_task, reader
from edgeward_runtime.tasks.answer import Answer
from edgeward_runtime.tasks.view import View
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Plan

Arrays = dict[str, npt.NDArray[Any]]
Vector = tuple[Arrays, Arrays]
"""Golden inputs and outputs."""

_WARM_RUNS = 2
_NO_RULES = Rules()
_NOTHING = -1
SERVED = 1 << 20
"""Sources from here on are requests: nothing of theirs is shared with the live ones."""


@dataclass(frozen=True)
class Recipe:
    """What an engine is made of."""

    model: ModelRef
    contract: Contract
    file: Path
    labels: tuple[str, ...]
    plan: Plan
    golden: Path | None = None
    """The golden vectors of this file; None: it came without."""
    least_cosine: float = 0.0
    """What its outputs must reach on them."""


@dataclass(frozen=True)
class Look:
    """One run's answer, and what each stage took in milliseconds."""

    answer: Answer
    preprocess_ms: float
    inference_ms: float
    postprocess_ms: float


def check_supported(contract: Contract, labels: Sequence[str] | None = None) -> None:
    """Raises Rejected for a contract that this release cannot run, whatever the file.

    With `labels` (empty: the model has none) also for outputs that its task cannot read.
    """
    check_task(contract)
    feeder(contract)
    if labels is not None:
        outputs = [
            Port(port.name, port.dtype, tuple(None if isinstance(d, str) else d for d in port.shape))
            for port in contract.outputs
        ]
        reader(contract, outputs, labels)


class Engine:
    """Open, use and close it on one thread. What a model remembers, it remembers for each source."""

    def __init__(self, recipe: Recipe, rules: Sequence[Rules] = ()) -> None:
        """Loads the model. `rules` are those of the sources, in order.

        Raises:
            Rejected: (NotLoaded among them) this cannot be.
        """
        self._contract = recipe.contract
        self._feeder: Feeder = feeder(recipe.contract)
        self._served: Feeder | None = None
        self._constants: Arrays = constants(recipe.contract)
        self._states: dict[int, Arrays] = {}
        self._flowing: dict[int, int | None] = {}
        """The rate of each source whose last frame was dealt with wholly."""
        self._fresh: set[int] = set()
        self._rules = tuple(rules)
        self.session: Session = open_session(recipe.file, recipe.plan)
        self._read = reader(recipe.contract, self.session.outputs, recipe.labels)
        self._names = [port.name for port in self.session.outputs]
        self._stateful = recipe.contract.stateful
        self._least_cosine = recipe.least_cosine

    def warm(self) -> None:
        """A few runs on a blank input, so that the first frame waits for nothing. Raises RunFailed."""
        blank = self._feeder.blank()
        for _ in range(_WARM_RUNS):
            self.session.run({**self._constants, **initial_states(self._contract), **blank})

    def looks(self, frame: Frame) -> Iterator[Look]:
        """The answers that this frame makes due: one of a picture, none or several of a chunk of sound.

        Raises:
            RunFailed: this run failed; the next may not.
            Rejected: the frame is of a kind or shape that cannot be fed.
        """
        self._continue(frame)
        start = time.perf_counter()
        for feed in self._feeder_of(frame.source).feeds(frame):
            fed = time.perf_counter()
            outputs = self._run(frame.source, feed)
            ran = time.perf_counter()
            answer = self._read(outputs, self._view(frame))
            end = time.perf_counter()
            yield Look(answer, (fed - start) * 1e3, (ran - fed) * 1e3, (end - ran) * 1e3)
            start = time.perf_counter()
        self._flowing[frame.source] = frame.rate

    def infer(self, feeds: Feed) -> dict[str, npt.NDArray[Any]]:
        """One run of what somebody else prepared; a model that remembers begins anew. Raises RunFailed."""
        outputs = self.session.run({**self._constants, **initial_states(self._contract), **feeds})
        return dict(zip(self._names, outputs, strict=True))

    def check(self, vector: Vector | None) -> float | None:
        """A run on golden inputs, and the least cosine of its outputs with the golden ones.

        With no vector it is a run on a blank input, whose outputs must be finite; then None.

        Raises:
            RunFailed: it failed, or an output is not finite.
            Rejected: the outputs are too far from the golden ones, or those are of another model.
        """
        inputs, golden = vector or (self._feeder.blank(), {})
        outputs = self.infer(inputs)
        for name, output in outputs.items():
            if not np.isfinite(output).all():
                raise RunFailed(f"Output {name} is not finite.")
        if not set(golden) <= set(outputs):
            raise Rejected("The golden vectors are of another model: their outputs differ.")
        if not golden:
            return None
        worst = min(parity.cosine(outputs[name], expected) for name, expected in golden.items())
        if worst < self._least_cosine:
            what = f"have cosine {worst:.4f}, below {self._least_cosine}"
            raise Rejected(f"Against the golden outputs its own {what}.")
        return worst

    def close(self) -> None:
        """Free the model."""
        self.session.close()

    def _feeder_of(self, source: int) -> Feeder:
        """Requests have one of their own: pictures of another size would make the live ones' buffers anew."""
        if source < SERVED:
            return self._feeder
        if self._served is None:
            self._served = feeder(self._contract)
        return self._served

    def _continue(self, frame: Frame) -> None:
        """Begin anew where the frame does not go on from the one before: a gap, or a run that failed."""
        source = frame.source
        # Not there: the first frame, or one that was left in the middle. What was not read of it is a gap.
        flowing = self._flowing.pop(source, _NOTHING) == frame.rate
        if not flowing or frame.lost_s:
            self._states.pop(source, None)
            self._feeder_of(source).forget(source)
            self._fresh.add(source)

    def _view(self, frame: Frame) -> View:
        """What the task knows of the run; the first one after a beginning is fresh."""
        source = frame.source
        fresh = source in self._fresh
        self._fresh.discard(source)
        rules = self._rules[source] if source < len(self._rules) else _NO_RULES
        width, height = (frame.data.shape[1], frame.data.shape[0]) if frame.rate is None else (0, 0)
        return View(source, rules, width, height, self._feeder.step_s, fresh)

    def _run(self, source: int, feed: Feed) -> list[npt.NDArray[Any]]:
        feeds = {**self._constants, **feed}
        if not self._stateful:
            return self.session.run(feeds)
        states = self._states.get(source)
        outputs = self.session.run(
            {**feeds, **(initial_states(self._contract) if states is None else states)}
        )
        self._states[source] = next_states(self._contract, dict(zip(self._names, outputs, strict=True)))
        return outputs
