"""Tasks: what the outputs of a model mean. One file is one task; one row below makes it known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy.typing as npt

from edgeward_runtime.sessions import Port
from edgeward_runtime.tasks.answer import Answer
from edgeward_runtime.tasks.classification import Classification
from edgeward_runtime.tasks.detector import Detection
from edgeward_runtime.tasks.segmentation import Segmentation
from edgeward_runtime.tasks.tensor import Tensors
from edgeward_runtime.tasks.vad import VoiceActivity
from edgeward_runtime.tasks.view import View
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected

Reader = Callable[[Sequence[npt.NDArray[Any]], View], Answer]
"""Outputs of a run, in the graph's order, and where its input came from -> answer. Raises RunFailed."""

TASKS: dict[str, Callable[[Contract, Sequence[Port], Sequence[str]], Reader]] = {
    "classification": Classification,
    "detection": Detection,
    "segmentation": Segmentation,
    "audio-classification": Classification,
    "vad": VoiceActivity,
    "tensor": Tensors,
}


def reader(contract: Contract, outputs: Sequence[Port], labels: Sequence[str]) -> Reader:
    """What reads the outputs of this contract's task. Raises Rejected for a task that is not known."""
    check_task(contract)
    return TASKS[contract.task](contract, outputs, labels)


def check_task(contract: Contract) -> None:
    """Raises Rejected for a task that is not known."""
    if contract.task not in TASKS:
        raise Rejected(
            f"This release does not run the task {contract.task!r}.", f"It runs: {', '.join(sorted(TASKS))}."
        )
