"""Classification of a picture or of a stretch of sound: one row of raw results -> the best few labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_runtime.sessions import Port, RunFailed
from edgeward_runtime.tasks.answer import Classified, Scored
from edgeward_runtime.tasks.view import View, label_of, result_at
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected

TOP = 5


class Classification:
    """Reads the contract's first result, of shape (1, classes)."""

    def __init__(self, contract: Contract, outputs: Sequence[Port], labels: Sequence[str]) -> None:
        """Raises Rejected when the outputs, the contract and the labels do not fit one another."""
        self._at, port = result_at(contract, outputs)
        classes = outputs[self._at].shape[-1] if outputs[self._at].shape else None
        if isinstance(classes, int) and not labels:
            labels = [label_of((), k) for k in range(classes)]
        if isinstance(classes, int) and classes != len(labels):
            raise Rejected(f"The model has {classes} classes, but there are {len(labels)} labels.")
        self._labels = tuple(labels)
        self._activation = port.activation

    def __call__(self, outputs: Sequence[npt.NDArray[Any]], view: View) -> Classified:
        """Raises RunFailed when the result has another length than the labels, or is not finite."""
        raw = np.asarray(outputs[self._at], np.float32).reshape(-1)
        if raw.size != len(self._labels):
            raise RunFailed(f"The result has {raw.size} numbers for {len(self._labels)} labels.")
        scores = activate(raw, self._activation)
        if not np.isfinite(scores).all():
            raise RunFailed("The result is not finite.")
        rules, sure = view.rules, float(scores.max(initial=0.0))
        if rules.classes:
            scores = np.where([rules.wanted(label) for label in self._labels], scores, 0)
        top = (Scored(k, self._labels[k], float(scores[k])) for k in best(scores, TOP))
        if rules.thresholds or rules.classes:
            top = (one for one in top if one.score >= max(rules.threshold(one.label, 0), 1e-9))
        return Classified(tuple(top), sure)


def activate(raw: npt.NDArray[np.float32], how: str) -> npt.NDArray[np.float32]:
    """Raw results as scores in 0..1; `none` takes them for scores and keeps them in range."""
    if how == "softmax":
        powers = np.exp(raw - raw.max())
        return np.asarray(powers / powers.sum(), np.float32)
    if how == "sigmoid":
        return np.asarray(0.5 * (1 + np.tanh(0.5 * raw)), np.float32)  # without overflow
    return np.asarray(np.clip(raw, 0, 1), np.float32)


def best(scores: npt.NDArray[np.float32], count: int) -> list[int]:
    """The indices of the `count` highest scores, highest first, without sorting all of them."""
    few = scores.size <= count
    chosen = np.arange(scores.size) if few else np.argpartition(scores, -count)[-count:]
    return [int(k) for k in chosen[np.lexsort((chosen, -scores[chosen]))]]
