"""Silero VAD, 16 kHz: how likely each 32 ms of sound is speech. Trained weights, MIT (LICENSES.md).

The file is the PyPI package's `silero_vad_16k_op15.onnx`. Changed by us: one stream instead of a batch of any
size, so that every shape is known: `input` (1, 576) holds 64 samples of context and 512 new ones, `state`
(2, 1, 128) is carried from run to run. The shipped file is used, unless `--weights` names a newer one: the
package's wheel, its directory, or the .onnx in it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import helper

from edgeward_models.progress import Progress, silent
from edgeward_models.zoo import Built
from edgeward_wire.errors import Rejected

from . import sidecars
from .graphs import save

NAME = "silero-vad"
FILE = "silero_vad_16k_op15.onnx"
SHIPPED = Path(__file__).resolve().parent / f"{NAME}.onnx"
RATE, WINDOW, CONTEXT = 16_000, 512, 64
MAX_BYTES = 64 << 20
SHAPES = {
    "input": (1, CONTEXT + WINDOW),
    "state": (2, 1, 128),
    "sr": (),
    "output": (1, 1),
    "stateN": (2, 1, 128),
}
FLOAT = "A tiny recurrent network: INT8 gains 4 % (measured), and its state would carry the errors on."
_HOW = (
    f"Give the package's wheel (pip download --no-deps silero-vad) or the {FILE} in it; without --weights the"
    " shipped file is used."
)


def build(out: Path, *, weights: Path | None = None, progress: Progress = silent) -> Built:
    """Write the model and its sidecar into `out`.

    Raises:
        Rejected: `weights` is not Silero VAD.
    """
    progress("reading the weights", 0, 2)
    raw = SHIPPED.read_bytes() if weights is None else _read(weights)
    progress("fixing its shapes", 1, 2)
    path = out / f"{NAME}.onnx"
    if weights is None:
        path.write_bytes(raw)
    else:
        save(one_stream(raw, weights.name), path)
    table = {
        "task": "vad",
        "float": FLOAT,
        "annotations": {"licence": "MIT", "source": f"silero-vad (PyPI), {FILE}"},
        "inputs": {
            "input": {"rate": RATE, "window": WINDOW, "hop": WINDOW, "context": CONTEXT},
            "state": {"bind": "state:h"},
            "sr": {"const": [RATE]},
        },
        "outputs": {"output": {"activation": "none"}, "stateN": {"bind": "state:h"}},
    }
    progress("built", 2, 2)
    return sidecars.write(path, "Silero VAD for 16 kHz, trained by the Silero Team", table)


def one_stream(raw: bytes, name: str) -> onnx.ModelProto:
    """The model with the shapes of a batch of one. Raises Rejected."""
    try:
        model = onnx.ModelProto.FromString(raw)
    except DecodeError as error:
        raise Rejected(f"{name} is not an ONNX file.", _HOW) from error
    ports: Sequence[onnx.ValueInfoProto] = [*model.graph.input, *model.graph.output]
    if {port.name for port in ports} != set(SHAPES):
        raise Rejected(f"{name} does not have Silero VAD's inputs and outputs: {', '.join(SHAPES)}.", _HOW)
    for port in ports:
        kind = port.type.tensor_type.elem_type
        port.CopyFrom(helper.make_tensor_value_info(port.name, kind, SHAPES[port.name]))
    del model.graph.value_info[:]
    model.doc_string = "Silero VAD (MIT, Copyright (c) 2020-present Silero Team), batch 1"
    return model


def _read(path: Path) -> bytes:
    """The model in a wheel, in a directory, or the file itself."""
    if path.is_dir():
        found = sorted(path.rglob(FILE))
        if not found:
            raise Rejected(f"There is no {FILE} in {path}.", _HOW)
        path = found[0]
    if path.suffix == ".onnx":
        _check_size(path.stat().st_size, path)
        return path.read_bytes()
    try:
        with zipfile.ZipFile(path) as wheel:
            member = wheel.getinfo(f"silero_vad/data/{FILE}")
            _check_size(member.file_size, path)
            return wheel.read(member)
    except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        raise Rejected(f"{path.name} does not hold {FILE}.", _HOW) from error


def _check_size(size: int, path: Path) -> None:
    if size > MAX_BYTES:
        raise Rejected(f"{path.name} is too large to be Silero VAD ({size / 1e6:.0f} MB).", _HOW)
