"""Detection: decoding and suppression held against a plain reference, and boxes found again on the frame."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward_runtime.preprocess import Preprocess
from edgeward_runtime.tasks.detection import (
    KINDS,
    Boxes,
    Kind,
    Settings,
    class_count,
    decode,
    detect,
    kind_of,
    overlaps,
    suppress,
    to_frame,
)
from edgeward_wire.contract import ImageSpec, InputPort
from edgeward_wire.errors import Rejected

CLASSES = 3
Row = tuple[float, float, float, float, float, int]
"""x1, y1, x2, y2, score, class."""


# --- the reference: slow, and written to be read


def plain_iou(a: Row, b: Row) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area_a = max(0.0, a[2] - a[0]) * max(0.0, a[3] - a[1])
    area_b = max(0.0, b[2] - b[0]) * max(0.0, b[3] - b[1])
    union = area_a + area_b - width * height
    return width * height / union if union > 0 else 0.0


def plain_candidates(output: np.ndarray, kind: Kind, how: Settings) -> list[Row]:
    rows: list[Row] = []
    anchors = output[0].T if kind == "yolov8" else output[0]
    for anchor in anchors:
        if kind == "end-to-end":
            x1, y1, x2, y2, score, index = (float(v) for v in anchor)
            if score >= how.score:
                rows.append((x1, y1, x2, y2, score, round(index)))
            continue
        x, y, w, h = (float(v) for v in anchor[:4])
        box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
        scores = list(anchor[4:]) if kind == "yolov8" else [s * anchor[4] for s in anchor[5:]]
        if how.several_classes:
            rows += [(*box, float(s), c) for c, s in enumerate(scores) if s >= how.score]
        else:
            c = max(range(len(scores)), key=lambda k: scores[k])
            if scores[c] >= how.score:
                rows.append((*box, float(scores[c]), c))
    return sorted(rows, key=lambda row: -row[4])


def plain_detect(output: np.ndarray, kind: Kind, how: Settings) -> list[Row]:
    kept: list[Row] = []
    for row in plain_candidates(output, kind, how):
        beaten = any(other[5] == row[5] and plain_iou(other, row) > how.iou for other in kept)
        if kind == "end-to-end" or not beaten:
            kept.append(row)
    return kept[: how.most]


def rows_of(boxes: Boxes) -> list[Row]:
    zipped = zip(boxes.corners.tolist(), boxes.scores.tolist(), boxes.classes.tolist(), strict=True)
    return [(*corners, score, index) for corners, score, index in zipped]  # type: ignore[misc]


# --- outputs: coordinates and scores on a coarse grid, so that float32 and Python agree on every comparison


@st.composite
def outputs(draw: st.DrawFn) -> tuple[np.ndarray, Kind]:
    kind = draw(st.sampled_from(KINDS))
    count = draw(st.integers(0, 14)) if kind == "end-to-end" else draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    places = rng.integers(0, 16, (count, 2)) * 4.0
    sizes = rng.integers(0, 8, (count, 2)) * 8.0
    if kind == "end-to-end":
        tail = np.stack([rng.integers(0, 17, count) / 16, rng.integers(0, CLASSES, count)], axis=1)
        return np.concatenate([places, places + sizes, tail], axis=1)[None].astype(np.float32), kind
    scores = rng.integers(0, 17, (count, CLASSES)) / 16
    parts = [places, sizes, scores] if kind == "yolov8" else [places, sizes, scores[:, :1], scores]
    rows = np.concatenate(parts, axis=1)[None].astype(np.float32)
    return (rows.transpose(0, 2, 1) if kind == "yolov8" else rows), kind


hows = st.builds(
    Settings,
    score=st.sampled_from([0.0625, 0.25, 0.5]),
    iou=st.sampled_from([0.1, 0.45, 0.7, 1.0]),
    most=st.sampled_from([1, 3, 300]),
    several_classes=st.booleans(),
)


@given(outputs(), hows)
@settings(max_examples=200, deadline=None)
def test_detections_are_those_of_the_plain_reference(made: tuple[np.ndarray, Kind], how: Settings) -> None:
    output, kind = made
    assert rows_of(decode(output, kind, how)) == plain_candidates(output, kind, how)
    assert rows_of(detect(output, kind, how)) == plain_detect(output, kind, how)


@pytest.mark.parametrize(("classes", "anchors"), [(40, 300), (40, 900), (2, 300), (1, 900)])
def test_crowds_are_those_of_the_plain_reference(classes: int, anchors: int) -> None:
    """Of one class and of many, and more than are held against one another at once."""
    rng = np.random.default_rng(anchors + classes)
    output = np.zeros((1, 4 + classes, anchors), np.float32)
    output[0, :2] = rng.integers(0, 40, (2, anchors)) * 4.0
    output[0, 2:4] = rng.integers(2, 8, (2, anchors)) * 8.0
    output[0, 4 + rng.integers(0, classes, anchors), np.arange(anchors)] = rng.integers(8, 17, anchors) / 16
    how = Settings(score=0.25, iou=0.45)
    assert 0 < len(plain_detect(output, "yolov8", how)) < anchors
    assert rows_of(detect(output, "yolov8", how)) == plain_detect(output, "yolov8", how)


@given(outputs())
@settings(max_examples=50, deadline=None)
def test_overlaps_are_symmetric_and_those_of_the_reference(made: tuple[np.ndarray, Kind]) -> None:
    boxes = decode(*made, Settings(score=0.0625))
    table = overlaps(boxes, boxes)
    assert table.shape == (len(boxes.scores),) * 2
    assert np.array_equal(table, table.T)
    rows = rows_of(boxes)
    expected = [[plain_iou(a, b) for b in rows] for a in rows]
    assert np.allclose(table, np.asarray(expected).reshape(table.shape), atol=1e-6)


def test_what_is_not_finite_is_no_detection_and_warns_of_nothing() -> None:
    output = np.zeros((1, 4 + CLASSES, 5), np.float32)
    output[0, :, 0] = [10, 10, 4, 4, 0.9, 0, 0]
    output[0, :, 1] = [np.nan, 10, 4, 4, 0.9, 0, 0]
    output[0, :, 2] = [10, 10, np.inf, np.inf, 0.9, 0, 0]
    output[0, :, 3] = [1e30, 10, 4, 4, 0.9, 0, 0]
    output[0, :, 4] = [10, 10, 4, 4, np.nan, np.nan, np.nan]
    assert rows_of(detect(output, "yolov8")) == [(8, 8, 12, 12, pytest.approx(0.9), 0)]
    five = np.array([[[10, 10, 4, 4, np.inf, 0, 0, 0]]], np.float32)
    assert rows_of(detect(five, "yolov5")) == []


def test_thousands_of_candidates_are_bounded() -> None:
    rng = np.random.default_rng(0)
    output = rng.uniform(0, 1, (1, 4 + 80, 8400)).astype(np.float32)
    output[0, :4] *= 640
    found = detect(output, "yolov8", Settings(score=0.001, several_classes=True, most=300))
    assert len(found.scores) == 300
    assert (np.diff(found.scores) <= 0).all()
    assert list(suppress(found, 0.7, 300)) == list(range(300))  # what was kept is kept again


# --- which kind


def test_the_kind_is_told_from_the_shape() -> None:
    assert kind_of((1, 84, 8400), 80) == "yolov8"
    assert kind_of((1, 25200, 85), 80) == "yolov5"
    assert kind_of((1, 300, 6), 80) == "end-to-end"
    assert kind_of((1, 84, 8400), None) == "yolov8"
    assert kind_of((1, 25200, 85), None) == "yolov5"
    assert kind_of((1, 6, 8400), 2) == "yolov8"
    assert class_count("yolov8", (1, 84, 8400)) == 80
    assert class_count("yolov5", (1, 25200, 85)) == 80
    assert class_count("end-to-end", (1, 300, 6)) is None


def test_what_could_be_two_kinds_must_be_declared() -> None:
    with pytest.raises(Rejected, match="could be yolov5 or end-to-end with 1 classes") as caught:
        kind_of((1, 300, 6), 1)
    assert caught.value.next_step == "Say which: yolov5 or end-to-end."
    assert kind_of((1, 300, 6), 1, "yolov5") == "yolov5"
    assert kind_of((1, 300, 6), 1, "end-to-end") == "end-to-end"
    with pytest.raises(Rejected, match="could be"):
        kind_of((1, 300, 6), None)


def test_what_is_no_detector_is_refused() -> None:
    with pytest.raises(Rejected, match=r"\(1, 1000\)"):
        kind_of((1, 1000), 80)
    with pytest.raises(Rejected, match="fits no detector of 20 classes"):
        kind_of((1, 84, 8400), 20)
    with pytest.raises(Rejected, match="declared yolov5, but that does not fit 80 classes"):
        kind_of((1, 84, 8400), 80, "yolov5")
    with pytest.raises(Rejected, match="shape"):
        kind_of((2, 84, 8400), 80)


# --- back on the frame

SPECS = {
    "letterbox": {"resize": "letterbox"},
    "stretch": {"resize": "stretch"},
    "crop": {"resize": "shorter_side", "resize_to": 80, "crop": "center"},
}


@pytest.mark.parametrize("how", SPECS)
@given(
    size=st.tuples(st.integers(40, 300), st.integers(40, 300)),
    at=st.tuples(st.floats(0.3, 0.7), st.floats(0.3, 0.7)),
)
@settings(max_examples=40, deadline=None)
def test_a_box_drawn_on_the_frame_is_found_where_it_is(
    how: str, size: tuple[int, int], at: tuple[float, float]
) -> None:
    """The device's own preprocessing carries a white patch into the tensor; the way back finds it again."""
    width, height = size
    side = 0.2 * min(width, height)
    x, y = width / 2 + (at[0] - 0.5) * side, height / 2 + (at[1] - 0.5) * side
    left, top, right, bottom = (round(v) for v in (x - side, y - side, x + side, y + side))
    frame = np.zeros((height, width, 3), np.uint8)
    frame[top:bottom, left:right] = 255
    spec = ImageSpec(width=72, height=64, pad=0, **SPECS[how])  # type: ignore[arg-type]
    tensor = Preprocess(
        InputPort(name="x", dtype="float32", shape=(1, 3, 64, 72), bind="source", image=spec)
    )(frame)
    ys, xs = np.nonzero(tensor[0, 0] > 0.5)
    seen = np.array([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], np.float32)
    one = Boxes(seen, np.ones(1, np.float32), np.zeros(1, np.int64))
    found = to_frame(one, spec, width, height).corners[0]
    step = max(width / 64, height / 64, 1.0)  # a pixel of the input, on the frame
    cut = np.array([left, top, right, bottom])
    assert np.abs(found - cut).max() <= 1.5 * step


def test_boxes_are_cut_at_the_edges_of_the_frame() -> None:
    spec = ImageSpec(width=64, height=64, resize="letterbox")
    boxes = Boxes(np.array([[-9, -9, 99, 99]], np.float32), np.ones(1, np.float32), np.zeros(1, np.int64))
    assert to_frame(boxes, spec, 128, 96).corners.tolist() == [[0, 0, 128, 96]]
