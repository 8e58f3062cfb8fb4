"""Whether a session gives what it must: golden vectors by cosine, golden pictures by their tensors.

A variant is held against its own exact outputs, not against FP32: a correct INT8 file and a kernel that
saturates are equally far from FP32, and far apart from one another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_runtime import images
from edgeward_runtime.golden import Arrays
from edgeward_runtime.ports import constants, initial_states, next_states
from edgeward_runtime.preprocess import Preprocess, image_input
from edgeward_runtime.sessions import Session
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Precision

MEAN_STEPS = 0.5
LARGEST_STEPS = 4.0
_HALF_GATE = 0.98

Array = npt.NDArray[Any]


def gate(declared: float, precision: Precision, provider: str) -> float:
    """The cosine that every output of every vector must reach; half precision gets a little more room."""
    half = precision == "fp16" or provider.startswith("Tensorrt")
    return min(declared, _HALF_GATE) if half else declared


def cosine(mine: Array, golden: Array) -> float:
    """Cosine of two arrays as vectors; -1 where `mine` is not finite, 1 where both are zero."""
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (mine, golden))
    if a.size != b.size or not np.isfinite(a).all():
        return -1.0
    lengths = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    if not lengths:
        return 1.0 if not a.any() and not b.any() else 0.0
    return min(1.0, float(a @ b) / lengths)


def worst_cosine(session: Session, vectors: Sequence[tuple[Arrays, Arrays]], contract: Contract) -> float:
    """The smallest cosine of any output of any vector.

    States begin at zero and are carried from vector to vector by this session itself, so that an error
    which grows from step to step is seen as it grows on the device.

    Raises:
        Rejected: the vectors are not of this model.
        RunFailed: a run failed.
    """
    names = {port.name for port in session.outputs}
    fixed, states = constants(contract), initial_states(contract)
    worst = 1.0
    for inputs, golden in vectors:
        feeds = {**fixed, **states, **inputs}
        if set(feeds) != {port.name for port in session.inputs} or not set(golden) <= names:
            raise Rejected("The golden vectors are of another model: their inputs or outputs differ.")
        outputs = dict(zip((port.name for port in session.outputs), session.run(feeds), strict=True))
        worst = min(worst, *(cosine(outputs[name], expected) for name, expected in golden.items()))
        states = next_states(contract, outputs)
    return worst


def check_preprocess(contract: Contract, pairs: Sequence[tuple[bytes, Array]]) -> None:
    """Hold this machine's preprocessing against golden pictures, in steps of a colour (0..255).

    Raises:
        Rejected: it differs by more than `MEAN_STEPS` on average or `LARGEST_STEPS` anywhere.
    """
    port = image_input(contract)
    preprocess = Preprocess(port)
    spec = preprocess.spec
    shape = (1, -1, 1, 1) if spec.layout == "nchw" else (1, 1, 1, -1)
    scale = np.abs(np.asarray(spec.scale, np.float64)).reshape(shape)
    for k, (raw, expected) in enumerate(pairs):
        mine = preprocess(images.decode(raw, f"golden picture {k}"))
        if mine.shape != expected.shape:
            raise Rejected(f"Golden tensor {k} has the shape {expected.shape}, not {mine.shape}.")
        steps = np.abs(mine.astype(np.float64) - expected) / scale
        mean, largest = float(steps.mean()), float(steps.max())
        if not (mean <= MEAN_STEPS and largest <= LARGEST_STEPS):
            raise Rejected(
                f"This machine prepares golden picture {k} differently: {mean:.2f} of 255 on average and"
                f" {largest:.1f} at most, where {MEAN_STEPS} and {LARGEST_STEPS:.0f} are allowed."
            )
