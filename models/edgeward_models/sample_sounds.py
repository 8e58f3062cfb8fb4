"""WAV files as samples: windows of halves of few files, or of every second one of many.

Invariant: the two splits never share a second. The halves are cut before the windows, so that not even
the context of a window reaches into the other split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeward_runtime import sounds
from edgeward_runtime.ports import shape_of
from edgeward_runtime.sounds import F32
from edgeward_wire.contract import AudioSpec, Contract, InputPort
from edgeward_wire.errors import Rejected

MAX_FILES = 10_000
_CACHE_BYTES = 512 << 20
_QUIETEST = 0.5


def find_sounds(source: Path) -> list[Path]:
    """The WAV files of a directory (or the one file), in order of name. Raises Rejected without any."""
    if source.is_file():
        return [source]
    found = sorted(p for p in source.glob("*") if p.suffix.lower() in sounds.SOUND_SUFFIXES)[:MAX_FILES]
    if not found:
        raise Rejected(f"{source} holds no sounds.", "Put WAV files there.")
    return found


class Sounds:
    """Files as windows of one input, decoded and converted when they are needed."""

    def __init__(self, contract: Contract, port: InputPort, paths: Sequence[Path], *, halved: bool) -> None:
        """`halved`: each file gives one half to each split. Raises Rejected for files that are no sound."""
        assert port.audio is not None
        self._spec: AudioSpec = port.audio
        self._name, self._dtype = port.name, np.dtype(port.dtype)
        self._shape = shape_of(contract, port)
        if int(np.prod(self._shape)) != self._spec.context + self._spec.window:
            raise Rejected(
                f"Input {port.name} has the shape {self._shape}, and a window of"
                f" {self._spec.context + self._spec.window} samples does not fill it."
            )
        self._in_order, self._halved = contract.stateful, halved
        self._paths = paths
        self._kept: dict[Path, F32] = {}
        self._room = _CACHE_BYTES
        self._lengths = [self._length(path) for path in paths]

    def _length(self, path: Path) -> int:
        form = sounds.wav_format(sounds.read_wav_bytes(path), path.name)
        return sounds.resampled_length(form.frames, form.rate, self._spec.rate)

    def _parts(self, split: Literal["fit", "test"]) -> list[tuple[Path, int, int]]:
        """(file, first sample, end) of each part that the split may use."""
        second = split == "test"
        files = list(zip(self._paths, self._lengths, strict=True))
        if not self._halved:
            return [(path, 0, length) for path, length in files[second::2]]
        cut = [(path, length, (length + 1) // 2) for path, length in files]
        parts = [(path, half if second else 0, length if second else half) for path, length, half in cut]
        return [part for part in parts if part[1] < part[2]]

    def _places(self, split: Literal["fit", "test"]) -> list[tuple[tuple[Path, int, int], int]]:
        """(part, beginning within it) of each window, hop after hop; a short part gives one, with silence."""
        spec = self._spec
        return [
            (part, k * spec.hop)
            for part in self._parts(split)
            for k in range(max(1, sounds.window_count(part[2] - part[1], spec)))
        ]

    def limit(self, split: Literal["fit", "test"]) -> int | None:
        """The windows there are, where their order matters; else None: any number can be cut."""
        return len(self._places(split)) if self._in_order else None

    def draw(
        self, split: Literal["fit", "test"], count: int, seed: int
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """In order for a model with state; else some of them, and when they run out, windows from anywhere.

        These begin anywhere in a part, and are up to 6 dB quieter, as from farther away.
        """
        places = self._places(split)
        if self._in_order:
            for part, start in places[:count]:
                yield self._cut(part, start)
            return
        rng = np.random.default_rng(seed)
        for k in sorted(rng.permutation(len(places))[:count]):
            yield self._cut(*places[int(k)])
        parts = self._parts(split)
        for k in range(count - len(places)):
            part = parts[k % len(parts)]
            room = max(0, part[2] - part[1] - self._spec.window)
            yield self._cut(part, int(rng.integers(0, room + 1)), float(rng.uniform(_QUIETEST, 1.0)))

    def _cut(self, part: tuple[Path, int, int], start: int, gain: float = 1.0) -> dict[str, npt.NDArray[Any]]:
        path, first, end = part
        window = sounds.window_at(self._sound(path)[first:end], start, self._spec)
        return {self._name: np.asarray(window * np.float32(gain), self._dtype).reshape(self._shape)}

    def _sound(self, path: Path) -> F32:
        if path in self._kept:
            return self._kept[path]
        sound = sounds.read_wav(path)
        samples = sounds.resample(sound.samples, sound.rate, self._spec.rate)
        if samples.nbytes <= self._room:
            self._room -= samples.nbytes
            self._kept[path] = samples
        return samples
