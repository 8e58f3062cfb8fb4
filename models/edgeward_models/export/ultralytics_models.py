"""Ultralytics checkpoints become ONNX files, where that package is installed. Its only importer.

It is licensed under the AGPL-3.0 and no dependency of ours: whoever has it uses it here under its terms. The
network goes through our own exporter and verification, with the head in the form that it has for export:
boxes and class scores in one output, without non-maximum suppression.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeward_models.export.archives import ULTRALYTICS, refuse_untrusted
from edgeward_models.export.faults import code_fault
from edgeward_models.export.inputs import InputSpec
from edgeward_models.export.report import ExportOptions, ExportReport
from edgeward_models.progress import Progress, silent
from edgeward_wire.contract import Task
from edgeward_wire.errors import Rejected

INPUT, OUTPUT = "images", "output0"
_TASKS: dict[str, Task] = {"detect": "detection", "classify": "classification", "segment": "segmentation"}
_SIZES: dict[str, int] = {"classify": 224}
_USUAL_SIZE = 640
_HEADS = ("Detect", "Classify", "RTDETRDecoder")


def export_ultralytics(
    checkpoint: Path,
    out: Path,
    options: ExportOptions | None = None,
    *,
    trust: bool = False,
    progress: Progress = silent,
) -> ExportReport:
    """Export a `.pt` checkpoint, or a model's `.yaml` with random weights, verified.

    Raises:
        Rejected: the package is not installed, the checkpoint is not trusted, or cannot be exported.
        Unavailable: a file cannot be read or written.
    """
    if checkpoint.suffix == ".pt":
        refuse_untrusted(checkpoint, ULTRALYTICS, trust)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")  # the package warns of what else could be installed
            import ultralytics
    except ModuleNotFoundError as error:
        raise Rejected(
            f"{checkpoint.name} is an Ultralytics checkpoint, and {error.name} is not installed."
            " Ultralytics is under the AGPL-3.0, which is why it does not come with us.",
            f"Where it is installed, run `yolo export model={checkpoint.name} format=onnx`: that file can be"
            " deployed.",
        ) from error
    except Exception as error:  # its own imports break on a torchvision that does not fit
        raise Rejected(
            code_fault("The package ultralytics cannot be imported", error),
            "Repair its installation: torch and torchvision must be of one release.",
        ) from error
    progress(f"loading {checkpoint.name}", 0, 1)
    network, task, names = _network(ultralytics, checkpoint)
    from edgeward_models.export.torch_models import export_torch

    options = options or ExportOptions()
    example = None if options.inputs else _example(task)
    options = _completed(options, task, names)
    return export_torch(network, example, out, options, source=checkpoint.name, progress=progress)


def _network(ultralytics: Any, checkpoint: Path) -> tuple[Any, str, tuple[str, ...]]:
    """(the module with its head made for export, its task, the classes' names)."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")  # as above
            model = ultralytics.YOLO(str(checkpoint))
            network = model.model.float().eval()
            for parameter in network.parameters():
                parameter.requires_grad = False
            network = network.fuse(verbose=False)
    except Exception as error:  # the package raises what it likes
        raise Rejected(
            code_fault(f"Ultralytics cannot load {checkpoint.name}", error), "Is it a whole checkpoint?"
        ) from error
    for part in network.modules():
        if {kind.__name__ for kind in type(part).__mro__} & set(_HEADS):
            part.export, part.format, part.dynamic = True, "onnx", False
    names = model.names
    listed = [names[key] for key in sorted(names)] if isinstance(names, dict) else list(names or ())
    return network, str(model.task), tuple(str(name) for name in listed)


def _completed(options: ExportOptions, task: str, names: tuple[str, ...]) -> ExportOptions:
    """With what the checkpoint says, where the caller says nothing."""
    spec: dict[str, Any] = {"colour": "rgb", "resize": "letterbox", "pad": 114, "scale": [1 / 255] * 3}
    declared: dict[str, Any] = {"inputs": {INPUT: spec}}
    if task == "classify":
        size = options.inputs[0].sized(1)[-1] if options.inputs else _SIZES[task]
        declared["inputs"][INPUT] |= {"resize": "shorter_side", "resize_to": size, "crop": "center"}
        declared["inputs"][INPUT].pop("pad")
        declared["outputs"] = {OUTPUT: {"activation": "none"}}  # its head ends in a softmax
    renamed = options.inputs and options.inputs[0].name != INPUT
    if renamed or options.output_names:
        declared = {}
    known = _TASKS.get(task, "tensor")
    return replace(
        options,
        inputs=options.inputs or ((InputSpec(INPUT, (1, 3, *([_SIZES.get(task, _USUAL_SIZE)] * 2))),)),
        output_names=options.output_names or ((OUTPUT,) if task in ("detect", "classify") else ()),
        task=options.task or known,
        labels=options.labels or names or None,
        declared={**declared, **options.declared},
    )


def _example(task: str) -> Any:
    """Colours in 0..1, as the network meets them."""
    size = _SIZES.get(task, _USUAL_SIZE)
    return np.random.default_rng(0).random((1, 3, size, size), np.float32)
