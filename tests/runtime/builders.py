"""Small real models, pictures and videos for tests: a classifier that tells the colour of a picture.

The answer is right by construction: a picture that is mostly red is `red`, in the float file and in
the INT8 file alike. Nothing here is random, so the same arguments give the same bytes.
"""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (30, 40, 220),
}
"""Label -> RGB, in the order of the classes."""

_HIDDEN = 8


def label_names(classes: int = 3) -> list[str]:
    """red, green, blue, then class-3, class-4, ... which no picture wins."""
    return [*COLOURS][:classes] + [f"class-{k}" for k in range(3, classes)]


def _weights(classes: int, salt: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Convolution (8, 3, 3, 3) that averages each colour, and the dense layer on its means."""
    conv = np.zeros((_HIDDEN, 3, 3, 3), np.float32)
    for k in range(_HIDDEN):
        conv[k, k % 3] = 1 / 9
    conv[3:] *= 0.5
    dense = np.full((classes, _HIDDEN), -1.5, np.float32)
    for c in range(min(classes, 3)):
        dense[c, [k for k in range(_HIDDEN) if k % 3 == c]] = 4.0
    dense[:, 3:] *= 0.5
    bias = np.full(classes, -8.0, np.float32)
    bias[:3] = 0.0
    bias += np.float32(salt * 1e-3)
    return conv, np.zeros(_HIDDEN, np.float32), dense, bias


def _save(
    path: Path, nodes: list, constants: dict[str, np.ndarray], io: tuple, metadata: dict | None
) -> Path:
    inputs, outputs, opset = io
    graph = helper.make_graph(
        nodes,
        "colours",
        inputs,
        outputs,
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 8
    for key, value in sorted((metadata or {}).items()):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def _io(classes: int, size: int, batch: str | int, opset: int) -> tuple:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, size, size])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])
    return [image], [logits], opset


def classifier(
    path: Path,
    classes: int = 3,
    *,
    size: int = 32,
    salt: int = 0,
    softmax: bool = False,
    batch: str | int = "batch",
    metadata: dict[str, str] | None = None,
    opset: int = 17,
) -> Path:
    """An FP32 classifier: image (batch, 3, size, size), RGB in 0..1 -> logits (batch, classes).

    Another `salt` gives other bytes and the same answers. `softmax` ends it in probabilities.
    """
    conv, conv_bias, dense, dense_bias = _weights(classes, salt)
    last = "raw" if softmax else "logits"
    nodes = [
        helper.make_node("Conv", ["image", "conv", "conv_bias"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalAveragePool", ["r"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "dense", "dense_bias"], [last], transB=1),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", [last], ["logits"], axis=1))
    constants = {"conv": conv, "conv_bias": conv_bias, "dense": dense, "dense_bias": dense_bias}
    return _save(path, nodes, constants, _io(classes, size, batch, opset), metadata)


def int8_classifier(
    path: Path,
    classes: int = 3,
    *,
    size: int = 32,
    salt: int = 0,
    batch: str | int = "batch",
    metadata: dict[str, str] | None = None,
) -> Path:
    """The same as an INT8 file: QDQ, U8 activations, S8 weights per channel; all MACs are quantised.

    The weights have 7 bits, so that the sums of a processor without VNNI do not saturate: the tests
    expect the same on every machine.
    """
    conv, _, dense, dense_bias = _weights(classes, salt)
    constants: dict[str, np.ndarray] = {
        "zp": np.uint8(0),
        "zp_out": np.uint8(128),
        "s_in": np.float32(1 / 255),
    }
    nodes: list = []

    def requantise(source: str, name: str, scale: float, zero: str = "zp") -> str:
        constants[f"{name}_s"] = np.float32(scale)
        nodes.append(helper.make_node("QuantizeLinear", [source, f"{name}_s", zero], [f"{name}_q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", f"{name}_s", zero], [f"{name}_d"]))
        return f"{name}_d"

    def weight(name: str, value: np.ndarray, bias: np.ndarray, input_scale: float) -> tuple[str, str]:
        scale = (np.abs(value).reshape(len(value), -1).max(axis=1) / 63).astype(np.float32)
        shaped = scale.reshape(-1, *[1] * (value.ndim - 1))
        constants[f"{name}_w"] = np.round(value / shaped).astype(np.int8)
        constants[f"{name}_ws"], constants[f"{name}_wz"] = scale, np.zeros(len(value), np.int8)
        constants[f"{name}_bs"] = scale * np.float32(input_scale)
        constants[f"{name}_b"] = np.round(bias / constants[f"{name}_bs"]).astype(np.int32)
        constants[f"{name}_bz"] = np.zeros(len(value), np.int32)
        for part in ("w", "b"):
            inputs = [f"{name}_{part}", f"{name}_{part}s", f"{name}_{part}z"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}_{part}d"], axis=0))
        return f"{name}_wd", f"{name}_bd"

    x = requantise("image", "x", 1 / 255)
    w, b = weight("conv", conv, np.zeros(_HIDDEN, np.float32), 1 / 255)
    nodes.append(helper.make_node("Conv", [x, w, b], ["c"], pads=[1, 1, 1, 1]))
    c = requantise("c", "cq", 1 / 255)
    nodes.append(helper.make_node("GlobalAveragePool", [c], ["p"]))
    p = requantise("p", "pq", 1 / 255)
    nodes.append(helper.make_node("Flatten", [p], ["f"]))
    w, b = weight("dense", dense, dense_bias, 1 / 255)
    nodes.append(helper.make_node("Gemm", ["f", w, b], ["g"], transB=1))
    g = requantise("g", "gq", 0.12, "zp_out")
    nodes.append(helper.make_node("Identity", [g], ["logits"]))
    constants.pop("s_in")
    return _save(path, nodes, constants, _io(classes, size, batch, 17), metadata)


CELL = 16


def detector(path: Path, *, size: int = 64, rows_first: bool = False) -> Path:
    """An FP32 detector as YOLOv8 writes it: image (1, 3, size, size), RGB in 0..1 -> (1, 4 + 3, anchors).

    Each cell of 16 x 16 pixels is an anchor with a box of its own size, in the order of reading; its scores
    say how red, green and blue it is. Gray scores below 0.01. `rows_first` writes (1, anchors, 4 + 3).
    """
    across = size // CELL
    centres = (np.arange(across, dtype=np.float32) + 0.5) * CELL
    cx, cy = np.meshgrid(centres, centres)
    boxes = np.stack([cx, cy, np.full_like(cx, CELL), np.full_like(cy, CELL)]).reshape(1, 4, -1)
    weight = np.full((3, 3, 1, 1), -12.0, np.float32)
    for k in range(3):
        weight[k, k] = 24.0
    constants = {
        "weight": weight,
        "bias": np.full(3, -5.0, np.float32),
        "boxes": boxes.astype(np.float32),
        "shape": np.array([1, 3, across * across], np.int64),
    }
    nodes = [
        helper.make_node(
            "AveragePool", ["image"], ["cells"], kernel_shape=[CELL, CELL], strides=[CELL, CELL]
        ),
        helper.make_node("Conv", ["cells", "weight", "bias"], ["raw"]),
        helper.make_node("Sigmoid", ["raw"], ["scored"]),
        helper.make_node("Reshape", ["scored", "shape"], ["scores"]),
        helper.make_node("Concat", ["boxes", "scores"], ["columns" if rows_first else "output0"], axis=1),
    ]
    if rows_first:
        nodes.append(helper.make_node("Transpose", ["columns"], ["output0"], perm=[0, 2, 1]))
    shape = [1, across * across, 7] if rows_first else [1, 7, across * across]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, size, size])
    output = helper.make_tensor_value_info("output0", TensorProto.FLOAT, shape)
    return _save(path, nodes, constants, ([image], [output], 17), None)


def detector_sidecar(path: Path, **more: str) -> Path:
    """What a detector's sidecar says; `more` are lines at its top."""
    lines = {"task": '"detection"', "labels": '"labels.txt"', "float": '"a tiny one, for tests"', **more}
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    return path


def segmenter(path: Path, *, size: int = 32, stride: int = 4) -> Path:
    """image (1, 3, size, size) -> scores (1, 4, size / stride, ...): red, green, blue, and dark otherwise."""
    weight = np.full((4, 3, 1, 1), -1.0, np.float32)
    for k in range(3):
        weight[k, k] = 2.0
    weight[3] = 0
    constants = {"weight": weight, "bias": np.array([0, 0, 0, 0.3], np.float32)}
    nodes = [
        helper.make_node(
            "AveragePool", ["image"], ["cells"], kernel_shape=[stride] * 2, strides=[stride] * 2
        ),
        helper.make_node("Conv", ["cells", "weight", "bias"], ["scores"]),
    ]
    side = size // stride
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, size, size])
    output = helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 4, side, side])
    return _save(path, nodes, constants, ([image], [output], 17), None)


def listener(path: Path, *, window: int = 160) -> Path:
    """sound (1, window), count (1, 1) -> how loud it is (1, 1), 4 x the mean of |x|, and count + 1."""
    constants = {"four": np.float32(4), "one": np.float32(1)}
    nodes = [
        helper.make_node("Abs", ["sound"], ["size"]),
        helper.make_node("ReduceMean", ["size"], ["mean"], axes=[1]),
        helper.make_node("Mul", ["mean", "four"], ["score"]),
        helper.make_node("Add", ["count", "one"], ["countn"]),
    ]

    def port(name: str, length: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, length])

    inputs, outputs = [port("sound", window), port("count", 1)], [port("score", 1), port("countn", 1)]
    return _save(path, nodes, constants, (inputs, outputs, 17), None)


def listener_sidecar(path: Path, *, rate: int = 16_000, hop: int = 160, task: str = "vad") -> Path:
    """What the listener's sidecar says."""
    path.write_text(
        f'task = "{task}"\nfloat = "a tiny one, for tests"\n[inputs.sound]\nrate = {rate}\nhop = {hop}\n'
    )
    return path


_VOWELS = ((730, 1090, 2440), (270, 2290, 3010), (570, 840, 2410), (530, 1840, 2480), (300, 870, 2240))


def spoken(seconds: float = 2.0, rate: int = 16_000, pitch: float = 120.0) -> np.ndarray:
    """Something like a voice, (n,) in -0.6..0.6: harmonics under the formants of five vowels, in syllables.

    Silero VAD takes it for speech, and tones or noise it does not.
    """
    t = np.arange(int(seconds * rate)) / rate
    tune = pitch * (1 + 0.06 * np.sin(2 * np.pi * 2.3 * t) + 0.08 * np.sin(2 * np.pi * 0.6 * t))
    phase = 2 * np.pi * np.cumsum(tune) / rate
    marks = np.arange(int(seconds / 0.18) + 2) * 0.18
    formants = [np.interp(t, marks, [_VOWELS[k % 5][r] for k in range(len(marks))]) for r in range(3)]
    voice = np.zeros(len(t))
    for harmonic in range(1, 30):
        at = harmonic * tune
        shape = zip(formants, (90, 110, 150), (1, 0.5, 0.25), strict=True)
        loud = sum(share / (1 + ((at - centre) / width) ** 2) for centre, width, share in shape)
        voice += loud * np.sin(harmonic * phase) * (at < min(7000, rate / 2)) / np.sqrt(harmonic)
    voice *= np.clip(1.3 * np.sin(2 * np.pi * 2.2 * t) ** 2, 0.05, 1)
    return (voice / np.abs(voice).max() * 0.6).astype(np.float32)


def wav_file(path: Path, samples: np.ndarray, rate: int = 16_000) -> Path:
    """(n,) or (n, channels) in -1..1 as a WAV file of 16 bits."""
    whole = np.round(np.clip(samples, -1, 1) * 32767).astype("<i2")
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1 if whole.ndim == 1 else whole.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(whole.tobytes())
    return path


def labels_file(path: Path, classes: int = 3) -> Path:
    """The labels, one a line."""
    path.write_text("\n".join(label_names(classes)) + "\n")
    return path


def sidecar_file(
    path: Path, labels: str = "labels.txt", *, size: int = 32, samples: str | None = None
) -> Path:
    """The sidecar TOML that declares what the two classifiers take."""
    text = f'task = "classification"\nlabels = "{labels}"\n'
    if samples is not None:
        text += f'samples = "{samples}"\n'
    text += (
        f'\n[inputs.image]\ncolour = "rgb"\nwidth = {size}\nheight = {size}\nresize = "stretch"\n'
        "scale = [0.00392156862745098, 0.00392156862745098, 0.00392156862745098]\nbias = [0.0, 0.0, 0.0]\n"
        '\n[outputs.logits]\nactivation = "softmax"\n'
    )
    path.write_text(text)
    return path


def frame(colour: str, width: int = 64, height: int = 48) -> np.ndarray:
    """A BGR picture (height, width, 3) of one colour with some structure in it."""
    red, green, blue = COLOURS[colour]
    picture = np.empty((height, width, 3), np.int16)
    picture[:] = (blue, green, red)
    ramp = np.linspace(-25, 25, width).astype(np.int16)[None, :, None]
    return np.clip(picture + ramp, 0, 255).astype(np.uint8)


def picture_file(path: Path, colour: str, width: int = 64, height: int = 48) -> Path:
    """That picture as a file; its suffix says the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), frame(colour, width, height))
    return path


def picture_directory(path: Path, colours: Sequence[str] = ("red", "green", "blue")) -> Path:
    """A directory of pictures, in order."""
    for k, colour in enumerate(colours):
        picture_file(path / f"{k:03d}-{colour}.png", colour)
    return path


def video_file(
    path: Path,
    colours: Sequence[str] = ("red", "green", "blue"),
    *,
    frames_each: int = 10,
    fps: float = 30.0,
    width: int = 64,
    height: int = 48,
) -> Path:
    """A video (.avi, Motion JPEG) that shows each colour for `frames_each` frames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), fps, (width, height))
    assert writer.isOpened()
    for colour in colours:
        for _ in range(frames_each):
            writer.write(frame(colour, width, height))
    writer.release()
    return path
