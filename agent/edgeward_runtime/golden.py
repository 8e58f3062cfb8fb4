"""Golden arrays: what a file gives for known inputs, so that a device can prove that it runs it right.

`.npz` with `in.<k>.<input>` and `out.<k>.<output>` for k = 0, 1, ...: this very file's outputs on the CPU
with all optimisation off. Where the model carries state the vectors are one sequence: `in` holds the source
inputs only, the states begin at zero, and what step k leaves in them is what step k + 1 is given; `out` holds
all outputs, the states among them. A file whose sums could saturate also has `cut.<k>.<output>`: about
what a kernel that adds in 16 bits would give instead (adr/0006). A second kind of file holds `picture.<k>`
(an encoded picture) and `tensor.<k>` (what it must become). Invariants: the same inputs give the same bytes;
what is read is bounded before it is unpacked, and never unpickled.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from edgeward_runtime import images
from edgeward_runtime.noise import noise, noise_picture
from edgeward_runtime.ports import constants, initial_states, next_states, sources
from edgeward_runtime.preprocess import Preprocess, image_input
from edgeward_runtime.sessions import RunFailed, open_exact
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected, Unavailable

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

DEFAULT_COUNT = 8
SEQUENCE_STEPS = 16
MAX_VECTORS = 256
MAX_UNPACKED_BYTES = 512 << 20
_MAX_MEMBERS = 4096
_MAX_HEADER_BYTES = 10_000
_NAME = re.compile(r"^(?:(in|out|cut)\.(\d{1,4})\.(.{1,64})|(picture|tensor)\.(\d{1,4}))$", re.DOTALL)
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
_PREPROCESS_PICTURES = 2
_UNREADABLE = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,  # an encrypted member; NotImplementedError, a strange compression, is one too
)


# --- made on the operator's machine


def make_golden(
    model_path: Path,
    contract: Contract,
    pictures: Sequence[Path] = (),
    count: int = DEFAULT_COUNT,
    seed: int = 0,
    *,
    feeds: Sequence[Arrays] | None = None,
    cuts: Sequence[Arrays] = (),
) -> bytes:
    """The golden vectors of one file as .npz bytes.

    The inputs are `feeds` (the source inputs of each vector), whoever chose them; without any they are up
    to `count` of the pictures, spread over all of them, or else (evidence `weak`) noise from `seed`.
    `cuts` are the outputs, by name, of a kernel that saturates, for each of `feeds`.

    Raises:
        Rejected: a picture or the file is no good, or the inputs do not fit the contract.
    """
    wanted = count if feeds is None else len(feeds)
    if not 1 <= wanted <= MAX_VECTORS:
        raise Rejected(f"{wanted} golden vectors were asked for; 1 to {MAX_VECTORS} can be made.")
    if feeds is None:
        steps = max(count, SEQUENCE_STEPS) if contract.stateful else count
        feeds = _inputs(contract, pictures, steps, seed)
    arrays: Arrays = {}
    for k, (given, outputs) in enumerate(
        zip(feeds, _exact_outputs(model_path, contract, feeds), strict=True)
    ):
        arrays.update({f"in.{k}.{name}": value for name, value in given.items()})
        arrays.update({f"out.{k}.{name}": value for name, value in outputs.items()})
    for k, cut in enumerate(cuts):
        arrays.update({f"cut.{k}.{name}": value for name, value in cut.items()})
    return write_npz(arrays)


def _exact_outputs(model_path: Path, contract: Contract, feeds: Sequence[Arrays]) -> Iterator[Arrays]:
    """All outputs by name for each of the inputs, states carried on."""
    session = open_exact(model_path)
    fixed, states = constants(contract), initial_states(contract)
    for k, given in enumerate(feeds):
        try:
            values = session.run({**fixed, **states, **given})
        except RunFailed as error:
            raise Rejected(
                f"{model_path.name} does not run on golden input {k}: {error.what}",
                "Check the shapes that are declared.",
            ) from error
        outputs = dict(zip((port.name for port in session.outputs), values, strict=True))
        for name, value in outputs.items():
            if not np.isfinite(value).all():
                raise Rejected(
                    f"Output {name} is not finite for golden input {k}.",
                    "Check the preprocessing and the file.",
                )
        yield outputs
        states = next_states(contract, outputs)
    session.close()


def make_preprocess_golden(contract: Contract, pictures: Sequence[Path] = (), seed: int = 0) -> bytes:
    """Pictures and the tensors that they must become, as .npz bytes: a few of `pictures`, or a made one."""
    preprocess = Preprocess(image_input(contract))
    raws = [_read_picture(path) for path in spread(pictures, _PREPROCESS_PICTURES)]
    if not raws:
        raws = [images.encode_png(noise_picture(np.random.default_rng(seed), 320, 240))]
    arrays: Arrays = {}
    for k, raw in enumerate(raws):
        arrays[f"picture.{k}"] = np.frombuffer(raw, np.uint8)
        arrays[f"tensor.{k}"] = preprocess(images.decode(raw)).copy()
    return write_npz(arrays)


def find_pictures(directory: Path, limit: int = 10_000) -> list[Path]:
    """The pictures of a directory (or the one file), in order of name. Raises Rejected when there is none."""
    if directory.is_file():
        return [directory]
    found = sorted(p for p in directory.glob("*") if p.suffix.lower() in images.PICTURE_SUFFIXES)[:limit]
    if not found:
        raise Rejected(
            f"{directory} holds no pictures.",
            f"Put {', '.join(sorted(images.PICTURE_SUFFIXES))} files there.",
        )
    return found


def write_npz(arrays: Mapping[str, Array]) -> bytes:
    """Arrays as .npz: sorted, with fixed times, so that the same arrays give the same bytes."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in sorted(arrays):
            member = zipfile.ZipInfo(f"{name}.npy", date_time=_ZIP_EPOCH)
            member.compress_type = zipfile.ZIP_DEFLATED
            member.create_system = 3
            raw = io.BytesIO()
            npy.write_array(raw, np.ascontiguousarray(arrays[name]), version=(1, 0), allow_pickle=False)
            archive.writestr(member, raw.getvalue(), compresslevel=6)
    return packed.getvalue()


def _inputs(contract: Contract, pictures: Sequence[Path], count: int, seed: int) -> list[Arrays]:
    if not pictures:
        return list(noise(contract, count, np.random.default_rng(seed)))
    if all(port.image is None for port in sources(contract)):
        raise Rejected("Sample pictures were given, but no input of the model is a picture.")
    port = image_input(contract)
    preprocess = Preprocess(port)
    frames = (images.decode(_read_picture(path), path.name) for path in spread(pictures, count))
    return [{port.name: preprocess(frame).copy()} for frame in frames]


def spread(pictures: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of them, evenly."""
    if len(pictures) <= count:
        return list(pictures)
    return [pictures[k * len(pictures) // count] for k in range(count)]


def _read_picture(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(images.MAX_PICTURE_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error


# --- read on the device


def read_npz(
    source: Path | bytes, name: str = "golden vectors", *, wanted: Callable[[str], bool] = lambda _: True
) -> Arrays:
    """The arrays of an .npz whose names are `wanted`, none of them pickled.

    Raises:
        Rejected: it is not such a file, or unpacks to more than `MAX_UNPACKED_BYTES`.
        Unavailable: it cannot be read.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(source) if isinstance(source, bytes) else source) as archive:
            members = archive.infolist()
            if len(members) > _MAX_MEMBERS or sum(m.file_size for m in members) > MAX_UNPACKED_BYTES:
                raise Rejected(f"The {name} unpack to more than {MAX_UNPACKED_BYTES >> 20} MB.")
            named = [(member.filename.removesuffix(".npy"), member) for member in members]
            return {key: _read_member(archive, member) for key, member in named if wanted(key)}
    except FileNotFoundError as error:
        raise Unavailable(f"The {name} are not there: {error.filename}.") from error
    except OSError as error:
        raise Unavailable(f"The {name} cannot be read: {error.strerror or error}.") from error
    except _UNREADABLE as error:
        raise Rejected(f"The {name} are not a readable .npz: {' '.join(str(error).split())[:120]}.") from None


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Array:
    with archive.open(member) as file:
        # zipfile stops at the declared size, so the bound above holds for what is read here.
        raw = io.BytesIO(file.read(member.file_size))
    if npy.read_magic(raw) != (1, 0):
        raise ValueError("an array has another version than 1.0")
    shape, fortran, dtype = npy.read_array_header_1_0(raw, max_header_size=_MAX_HEADER_BYTES)
    # numpy's own reader allocates what the header claims before it looks whether that is there.
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(raw.getbuffer()) - raw.tell():
        raise ValueError("an array's header does not fit its data")
    return np.frombuffer(raw.getbuffer()[raw.tell() :], dtype).reshape(shape, order="F" if fortran else "C")


def first_vector(source: Path | bytes) -> tuple[Arrays, Arrays]:
    """The inputs and outputs of vector 0, without unpacking the others. Raises as `read_npz`, `vectors`."""
    (first,) = vectors(read_npz(source, wanted=lambda key: key.startswith(("in.0.", "out.0."))))
    return first


def vectors(arrays: Arrays) -> list[tuple[Arrays, Arrays]]:
    """Golden arrays as (inputs, outputs) for each k. Raises Rejected when they do not follow the format."""
    found: dict[int, tuple[Arrays, Arrays]] = {}
    for name, value in arrays.items():
        match = _NAME.match(name)
        if match is None or match.group(1) is None:
            raise Rejected(f"The golden vectors hold {name[:80]!r}, which is not in the format.")
        if match.group(1) != "cut":
            side = 0 if match.group(1) == "in" else 1
            found.setdefault(int(match.group(2)), ({}, {}))[side][match.group(3)] = value
    pairs = [found[k] for k in sorted(found)]
    if not pairs or not all(inputs and outputs for inputs, outputs in pairs):
        raise Rejected("The golden vectors are empty, or lack inputs or outputs.")
    return pairs


def cuts(arrays: Arrays) -> list[Arrays]:
    """The outputs of a saturating kernel by name for each of `vectors`; empty where it would give the same.

    Raises Rejected when one has no exact output of its shape beside it, or is not finite.
    """
    names = [match for match in map(_NAME.match, arrays) if match is not None and match.group(1)]
    found: dict[int, Arrays] = {int(match.group(2)): {} for match in names}
    for match in names:
        if match.group(1) == "cut":
            cut, exact = arrays[match.group(0)], arrays.get(f"out.{match.group(2)}.{match.group(3)}")
            if exact is None or exact.shape != cut.shape or not np.isfinite(cut).all():
                raise Rejected(f"The golden vectors' {match.group(0)[:80]} is not one of their outputs.")
            found[int(match.group(2))][match.group(3)] = cut
    return [found[k] for k in sorted(found)]


def picture_pairs(arrays: Arrays) -> list[tuple[bytes, Array]]:
    """Preprocessing arrays as (encoded picture, tensor) for each k. Raises Rejected."""
    numbers = sorted({int(m.group(5)) for m in map(_NAME.match, arrays) if m is not None and m.group(5)})
    try:
        pairs = [(arrays[f"picture.{k}"].tobytes(), arrays[f"tensor.{k}"]) for k in numbers]
    except KeyError as error:
        raise Rejected(f"The preprocessing vectors lack {error.args[0]}.") from None
    if not pairs:
        raise Rejected("The preprocessing vectors are empty.")
    return pairs
