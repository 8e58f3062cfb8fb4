"""Labelled inputs, one by one, as a model takes them: through the very preprocessing that the device runs.

Invariants: a file is decoded when its turn comes, and not kept; a sound longer than the model's window is
represented by the window in its middle, a shorter one is followed by silence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from edgeward_models.samples import Feeds
from edgeward_runtime import images, sounds
from edgeward_runtime.ports import shape_of, sources
from edgeward_runtime.preprocess import Preprocess, image_input
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected, Unavailable

Kind = Literal["folders", "table", "coco", "arrays"]


class Truth(NamedTuple):
    """One object on a picture."""

    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels of the picture."""
    class_index: int
    crowd: bool
    """A group that is neither found nor missed."""
    area: float


@dataclass(frozen=True, slots=True)
class Item:
    """One input, and what is right for it: a class, or the objects on it."""

    name: str
    path: Path = Path()
    """Of a picture."""
    row: int = -1
    """In an array."""
    label: int = -1
    truths: tuple[Truth, ...] = ()
    size: tuple[int, int] | None = None
    """(width, height) as the annotations say."""


class Sample(NamedTuple):
    """An item ready to be run. `feeds` are valid until the next one is made."""

    item: Item
    feeds: Feeds
    size: tuple[int, int] | None
    """(width, height) of the picture."""


@dataclass(frozen=True)
class LabelledSet:
    """What `open_labelled` found."""

    kind: Kind
    origin: str
    """For people: "120 pictures of 10 classes in data"."""
    items: tuple[Item, ...]
    _arrays: Feeds = field(default_factory=dict, repr=False)

    def choose(self, count: int | None, seed: int = 0) -> LabelledSet:
        """So many of them, drawn without returning; all when there are not more."""
        if count is None or count >= len(self.items):
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self.items))[:count])
        origin = f"{count} of the {self.origin}, drawn with seed {seed}"
        return replace(self, items=tuple(self.items[k] for k in chosen), origin=origin)

    def stream(self, contract: Contract) -> Iterator[Sample]:
        """Each of them through the device's preprocessing. Raises Rejected, Unavailable on the way."""
        if self.kind == "arrays":
            for item in self.items:
                yield Sample(item, {name: rows[item.row] for name, rows in self._arrays.items()}, None)
            return
        prepare = _clips(contract) if sources(contract)[0].audio is not None else _frames(contract)
        for item in self.items:
            yield prepare(item)


def suffixes(contract: Contract) -> tuple[str, frozenset[str]]:
    """What the files are called that this model's input is made of, and how they end.

    Raises Rejected when it is made of no file.
    """
    ports = sources(contract)
    if len(ports) == 1 and ports[0].audio is not None:
        return "sound", sounds.SOUND_SUFFIXES
    image_input(contract)
    return "picture", images.PICTURE_SUFFIXES


def _frames(contract: Contract) -> Callable[[Item], Sample]:
    port = image_input(contract)
    preprocess = Preprocess(port)

    def prepare(item: Item) -> Sample:
        picture = images.decode(read_bytes(item.path, images.MAX_PICTURE_BYTES), item.name)
        size = (picture.shape[1], picture.shape[0])
        if item.size is not None and item.size != size:
            raise Rejected(
                f"{item.name} is {size[0]} x {size[1]}, but its annotations are for"
                f" {item.size[0]} x {item.size[1]}.",
                "Its boxes would be elsewhere: use the pictures that were annotated.",
            )
        return Sample(item, {port.name: preprocess(picture)}, size)

    return prepare


def _clips(contract: Contract) -> Callable[[Item], Sample]:
    port = sources(contract)[0]
    spec = port.audio
    if spec is None:
        raise AssertionError("asked for only where there is sound")
    shape, dtype = shape_of(contract, port), np.dtype(port.dtype)

    def prepare(item: Item) -> Sample:
        sound = sounds.decode_wav(read_bytes(item.path, sounds.MAX_WAV_BYTES), item.name)
        heard = sounds.resample(sound.samples, sound.rate, spec.rate)
        window = sounds.window_at(heard, max(0, (len(heard) - spec.window) // 2), spec)
        if window.size != int(np.prod(shape)):
            raise Rejected(
                f"Input {port.name} has the shape {shape}, and a window of {window.size} samples does not"
                " fill it.",
                "Declare rate, window and hop as the model was made for.",
            )
        return Sample(item, {port.name: window.astype(dtype).reshape(shape)}, None)

    return prepare


def read_bytes(path: Path, most: int) -> bytes:
    """A whole file. Raises Rejected when it is longer than `most`, Unavailable."""
    try:
        with path.open("rb") as file:
            raw = file.read(most + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if len(raw) > most:
        raise Rejected(f"{path.name} is longer than {most >> 20} MB.")
    return raw
