"""One quantised file on trial: does it load, is it right on this machine, how far is it from FP32.

Invariants: a candidate's fault is a sentence in its `Judged`, never an exception; FP32's own fault is
`Rejected`. Every sample goes through the plan that would run here; a few also through the exact session
(all optimisation off), and both must agree (`parity`), since against FP32 a correct INT8 file and a
saturating kernel look alike. States are carried from sample to sample as the device carries them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_models import pairsafe
from edgeward_models.answers import CLASSIFYING, Detections, first_class
from edgeward_models.metrics import average
from edgeward_models.samples import Feeds
from edgeward_models.similarity import cosine, energies, sqnr_interval
from edgeward_models.statistics import Interval
from edgeward_runtime.parity import gate as parity_gate
from edgeward_runtime.ports import constants, initial_states, next_states
from edgeward_runtime.sessions import NotLoaded, RunFailed, Session, open_exact, open_session
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Precision
from edgeward_wire.verdict import Plan

Array = npt.NDArray[Any]
Outputs = dict[str, Array]

PARITY = 0.99
"""The cosine with its own exact outputs that a file must reach; less for half precision (parity.gate)."""
_SLOW = 2.0
"""A candidate that takes so many times FP32's time is judged on fewer samples."""
_LEAST = 16
_KEPT_BYTES = 320 << 20


@dataclass(frozen=True)
class Effort:
    """How many samples each step takes; follows from how long one run takes."""

    fit: int
    """To search with."""
    test: int
    """For the final figures."""
    calibrate: int
    exact: int
    """Also run with all optimisation off."""
    rank: int
    """To rank the layers with."""


def effort(run_s: float, budget_s: float, fit: int | None, test: int | None, sample_bytes: int) -> Effort:
    """Counts for a model that takes `run_s` seconds a run; `fit`, `test` are what the samples have at most.

    `sample_bytes` are those of one sample's inputs and outputs: `fit` samples stay in memory. The shares of
    the budget: a candidate may take a thirtieth of it, and half of that to be judged.
    """
    run = max(run_s, 1e-5)

    def count(share: float, least: int, most: int, has: int | None) -> int:
        return min(max(least, min(most, int(share * budget_s / run))), most if has is None else has)

    keep = max(_LEAST, _KEPT_BYTES // max(1, sample_bytes))
    return Effort(
        fit=count(1 / 60, 24, min(512, keep), fit),
        test=count(1 / 16, 64, 900, test),
        calibrate=count(1 / 100, 16, 96, fit),
        exact=count(1 / 1000, 3, 8, fit),
        rank=count(1 / 2000, 2, 8, fit),
    )


@dataclass(frozen=True)
class Judged:
    """What came of one file."""

    excluded: str = ""
    parity: float | None = None
    energies: tuple[tuple[tuple[float, float], ...], ...] = ()
    """(signal, noise) of each output (or part of one, see `Detections.cut`) of each sample, against FP32."""
    agreed: tuple[float, ...] = ()
    """How far the answers are FP32's, 0..1: of a classification for each sample, of a detector for each
    sample on which either finds anything."""

    def sqnr(self) -> tuple[float, Interval] | None:
        """In dB, with its interval over the samples."""
        return sqnr_interval(self.energies) if self.energies else None

    def agreement(self) -> tuple[float, Interval] | None:
        """On average over the samples, with its interval."""
        if not self.agreed:
            return None
        figure = average(self.agreed)
        return figure.value, figure.interval

    def plain(self) -> dict[str, Any]:
        """As JSON knows it: an infinite noise is null."""
        parts = [[[s, None if math.isinf(n) else n] for s, n in sample] for sample in self.energies]
        return {
            "excluded": self.excluded,
            "parity": self.parity,
            "energies": parts,
            "agreed": list(self.agreed),
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Judged:
        """The other way."""
        parts = tuple(
            tuple((s, math.inf if n is None else n) for s, n in sample) for sample in plain["energies"]
        )
        return cls(plain["excluded"], plain["parity"], parts, tuple(plain["agreed"]))


def drive(
    session: Session, contract: Contract, samples: Iterable[Feeds]
) -> Iterator[tuple[dict[str, Array], Outputs]]:
    """(all inputs, all outputs) of each sample in turn, with constants fed and states carried.

    Raises RunFailed.
    """
    fixed, states = constants(contract), initial_states(contract)
    names = [port.name for port in session.outputs]
    for sample in samples:
        feeds = {**fixed, **sample, **states}
        outputs = dict(zip(names, session.run(feeds), strict=True))
        yield feeds, outputs
        states = next_states(contract, outputs)


def compared(contract: Contract) -> list[str]:
    """The outputs that are held against FP32's: results made of floats."""
    return [port.name for port in contract.results if port.dtype.startswith("float")]


@dataclass(frozen=True)
class Bench:
    """What every candidate is held against."""

    contract: Contract
    samples: Sequence[Feeds]
    reference: Sequence[Outputs]
    """FP32's outputs of the same samples."""
    reference_s: float
    """How long those took."""
    exact: int
    """How many of them a file's exact outputs are made of."""
    boxes: Detections | None = None
    """How a detector's output is read; None: the output as a whole counts."""

    def first(self, count: int) -> Bench:
        """The same with fewer samples."""
        return replace(self, samples=self.samples[:count], reference=self.reference[:count])

    def judge(self, file: Path, plan: Plan | None, precision: Precision) -> Judged:
        """Try one file. `plan` None: this machine cannot run it as its target would: exact outputs only."""
        try:
            exact = self._exact(file, len(self.samples) if plan is None else self.exact)
            if plan is None:
                return self._compare(exact)
            return self._under(file, plan, precision, exact)
        except NotLoaded as error:
            return Judged(f"It does not load: {error.what}")
        except RunFailed as error:
            return Judged(f"It loads, but does not run. {error.what}")

    def _exact(self, file: Path, count: int) -> list[Outputs]:
        session = open_exact(file)
        try:
            return self._results(session, count, math.inf)
        finally:
            session.close()

    def _under(self, file: Path, plan: Plan, precision: Precision, exact: Sequence[Outputs]) -> Judged:
        session = open_session(file, plan)
        try:
            mine = self._results(session, len(exact), math.inf)
            worst = min(
                (cosine(a[name], b[name]) for a, b in zip(mine, exact, strict=True) for name in a),
                default=1.0,
            )
            least = parity_gate(PARITY, precision, plan.provider)
            if worst < least:
                return Judged(_wrong(file, worst, least), worst)
            judged = self._compare(self._results(session, len(self.samples), _SLOW * self.reference_s))
        finally:
            session.close()
        return Judged(judged.excluded, worst, judged.energies, judged.agreed)

    def _results(self, session: Session, count: int, limit_s: float) -> list[Outputs]:
        """The result outputs of the first samples: at least `_LEAST`, and no more than fit into `limit_s`."""
        wanted = compared(self.contract)
        began = time.perf_counter()
        found: list[Outputs] = []
        for _, outputs in drive(session, self.contract, self.samples[:count]):
            found.append({name: outputs[name] for name in wanted})
            if len(found) >= _LEAST and time.perf_counter() - began > limit_s:
                break
        return found

    def _compare(self, outputs: Sequence[Outputs]) -> Judged:
        # Fewer outputs than samples: it was slow, see `_results`.
        return apart(self.contract, zip(self.reference, outputs, strict=False), self.boxes)


def apart(
    contract: Contract, pairs: Iterable[tuple[Outputs, Outputs]], boxes: Detections | None = None
) -> Judged:
    """How far (FP32's, its) outputs are from one another, sample by sample."""
    parts: list[tuple[tuple[float, float], ...]] = []
    agreed: list[float] = []
    for k, (reference, mine) in enumerate(pairs):
        for name in reference:
            if mine[name].shape != reference[name].shape:
                return Judged(f"Output {name} has another shape than in float.")
            if not np.isfinite(mine[name]).all():
                return Judged(f"Output {name} is not finite on sample {k}.")
        pieces = [(a, mine[name]) for name, a in reference.items()]
        if boxes is not None:
            cut = [zip(boxes.cut(n, a), boxes.cut(n, mine[n]), strict=True) for n, a in reference.items()]
            pieces = [piece for both in cut for piece in both]
        parts.append(tuple(energies(a, b) for a, b in pieces))
        agreement = _agreement(contract, reference, mine, boxes)
        if agreement is not None:
            agreed.append(agreement)
    return Judged("", None, tuple(parts), tuple(agreed))


def _agreement(
    contract: Contract, reference: Outputs, mine: Outputs, boxes: Detections | None
) -> float | None:
    """How far both give the same answer to one sample; None where there is none."""
    if boxes is not None:
        return boxes.agree(boxes.found(reference), boxes.found(mine))
    scores = contract.scores
    if scores is None or contract.task not in CLASSIFYING:
        return None
    return float(first_class(scores, reference[scores.name]) == first_class(scores, mine[scores.name]))


def side_by_side(
    contract: Contract,
    reference: tuple[Path, Plan],
    candidate: tuple[Path, Plan],
    samples: Iterable[Feeds],
    boxes: Detections | None = None,
) -> Judged:
    """Both files on the same test samples, one at a time, so that many samples take no memory.

    Both have run on this machine before: raises NotLoaded, RunFailed when they do not any more; Rejected
    where the reference's outputs are not finite.
    """
    ours, theirs = tee(samples)
    wanted = compared(contract)
    one, other = open_session(*reference), open_session(*candidate)
    try:
        mine = finite(reference[0], contract, drive(one, contract, ours), "test sample")
        runs = zip(mine, drive(other, contract, theirs), strict=True)
        return apart(contract, ((a, {n: b[n] for n in wanted}) for a, (_, b) in runs), boxes)
    finally:
        one.close()
        other.close()


def finite(
    file: Path, contract: Contract, runs: Iterable[tuple[Mapping[str, Array], Outputs]], what: str = "sample"
) -> Iterator[Outputs]:
    """The float file's outputs that are compared. Raises Rejected where one is not finite."""
    wanted = compared(contract)
    for k, (_, outputs) in enumerate(runs):
        for name in wanted:
            if not np.isfinite(outputs[name]).all():
                raise Rejected(
                    f"Output {name} of {file.name} is not finite on {what} {k}, in float.",
                    "Check the samples' preprocessing and the export.",
                )
        yield {name: outputs[name] for name in wanted}


def set_bench(
    file: Path,
    contract: Contract,
    plan: Plan,
    samples: Sequence[Feeds],
    exact: int,
    *,
    boxes: Detections | None = None,
) -> Bench:
    """Run the float file over the samples.

    Raises:
        Rejected: it does not load or run, or an output is not finite.
    """
    if not compared(contract):
        raise Rejected(f"{file.name} has no output of floats to hold INT8 against.")
    try:
        session = open_session(file, plan)
    except NotLoaded as error:
        raise Rejected(f"{file.name} does not load: {error.what}") from error
    began = time.perf_counter()
    try:
        found = list(finite(file, contract, drive(session, contract, samples)))
    except RunFailed as error:
        raise Rejected(f"{file.name} does not run on the samples. {error.what}") from error
    finally:
        session.close()
    return Bench(contract, samples, found, time.perf_counter() - began, exact, boxes)


def saturation(file: Path) -> str:
    """Why a file may be wrong on a processor without VNNI; empty when its weights prove that it cannot."""
    unsafe = _unsafe(file)
    if not unsafe:
        return ""
    nodes = "1 node" if len(unsafe) == 1 else f"{len(unsafe)} nodes"
    return (
        f"On x86-64 without VNNI the 16-bit sums of {nodes} may saturate ({unsafe[0]}, ...),"
        " and the target's hints do not demand VNNI."
    )


def _unsafe(file: Path) -> list[str]:
    return [bound.node for bound in pairsafe.worst_pairs(file) if not bound.safe]


def _wrong(file: Path, worst: float, least: float) -> str:
    finite = ", or are not finite" if worst <= -1 else ""
    cause = "its 16-bit sums saturate" if _unsafe(file) else "the runtime's optimisations change it"
    return (
        f"On this machine its outputs have cosine {worst:.4f} with its own exact ones, below"
        f" {least}{finite}: {cause}."
    )
