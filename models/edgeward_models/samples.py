"""What a model is calibrated, searched and judged on: pictures, sounds, rows or noise, as its inputs.

    open_samples(contract, Path("pictures")).take("fit", 128)

Invariants: the two splits never share a pixel, a second or a row, however often and in whatever numbers
they are taken, and files with the same bytes count once; the same files, contract and seeds give the
same arrays; every array is the caller's own; pictures and sounds go through the very code that the
device runs. Only the inputs bound to `source` are fed: constants and states are the caller's.

- Fewer than `MANY` pictures: seeded random crops (55 to 100 % of each side, half of them mirrored) of
  one half of each picture, cut across its longer side. `fit` has the left or top halves, `test` the others.
- `MANY` pictures and more: whole ones, alternating; when those run out, crops of the same ones.
- WAV files likewise: windows of the first or second half of each, or of every second file.
- An `.npz` holds one array of shape (N, ...) for each source input; rows alternate, and where the
  model carries state the first half of them is `fit`, in their order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgeward_models.sample_sounds import Sounds, find_sounds
from edgeward_runtime import golden, images
from edgeward_runtime.images import U8
from edgeward_runtime.noise import noise
from edgeward_runtime.ports import shape_of, sources
from edgeward_runtime.preprocess import Preprocess
from edgeward_runtime.sounds import read_wav_bytes
from edgeward_wire.contract import Contract, InputPort
from edgeward_wire.errors import Rejected, Unavailable

Feeds = dict[str, npt.NDArray[Any]]
"""The source inputs of one run, by name."""
Split = Literal["fit", "test"]

MAX_COUNT = 10_000
MAX_TAKE_BYTES = 4 << 30
MANY = 64
_CACHE_BYTES = 512 << 20
_SMALLEST_CROP = 0.55
_SIDES: dict[Split, int] = {"fit": 0, "test": 1}
_SOURCE_STEP = "Name a directory of pictures or WAV files, or an .npz with one array for each input."


class _Source(Protocol):
    def limit(self, split: Split) -> int | None: ...

    def draw(self, split: Split, count: int, seed: int) -> Iterator[Feeds]: ...


@dataclass(frozen=True)
class Samples:
    """Inputs of one contract, in two splits that share nothing."""

    contract: Contract
    origin: str
    """For people: "9 pictures in pictures"."""
    evidence: Literal["strong", "weak"]
    """`weak`: noise, for want of anything better."""
    digest: str
    """sha256 of what was read."""
    _source: _Source = field(repr=False)
    _seed: int = 0

    def limit(self, split: Split) -> int | None:
        """How many samples a split has at most; None: as many as are asked for (crops, noise)."""
        return self._source.limit(split)

    def take(self, split: Split, count: int, seed: int = 0) -> list[Feeds]:
        """`count` samples at once, each with a batch of one.

        Where the model carries state they are consecutive; otherwise `seed` chooses among them.

        Raises:
            Rejected: there are not so many, a file is no good, or they would not fit into memory.
            Unavailable: a file cannot be read any more.
        """
        ports = sources(self.contract)
        size = count * sum(_bytes(self.contract, port) for port in ports)
        if size > MAX_TAKE_BYTES:
            raise Rejected(
                f"{count} samples would take {size / 1e9:.1f} GB of memory; at most"
                f" {MAX_TAKE_BYTES / 1e9:.1f} GB are used.",
                "Ask for fewer.",
            )
        return list(self.stream(split, count, seed))

    def candidates(self, count: int) -> list[Feeds]:
        """At most `count` inputs to choose golden vectors from: pictures whole, as a device sees them, first.

        Then what `take` gives of the test split; where state is carried, that alone and in order. Raises as
        `take` does.
        """
        whole: list[Feeds] = []
        if isinstance(self._source, _Pictures) and not self.contract.stateful:
            whole = list(self._source.whole(count))
        most = self.limit("test")
        more = count - len(whole) if most is None else min(count - len(whole), most)
        return whole + (self.take("test", more) if more > 0 else [])

    def stream(self, split: Split, count: int, seed: int = 0) -> Iterator[Feeds]:
        """The same samples as `take`, one after the other. Raises as `take` does, at once or on the way."""
        if not 1 <= count <= MAX_COUNT:
            raise Rejected(f"{count} samples were asked for; 1 to {MAX_COUNT} can be taken.")
        most = self.limit(split)
        if most is not None and count > most:
            raise Rejected(
                f"{count} samples to {split} with were asked for, but {self.origin} has only {most}"
                " (one half of its rows is for fitting, the other for testing).",
                f"Give at least {2 * count} rows, or ask for fewer.",
            )
        return self._source.draw(split, count, seed + 1_000_003 * self._seed)


def open_samples(contract: Contract, source: Path | None, *, seed: int = 0) -> Samples:
    """Look at what is there; pictures are decoded when they are taken.

    `source`: a directory of pictures or of WAV files, or one such file, or an `.npz`; None: noise.

    Raises:
        Rejected: nothing there suits the contract; says what was expected and what was found.
        Unavailable: it cannot be read.
    """
    if source is None:
        digest = hashlib.sha256(f"noise {seed}".encode()).hexdigest()
        return Samples(contract, f"noise from seed {seed}", "weak", digest, _Noise(contract), seed)
    if not source.exists():
        raise Rejected(f"There are no samples at {source}.", _SOURCE_STEP)
    if source.is_file() and source.suffix.lower() == ".npz":
        rows, digest = _read_rows(contract, source)
        origin = f"{len(next(iter(rows.values())))} rows in {source.name}"
        return Samples(contract, origin, "strong", digest, _Rows(rows, in_order=contract.stateful), seed)
    ports = sources(contract)
    if len(ports) != 1:
        raise Rejected(
            f"The model takes {len(ports)} inputs ({', '.join(port.name for port in ports)}),"
            f" and {source.name} can feed only one.",
            "Give an .npz with one array for each of them.",
        )
    if ports[0].image is not None:
        return _open_pictures(contract, ports[0], source, seed)
    if ports[0].audio is not None:
        return _open_sounds(contract, ports[0], source, seed)
    raise Rejected(
        f"Input {ports[0].name} is neither a picture nor sound, so {source.name} cannot feed it.",
        f"Give an .npz with an array {ports[0].name!r} of shape (N, ...), or declare what the input is.",
    )


def _bytes(contract: Contract, port: InputPort) -> int:
    return int(np.prod(shape_of(contract, port), dtype=np.int64)) * np.dtype(port.dtype).itemsize


# --- pictures


def _open_pictures(contract: Contract, port: InputPort, source: Path, seed: int) -> Samples:
    paths, digest = _unique(golden.find_pictures(source), _read)
    origin = _origin(source, len(paths), "picture")
    return Samples(contract, origin, "strong", digest, _Pictures(port, paths), seed)


def _open_sounds(contract: Contract, port: InputPort, source: Path, seed: int) -> Samples:
    paths, digest = _unique(find_sounds(source), read_wav_bytes)
    origin = _origin(source, len(paths), "sound")
    found = Sounds(contract, port, paths, halved=len(paths) < MANY)
    return Samples(contract, origin, "strong", digest, found, seed)


def _unique(paths: Sequence[Path], read: Callable[[Path], bytes]) -> tuple[list[Path], str]:
    """The files without those that are copies, and the digest of all."""
    seen: dict[str, Path] = {}
    for path in paths:
        seen.setdefault(hashlib.sha256(read(path)).hexdigest(), path)
    return list(seen.values()), hashlib.sha256("".join(seen).encode()).hexdigest()


def _origin(source: Path, count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)} in {source.name}" if source.is_dir() else source.name


def halves(picture: U8) -> tuple[U8, U8]:
    """The picture cut across its longer side: (left, right) or (top, bottom)."""
    height, width = picture.shape[:2]
    if width >= height:
        return picture[:, : width // 2], picture[:, width // 2 :]
    return picture[: height // 2], picture[height // 2 :]


def crop(region: U8, rng: np.random.Generator) -> U8:
    """A random crop of 55 to 100 % of each side, mirrored half of the time."""
    height, width = (max(1, int(side * rng.uniform(_SMALLEST_CROP, 1.0))) for side in region.shape[:2])
    top = int(rng.integers(0, region.shape[0] - height + 1))
    left = int(rng.integers(0, region.shape[1] - width + 1))
    cut = region[top : top + height, left : left + width]
    return np.ascontiguousarray(cut[:, ::-1] if rng.random() < 0.5 else cut)


class _Pictures:
    """Files, decoded when they are needed and kept while they fit."""

    def __init__(self, port: InputPort, paths: Sequence[Path]) -> None:
        self._port, self._paths = port, paths
        self._kept: dict[Path, U8] = {}
        self._room = _CACHE_BYTES

    def limit(self, split: Split) -> int | None:
        return None

    def draw(self, split: Split, count: int, seed: int) -> Iterator[Feeds]:
        preprocess = Preprocess(self._port)
        for picture in self._cut(split, count, np.random.default_rng(seed)):
            yield {self._port.name: preprocess(picture).copy()}

    def whole(self, count: int) -> Iterator[Feeds]:
        """The pictures themselves, spread over all of them."""
        preprocess = Preprocess(self._port)
        for path in golden.spread(self._paths, count):
            yield {self._port.name: preprocess(self._picture(path)).copy()}

    def _cut(self, split: Split, count: int, rng: np.random.Generator) -> Iterator[U8]:
        side = _SIDES[split]
        if len(self._paths) < MANY:
            for k in range(count):
                yield crop(halves(self._picture(self._paths[k % len(self._paths)]))[side], rng)
            return
        mine = self._paths[side::2]
        for k in sorted(rng.permutation(len(mine))[:count]):
            yield self._picture(mine[k])
        for k in range(count - len(mine)):
            yield crop(self._picture(mine[k % len(mine)]), rng)

    def _picture(self, path: Path) -> U8:
        if path in self._kept:
            return self._kept[path]
        picture = images.decode(_read(path), path.name)
        if min(picture.shape[:2]) < 2:
            raise Rejected(
                f"{path.name} is {picture.shape[1]} x {picture.shape[0]}: too small to be cut in two."
            )
        if picture.nbytes <= self._room:
            self._room -= picture.nbytes
            self._kept[path] = picture
        return picture


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(images.MAX_PICTURE_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error


# --- rows


class _Rows:
    """Arrays (N, *shape) by input."""

    def __init__(self, rows: Feeds, *, in_order: bool) -> None:
        self._rows, self._in_order = rows, in_order
        self._count = len(next(iter(rows.values())))

    def _mine(self, split: Split) -> range:
        if self._in_order:
            middle = (self._count + 1) // 2
            return range(middle) if split == "fit" else range(middle, self._count)
        return range(_SIDES[split], self._count, 2)

    def limit(self, split: Split) -> int | None:
        return len(self._mine(split))

    def draw(self, split: Split, count: int, seed: int) -> Iterator[Feeds]:
        mine = self._mine(split)
        chosen = (
            range(count) if self._in_order else np.random.default_rng(seed).permutation(len(mine))[:count]
        )
        for k in chosen:
            yield {name: values[mine[int(k)]].copy() for name, values in self._rows.items()}


def _read_rows(contract: Contract, path: Path) -> tuple[Feeds, str]:
    try:
        with path.open("rb") as file:
            raw = file.read(golden.MAX_UNPACKED_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if len(raw) > golden.MAX_UNPACKED_BYTES:
        raise Rejected(
            f"{path.name} is longer than {golden.MAX_UNPACKED_BYTES >> 20} MB.", "Give fewer rows."
        )
    arrays = golden.read_npz(raw, f"samples {path.name}")
    wanted = sources(contract)
    names = [port.name for port in wanted]
    if set(arrays) != set(names):
        found = ", ".join(sorted(arrays)[:8]) or "none"
        raise Rejected(
            f"{path.name} must hold one array for each input ({', '.join(names)}); it holds: {found}.",
            f"Write it with numpy.savez({path.name!r}, {names[0]}=...).",
        )
    rows = {port.name: rows_of(contract, port, arrays[port.name], path.name) for port in wanted}
    counts = {name: len(values) for name, values in rows.items()}
    if len(set(counts.values())) != 1:
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise Rejected(f"The arrays of {path.name} differ in their number of rows: {told}.")
    if min(counts.values()) < 2:
        raise Rejected(f"{path.name} has too few rows: one to fit and one to test with are the least.")
    return rows, hashlib.sha256(raw).hexdigest()


def rows_of(contract: Contract, port: InputPort, values: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """(N, *shape) of the port's type. Raises Rejected with what was expected and what was found."""
    shape, dtype = shape_of(contract, port), np.dtype(port.dtype)
    inner = shape[1:] if shape and shape[0] == 1 else shape
    if values.ndim == 0 or values.shape[1:] not in (shape, inner):
        raise Rejected(
            f"{where}: array {port.name} has the shape {values.shape}; expected is (N{_tail(inner)}),"
            " one row a sample."
        )
    fits = values.dtype.kind == dtype.kind or (values.dtype.kind in "iu" and dtype.kind in "iu")
    if not fits:
        raise Rejected(
            f"{where}: array {port.name} is {values.dtype}; the input takes {dtype}.",
            "Save what goes into the model, prepared as the device prepares it, not the raw data."
            if dtype.kind == "f"
            else "",
        )
    if dtype.kind == "f" and not np.isfinite(values).all():
        bad = int(np.argwhere(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))[0, 0])
        raise Rejected(f"{where}: array {port.name} is not finite in row {bad}.", "Leave such rows out.")
    if dtype.kind in "iu" and values.size:
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        if int(values.min()) < least or int(values.max()) > most:
            raise Rejected(f"{where}: array {port.name} leaves the range of {dtype}, {least}..{most}.")
    return np.ascontiguousarray(values.reshape(len(values), *shape), dtype)


def _tail(shape: tuple[int, ...]) -> str:
    return "".join(f", {side}" for side in shape) or ","


# --- noise


class _Noise:
    """Smooth coloured pictures, or numbers, from the seed."""

    def __init__(self, contract: Contract) -> None:
        self._contract = contract

    def limit(self, split: Split) -> int | None:
        return None

    def draw(self, split: Split, count: int, seed: int) -> Iterator[Feeds]:
        return noise(self._contract, count, np.random.default_rng([seed % (1 << 32), _SIDES[split]]))
