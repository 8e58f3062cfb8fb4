"""What a search found: every candidate with its figures, what was chosen, and why the others were not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgeward_models.race import Timing
from edgeward_models.schemes import Scheme
from edgeward_models.search import Gate, Measured
from edgeward_models.statistics import Interval
from edgeward_models.trials import Judged


@dataclass(frozen=True)
class Candidate:
    """One scheme that was tried. Figures on the `fit` samples; None where it did not get so far."""

    measured: Measured
    file: Path | None = None
    bytes: int = 0
    parity: float | None = None
    """The smallest cosine with its own exact outputs under the plan that runs here."""
    sqnr_interval: Interval | None = None
    agreement_interval: Interval | None = None
    timing: Timing | None = None

    @classmethod
    def of(cls, scheme: Scheme, file: Path, judged: Judged) -> Candidate:
        """With what its trial said."""
        sqnr, agreement = judged.sqnr(), judged.agreement()
        measured = Measured(
            scheme,
            sqnr_db=sqnr[0] if sqnr else None,
            agreement=agreement[0] if agreement else None,
            excluded=judged.excluded,
        )
        return cls(
            measured,
            file,
            file.stat().st_size,
            judged.parity,
            sqnr[1] if sqnr else None,
            agreement[1] if agreement else None,
        )

    @property
    def title(self) -> str:
        """Its scheme, for people."""
        return self.measured.scheme.title

    def excluding(self, reason: str) -> Candidate:
        """The same, out of the question for this reason; an empty one changes nothing."""
        if not reason:
            return self
        return replace(self, measured=replace(self.measured, excluded=reason))

    def timed(self, timing: Timing) -> Candidate:
        """With its latency; one that fell out of the race is out of the question."""
        high = timing.interval.high if timing.interval else None
        measured = replace(self.measured, ratio=timing.ratio, ratio_high=high)
        fault = timing.reason if timing.ratio is None else ""
        return replace(self, measured=measured, timing=timing).excluding(fault)


@dataclass(frozen=True)
class Final:
    """What was chosen, on samples that neither calibrated nor searched."""

    samples: int
    sqnr_db: float
    sqnr_interval: Interval
    agreement: float | None
    agreement_interval: Interval | None

    @classmethod
    def of(cls, judged: Judged) -> Final:
        """What a trial on the test samples says."""
        sqnr, agreement = judged.sqnr(), judged.agreement()
        value, interval = sqnr if sqnr is not None else (-math.inf, Interval(-math.inf, -math.inf))
        figure, around = agreement if agreement is not None else (None, None)
        return cls(len(judged.energies), value, interval, figure, around)

    @property
    def measured(self) -> Measured:
        """As a gate takes it."""
        return Measured(Scheme("static"), self.sqnr_db, self.agreement)

    def accuracy(self, agreement: str = "top1_agreement_fp32") -> dict[str, float]:
        """As a sidecar's [accuracy]: figures only, what is infinite is left out."""
        found: dict[str, float] = {}
        if self.agreement is not None and self.agreement_interval is not None:
            low, high = self.agreement_interval
            found[agreement] = round(self.agreement, 4)
            found[f"{agreement}_low"] = round(low, 4)
            found[f"{agreement}_high"] = round(high, 4)
        if abs(self.sqnr_db) < 1000:
            found["sqnr_db"] = round(self.sqnr_db, 2)
        return {**found, "samples": float(self.samples)}


@dataclass(frozen=True)
class TargetReport:
    """The search for one target."""

    target: str
    gate: Gate
    why: str
    """Why that gate."""
    here: bool
    """Whether this machine could measure it; otherwise the device's probe decides."""
    candidates: tuple[Candidate, ...] = ()
    chosen: int | None = None
    final: Final | None = None
    """Of what was chosen."""
    front: tuple[int, ...] = ()
    fp32: Timing | None = None
    layers: tuple[Mapping[str, Any], ...] = ()
    """By sensitivity, the most sensitive first."""
    unsupported: tuple[str, ...] = ()
    """Operators of the model that stay in float on this target."""
    notes: tuple[str, ...] = ()

    @property
    def offered(self) -> Candidate | None:
        """What is to be deployed, if anything."""
        return None if self.chosen is None else self.candidates[self.chosen]
