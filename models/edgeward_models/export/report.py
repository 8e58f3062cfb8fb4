"""What an export is asked for, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from edgeward_models.export.inputs import InputSpec
from edgeward_models.export.verify import Tolerance, Verification
from edgeward_models.graph import OPSETS, Facts
from edgeward_wire.contract import Task
from edgeward_wire.errors import Rejected

Exporter = Literal["auto", "dynamo", "torchscript"]
DEFAULT_OPSET = 18
"""What PyTorch's exporter writes without converting; TensorRT 10 and all of ONNX Runtime's tools read it."""
TRIALS = 4
STATE_STEPS = 8
OTHER_BATCH = 3
_SMALL = 1e-4


class NotExported(Rejected):
    """One exporter cannot do it; another might."""


@dataclass(frozen=True)
class ExportOptions:
    """How to export. Whether a framework has a use for each of them is for its module to say."""

    exporter: Exporter = "auto"
    opset: int | None = None
    """None: `DEFAULT_OPSET`."""
    dynamic_batch: bool = False
    """Leave the first dimension of every input open; `N` in a shape of `inputs` says it for one."""
    inputs: tuple[InputSpec, ...] = ()
    """In the order in which the model takes them; empty: as the examples are."""
    output_names: tuple[str, ...] = ()
    states: Mapping[str, str] = field(default_factory=dict)
    """Input -> the output that is its next value: carried from run to run on the device."""
    task: Task | None = None
    labels: Path | tuple[str, ...] | None = None
    samples: Path | None = None
    """An `.npz` of inputs to verify with; None: seeded noise."""
    tolerance: Tolerance = field(default_factory=Tolerance)
    seed: int = 0
    declared: Mapping[str, Any] = field(default_factory=dict)
    """More for the file's metadata `edgeward`, in the sidecar's shape (edgeward_runtime.contract_guess)."""

    def __post_init__(self) -> None:
        """Raises Rejected for an opset that no device could load."""
        first, last = OPSETS
        if self.opset is not None and not first <= self.opset <= last:
            raise Rejected(f"Opset {self.opset} is not supported.", f"Devices load opsets {first} to {last}.")

    @property
    def target_opset(self) -> int:
        """The opset to write."""
        return self.opset or DEFAULT_OPSET


@dataclass(frozen=True)
class Attempt:
    """One exporter, and how it went; `reason` is empty when its file was taken."""

    exporter: str
    outcome: Literal["verified", "differs", "failed"]
    reason: str = ""


@dataclass(frozen=True)
class ExportReport:
    """What came of an export. Only a file that passed is in its place."""

    source: str
    out: Path | None
    """None: verification failed, and nothing was written."""
    exporter: str
    attempts: tuple[Attempt, ...]
    verification: Verification
    facts: Facts
    labels: Path | None = None
    """The file with the classes' names, beside `out`."""
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the file is there, and gives what the model gives."""
        return self.out is not None

    @property
    def advice(self) -> str:
        """What to do about outputs that differ."""
        checked = self.verification
        if checked.worst is None or checked.faults:
            return "Verify with inputs that the model is made for (--samples), or try another exporter."
        if checked.worst.absolute <= _SMALL * checked.largest:
            return (
                f"The difference is small beside the output's largest value, {checked.largest:.3g}:"
                f" if that is good enough, --atol {2 * checked.worst.absolute:.1g}."
            )
        return "The exporter wrote something else than the model: try another one, or another --opset."

    def plain(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        facts, checked = self.facts, self.verification
        worst = asdict(checked.worst) if checked.worst else None
        return {
            "source": self.source,
            "passed": self.passed,
            "out": str(self.out) if self.out else None,
            "labels": str(self.labels) if self.labels else None,
            "exporter": self.exporter,
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "opset": facts.opset,
            "ir_version": facts.ir_version,
            "bytes": facts.bytes,
            "inputs": [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in facts.inputs],
            "outputs": [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in facts.outputs],
            "operators": facts.operators,
            "verification": {
                "passed": checked.passed,
                "failure": checked.failure,
                "rtol": checked.tolerance.rtol,
                "atol": checked.tolerance.atol,
                "trials": checked.trials,
                "batches": list(checked.batches),
                "evidence": checked.evidence,
                "worst": {k: _finite(v) for k, v in worst.items()} if worst else None,
                "faults": list(checked.faults),
                "labels": {"same": checked.labels[0], "rows": checked.labels[1]} if checked.labels else None,
            },
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }


def parse_states(texts: Sequence[str]) -> dict[str, str]:
    """`h=output_1` for each state. Raises Rejected."""
    states: dict[str, str] = {}
    for text in texts:
        into, equals, source = text.partition("=")
        if not (into and equals and source) or into in states or source in states.values():
            raise Rejected(
                f"{text[:100]!r} does not say what a state is.", "Write --state INPUT=OUTPUT once for each."
            )
        states[into] = source
    return states


def parse_task(text: str | None) -> Task | None:
    """A task by its name. Raises Rejected."""
    if text is None:
        return None
    known: dict[str, Task] = {task: task for task in get_args(Task)}
    if text not in known:
        raise Rejected(f"The task {text[:64]!r} is not known.", f"Known are: {', '.join(known)}.")
    return known[text]


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
