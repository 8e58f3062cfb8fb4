"""What a source delivers becomes the inputs of runs: a picture of one, a chunk of sound of none or several.

Invariants: the tensors of a feed are valid until the next one is asked for; sources share nothing but the
buffers of the picture's preparation; a gap in sound begins the windows anew, and is never filled up.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgeward_runtime.ports import shape_of, sources
from edgeward_runtime.preprocess import Preprocess, image_input
from edgeward_runtime.slots import Frame
from edgeward_runtime.sounds import SOUND_SUFFIXES, Resampler, Windows, read_wav
from edgeward_wire.contract import AudioSpec, Contract, InputPort
from edgeward_wire.errors import Rejected

MAX_FILES = 1000

Tensor = npt.NDArray[Any]
Feed = dict[str, Tensor]
"""The inputs bound to `source`, by name."""


class Feeder(Protocol):
    """Makes the fed inputs of a contract. One engine owns it."""

    step_s: float
    """How much time one run stands for; 0 for pictures."""

    def feeds(self, frame: Frame) -> Iterator[Feed]:
        """The inputs of each run that this frame makes due. Raises Rejected for what cannot be fed."""
        ...

    def forget(self, source: int) -> None:
        """What comes next from this source does not continue what came before."""
        ...

    def blank(self) -> Feed:
        """Something of the right shapes, to warm up with."""
        ...


class Pictures:
    """One run a picture. The frame is given back once it was read."""

    step_s = 0.0

    def __init__(self, contract: Contract) -> None:
        port = image_input(contract)
        self._name = port.name
        self._preprocess = Preprocess(port)

    def feeds(self, frame: Frame) -> Iterator[Feed]:
        if frame.rate is not None:
            raise Rejected(
                "The model takes pictures, but the source delivers sound.", "Name a camera or pictures."
            )
        tensor = self._preprocess(frame.data)
        frame.release()
        yield {self._name: tensor}

    def forget(self, source: int) -> None:
        """Pictures stand by themselves."""

    def blank(self) -> Feed:
        return {self._name: self._preprocess(np.full((64, 64, 3), 128, np.uint8))}


class Sounds:
    """A run for each window that is full. Each source has a converter of rates and windows of its own."""

    def __init__(self, contract: Contract) -> None:
        port, spec = sound_input(contract)
        self._name = port.name
        self.step_s = spec.hop / spec.rate
        self._spec = spec
        self._shape, self._dtype = shape_of(contract, port), np.dtype(port.dtype)
        self._streams: dict[int, tuple[int, Resampler, Windows]] = {}

    def feeds(self, frame: Frame) -> Iterator[Feed]:
        if frame.rate is None:
            raise Rejected(
                "The model takes sound, but the source delivers pictures.", "Name a microphone or WAV file."
            )
        rate, resampler, windows = self._streams.get(frame.source, (0, None, None))
        if resampler is None or windows is None or rate != frame.rate or frame.lost_s:
            resampler, windows = Resampler(frame.rate, self._spec.rate), Windows(self._spec)
            self._streams[frame.source] = (frame.rate, resampler, windows)
        for window in windows.push(resampler.push(frame.data)):
            yield {self._name: window.astype(self._dtype, copy=False).reshape(self._shape)}

    def forget(self, source: int) -> None:
        """The next chunk begins new windows, with silence before it."""
        self._streams.pop(source, None)

    def blank(self) -> Feed:
        return {self._name: np.zeros(self._shape, self._dtype)}


class Tensors:
    """Inputs that no source of ours delivers: rows of numbers, several inputs. Whoever asks feeds them."""

    step_s = 0.0

    def __init__(self, contract: Contract) -> None:
        self._blank = {
            port.name: np.zeros(shape_of(contract, port), np.dtype(port.dtype)) for port in sources(contract)
        }

    def feeds(self, frame: Frame) -> Iterator[Feed]:
        takes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in self._blank.items())
        raise Rejected(
            f"No source can feed this model: it takes {takes}, not one picture or one sound.",
            "Give its pipeline no sources, and ask it through local serving.",
        )

    def forget(self, source: int) -> None:
        """Nothing is remembered."""

    def blank(self) -> Feed:
        return dict(self._blank)


def sound_input(contract: Contract) -> tuple[InputPort, AudioSpec]:
    """The one stretch of sound that this contract takes. Raises Rejected when that is not so."""
    fed = sources(contract)
    if len(fed) != 1 or fed[0].audio is None:
        raise Rejected(f"The model does not take exactly one picture or one sound (task {contract.task}).")
    return fed[0], fed[0].audio


def windows_of(contract: Contract, path: Path, count: int) -> list[Feed]:
    """The first `count` windows of a WAV file, or of a directory of them in order of name, as inputs.

    Raises:
        Rejected: the contract takes no sound, or the files hold none. Unavailable: one cannot be read.
    """
    feeder = Sounds(contract)
    files = (
        [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix.lower() in SOUND_SUFFIXES)
    )
    found: list[Feed] = []
    for number, file in enumerate(files[:MAX_FILES]):
        sound = read_wav(file)
        frame = Frame(number, sound.samples, 0.0, 0.0, 0.0, rate=sound.rate)
        for feed in feeder.feeds(frame):
            found.append({name: tensor.copy() for name, tensor in feed.items()})
            if len(found) == count:
                return found
    if not found:
        raise Rejected(f"{path} holds no sound as long as the model's window.", "Name WAV files there.")
    return found


def feedable(contract: Contract) -> bool:
    """Whether a camera, a microphone or a file can feed it: exactly one picture, or one sound, goes in."""
    fed = sources(contract)
    return len(fed) == 1 and (fed[0].image is not None or fed[0].audio is not None)


def feeder(contract: Contract) -> Feeder:
    """What feeds this contract. Raises Rejected when its inputs cannot be."""
    if not feedable(contract):
        return Tensors(contract)
    return Sounds(contract) if sources(contract)[0].audio is not None else Pictures(contract)
