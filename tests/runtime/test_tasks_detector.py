"""The detection task: which boxes a source's rules ask for, and where they stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
import pytest

from edgeward_runtime.contract_guess import Guess, guess
from edgeward_runtime.engine import Engine, Recipe
from edgeward_runtime.sessions import Port, RunFailed
from edgeward_runtime.slots import Frame
from edgeward_runtime.sources.options import Rules
from edgeward_runtime.tasks import reader
from edgeward_runtime.tasks.answer import Detected
from edgeward_runtime.tasks.detector import Detection
from edgeward_runtime.tasks.view import View
from edgeward_wire.contract import Contract, OutputPort
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Plan
from runtime.builders import COLOURS, detector, detector_sidecar, labels_file

NAMES = ["red", "green", "blue"]
GRAY = 114


def declared(
    shape: tuple[int | str, ...] = (1, 7, 40), *, size: int = 64, boxes: str | None = None
) -> Contract:
    image = {"width": size, "height": size, "resize": "letterbox"}
    return Contract.model_validate(
        {
            "task": "detection",
            "inputs": [
                {
                    "name": "x",
                    "dtype": "float32",
                    "shape": (1, 3, size, size),
                    "bind": "source",
                    "image": image,
                }
            ],
            "outputs": [{"name": "y", "dtype": "float32", "shape": shape, "boxes": boxes}],
            "dimensions": {d: {} for d in shape if isinstance(d, str)},
        }
    )


def yolov8(*rows: tuple[float, ...], anchors: int = 40) -> np.ndarray:
    """(cx, cy, w, h, score of each class) -> (1, 7, anchors)."""
    output = np.zeros((1, 7, anchors), np.float32)
    for k, row in enumerate(rows):
        output[0, :, k] = row
    return output


def read(rules: Rules, *rows: tuple[float, ...], width: int = 64, height: int = 64) -> Detected:
    task = reader(declared(), (Port("y", "float32", (1, 7, 40)),), NAMES)
    answer = task([yolov8(*rows)], View(0, rules, width, height))
    assert isinstance(answer, Detected)
    return answer


RED = (16, 16, 10, 10, 0.9, 0, 0)
GREEN = (40, 40, 10, 20, 0, 0.6, 0)
FAINT = (50, 20, 8, 8, 0, 0, 0.2)


def labels(answer: Detected) -> list[str]:
    return [box.label for box in answer.boxes]


def test_boxes_come_best_first_with_their_labels() -> None:
    answer = read(Rules(), GREEN, RED, FAINT)
    assert labels(answer) == ["red", "green"]
    assert answer.boxes[1].corners == (35, 30, 45, 50)
    assert [box.class_index for box in answer.boxes] == [0, 1]
    assert answer.size == (64, 64)
    assert answer.labels() == ("red", "green")


def test_thresholds_and_classes() -> None:
    assert labels(read(Rules({"blue": 0.1}), GREEN, RED, FAINT)) == ["red", "green", "blue"]
    assert labels(read(Rules({"*": 0.7}), GREEN, RED, FAINT)) == ["red"]
    assert labels(read(Rules({"*": 0.7, "green": 0.5}), GREEN, RED, FAINT)) == ["red", "green"]
    assert labels(read(Rules({"red": 0.95}), GREEN, RED, FAINT)) == ["green"]
    assert labels(read(Rules(classes=frozenset({"green"})), GREEN, RED, FAINT)) == ["green"]
    assert labels(read(Rules({"*": 0.1}, frozenset({"blue"})), GREEN, RED, FAINT)) == ["blue"]
    assert not read(Rules(classes=frozenset({"persn"})), GREEN, RED).boxes


def test_the_zones_are_those_that_hold_the_middle_of_the_lower_edge() -> None:
    zones = {
        "left": ((0.0, 0.0), (0.5, 0.0), (0.5, 1.0), (0.0, 1.0)),
        "low": ((0.0, 0.75), (1.0, 0.75), (1.0, 1.0), (0.0, 1.0)),
    }
    red, green = read(Rules(zones=zones), RED, GREEN).boxes
    assert red.zones == ("left",)
    assert green.zones == ("low",), "its middle is above the zone, its feet are in it"


def test_boxes_are_in_pixels_of_the_frame() -> None:
    """A frame of 640 x 320 lies at rows 16 to 48 of the model's 64 x 64."""
    (red,) = read(Rules(), (32, 32, 64, 32, 0.9, 0, 0), width=640, height=320).boxes
    assert red.corners == (0, 0, 640, 320)


def test_kinds_are_declared_or_told_by_the_shape() -> None:
    end_to_end = np.zeros((1, 3, 6), np.float32)
    end_to_end[0, 0] = (10, 10, 20, 20, 0.8, 2)
    task = reader(declared((1, 3, 6)), (Port("y", "float32", (1, 3, 6)),), NAMES)
    (box,) = task([end_to_end], View(0, Rules(), 64, 64)).boxes  # type: ignore[union-attr]
    assert (box.label, box.corners) == ("blue", (10, 10, 20, 20))
    one_class = (Port("y", "float32", (1, 100, 6)),)
    with pytest.raises(Rejected, match="could be yolov5 or end-to-end"):
        reader(declared((1, 100, 6)), one_class, ["person"])
    reader(declared((1, 100, 6), boxes="yolov5"), one_class, ["person"])
    with pytest.raises(Rejected, match="declared yolov8"):
        reader(declared((1, 100, 6), boxes="yolov8"), one_class, ["person"])


def test_sizes_that_are_not_known_before_the_first_frame() -> None:
    task = Detection(declared((1, 7, "anchors")), (Port("y", "float32", (1, 7, None)),), NAMES)
    view = View(0, Rules(), 64, 64)
    assert len(task([yolov8(RED, anchors=84)], view).boxes) == 1
    assert len(task([yolov8(RED, anchors=21)], view).boxes) == 1
    with pytest.raises(RunFailed, match="does not fit 3 classes"):
        task([np.zeros((1, 9, 84), np.float32)], view)


def test_an_end_to_end_output_without_a_fixed_length_may_be_empty() -> None:
    """And may have as many boxes as another kind has channels: 3 classes and 4."""
    task = Detection(declared((1, "boxes", 6)), (Port("y", "float32", (1, None, 6)),), NAMES)
    view = View(0, Rules(), 64, 64)
    for count in (0, 1, 7, 8):
        output = np.zeros((1, count, 6), np.float32)
        output[0, :, :] = (10, 10, 20, 20, 0.8, 2)
        assert [box.label for box in task([output], view).boxes] == ["blue"] * count
    with pytest.raises(RunFailed, match="shape"):
        task([np.zeros((1, 0, 7), np.float32)], view)


def test_what_is_no_detector_is_rejected() -> None:
    rows = declared((1, 7))
    with pytest.raises(Rejected, match="one output of three dimensions; this model has 0"):
        reader(rows, (Port("y", "float32", (1, 7)),), NAMES)
    pair = declared().model_copy(
        update={"outputs": tuple(OutputPort(name=n, dtype="float32", shape=(1, 7, 40)) for n in "yz")}
    )
    with pytest.raises(Rejected, match="this model has 2"):
        reader(pair, (Port("y", "float32", (1, 7, 40)),), NAMES)


def test_a_class_without_a_label_has_a_number() -> None:
    task = reader(declared(), (Port("y", "float32", (1, 7, 40)),), [])
    answer = task([yolov8(RED)], View(0, Rules(), 64, 64))
    assert answer.labels() == ("class 0",)


# --- with a real model


def picture(width: int, height: int, *squares: tuple[str, int, int, int]) -> np.ndarray:
    """Gray, BGR, with squares (colour, x, y, side)."""
    image = np.full((height, width, 3), GRAY, np.uint8)
    for colour, x, y, side in squares:
        cv2.rectangle(image, (x, y), (x + side - 1, y + side - 1), COLOURS[colour][::-1], -1)
    return image


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Guess:
    directory = tmp_path_factory.mktemp("detector")
    labels_file(directory / "labels.txt")
    detector_sidecar(directory / "boxes.toml")
    return guess(detector(directory / "boxes.onnx")).complete()


@pytest.fixture
def engine(known: Guess) -> Iterator[Engine]:
    assert known.labels is not None
    recipe = Recipe(
        model=ModelRef(path="models/boxes/1.json", sha256="0" * 64),
        contract=known.contract,
        file=known.labels.parent / "boxes.onnx",
        labels=tuple(NAMES),
        plan=Plan(provider="CPUExecutionProvider", variant="fp32"),
    )
    zones: Any = {"door": ((0, 0.5), (0.5, 0.5), (0.5, 1), (0, 1))}
    engine = Engine(recipe, [Rules(zones=zones)])
    engine.warm()
    yield engine
    engine.close()


def test_a_letterbox_is_a_detectors_default(known: Guess) -> None:
    assert known.contract.source.image is not None
    assert known.contract.source.image.resize == "letterbox"
    assert any("letterbox" in note for note in known.notes)


def test_squares_are_found_where_they_are(engine: Engine) -> None:
    """640 x 480 becomes 64 x 48 with 8 rows above: a cell of 16 is 160 x 160 of the frame."""
    image = picture(640, 480, ("red", 0, 240, 160), ("blue", 320, 80, 160))
    (look,) = engine.looks(Frame(0, image, 0.0, 0.0, 0.0))
    answer = look.answer
    assert isinstance(answer, Detected)
    found = {box.label: box for box in answer.boxes}
    assert set(found) == {"red", "blue"}
    assert found["red"].corners == pytest.approx((0, 240, 160, 400), abs=1)
    assert found["red"].zones == ("door",)
    assert found["blue"].corners == pytest.approx((320, 80, 480, 240), abs=1)
    assert found["blue"].zones == ()
