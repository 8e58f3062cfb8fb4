"""Classification: activations and the best few."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeward_runtime.doubts import doubt
from edgeward_runtime.sampling import sureness
from edgeward_runtime.sessions import Port, RunFailed
from edgeward_runtime.sources.options import Rules
from edgeward_runtime.tasks import TASKS, reader
from edgeward_runtime.tasks.answer import Classified
from edgeward_runtime.tasks.classification import activate, best
from edgeward_runtime.tasks.view import View
from edgeward_wire.contract import Contract, InputPort, OutputPort
from edgeward_wire.errors import Rejected

PICTURE = View(0, Rules(), 640, 480)

rows = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-200, 200, width=32))


def contract(activation: str = "softmax", task: str = "classification") -> Contract:
    return Contract(
        task=task,  # type: ignore[arg-type]
        inputs=(InputPort(name="x", dtype="float32", shape=(1,), bind="source"),),
        outputs=(
            OutputPort(name="other", dtype="float32", shape=(1, 9), bind="result"),
            OutputPort(name="y", dtype="float32", shape=(1, 3), activation=activation),  # type: ignore[arg-type]
        )[1:],
    )


@given(rows, st.integers(1, 10))
def test_best_is_what_sorting_all_of_them_gives(row: np.ndarray, count: int) -> None:
    assert sorted(row[best(row, count)], reverse=True) == sorted(row, reverse=True)[:count]
    chosen = row[best(row, count)]
    assert list(chosen) == sorted(chosen, reverse=True)


@given(rows)
def test_scores_are_between_0_and_1_and_keep_the_order(row: np.ndarray) -> None:
    for how in ("softmax", "sigmoid", "none"):
        scores = activate(row, how)
        assert scores.dtype == np.float32
        assert ((scores >= 0) & (scores <= 1)).all()
        assert scores[row.argmax()] == scores.max()
    assert activate(row, "softmax").sum() == pytest.approx(1, abs=1e-4)


def test_an_answer_has_labels_best_first() -> None:
    ports = (Port("aux", "float32", (1, 2)), Port("y", "float32", (1, 3)))
    read = reader(contract(), ports, ["a", "b", "c"])
    answer = read([np.zeros((1, 2), np.float32), np.array([[1.0, 3.0, 2.0]], np.float32)], PICTURE)
    assert isinstance(answer, Classified)
    assert [(t.class_index, t.label) for t in answer.top] == [(1, "b"), (2, "c"), (0, "a")]


def test_what_does_not_fit_is_rejected_or_fails() -> None:
    port = Port("y", "float32", (1, 3))
    with pytest.raises(Rejected, match="3 classes, but there are 2 labels"):
        reader(contract(), (port,), ["a", "b"])
    with pytest.raises(Rejected, match="no output"):
        reader(contract(), (Port("z", "float32", (1, 3)),), ["a", "b", "c"])
    with pytest.raises(Rejected, match="does not run the task 'dance'"):
        reader(contract().model_copy(update={"task": "dance"}), (port,), ["a", "b", "c"])
    with pytest.raises(Rejected, match="one output of three dimensions"):
        reader(contract(task="detection"), (port,), ["a", "b", "c"])
    read = reader(contract(), (Port("y", "float32", (1, None)),), ["a", "b", "c"])
    with pytest.raises(RunFailed, match="4 numbers"):
        read([np.zeros((1, 4), np.float32)], PICTURE)
    with pytest.raises(RunFailed, match="not finite"):
        read([np.array([[1, np.nan, 2]], np.float32)], PICTURE)


def test_how_sure_it_is_does_not_depend_on_what_is_asked_for() -> None:
    read = reader(contract("none"), (Port("y", "float32", (1, 3)),), ["a", "b", "c"])
    row = [np.array([[0.02, 0.9, 0.08]], np.float32)]
    for rules in (Rules(), Rules(classes=frozenset("a")), Rules({"*": 0.5}, frozenset("a"))):
        assert sureness(read(row, View(0, rules, 640, 480))) == pytest.approx(0.9), rules


ZONE = {"door": ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0))}


@pytest.mark.parametrize(
    ("task", "labels", "rules", "below", "says"),
    [
        ("detection", ["car"], Rules({"*": 0.4, "car": 0.5}, frozenset({"car"}), ZONE), 0.5, ""),
        (
            "detection",
            ["car"],
            Rules({"cat": 0.5}),
            None,
            "thresholds: no label of the model is cat (near: car).",
        ),
        (
            "classification",
            ["car"],
            Rules(classes=frozenset({"xyz"})),
            None,
            "classes: no label of the model is xyz.",
        ),
        ("classification", [], Rules(classes=frozenset({"class 7"})), None, ""),
        (
            "classification",
            ["car"],
            Rules(zones=ZONE),
            0.5,
            "zones: of no use to a model for classification.",
        ),
        ("segmentation", ["road"], Rules({"background": 0.1}, frozenset({"road"})), None, ""),
        ("segmentation", ["road"], Rules(), 0.5, "samples below: of no use to a model for segmentation."),
        ("vad", [], Rules({"speech": 0.4}), 0.5, ""),
        (
            "vad",
            [],
            Rules({"speach": 0.4}),
            None,
            "thresholds: no label of the model is speach (near: speech).",
        ),
        ("vad", [], Rules(classes=frozenset({"speech"})), None, "classes: of no use to a model for vad."),
        (
            "tensor",
            [],
            Rules({"a": 0.4}, frozenset({"b"}), ZONE),
            0.5,
            "thresholds, classes, zones, samples below: of no use to a model for tensor.",
        ),
    ],
)
def test_settings_that_would_do_nothing_are_found(
    task: str, labels: list[str], rules: Rules, below: float | None, says: str
) -> None:
    assert doubt(task, labels, rules, below) == says


def test_every_task_says_what_it_heeds() -> None:
    assert all(doubt(task, (), Rules()) == "" for task in TASKS)
