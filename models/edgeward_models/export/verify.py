"""A file's outputs held against those of the model that it was made of, element by element.

Invariants: no framework is needed here: what the model gives comes in as arrays; an element passes when
|expected - actual| <= atol + rtol * |expected| (as numpy.allclose has it) and both are finite; the worst
element is the one that goes furthest beyond that, or comes closest; a file that does not run, or whose
outputs have other shapes, fails with the reason and never with an exception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_models.progress import Progress, silent
from edgeward_runtime.sessions import NotLoaded, RunFailed, Session, open_exact
from edgeward_wire.errors import Rejected

Array = npt.NDArray[Any]
RTOL = 1e-3
ATOL = 1e-4
"""Two right implementations in float32 differ by about 1e-6 of an output's size for each deep layer."""
MAX_FAULTS = 8


@dataclass(frozen=True)
class Tolerance:
    """|expected - actual| <= atol + rtol * |expected|."""

    rtol: float = RTOL
    atol: float = ATOL

    def __post_init__(self) -> None:
        """Raises Rejected for what is no tolerance."""
        if not (0 <= self.rtol < 1 and 0 <= self.atol < np.inf and self.rtol + self.atol > 0):
            raise Rejected(
                f"rtol {self.rtol:g} and atol {self.atol:g} are no tolerance.",
                f"Usual are {RTOL:g} and {ATOL:g}.",
            )


@dataclass(frozen=True)
class Step:
    """One run: what goes in, what the model itself gives, and its class indices where it is a classifier."""

    feeds: Mapping[str, Array]
    expected: Mapping[str, Array]
    classes: Array | None = None


@dataclass(frozen=True)
class Trial:
    """Runs in their order. Between them the file carries its own outputs to inputs (`states`)."""

    what: str
    batch: int
    steps: tuple[Step, ...]
    states: Mapping[str, str] = field(default_factory=dict)
    """Input -> the output that is its next value."""


@dataclass(frozen=True)
class Worst:
    """The element that differs most; `excess` is its difference in tolerances (1 is the limit)."""

    output: str
    index: tuple[int, ...]
    expected: float
    actual: float
    absolute: float
    relative: float
    excess: float
    trial: str = ""

    def __str__(self) -> str:
        at = ", ".join(map(str, self.index))
        return (
            f"{self.output}[{at}] is {self.expected:.7g} in the model and {self.actual:.7g} in the file: "
            f"{self.absolute:.2g} apart, {self.relative:.2g} of it"
        )


@dataclass(frozen=True)
class Verification:
    """What came of it."""

    tolerance: Tolerance
    trials: int
    batches: tuple[int, ...]
    evidence: str
    """`noise`, or the name of the file with the samples."""
    worst: Worst | None
    """None: nothing could be compared."""
    faults: tuple[str, ...] = ()
    """What failed besides single elements."""
    largest: float = 0.0
    """The largest |expected| of the worst element's output."""
    labels: tuple[int, int] | None = None
    """Of a classifier: rows with the same best class, and rows."""

    @property
    def passed(self) -> bool:
        """Whether the file gives what the model gives."""
        return not self.faults and self.worst is not None and self.worst.excess <= 1

    @property
    def failure(self) -> str:
        """Why not, in a sentence; empty when it passed."""
        if self.passed:
            return ""
        return self.faults[0] if self.faults else f"Outputs differ: {self.worst}."


def verify(
    path: Path,
    trials: Sequence[Trial],
    tolerance: Tolerance,
    *,
    evidence: str = "noise",
    classifier: bool = False,
    progress: Progress = silent,
) -> Verification:
    """Run every trial through the file as it is: on the CPU, one thread, all optimisation off."""
    tally = _Tally(tolerance, classifier)
    try:
        session = open_exact(path)
    except NotLoaded as error:
        tally.faults.append(f"ONNX Runtime does not load the file: {error.what}")
        return tally.verdict(trials, evidence)
    try:
        for k, trial in enumerate(trials):
            progress("verifying", k, len(trials))
            tally.run(session, trial)
    finally:
        session.close()
    progress("verifying", len(trials), len(trials))
    return tally.verdict(trials, evidence)


def worst_element(output: str, expected: Array, actual: Array, tolerance: Tolerance) -> Worst | None:
    """The element of two finite arrays of one shape that differs most; None when they are empty."""
    if not expected.size:
        return None
    reference, other = expected.astype(np.float64), actual.astype(np.float64)
    difference = np.abs(reference - other)
    allowed = tolerance.atol + tolerance.rtol * np.abs(reference)
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(difference == 0, 0.0, difference / allowed)
    at = np.unravel_index(int(np.argmax(excess)), excess.shape)
    mine, theirs, apart = float(reference[at]), float(other[at]), float(difference[at])
    relative = apart / abs(mine) if mine else (np.inf if apart else 0.0)
    return Worst(output, tuple(int(k) for k in at), mine, theirs, apart, float(relative), float(excess[at]))


def fault_of(output: str, expected: Array, actual: Array) -> str:
    """What makes a comparison of elements impossible: another shape, or values that are not finite."""
    if expected.shape != actual.shape:
        return f"Output {output} is {_shape(expected)} in the model, but {_shape(actual)} in the file."
    for array, whose in ((expected, "the model itself"), (actual, "the file only")):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = np.argwhere(~np.isfinite(array))
            value = array[tuple(bad[0])]
            return (
                f"Output {output} is not finite in {whose}: {len(bad)} of {array.size} values, "
                f"the first is {value} at {tuple(int(k) for k in bad[0])}."
            )
    return ""


class _Tally:
    """The worst of all runs so far."""

    def __init__(self, tolerance: Tolerance, classifier: bool) -> None:
        self.tolerance, self.classifier = tolerance, classifier
        self.worst: Worst | None = None
        self.largest = 0.0
        self.faults: list[str] = []
        self.hits = self.rows = 0

    def run(self, session: Session, trial: Trial) -> None:
        names = [port.name for port in session.outputs]
        taken = [port.name for port in session.inputs]
        carried: dict[str, Array] = {}
        for step in trial.steps:
            feeds = {name: carried.get(name, array) for name, array in step.feeds.items() if name in taken}
            try:
                outputs = dict(zip(names, session.run(feeds), strict=True))
            except RunFailed as error:
                return self._fault(f"With a batch of {trial.batch} the file does not run: {error.what}")
            for name, expected in step.expected.items():
                self._compare(name, expected, outputs.get(name), trial)
            if self.classifier:
                self._labels(step, outputs)
            carried = {into: outputs[out] for into, out in trial.states.items() if out in outputs}
        return None

    def verdict(self, trials: Sequence[Trial], evidence: str) -> Verification:
        return Verification(
            tolerance=self.tolerance,
            trials=len(trials),
            batches=tuple(sorted({trial.batch for trial in trials})),
            evidence=evidence,
            worst=self.worst,
            faults=tuple(self.faults) or (() if self.worst else ("Nothing could be compared.",)),
            largest=self.largest,
            labels=(self.hits, self.rows) if self.rows else None,
        )

    def _compare(self, name: str, expected: Array, actual: Array | None, trial: Trial) -> None:
        if actual is None:
            return self._fault(f"The file has no output {name}.")
        fault = fault_of(name, expected, actual)
        if fault:
            return self._fault(f"{fault} ({trial.what})")
        worst = worst_element(name, expected, actual, self.tolerance)
        if worst is not None and (self.worst is None or worst.excess > self.worst.excess):
            self.worst = Worst(**{**vars(worst), "trial": trial.what})
            self.largest = float(np.abs(expected.astype(np.float64)).max())
        return None

    def _labels(self, step: Step, outputs: Mapping[str, Array]) -> None:
        name, expected = next(iter(step.expected.items()))
        actual = outputs.get(name)
        if actual is None or actual.shape != expected.shape or actual.ndim < 1 or not actual.size:
            return
        classes = step.classes if step.classes is not None else expected.argmax(axis=-1)
        same = np.asarray(classes).reshape(-1) == actual.argmax(axis=-1).reshape(-1)
        self.hits, self.rows = self.hits + int(same.sum()), self.rows + same.size

    def _fault(self, what: str) -> None:
        if what not in self.faults and len(self.faults) < MAX_FAULTS:
            self.faults.append(what)


def _shape(array: Array) -> str:
    return " x ".join(map(str, array.shape)) or "one number"
