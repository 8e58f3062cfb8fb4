"""What the runtime does to each frame, without the session's own time: `overhead` and `preprocess`."""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bench_runtime_sides as sides
import numpy as np
from bench_runtime_sides import PICTURES, ZOO, Pair, in_turn, ratio_of, skipped, spread
from camera import pan
from rows import Row, at_least, at_most, told

from edgeward_runtime import images
from edgeward_runtime.preprocess import Preprocess, geometry
from edgeward_wire.contract import ImageSpec, InputPort

ULTRALYTICS = "EDGEWARD_ULTRALYTICS_PYTHON"
COUNTS = (0, 10, 300)


# --- overhead


def overhead(minutes: float) -> Iterator[Row]:
    """All but the session's time a frame, of YOLOv8-s at 1080p with 0, 10 and 300 objects found."""
    runs = max(20, min(300, round(minutes * 60)))
    python = os.environ.get(ULTRALYTICS, "")
    if not python:
        skipped(
            "Ultralytics", f"{ULTRALYTICS} names no Python that has it (AGPL: never a dependency of ours)"
        )
    with tempfile.TemporaryDirectory() as directory:
        home = Path(directory)
        picture = home / "frame.png"
        picture.write_bytes(images.encode_png(_frames(1)[0]))
        for count in COUNTS:
            model = injected(home, count)
            mine = [
                sys.executable,
                str(Path(sides.__file__)),
                "overhead",
                str(model),
                str(picture),
                str(runs),
            ]
            theirs = [python, "-c", sides.PREDICT, str(model), str(picture), str(runs)] if python else []
            yield from _overheads(count, mine, theirs)


def _overheads(count: int, mine: Sequence[str], theirs: Sequence[str]) -> Iterator[Row]:
    """One number of objects: the time and the memory of the processes."""
    ours: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for k in range(3):
        for command, into in [(mine, ours), (theirs, others)][:: -1 if k % 2 else 1]:
            if command:
                into.append(sides.overhead_of(command))
                if into[-1]["found"] != count:
                    raise RuntimeError(f"{count} objects were injected, {into[-1]['found']} found")
    took = [statistics.median(one["ms"]) for one in ours]
    worst = statistics.median(float(np.percentile(one["ms"], 99)) for one in ours)
    memory = statistics.median(one["memory_mb"] for one in ours)
    label = f"{count}_objects"
    yield told("overhead", f"{label}_p50", statistics.median(took), "ms", f"p99 {worst:.2f} ms")
    yield told("overhead", f"{label}_memory", memory, "MB PSS", "without the model's weights")
    if not others:
        return
    pairs = list(zip(took, (statistics.median(one["ms"]) for one in others), strict=True))
    theirs_mb = statistics.median(one["memory_mb"] for one in others)
    yield told("overhead", f"{label}_ultralytics_p50", statistics.median(o for _, o in pairs), "ms")
    yield at_most("overhead", f"{label}_ratio", ratio_of(pairs), "x", goal=0.5, note=spread(pairs))
    yield at_most("overhead", f"{label}_memory_ratio", memory / theirs_mb, "x", goal=0.2)


def injected(home: Path, count: int) -> Path:
    """A file with YOLOv8-s's contract whose output is always the same: so many objects, none on another.

    It stands for the model: what the runtime does around a run does not depend on what the run does.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    raw = np.zeros((1, 84, 8400), np.float32)
    for k in range(count):
        across, down = k % 20, k // 20
        # Within the 360 rows that a 16:9 frame has on the square; each a little less sure than the last.
        raw[0, :4, 28 * k] = (16 + 32 * across, 140 + 12 + 24 * down, 24, 18)
        raw[0, 4 + k % 80, 28 * k] = 0.9 - k / 1000
    graph = helper.make_graph(
        [helper.make_node("Identity", ["raw"], ["output0"])],
        "injected",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 640, 640])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 84, 8400])],
        [numpy_helper.from_array(raw, "raw")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    labels = (ZOO / "coco-labels.txt").read_text().split("\n")[:80]
    said = {"names": str(dict(enumerate(labels))), "task": "detect", "stride": "32", "imgsz": "[640, 640]"}
    helper.set_model_props(made, {**said, "batch": "1"})
    file = home / f"injected-{count}.onnx"
    onnx.save(made, str(file))
    file.with_suffix(".toml").write_text(
        f"name = 'injected'\ntask = 'detection'\nprecision = 'fp32'\nlabels = '{ZOO / 'coco-labels.txt'}'\n"
        "[inputs.images]\ncolour = 'rgb'\nwidth = 640\nheight = 640\nresize = 'letterbox'\nlayout = 'nchw'\n"
    )
    return file


# --- preprocess


def preprocess(minutes: float) -> Iterator[Row]:
    """A frame of 1080p to a letterboxed, normalised tensor: ours, cv2.dnn.blobFromImage, plain NumPy."""
    images.be_light()  # OpenCV on one thread, on every side
    spec = ImageSpec(colour="rgb", width=640, height=640, resize="letterbox")
    ours = Preprocess(
        InputPort(name="images", dtype="float32", shape=(1, 3, 640, 640), bind="source", image=spec)
    )
    frames = _frames(4)
    others = {"blob_from_image": _by_blob(spec), "numpy": _by_numpy(spec)}
    for name, other in others.items():
        worst = max(float(np.abs(ours(frame) - other(frame)).max()) for frame in frames)
        if worst > 4 / 255:
            raise RuntimeError(f"{name} makes another tensor than we do: {worst:.4f} apart")
    seconds = min(60.0, minutes * 60) / len(others)
    for name, other in others.items():
        pairs = _timed(frames, ours, other, seconds)
        mine, took = (statistics.median(side) for side in zip(*pairs, strict=True))
        yield told("preprocess", f"{name}_p50", took, "ms", f"ours {mine:.3f} ms; one thread")
        yield at_least(
            "preprocess",
            f"{name}_to_ours",
            1 / ratio_of(pairs),
            "x faster",
            goal=4,
            note=f"{len(pairs)} rounds",
        )


def _timed(
    frames: Sequence[images.U8],
    ours: Callable[[images.U8], Any],
    other: Callable[[images.U8], Any],
    seconds: float,
) -> list[Pair]:
    """Milliseconds of both sides in each round, all frames in each."""

    def side(make: Callable[[images.U8], Any]) -> float:
        began = time.perf_counter()
        for frame in frames:
            make(frame)
        return (time.perf_counter() - began) * 1e3 / len(frames)

    until, found = time.monotonic() + seconds, list[Pair]()
    in_turn(3, lambda: side(ours), lambda: side(other))
    while time.monotonic() < until or not found:
        found += in_turn(2, lambda: side(ours), lambda: side(other))
    return found


def _letterbox(frame: images.U8, spec: ImageSpec) -> images.U8:
    """As everybody writes it."""
    import cv2

    height, width = frame.shape[:2]
    place = geometry(spec, width, height)
    small = cv2.resize(frame, (place.width, place.height), interpolation=cv2.INTER_LINEAR)
    below, right = spec.height - place.height - place.top, spec.width - place.width - place.left
    padded = cv2.copyMakeBorder(
        small, place.top, below, place.left, right, cv2.BORDER_CONSTANT, value=(spec.pad,) * 3
    )
    return np.asarray(padded, np.uint8)


def _by_blob(spec: ImageSpec) -> Callable[[images.U8], Any]:
    import cv2

    return lambda frame: cv2.dnn.blobFromImage(_letterbox(frame, spec), 1 / 255, swapRB=True)


def _by_numpy(spec: ImageSpec) -> Callable[[images.U8], Any]:
    def make(frame: images.U8) -> Any:
        tensor = _letterbox(frame, spec)[:, :, ::-1].transpose(2, 0, 1)[None].astype(np.float32) / 255.0
        return np.ascontiguousarray(tensor)

    return make


def _frames(count: int) -> list[images.U8]:
    """Photographs at 1920 x 1080."""
    return [
        next(pan(images.decode(path.read_bytes()), 1920, 1080, 1, backwards=False)).astype(np.uint8)
        for path in PICTURES[:count]
    ]
