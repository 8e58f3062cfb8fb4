"""What an evaluation found: figures with their intervals, a gate's verdict, and the same as JSON. Pure.

Invariants: a drop is FP32's figure less the model's, above 0 where the model is worse; a gate is passed
or failed by the point estimate, and `decided` says whether the interval leaves any doubt; JSON holds no
infinities (null: equal, in dB).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from edgeward_models.layers import Layers
from edgeward_models.metrics import ClassScore, Confusion, Figure, needed
from edgeward_models.statistics import Interval
from edgeward_wire.manifest import Precision

_SLACK = 1e-9  # of floating-point sums; a drop that is just what is allowed passes


@dataclass(frozen=True)
class Subject:
    """A file that was evaluated, or its float original."""

    title: str
    file: Path
    whole: Path
    """The file with its weights inside; a copy is gone when the evaluation has ended."""
    precision: Precision
    bytes: int


@dataclass(frozen=True)
class Row:
    """One figure of the model, and FP32's beside it where it has one."""

    name: str
    title: str
    unit: Literal["share", "dB"]
    model: Figure
    fp32: Figure | None = None
    drop: Figure | None = None


@dataclass(frozen=True)
class Gate:
    """Whether a drop stays within what is allowed."""

    what: str
    allowed: float
    drop: Figure

    @property
    def passed(self) -> bool:
        """By the point estimate."""
        return self.drop.value <= self.allowed + _SLACK

    @property
    def decided(self) -> bool:
        """Whether the whole interval lies on one side of the gate."""
        low, high = self.drop.interval
        return high <= self.allowed + _SLACK or low > self.allowed + _SLACK

    @property
    def needed(self) -> int | None:
        """About how many samples would decide it; None: it is decided, or no number would."""
        if self.decided:
            return None
        return needed(self.drop, self.allowed)


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found."""

    model: Subject
    against: Subject | None
    task: str
    data: str
    """What the labelled figures stand on, for people; empty without labels."""
    samples: str
    """What agreement and SQNR stand on."""
    evidence: Literal["strong", "weak"]
    plan: str
    """How both files were run."""
    rows: tuple[Row, ...]
    labels: tuple[str, ...]
    classes: tuple[ClassScore, ...]
    """Of a classification, those that occur."""
    confused: tuple[Confusion, ...]
    class_ap: dict[int, float]
    """AP50-95 of each class of a detection."""
    layers: Layers | None
    parity: float | None
    """The smallest cosine of the outputs with the model's own exact ones, on a few samples."""
    gate: Gate | None
    notes: tuple[str, ...]
    took_s: float

    @property
    def passed(self) -> bool:
        """Whether no gate failed."""
        return self.gate is None or self.gate.passed

    def row(self, name: str) -> Row | None:
        """A figure by its name: top1, top5, macro_f1, map50, map50_95, agreement, sqnr."""
        return next((row for row in self.rows if row.name == name), None)

    def label(self, index: int) -> str:
        """A class for people."""
        return self.labels[index] if index < len(self.labels) else f"class {index}"

    def accuracy(self) -> dict[str, float]:
        """The figures as a sidecar's [accuracy] and a manifest take them."""
        names = {
            "agreement": "top1_agreement_fp32" if self.classes or not self.class_ap else "agreement_fp32"
        }
        found: dict[str, float] = {}
        for row in self.rows:
            name = "sqnr_db" if row.name == "sqnr" else names.get(row.name, row.name)
            parts = {"": row.model.value, "_low": row.model.interval.low, "_high": row.model.interval.high}
            found.update({name + end: round(v, 4) for end, v in parts.items() if math.isfinite(v)})
        return found


def plain(found: Evaluation) -> dict[str, Any]:
    """Everything, for `--json`."""
    return {
        "model": _subject(found.model),
        "against": _subject(found.against) if found.against else None,
        "task": found.task,
        "data": found.data or None,
        "samples": found.samples or None,
        "evidence": found.evidence,
        "plan": found.plan,
        "figures": {
            row.name: {
                "unit": row.unit,
                "model": _figure(row.model),
                "fp32": _figure(row.fp32),
                "drop": _figure(row.drop),
            }
            for row in found.rows
        },
        "classes": [{"label": found.label(c.index), **asdict(c)} for c in found.classes],
        "confused": [
            {"label": found.label(c.label), "taken_for": found.label(c.predicted), "count": c.count}
            for c in found.confused
        ],
        "class_ap": {found.label(index): round(ap, 6) for index, ap in found.class_ap.items()},
        "layers": _layers(found.layers),
        "parity": found.parity,
        "gate": _gate(found.gate),
        "accuracy": found.accuracy(),
        "notes": list(found.notes),
        "took_s": round(found.took_s, 3),
    }


def _subject(subject: Subject) -> dict[str, Any]:
    return {
        "title": subject.title,
        "file": str(subject.file),
        "precision": subject.precision,
        "bytes": subject.bytes,
    }


def _figure(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    low, high = figure.interval
    numbers = {"value": figure.value, "low": low, "high": high}
    return {**{key: _finite(value) for key, value in numbers.items()}, "samples": figure.count}


def _layers(layers: Layers | None) -> dict[str, Any] | None:
    if layers is None:
        return None
    rows = [
        {**asdict(row), "sqnr_db": _finite(row.sqnr_db), "own_db": _finite(row.own_db)} for row in layers.rows
    ]
    return {"skipped": layers.skipped, "worst_first": rows}


def _gate(gate: Gate | None) -> dict[str, Any] | None:
    if gate is None:
        return None
    return {
        "what": gate.what,
        "allowed": gate.allowed,
        "drop": _figure(gate.drop),
        "passed": gate.passed,
        "decided": gate.decided,
        "samples_needed": gate.needed,
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 6)


def flipped(figure: Figure) -> Figure:
    """A share as what it lacks of the whole: agreement becomes a drop."""
    low, high = figure.interval
    return Figure(1 - figure.value, Interval(1 - high, 1 - low), figure.count)
