"""Whether a session gives what it must: golden vectors by cosine, golden pictures by their tensors.

A variant is held against its own exact outputs, not against FP32: a correct INT8 file and a kernel that
saturates are equally far from FP32, and far apart from one another. Where large numbers hide small ones
(boxes beside scores) a cosine sees neither; then it tells which way the outputs are off: towards what
saturation would make of them, or anywhere (adr/0006).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
GATE = 0.99
"""The cosine that is asked for where a manifest asks for no other."""
LEANING = 0.5
"""From here on outputs are taken for saturated: measured were .05 to .18 of correct kernels, .80 and more of
saturating ones (adr/0006)."""
_HALF_GATE = 0.98

Array = npt.NDArray[Any]
Vector = tuple[Arrays, Arrays]
"""Inputs and exact outputs."""


def gate(declared: float, precision: Precision, provider: str) -> float:
    """The cosine that every output of every vector must reach; half precision gets a little more room.

    `provider` with or without "ExecutionProvider".
    """
    half = precision == "fp16" or provider.startswith("Tensorrt")
    return min(declared, _HALF_GATE) if half else declared


def cosine(mine: Array, golden: Array) -> float:
    """Cosine of two arrays as vectors; -1 where either is not finite, 1 where both are zero."""
    a, b = (np.asarray(x, np.float64).reshape(-1) for x in (mine, golden))
    if a.size != b.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return -1.0
    lengths = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    if not lengths:
        return 1.0 if not a.any() and not b.any() else 0.0
    return min(1.0, float(a @ b) / lengths)


class Leaning:
    """How far outputs lean from the exact ones towards the saturated ones: 0 not at all, 1 all the way.

    The share of the way that they have gone along it, but no more than its share in how far they are off at
    all: noise that dwarfs the way points anywhere. Over all runs; each output weighs by how much saturation
    turns it, whatever the size of its numbers.
    """

    def __init__(self) -> None:
        self._sums: dict[str, npt.NDArray[np.float64]] = {}

    def add(self, name: str, mine: Array, exact: Array, cut: Array) -> None:
        """One output of one run; arrays of other shapes, or not finite, count for nothing."""
        if mine.shape != exact.shape or not np.isfinite(mine).all():
            return
        zero, off, way = (np.asarray(x, np.float64).reshape(-1) for x in (exact, mine, cut))
        off, way = off - zero, way - zero
        sums = np.array([off @ way, way @ way, off @ off, zero @ zero])
        self._sums[name] = self._sums.get(name, 0.0) + sums

    @property
    def value(self) -> float | None:
        """None where saturation would change nothing."""
        each = [sums[:3] / (sums[1] + sums[3]) for sums in self._sums.values() if sums[1]]
        if not each:
            return None
        along, way, off = (float(total) for total in np.sum(each, axis=0))
        return along / max(way, math.sqrt(way * off))


@dataclass(frozen=True)
class Held:
    """What came of a session's outputs beside golden ones."""

    cosine: float
    """The smallest of any output of any vector."""
    leaning: float | None
    """Towards what a saturating kernel would give; None where nothing is known of that."""


def hold(
    session: Session, vectors: Sequence[Vector], contract: Contract, cuts: Sequence[Arrays] = ()
) -> Held:
    """Run the vectors and compare; `cuts` are the saturated outputs of each, where there are any.

    States begin at zero and are carried from vector to vector by this session itself, so that an error
    which grows from step to step is seen as it grows on the device.

    Raises:
        Rejected: the vectors are not of this model.
        RunFailed: a run failed.
    """
    worst, leaning = 1.0, Leaning()
    for k, outputs in enumerate(_runs(session, vectors, contract)):
        golden = vectors[k][1]
        worst = min(worst, *(cosine(outputs[name], expected) for name, expected in golden.items()))
        for name, cut in (cuts[k] if cuts else {}).items():
            leaning.add(name, outputs[name], golden[name], cut)
    return Held(worst, leaning.value)


def worst_cosine(session: Session, vectors: Sequence[Vector], contract: Contract) -> float:
    """The cosine of `hold`; raises as it does."""
    return hold(session, vectors, contract).cosine


def _runs(session: Session, vectors: Sequence[Vector], contract: Contract) -> Iterator[Arrays]:
    """All outputs by name of each vector's inputs, states carried on."""
    names = [port.name for port in session.outputs]
    fixed, states = constants(contract), initial_states(contract)
    for inputs, golden in vectors:
        feeds = {**fixed, **states, **inputs}
        if set(feeds) != {port.name for port in session.inputs} or not set(golden) <= set(names):
            raise Rejected("The golden vectors are of another model: their inputs or outputs differ.")
        outputs = dict(zip(names, session.run(feeds), strict=True))
        yield outputs
        states = next_states(contract, outputs)


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
