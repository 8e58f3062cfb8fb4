"""What a file with a model in it is, told from its names and first bytes: nothing in it is run.

Invariant: reading a pickle runs whatever its maker put into it, so `Kind.runs_code` is known before a
framework touches the file.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from edgeward_wire.errors import Rejected, Unavailable

MAX_BYTES = 8 << 30
_MAX_PICKLE_BYTES = 64 << 20
_TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80"
_PICKLES = (".pkl", ".pickle", ".joblib")


@dataclass(frozen=True)
class Kind:
    """What a file is, for people; and whether reading it runs code that is in it."""

    name: str
    title: str
    runs_code: bool


TORCHSCRIPT = Kind("torchscript", "a TorchScript archive", runs_code=False)
PROGRAM = Kind("program", "an exported PyTorch program", runs_code=True)
"""Its example inputs may be a pickle."""
TORCH_PICKLE = Kind("torch", "a PyTorch pickle", runs_code=True)
ULTRALYTICS = Kind("ultralytics", "an Ultralytics checkpoint", runs_code=True)
PICKLE = Kind("pickle", "a Python pickle", runs_code=True)


def kind_of(path: Path) -> Kind:
    """What a file is.

    Raises:
        Rejected: it is nothing that can be exported; says what it is where that is known.
        Unavailable: it cannot be read.
    """
    try:
        if path.is_dir():
            raise Rejected(f"{path} is a directory.", "Name the file with the model.")
        if path.stat().st_size > MAX_BYTES:
            raise Rejected(f"{path.name} is larger than {MAX_BYTES >> 30} GB.")
        with path.open("rb") as stream:
            head = stream.read(64)
        if zipfile.is_zipfile(path) and head.startswith(b"PK"):
            return _archive(path)
    except FileNotFoundError:
        raise Rejected(
            f"There is no file {path}.", "Name a file, or package.module:callable of what builds the model."
        ) from None
    except (OSError, zipfile.BadZipFile) as error:
        raise Unavailable(f"{path} cannot be read: {error}.", "Check the path, or copy it again.") from error
    if head.startswith(_TORCH_LEGACY):
        return TORCH_PICKLE
    if path.suffix in _PICKLES and head:
        return PICKLE
    raise _unknown(path, head)


def _archive(path: Path) -> Kind:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        inner = {name.partition("/")[2] for name in names}
        if any(name.startswith("code/") for name in inner) and "constants.pkl" in inner:
            return TORCHSCRIPT
        if inner & {"models/model.json", "archive_format"} or "serialized_exported_program.json" in names:
            return PROGRAM
        pickled = next((info for info in archive.infolist() if info.filename.endswith("/data.pkl")), None)
        if pickled is None:
            raise Rejected(f"{path.name} is an archive without a PyTorch model in it.", _AGAIN)
        if pickled.file_size <= _MAX_PICKLE_BYTES and b"ultralytics" in archive.read(pickled):
            return ULTRALYTICS
    return TORCH_PICKLE


_AGAIN = "Save the model with torch.jit.save, torch.export.save or joblib.dump, or name a callable."


def _unknown(path: Path, head: bytes) -> Rejected:
    if not head:
        return Rejected(f"{path.name} is empty.", "Copy it again.")
    if path.suffix == ".onnx":
        return Rejected(f"{path.name} is ONNX already.", "Go on with `agent-ctl model inspect`.")
    if path.suffix == ".safetensors":
        return Rejected(f"{path.name} holds weights only.", WEIGHTS_ONLY)
    if head.startswith(b"\x89HDF") or path.suffix in (".keras", ".tflite", ".pb"):
        return Rejected(f"{path.name} is a model of TensorFlow or Keras.", "Convert it with tf2onnx first.")
    return Rejected(f"{path.name} is nothing that can be exported.", _AGAIN)


WEIGHTS_ONLY = "Write a function that builds the module and loads them, and name it: package.module:function."


def refuse_untrusted(path: Path, kind: Kind, trust: bool) -> None:
    """Raises Rejected for a file whose reading runs code, unless it is trusted."""
    if kind.runs_code and not trust:
        raise Rejected(
            f"{path.name} is {kind.title}: reading it runs whatever code its maker put into it.",
            "If you know where it comes from, add --trust; or name package.module:callable of your own code.",
        )
