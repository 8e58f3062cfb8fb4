"""What numbers a scheme's eight bits stand for: scales, zero points, rounded weights. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_models import pairsafe
from edgeward_models.pairsafe import Scales
from edgeward_models.regions import Weighted
from edgeward_models.schemes import Scheme

CODES = 127
"""The largest code of a weight."""
_CODES_S7 = 63
_NOTHING = 1e-30

Array = npt.NDArray[Any]


def weight_scales(weights: Array, one: Weighted, scheme: Scheme) -> Scales:
    """(output channels,): what one code of each channel's weights is worth.

    A depthwise kernel may have all of 8 bits under any scheme: it sums in 32. Without a scale per channel all
    are the coarsest.
    """
    rows = pairsafe.kernel_rows(one.op, weights, one.axis)
    if scheme.weights == "s8" or one.depthwise:
        found = pairsafe.scales(rows, pairs=False)
    elif scheme.weights == "s7":
        found = pairsafe.scales(rows, pairs=False, codes=_CODES_S7)
    else:
        found = pairsafe.scales(rows, pairs=True)
    return found if scheme.per_channel else np.full_like(found, found.max(initial=0.0))


def rounded_weights(weights: Array, one: Weighted, scheme: Scheme) -> Array:
    """The weights as their codes stand for them, float32, in the shape that they have."""
    shape = [1] * weights.ndim
    shape[one.axis] = -1
    scale = weight_scales(weights, one, scheme).reshape(shape)
    return (np.clip(np.round(weights / scale), -CODES, CODES) * scale).astype(np.float32)


def activation_code(limits: tuple[float, float], scheme: Scheme) -> tuple[float, int]:
    """(scale, zero point) of activations within `limits`, which hold zero, under the scheme."""
    low, high = limits
    signed = scheme.activations == "s8"
    if scheme.symmetric_activations:
        low, high = -max(-low, high), max(-low, high)
    scale = (high - low) / (254 if scheme.symmetric_activations and signed else 255)
    if scale < _NOTHING:
        return 1.0, 0
    if scheme.symmetric_activations:
        return float(np.float32(scale)), 0 if signed else 128
    return float(np.float32(scale)), round((-128 if signed else 0) - low / scale)
