"""What goes into a model while it is exported: shapes that people write, noise, and rows of an `.npz`.

Invariants: the same seed gives the same arrays; nothing that is written makes an array beyond
`MAX_ELEMENTS`; `N` stands for the batch wherever it is in a shape.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeward_wire.errors import Rejected, Unavailable

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

DTYPES = ("float32", "float16", "uint8", "int8", "int32", "int64", "bool")
"""What a device can feed."""
MAX_ELEMENTS = 1 << 26
MAX_RANK = 8
MAX_NAME = 64
MAX_SAMPLES_BYTES = 1 << 30
BATCH = "N"
_SYNTAX = "Write NAME=1x3x224x224:float32, with N where the batch is to stay open, or NAME=scalar:int64."
_SCALAR = "scalar"
_MAX_DIMENSION = 1 << 24
_FEW = 2  # whole numbers without an example to tell their range


@dataclass(frozen=True)
class InputSpec:
    """One input of the graph; None in `shape` is the batch, which the file leaves open."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str = "float32"

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape with a batch of that length."""
        return tuple(batch if d is None else d for d in self.shape)

    def opened(self) -> InputSpec:
        """With its first dimension open, if none is and it has one."""
        if None in self.shape or not self.shape:
            return self
        return InputSpec(self.name, (None, *self.shape[1:]), self.dtype)

    @property
    def open_axis(self) -> int | None:
        """Where the batch is."""
        return self.shape.index(None) if None in self.shape else None

    def __str__(self) -> str:
        shape = "x".join(BATCH if d is None else str(d) for d in self.shape) or _SCALAR
        return f"{self.name}={shape}:{self.dtype}"


def parse_input(text: str) -> InputSpec:
    """`image=1x3x224x224:float32`; without `:dtype` it is float32. Raises Rejected."""
    name, equals, rest = text.partition("=")
    shape_text, colon, dtype = rest.partition(":")
    if not (name and equals and shape_text) or len(name) > MAX_NAME or (colon and not dtype):
        raise Rejected(f"{text[:100]!r} does not say what an input is.", _SYNTAX)
    dtype = dtype or "float32"
    if dtype not in DTYPES:
        raise Rejected(f"Input {name} has the type {dtype[:32]!r}.", f"Devices feed: {', '.join(DTYPES)}.")
    words = [] if shape_text == _SCALAR else shape_text.split("x")
    if not all(word == BATCH or re.fullmatch(r"[1-9][0-9]{0,8}", word) for word in words):
        raise Rejected(f"{shape_text[:100]!r} is not a shape of input {name}.", _SYNTAX)
    shape = tuple(None if word == BATCH else int(word) for word in words)
    return checked(InputSpec(name, shape, dtype))


def checked(spec: InputSpec) -> InputSpec:
    """Itself, within bounds. Raises Rejected."""
    if len(spec.shape) > MAX_RANK:
        raise Rejected(
            f"Input {spec.name} has {len(spec.shape)} dimensions; at most {MAX_RANK} are possible."
        )
    if spec.shape.count(None) > 1:
        raise Rejected(f"Input {spec.name} has the batch twice.", "N may stand once in a shape.")
    if spec.dtype not in DTYPES:
        raise Rejected(
            f"Input {spec.name} is {spec.dtype}, which no device can feed.",
            f"Give the model one of {', '.join(DTYPES)}, e.g. with .float().",
        )
    if math.prod(spec.sized(1)) > MAX_ELEMENTS or max(spec.sized(1), default=1) > _MAX_DIMENSION:
        raise Rejected(f"Input {spec} is too large: at most {MAX_ELEMENTS} numbers are possible.")
    return spec


def like(name: str, example: Array) -> InputSpec:
    """What an example says of its input. Raises Rejected."""
    return checked(InputSpec(name, tuple(example.shape), str(example.dtype)))


def noise(spec: InputSpec, batch: int, rng: np.random.Generator, example: Array | None = None) -> Array:
    """Seeded values of that shape; spread as the example is, where it is not constant.

    Floats are normal, whole numbers lie within the example's range (0 and 1 without one).
    """
    shape = spec.sized(batch)
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "b":
        return np.asarray(rng.random(shape) < 0.5)
    if dtype.kind in "iu":
        low, high = (0, _FEW) if example is None else (int(example.min()), int(example.max()) + 1)
        return np.asarray(rng.integers(low, high, shape), dtype)
    mean, spread = 0.0, 1.0
    if example is not None and example.size > 1 and float(np.std(example, dtype=np.float64)) > 0:
        mean, spread = float(np.mean(example, dtype=np.float64)), float(np.std(example, dtype=np.float64))
    return np.asarray(rng.normal(mean, spread, shape), dtype)


def one_of(spec: InputSpec, example: Array) -> Array:
    """An example cut to a batch of one, where its batch is open."""
    axis = spec.open_axis
    return example if axis is None else np.take(example, [0], axis=axis)


def join(spec: InputSpec, rows: Sequence[Array]) -> Array:
    """Batches of one as one batch; an input without a batch takes the first."""
    return rows[0] if spec.open_axis is None else np.concatenate(rows, axis=spec.open_axis)


def read_samples(path: Path, specs: Sequence[InputSpec], most: int) -> list[Feeds]:
    """The first `most` rows of an `.npz` with one array for each input, as feeds with a batch of one.

    An array is (rows, *shape without the batch), or (rows, *shape).

    Raises:
        Rejected: it is no such file, an array is missing, or has another shape or type.
        Unavailable: it cannot be read.
    """
    wanted = {spec.name: spec for spec in specs}
    arrays = _load(path)
    missing = sorted(wanted.keys() - arrays.keys())
    if missing:
        raise Rejected(
            f"{path.name} has no array for input {missing[0]}; it has {', '.join(sorted(arrays)) or 'none'}.",
            f"Save it with numpy.savez(path, {missing[0]}=rows).",
        )
    columns = {name: _rows(path, spec, arrays[name], most) for name, spec in wanted.items()}
    count = min(len(rows) for rows in columns.values())
    return [{name: rows[k] for name, rows in columns.items()} for k in range(count)]


def _load(path: Path) -> Mapping[str, Array]:
    try:
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                raise Rejected(f"{path.name} is one array.", "Save it with numpy.savez(path, NAME=rows).")
            parts = loaded.zip.infolist() if loaded.zip is not None else []
            if sum([part.file_size for part in parts]) > MAX_SAMPLES_BYTES:
                raise Rejected(
                    f"{path.name} holds more than {MAX_SAMPLES_BYTES >> 20} MB.", "Give fewer rows."
                )
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise Rejected(f"There is no file {path}.", "Check the path.") from None
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise Rejected(
            f"{path.name} is not an .npz of plain numbers.", "Save it with numpy.savez(path, NAME=rows)."
        ) from error


def _rows(path: Path, spec: InputSpec, array: Array, most: int) -> list[Array]:
    one = spec.sized(1)
    where = f"{path.name}: array {spec.name}"
    if np.dtype(spec.dtype).kind != array.dtype.kind:
        raise Rejected(f"{where} is {array.dtype}, but the input is {spec.dtype}.")
    if array.ndim >= 1 and array.shape[1:] == one:
        shaped = array[:most]
    elif one and one[0] == 1 and array.shape[1:] == one[1:]:
        shaped = array[:most, None]
    else:
        raise Rejected(
            f"{where} has the shape {array.shape}, but the input is {one}.",
            f"Its shape must be {('rows', *one[1:]) if one and one[0] == 1 else ('rows', *one)}.".replace(
                "'", ""
            ),
        )
    if not len(shaped):
        raise Rejected(f"{where} has no rows.")
    if array.dtype.kind == "f" and not np.isfinite(shaped).all():
        raise Rejected(f"{where} holds values that are not finite.", "Remove those rows.")
    return [np.ascontiguousarray(row, dtype=spec.dtype) for row in shaped]
