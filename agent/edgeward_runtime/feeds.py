"""What a source delivers becomes the inputs of runs: a picture of one, a chunk of sound of none or several.

Invariants: the tensors of a feed are valid until the next one is asked for; sources share nothing but the
buffers of the picture's preparation; a gap in sound begins the windows anew, and is never filled up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeward_runtime.ports import shape_of, sources
from edgeward_runtime.preprocess import Preprocess, image_input
from edgeward_runtime.slots import Frame
from edgeward_runtime.sounds import Resampler, Windows
from edgeward_wire.contract import AudioSpec, Contract, InputPort
from edgeward_wire.errors import Rejected

Tensor = npt.NDArray[Any]


class Feeder(Protocol):
    """Makes the fed input of a contract. One engine owns it."""

    name: str
    """Of the input."""
    step_s: float
    """How much time one run stands for; 0 for pictures."""

    def feeds(self, frame: Frame) -> Iterator[Tensor]:
        """The tensor of each run that this frame makes due. Raises Rejected for what cannot be fed."""
        ...

    def blank(self) -> Tensor:
        """Something of the right shape, to warm up with."""
        ...


class Pictures:
    """One run a picture. The frame is given back once it was read."""

    step_s = 0.0

    def __init__(self, contract: Contract) -> None:
        port = image_input(contract)
        self.name = port.name
        self._preprocess = Preprocess(port)

    def feeds(self, frame: Frame) -> Iterator[Tensor]:
        tensor = self._preprocess(frame.data)
        frame.release()
        yield tensor

    def blank(self) -> Tensor:
        return self._preprocess(np.full((64, 64, 3), 128, np.uint8))


class Sounds:
    """A run for each window that is full. Each source has a converter of rates and windows of its own."""

    def __init__(self, contract: Contract) -> None:
        port, spec = sound_input(contract)
        self.name = port.name
        self.step_s = spec.hop / spec.rate
        self._spec = spec
        self._shape, self._dtype = shape_of(contract, port), np.dtype(port.dtype)
        self._streams: dict[int, tuple[int, Resampler, Windows]] = {}

    def feeds(self, frame: Frame) -> Iterator[Tensor]:
        if frame.rate is None:
            raise Rejected(
                "The model takes sound, but the source delivers pictures.", "Name a microphone or WAV file."
            )
        rate, resampler, windows = self._streams.get(frame.source, (0, None, None))
        if resampler is None or windows is None or rate != frame.rate or frame.lost_s:
            resampler, windows = Resampler(frame.rate, self._spec.rate), Windows(self._spec)
            self._streams[frame.source] = (frame.rate, resampler, windows)
        for window in windows.push(resampler.push(frame.data)):
            yield window.astype(self._dtype, copy=False).reshape(self._shape)

    def blank(self) -> Tensor:
        return np.zeros(self._shape, self._dtype)


def sound_input(contract: Contract) -> tuple[InputPort, AudioSpec]:
    """The one stretch of sound that this contract takes. Raises Rejected when that is not so."""
    fed = sources(contract)
    if len(fed) != 1 or fed[0].audio is None:
        raise Rejected(f"The model does not take exactly one picture or one sound (task {contract.task}).")
    return fed[0], fed[0].audio


def feeder(contract: Contract) -> Feeder:
    """What feeds this contract. Raises Rejected when no source can."""
    if any(port.audio is not None for port in sources(contract)):
        return Sounds(contract)
    return Pictures(contract)
