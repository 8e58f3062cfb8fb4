"""The zoo's operators in NumPy, in double precision: what a graph computes on its probe while it is built.

Slow beside a runtime, but exact enough that rounding to twelve bits gives the same weights on every machine,
and independent of the runtime that later runs the graph. Pictures are (n, channels, height, width), sound
(n, channels, samples); all arrays float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: |error| <= 1.5e-7
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
_ERF_P = 0.3275911


def conv(x: Array, weights: Array, stride: int = 1, pad: int = 0, groups: int = 1) -> Array:
    """Convolution over one or two spatial axes; `weights` (out, in / groups, *kernel)."""
    if x.ndim == 3:
        return _conv2d(x[:, :, None], weights[:, :, None], (1, stride), (0, pad), groups)[:, :, 0]
    return _conv2d(x, weights, (stride, stride), (pad, pad), groups)


def _conv2d(x: Array, weights: Array, stride: tuple[int, int], pad: tuple[int, int], groups: int) -> Array:
    out, _, *kernel = weights.shape
    count, channels = x.shape[:2]
    x = np.pad(x, ((0, 0), (0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
    height, width = ((x.shape[2 + k] - kernel[k]) // stride[k] + 1 for k in range(2))
    sums = np.zeros((count, groups, out // groups, height * width))
    taps = weights.astype(np.float64).reshape(groups, out // groups, channels // groups, *kernel)
    # Contiguous matrices, one for each place in the kernel: others would miss the fast product.
    taps = np.ascontiguousarray(np.moveaxis(taps, (3, 4), (0, 1)))
    for row in range(kernel[0]):
        for column in range(kernel[1]):
            rows = slice(row, row + stride[0] * (height - 1) + 1, stride[0])
            columns = slice(column, column + stride[1] * (width - 1) + 1, stride[1])
            seen = x[:, :, rows, columns].reshape(count, groups, channels // groups, height * width)
            sums += taps[row, column] @ seen
    return sums.reshape(count, out, height, width)


def max_pool(x: Array, kernel: int, stride: int, pad: int) -> Array:
    """Maximum over kernel x kernel pixels."""
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=-np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(x, (kernel, kernel), axis=(2, 3))
    return np.asarray(windows[:, :, ::stride, ::stride].max(axis=(4, 5)))


def normalise(x: Array, axes: tuple[int, ...], epsilon: float) -> Array:
    """Mean 0 and variance 1 over `axes`."""
    centred = x - x.mean(axis=axes, keepdims=True)
    return np.asarray(centred / np.sqrt(np.square(centred).mean(axis=axes, keepdims=True) + epsilon))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * x)))


def softmax(x: Array, axis: int) -> Array:
    """exp(x), sum 1 over `axis`."""
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def erf(x: Array) -> Array:
    """The error function, to 1.5e-7."""
    t = 1 / (1 + _ERF_P * np.abs(x))
    return np.asarray(np.sign(x) * (1 - t * np.polyval(_ERF, t) * np.exp(-np.square(x))))


def rounded(x: Array) -> Array:
    """Twelve bits of each number: what double precision leaves open after a thousand sums is gone."""
    fraction, exponent = np.frexp(np.asarray(x, np.float64))
    return np.asarray(np.ldexp(np.round(fraction * 4096) / 4096, exponent))
