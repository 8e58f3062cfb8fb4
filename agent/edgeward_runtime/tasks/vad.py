"""Voice activity: the score of each stretch of sound -> whether somebody speaks, and since when.

Speech begins with the first stretch at or above the threshold (label `speech`, 0.5 unless the source's rules
say otherwise). It ends when the score has fallen below the threshold by more than `BAND`, and has not come
back up to it for `HOLD_S`: a breath between two words is not silence. Silence then counts from where the
score fell. Invariant: each source is remembered by itself, and a gap forgets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_runtime.sessions import Port, RunFailed
from edgeward_runtime.tasks.answer import Spoken
from edgeward_runtime.tasks.classification import activate
from edgeward_runtime.tasks.view import View, result_at
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected

SPEECH = "speech"
THRESHOLD = 0.5
BAND = 0.15
HOLD_S = 0.1
_LONGEST_S = 30 * 86_400.0
_WHOLE_STEP = 1e-9  # three steps of 0.1 s are as long as 0.3 s


@dataclass
class Hearing:
    """One source's hysteresis."""

    active: bool = False
    for_s: float = 0.0
    """How long it has been so."""
    low_s: float | None = None
    """While active: the time since the score fell; None: it is up."""

    def hear(self, score: float, step_s: float, threshold: float) -> None:
        """The score of the next `step_s` seconds."""
        self.for_s = min(self.for_s + step_s, _LONGEST_S)
        if not self.active:
            if score >= threshold:
                self.active, self.for_s, self.low_s = True, step_s, None
            return
        if score >= threshold:
            self.low_s = None
        elif self.low_s is not None or score < threshold - BAND:
            self.low_s = (self.low_s or 0.0) + step_s
        if self.low_s is not None and self.low_s >= HOLD_S - _WHOLE_STEP and score < threshold - BAND:
            self.active, self.for_s, self.low_s = False, self.low_s, None


class VoiceActivity:
    """Reads the contract's first result: one score, or two classes of which the second is speech."""

    def __init__(self, contract: Contract, outputs: Sequence[Port], labels: Sequence[str]) -> None:
        """Raises Rejected when the outputs do not fit the contract, or are no score."""
        self._at, port = result_at(contract, outputs)
        self._activation = port.activation
        last = outputs[self._at].shape[-1] if outputs[self._at].shape else 1
        if isinstance(last, int) and last > 2:
            raise Rejected(
                f"Output {port.name} has {last} numbers; voice activity is one score, or silence and speech.",
                "Is it an audio-classification? Say so with --task.",
            )
        self._heard: dict[int, Hearing] = {}

    def __call__(self, outputs: Sequence[npt.NDArray[Any]], view: View) -> Spoken:
        """Raises RunFailed when the result is not finite, or not of one or two numbers."""
        raw = np.asarray(outputs[self._at], np.float32).reshape(-1)
        if not 1 <= raw.size <= 2:
            raise RunFailed(f"The result has {raw.size} numbers, not one score.")
        score = float(activate(raw, self._activation)[-1])
        if not np.isfinite(score):
            raise RunFailed("The result is not finite.")
        hearing = Hearing() if view.fresh else self._heard.get(view.source, Hearing())
        self._heard[view.source] = hearing
        hearing.hear(score, view.step_s, view.rules.threshold(SPEECH, THRESHOLD))
        return Spoken(hearing.active, score, hearing.for_s)
