"""What a task knows of a run besides its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from edgeward_runtime.sessions import Port
from edgeward_runtime.sources.options import Rules
from edgeward_wire.contract import Contract, OutputPort
from edgeward_wire.errors import Rejected


class View(NamedTuple):
    """Where the input came from."""

    source: int
    """Its number in the pipeline: a task that remembers keeps one memory for each."""
    rules: Rules
    width: int = 0
    """Of the frame in pixels; 0 for sound."""
    height: int = 0
    step_s: float = 0
    """How much time one run stands for; 0 for pictures."""
    fresh: bool = False
    """Whether this run does not continue what came before of its source: the first one, or after a gap.
    What a task remembers of the source counts no more."""


def result_at(contract: Contract, outputs: Sequence[Port]) -> tuple[int, OutputPort]:
    """The result with the scores: its place among the outputs. Raises Rejected when it is not there."""
    return place_of(contract.scores, outputs)


def place_of(port: OutputPort | None, outputs: Sequence[Port]) -> tuple[int, OutputPort]:
    """The port and its place among the file's outputs. Raises Rejected when it is not there."""
    names = [output.name for output in outputs]
    if port is None or port.name not in names:
        raise Rejected(f"The file has no output {port.name if port else ''!r} as the contract says.")
    return names.index(port.name), port


def label_of(labels: Sequence[str], index: int) -> str:
    """The name of a class; a model without labels, or with too few, has numbers."""
    return labels[index] if 0 <= index < len(labels) else f"class {index}"
