"""State dicts: where trained weights come from. `.npz` and `.safetensors`, read without their libraries.

Invariant: a network is built of exactly the tensors that its file holds, all of the right shape and finite;
whatever is missing, left over or wrong is named.
"""

from __future__ import annotations

import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeward_wire.errors import Rejected, Unavailable

from .forward import Array
from .graphs import Make, Parameters, Seeded

MAX_BYTES = 2 << 30
MAX_TENSORS = 10_000
_MAX_HEADER = 16 << 20
_NAMED = 5
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_COUNTER = "num_batches_tracked"


class Loaded:
    """Tensors from a file. `get` notes what does not fit; `finish` raises it, all at once."""

    random = False

    def __init__(self, tensors: Mapping[str, Array], origin: str) -> None:
        self._tensors, self._origin = tensors, origin
        self._taken: set[str] = set()
        self._missing: list[str] = []
        self._wrong: list[str] = []

    def get(self, name: str, shape: tuple[int, ...], make: Make) -> Array:
        """The tensor of that name as float32; zeros where it is missing or wrong."""
        self._taken.add(name)
        tensor = self._tensors.get(name)
        if tensor is None:
            self._missing.append(name)
        elif tensor.shape != shape:
            self._wrong.append(f"{name} is {tuple(tensor.shape)}, not {shape}")
        elif not np.isfinite(tensor).all():
            self._wrong.append(f"{name} holds values that are not finite")
        else:
            return np.ascontiguousarray(tensor, dtype=np.float32)
        return np.zeros(shape, np.float32)

    def finish(self) -> None:
        """Raises Rejected, unless all that was asked for was there and nothing else is."""
        spare = sorted(n for n in self._tensors if n not in self._taken and not n.endswith(_COUNTER))
        faults = [
            f"{len(names)} {what}: {', '.join(names[:_NAMED])}{', ...' * (len(names) > _NAMED)}"
            for what, names in (("missing", self._missing), ("wrong", self._wrong), ("unexpected", spare))
            if names
        ]
        if faults:
            raise Rejected(
                f"The weights in {self._origin} are not this network's: {'; '.join(faults)}.",
                "Take the state dict of the model that the recipe names (models/zoo/README.md).",
            )


def parameters(
    name: str,
    weights: Path | None,
    *,
    prefixes: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    renamed: Mapping[str, str] | None = None,
) -> tuple[str, Seeded | Loaded]:
    """The model's name and where its weights come from: seeded noise, or the state dict in `weights`.

    A prefix that all names have is taken off; tensors in `ignore` may be there; the ends of names in
    `renamed` mean what they map to.

    Raises:
        Rejected, Unavailable: as `read`.
    """
    if weights is None:
        return f"{name}-random", Seeded()
    tensors = read(weights)
    for prefix in prefixes:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
    for old, new in (renamed or {}).items():
        tensors = {k.removesuffix(old) + new if k.endswith(old) else k: v for k, v in tensors.items()}
    return name, Loaded({k: v for k, v in tensors.items() if k not in ignore}, weights.name)


def finish(used: Parameters) -> None:
    """Raises Rejected if loaded weights did not fit."""
    if isinstance(used, Loaded):
        used.finish()


def origin(weights: Path | None) -> str:
    """For `about`."""
    if weights is None:
        return "random weights (seed 0): its answers mean nothing"
    return f"weights of {weights.name}"


def read(path: Path) -> dict[str, Array]:
    """Every tensor of a `.npz` or `.safetensors` file.

    Raises:
        Rejected: another kind of file, too large, or damaged. Unavailable: it cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise Rejected(f"{path.name} is {size / 1e9:.1f} GB; at most {MAX_BYTES / 1e9:.1f} GB are read.")
        if path.suffix == ".safetensors":
            return dict(_safetensors(path.read_bytes(), path.name))
        if path.suffix == ".npz":
            return _npz(path)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror}.", "Check the path.") from error
    raise Rejected(
        f"{path.name} is neither .safetensors nor .npz.",
        "Convert a PyTorch checkpoint where PyTorch is:"
        " numpy.savez(OUT, **{k: v.numpy() for k, v in model.state_dict().items()}).",
    )


def _npz(path: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_TENSORS or sum(entry.file_size for entry in entries) > MAX_BYTES:
                raise Rejected(f"{path.name} unpacks to more than {MAX_BYTES / 1e9:.1f} GB of tensors.")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, NotImplementedError) as error:
        raise Rejected(f"{path.name} is not an .npz file of plain arrays: {error}.") from error


def _safetensors(raw: bytes, name: str) -> Iterator[tuple[str, Array]]:
    """Eight bytes of length, a JSON header, then the tensors, little-endian."""
    damaged = Rejected(f"{name} is not a safetensors file, or it is damaged.", "Copy it again.")
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > min(_MAX_HEADER, len(raw) - 8):
        raise damaged
    try:
        header = json.loads(raw[8 : 8 + length])
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise damaged
    body = memoryview(raw)[8 + length :]
    for key, entry in header.items():
        if key != "__metadata__":
            tensor = _tensor(entry, body)
            if tensor is None:
                raise damaged
            yield key, tensor


def _tensor(entry: Any, body: memoryview) -> Array | None:
    """One tensor, or None when its entry makes no sense."""
    try:
        dtype = np.dtype(_DTYPES[entry["dtype"]]).newbyteorder("<")
        shape = tuple(int(side) for side in entry["shape"])
        start, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        return None
    if min(shape, default=0) < 0 or not 0 <= start <= end <= len(body):
        return None
    if end - start != math.prod(shape) * dtype.itemsize:
        return None
    flat = np.frombuffer(body[start:end], dtype)
    if entry["dtype"] == "BF16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return flat.reshape(shape)
