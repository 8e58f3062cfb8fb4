"""One model ready for frames: preprocessing, session and task, all on the thread that made it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeward_runtime.images import U8
from edgeward_runtime.ports import constants
from edgeward_runtime.preprocess import Preprocess, image_input
from edgeward_runtime.sessions import open_session
from edgeward_runtime.tasks import check_task, reader
from edgeward_runtime.tasks.answer import Answer
from edgeward_wire.contract import Contract
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Plan

_WARM_RUNS = 2


@dataclass(frozen=True)
class Recipe:
    """What an engine is made of."""

    model: ModelRef
    contract: Contract
    file: Path
    labels: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Look:
    """One frame's answer, and what each stage took in milliseconds."""

    answer: Answer
    preprocess_ms: float
    inference_ms: float
    postprocess_ms: float


def check_supported(contract: Contract) -> None:
    """Raises Rejected for a contract that this release cannot run, whatever the file."""
    image_input(contract)
    check_task(contract)


class Engine:
    """Open, use and close it on one thread."""

    def __init__(self, recipe: Recipe) -> None:
        """Loads the model. Raises Rejected (NotLoaded among them) when this cannot be."""
        port = image_input(recipe.contract)
        self._preprocess = Preprocess(port)
        self._feeds = {**constants(recipe.contract)}
        self._name = port.name
        self._session = open_session(recipe.file, recipe.plan)
        self._read = reader(recipe.contract, self._session.outputs, recipe.labels)

    def warm(self) -> None:
        """A few runs on a gray picture, so that the first frame waits for nothing. Raises RunFailed."""
        gray = np.full((64, 64, 3), 128, np.uint8)
        for _ in range(_WARM_RUNS):
            self.look(gray)

    def look(self, frame: U8, done_with_frame: Callable[[], None] | None = None) -> Look:
        """(height, width, 3) uint8 BGR -> answer. `done_with_frame` is called once the picture was read.

        Raises:
            RunFailed: this run failed; the next may not.
            Rejected: the frame is of a shape that cannot be fed.
        """
        start = time.perf_counter()
        self._feeds[self._name] = self._preprocess(frame)
        if done_with_frame is not None:
            done_with_frame()
        fed = time.perf_counter()
        outputs = self._session.run(self._feeds)
        ran = time.perf_counter()
        answer = self._read(outputs)
        end = time.perf_counter()
        return Look(answer, (fed - start) * 1e3, (ran - fed) * 1e3, (end - ran) * 1e3)

    def close(self) -> None:
        """Free the model."""
        self._session.close()
