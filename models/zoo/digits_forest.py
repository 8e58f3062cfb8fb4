"""Handwritten digits by a random forest, trained here on scikit-learn's bundled 8 x 8 digits.

A forest, not a network: its thresholds fall between whole numbers of 0..16, so the file answers exactly as
scikit-learn does, and training it gives the same trees on every machine. It is float for a good reason:
comparisons have no products that INT8 could speed up. `features` (batch, 64) holds the 64 pixels of a digit.

The last 540 of the 1797 digits are held out: they were written by other people than those before them, so
the recorded accuracy is lower, and truer, than that of shuffled rows. They lie beside the model as
`digits.npz` (`features`, `labels`): samples for its golden vectors, and labelled data for
`agent-ctl model evaluate`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from edgeward_models.progress import Progress, silent
from edgeward_models.statistics import wilson
from edgeward_models.zoo import Built
from edgeward_runtime import golden
from edgeward_runtime.sessions import open_exact
from edgeward_wire.errors import Rejected

from . import sidecars
from .forward import Array
from .graphs import save

NAME = "digits-forest"
TREES, SEED = 60, 0
HELD_OUT = 540
FLOAT = "Trees compare, they do not multiply: there is nothing to quantise."


def build(out: Path, *, weights: Path | None = None, progress: Progress = silent) -> Built:
    """Train, export and measure; write the model, its sidecar, its labels and the held-out digits into `out`.

    Raises:
        Rejected: scikit-learn or skl2onnx is not installed.
    """
    progress("training", 0, 3)
    try:
        from sklearn.datasets import load_digits
        from sklearn.ensemble import RandomForestClassifier

        from edgeward_models.export.report import ExportOptions
        from edgeward_models.export.sklearn_models import export_sklearn
    except ImportError as error:
        raise Rejected(
            f"Training the forest needs a library that is not installed: {error.name}.",
            "pip install 'edgeward[models,sklearn]'",
        ) from error
    rows, digits = load_digits(return_X_y=True)
    forest = RandomForestClassifier(TREES, random_state=SEED, n_jobs=1)
    forest.fit(rows[:-HELD_OUT], digits[:-HELD_OUT])
    features, labels = rows[-HELD_OUT:].astype(np.float32), digits[-HELD_OUT:].astype(np.int64)
    labelled, samples = out / "digits.npz", out / "digits-rows.npz"
    labelled.write_bytes(golden.write_npz({"features": features, "labels": labels}))
    samples.write_bytes(golden.write_npz({"features": features}))
    progress("exporting", 1, 3)
    options = ExportOptions(labels=tuple(str(digit) for digit in range(10)), samples=samples)
    path = out / f"{NAME}.onnx"
    report = export_sklearn(forest, path, options, source=f"random forest of {TREES} trees")
    if report.out is None or report.labels is None:
        raise Rejected(
            "The exported forest does not answer as scikit-learn's does.", "Install another skl2onnx."
        )
    model = onnx.load(str(path))
    model.graph.name = NAME  # skl2onnx draws one
    save(model, path)
    progress("measuring", 2, 3)
    table = {
        "task": "classification",
        "labels": report.labels.name,
        "samples": samples.name,
        "float": FLOAT,
        "accuracy": _accuracy(path, features, labels),
        "annotations": {
            "licence": "Apache-2.0",
            "data": "UCI handwritten digits (CC BY 4.0), by scikit-learn",
        },
        "outputs": {"probabilities": {"activation": "none"}},
    }
    built = sidecars.write(path, f"A random forest of {TREES} trees on 8 x 8 digits, trained here", table)
    progress("built", 3, 3)
    return replace(built, files=(*built.files, report.labels, labelled, samples))


def _accuracy(model: Path, features: Array, labels: Array) -> dict[str, float]:
    """Top-1 of the ONNX file on the held-out digits, with Wilson's interval at 95 %."""
    session = open_exact(model)
    [scores] = session.run({"features": features})
    session.close()
    right = int((scores.argmax(axis=1) == labels).sum())
    low, high = wilson(right, len(labels))
    shares = {"top1": right / len(labels), "top1_low": low, "top1_high": high}
    return {**{name: round(share, 4) for name, share in shares.items()}, "rows": float(len(labels))}
