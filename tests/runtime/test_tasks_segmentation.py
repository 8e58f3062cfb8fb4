"""Segmentation and raw tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeward_runtime.contract_guess import guess
from edgeward_runtime.engine import Engine, Recipe
from edgeward_runtime.sessions import Port, RunFailed
from edgeward_runtime.slots import Frame
from edgeward_runtime.sources.options import Rules
from edgeward_runtime.tasks import reader
from edgeward_runtime.tasks.answer import Raw, Segmented
from edgeward_runtime.tasks.segmentation import best_class
from edgeward_runtime.tasks.view import View
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import ModelRef
from edgeward_wire.verdict import Plan
from runtime.builders import frame, segmenter

NAMES = ("red", "green", "blue", "dark")
SQUARE = View(0, Rules(), 32, 32)


def contract(
    shape: tuple[int | str, ...],
    dtype: str = "float32",
    *,
    resize: str = "stretch",
    layout: str = "nchw",
    activation: str = "none",
) -> Contract:
    image = {"width": 32, "height": 32, "resize": resize, "layout": layout}
    source = {"name": "x", "dtype": "float32", "shape": (1, 3, 32, 32), "bind": "source", "image": image}
    output = {"name": "y", "dtype": dtype, "shape": shape, "activation": activation}
    return Contract.model_validate({"task": "segmentation", "inputs": [source], "outputs": [output]})


def read(known: Contract, raw: np.ndarray, labels: tuple[str, ...] = NAMES, view: View = SQUARE) -> Segmented:
    answer = reader(known, (Port("y", known.outputs[0].dtype, known.outputs[0].shape),), labels)([raw], view)
    assert isinstance(answer, Segmented)
    return answer


scored = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=7).filter(lambda shape: shape[0] > 1),
    elements=st.integers(-3, 3).map(float),  # few values: many are equal
)


@given(scored)
def test_the_best_class_is_argmax(scores: np.ndarray) -> None:
    assert (best_class(scores, 0.5) == scores.argmax(axis=0)).all()


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_not_finite_fail(where: int, value: float) -> None:
    scores = np.zeros((2, 2, 2), np.float32)
    scores[where, 0, 1] = value
    with pytest.raises(RunFailed, match="not finite"):
        best_class(scores, 0.5)


def test_areas_are_shares_largest_first() -> None:
    scores = np.zeros((1, 4, 4, 4), np.float32)
    scores[0, 1, :3] = 1
    scores[0, 3, 3] = 1
    answer = read(contract((1, 4, 4, 4)), scores)
    assert [(a.label, a.share) for a in answer.areas] == [("green", 0.75), ("dark", 0.25)]
    assert answer.mask.shape == (4, 4)
    assert answer.labels() == ("green",)
    few = read(contract((1, 4, 4, 4)), scores, view=View(0, Rules({"*": 0.5}), 32, 32))
    assert [a.label for a in few.areas] == ["green"]
    named = read(contract((1, 4, 4, 4)), scores, view=View(0, Rules(classes=frozenset({"dark"})), 32, 32))
    assert [a.label for a in named.areas] == ["dark"]


def test_maps_of_classes_are_taken_as_they_are() -> None:
    classes = np.array([[0, 0, 2, 2], [0, 0, 2, 2]])
    for shape in ((1, 2, 4), (1, 1, 2, 4), (2, 4)):
        answer = read(contract(shape, "int64"), classes.reshape(shape))
        assert [(a.label, a.share) for a in answer.areas] == [("red", 0.5), ("blue", 0.5)]
    with pytest.raises(RunFailed, match="no map of classes"):
        read(contract((1, 2, 4), "int64"), classes[None] - 5)
    with pytest.raises(RunFailed, match="no map of classes"):
        read(contract((1, 2, 4), "int64"), np.zeros((2, 2, 4), np.int64))
    as_floats = read(contract((1, 2, 4)), classes[None].astype(np.float32))
    assert [a.label for a in as_floats.areas] == ["red", "blue"]
    with pytest.raises(RunFailed, match="not whole"):
        read(contract((1, 2, 4)), classes[None].astype(np.float32) * 0.45)


def test_the_last_axis_may_be_the_classes() -> None:
    scores = np.zeros((1, 2, 2, 4), np.float32)
    scores[..., 2] = 1
    answer = read(contract((1, 2, 2, 4), layout="nhwc"), scores)
    assert [a.label for a in answer.areas] == ["blue"]


@pytest.mark.parametrize(("activation", "inside"), [("none", 0.6), ("sigmoid", 0.1)])
def test_one_channel_is_one_class_and_the_rest(activation: str, inside: float) -> None:
    raw = np.full((1, 1, 2, 4), -0.4, np.float32)
    raw[..., :1] = inside
    answer = read(contract((1, 1, 2, 4), activation=activation), raw, ("road",))
    assert [(a.label, a.class_index, a.share) for a in answer.areas] == [
        ("background", 0, 0.75),
        ("road", 1, 0.25),
    ]


def test_the_letterbox_is_no_part_of_the_frame() -> None:
    """A frame of 640 x 320 lies at rows 8 to 24 of 32: rows 2 to 6 of a map of 8."""
    scores = np.zeros((1, 4, 8, 8), np.float32)
    scores[0, 3] = 0.5
    scores[0, 0, 2:6, :4] = 1
    answer = read(contract((1, 4, 8, 8), resize="letterbox"), scores, view=View(0, Rules(), 640, 320))
    assert answer.mask.shape == (4, 8)
    assert [(a.label, a.share) for a in answer.areas] == [("red", 0.5), ("dark", 0.5)]


def test_what_is_no_segmentation_is_rejected_or_fails() -> None:
    with pytest.raises(Rejected, match="4 classes, but there are 2 labels"):
        read(contract((1, 4, 4, 4)), np.zeros((1, 4, 4, 4), np.float32), ("a", "b"))
    with pytest.raises(Rejected, match="this model has none"):
        read(contract((1, 9)), np.zeros((1, 9), np.float32))
    with pytest.raises(RunFailed, match="shape"):
        read(contract((1, 4, 4, 4)), np.zeros((1, 4, 4), np.float32))


def recipe(path: Path, task: str) -> Recipe:
    known = guess(path, flags={"task": task}).complete()
    return Recipe(
        model=ModelRef(path="models/m/1.json", sha256="0" * 64),
        contract=known.contract,
        file=path,
        labels=NAMES if task == "segmentation" else (),
        plan=Plan(provider="CPUExecutionProvider", variant="fp32"),
    )


def test_a_real_one_sees_the_two_halves_of_a_picture(tmp_path: Path) -> None:
    engine = Engine(recipe(segmenter(tmp_path / "m.onnx"), "segmentation"))
    engine.warm()
    halves = np.concatenate([frame("red"), frame("blue")], axis=1)
    (look,) = engine.looks(Frame(0, halves, 0.0, 0.0, 0.0))
    assert isinstance(look.answer, Segmented)
    assert {area.label: area.share for area in look.answer.areas} == {"red": 0.5, "blue": 0.5}
    engine.close()


def test_tensors_come_as_they_are(tmp_path: Path) -> None:
    engine = Engine(recipe(segmenter(tmp_path / "m.onnx"), "tensor"))
    (look,) = engine.looks(Frame(0, frame("red"), 0.0, 0.0, 0.0))
    assert isinstance(look.answer, Raw)
    ((name, array),) = look.answer.outputs
    assert (name, array.shape, look.answer.labels()) == ("scores", (1, 4, 8, 8), ())
    engine.close()
