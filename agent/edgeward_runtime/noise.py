"""Made-up inputs for a contract, where nobody gave samples: smooth coloured pictures, babble, or numbers.

Invariant: the same contract, count and generator state give the same arrays. What stands on them is
weak evidence: noise excites a network otherwise than what it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_runtime import images, sounds
from edgeward_runtime.ports import shape_of, sources
from edgeward_runtime.preprocess import Preprocess
from edgeward_wire.contract import AudioSpec, Contract, InputPort

Array = npt.NDArray[Any]

_WIDTH, _HEIGHT = 320, 240


def noise(contract: Contract, count: int, generator: np.random.Generator) -> Iterator[dict[str, Array]]:
    """`count` made-up values for all inputs that are bound to `source`. Raises Rejected for a huge shape."""
    ports = sources(contract)
    prepare = {port.name: Preprocess(port) for port in ports if port.image is not None}
    heard = {port.name: _babble(generator, port.audio) for port in ports if port.audio is not None}
    for _ in range(count):
        feeds: dict[str, Array] = {}
        for port in ports:
            if port.name in prepare:
                feeds[port.name] = prepare[port.name](noise_picture(generator, _WIDTH, _HEIGHT)).copy()
            elif port.name in heard:
                window = next(heard[port.name])
                feeds[port.name] = np.array(window, np.dtype(port.dtype)).reshape(shape_of(contract, port))
            else:
                feeds[port.name] = _numbers(generator, contract, port)
        yield feeds


def noise_picture(generator: np.random.Generator, width: int, height: int) -> images.U8:
    """Smooth patches of colour with grain on them: livelier for a network than white noise."""
    coarse = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = images.resize(coarse, width, height, "cubic", np.empty((height, width, 3), np.uint8))
    grain = generator.integers(-24, 25, smooth.shape)
    return np.asarray(np.clip(smooth.astype(np.int16) + grain, 0, 255), np.uint8)


def _babble(generator: np.random.Generator, spec: AudioSpec) -> Iterator[sounds.F32]:
    """Windows of one endless stream: tones that come and go, on a noise of changing strength."""
    windows = sounds.Windows(spec)
    begun = 0
    while True:
        seconds = (begun + np.arange(spec.hop)) / spec.rate
        begun += spec.hop
        pitches = generator.uniform(60, spec.rate / 2.5, 4)
        tones = sum(np.sin(2 * np.pi * pitch * seconds) for pitch in pitches)
        grain = generator.standard_normal(spec.hop)
        chunk = generator.uniform(0, 0.15) * tones + generator.uniform(0, 0.1) * grain
        yield from windows.push(np.clip(chunk, -1, 1).astype(np.float32))


def _numbers(generator: np.random.Generator, contract: Contract, port: InputPort) -> Array:
    shape, dtype = shape_of(contract, port), np.dtype(port.dtype)
    if dtype.kind == "f":
        return np.asarray(generator.standard_normal(shape), dtype)
    if dtype.kind == "b":
        return np.asarray(generator.integers(0, 2, shape), dtype)
    return np.asarray(generator.integers(0, 100, shape), dtype)
