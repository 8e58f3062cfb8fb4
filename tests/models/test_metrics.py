"""Figures held against independent computations: by hand, by scikit-learn, by pycocotools itself."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward_models import metrics
from edgeward_models.items import Truth
from edgeward_models.mean_ap import MeanAp
from edgeward_models.statistics import Interval
from edgeward_runtime.tasks.detection import Boxes

needs_pycocotools = pytest.mark.skipif(
    importlib.util.find_spec("pycocotools") is None, reason="mAP needs pycocotools (the extra eval)"
)
pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60)


# --- classes


@given(st.lists(st.floats(-3, 3).map(lambda v: round(v, 1)), min_size=1, max_size=20), st.data())
def test_a_rank_is_the_place_in_the_sorted_scores(row: list[float], data: st.DataObject) -> None:
    label = data.draw(st.integers(0, len(row) - 1))
    ordered = sorted(range(len(row)), key=lambda k: (-row[k], k))
    assert metrics.rank_of(np.asarray(row), label) == ordered.index(label)


@given(pairs)
def test_f1_is_scikit_learn_s(rows: list[tuple[int, int]]) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    labels, predicted = [a for a, _ in rows], [b for _, b in rows]
    expected = sklearn.precision_recall_fscore_support(labels, predicted, zero_division=0)
    mine = metrics.class_scores(labels, predicted)
    for k, column in enumerate(("precision", "recall", "f1", "support")):
        assert [getattr(score, column) for score in mine] == pytest.approx(list(expected[k]))
    classes = sorted({*labels, *predicted})
    assert [score.index for score in mine] == classes
    assert np.mean([score.f1 for score in mine]) == pytest.approx(
        sklearn.f1_score(labels, predicted, average="macro")
    )


def test_macro_f1_by_hand_with_an_interval_that_holds_it() -> None:
    labels, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 0]
    figure = metrics.macro_f1(labels, predicted)
    assert figure.value == pytest.approx((2 / 3 + 4 / 5 + 0) / 3)
    assert figure.interval.low <= figure.value <= figure.interval.high
    assert figure == metrics.macro_f1(labels, predicted)


@given(pairs)
def test_confusions_count_every_wrong_answer_once(rows: list[tuple[int, int]]) -> None:
    labels, predicted = [a for a, _ in rows], [b for _, b in rows]
    found = metrics.confusions(labels, predicted, most=100)
    assert sum(c.count for c in found) == sum(a != b for a, b in rows)
    assert [c.count for c in found] == sorted((c.count for c in found), reverse=True)
    assert all(rows.count((c.label, c.predicted)) == c.count for c in found)


# --- drops


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_a_drop_is_the_difference_of_the_shares(rows: list[tuple[bool, bool]]) -> None:
    a, b = [r for r, _ in rows], [m for _, m in rows]
    figure = metrics.share_drop(a, b)
    assert figure.value == pytest.approx(metrics.share(a).value - metrics.share(b).value)
    assert -1 <= figure.interval.low <= figure.value <= figure.interval.high <= 1
    assert figure.interval.low < figure.interval.high


def test_a_drop_s_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Two models that differ on 4 % against 2 % of all inputs: drop 0.02."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(400):
        kind = rng.choice(4, 300, p=[0.8, 0.04, 0.02, 0.14])
        interval = metrics.share_drop((kind == 0) | (kind == 1), (kind == 0) | (kind == 2)).interval
        held += interval.low <= 0.02 <= interval.high
    assert 0.92 <= held / 400 <= 0.985


def test_a_pair_is_surer_than_two_shares() -> None:
    reference = [True] * 90 + [False] * 10
    mine = [False] * 2 + [True] * 88 + [False] * 10
    drop = metrics.share_drop(reference, mine).interval
    alone = metrics.share(mine).interval
    assert drop.high - drop.low < (alone.high - alone.low) / 1.5


def test_how_many_samples_would_decide() -> None:
    figure = metrics.Figure(0.02, Interval(-0.02, 0.08), 100)
    assert metrics.needed(figure, 0.05) == 400  # half of the way up
    assert metrics.needed(figure, 0.0) == 400  # half of the way down
    assert metrics.needed(figure, 0.02) is None
    assert metrics.needed(figure, 0.02 + 1e-12) is None
    assert metrics.needed(metrics.Figure(0.1, Interval(0.1, 0.1), 100), 0.2) is None


def test_an_average_of_zeros_and_ones_is_a_share() -> None:
    assert metrics.average([1.0, 0.0, 1.0]) == metrics.share([True, False, True])
    partly = metrics.average([1.0, 0.5, 0.75, 1.0])
    assert partly.value == pytest.approx(0.8125)
    assert 0.5 <= partly.interval.low < partly.value < partly.interval.high <= 1


# --- boxes


def boxes(*rows: tuple[float, float, float, float, float, int]) -> Boxes:
    table = np.asarray(rows, np.float32).reshape(-1, 6)
    return Boxes(table[:, :4], table[:, 4], table[:, 5].astype(np.int64))


def truth(x: float, y: float, side: float, index: int = 0, *, crowd: bool = False) -> Truth:
    return Truth((x, y, x + side, y + side), index, crowd, side * side)


@needs_pycocotools
def test_perfect_boxes_have_a_map_of_1_and_none_a_map_of_0() -> None:
    there = [[truth(0, 0, 50)], [truth(10, 10, 40, 1), truth(60, 60, 20)]]
    exact = [boxes((0, 0, 50, 50, 0.9, 0)), boxes((10, 10, 50, 50, 0.8, 1), (60, 60, 80, 80, 0.7, 0))]
    perfect = MeanAp(there, exact)
    assert (perfect.map50, perfect.map50_95) == pytest.approx((1, 1))
    assert perfect.by_class == {0: pytest.approx(1), 1: pytest.approx(1)}
    none = MeanAp(there, [boxes(), boxes()])
    assert (none.map50, none.map50_95) == (0, 0)
    assert none.interval(1, minus=perfect) == Interval(1, 1)


@needs_pycocotools
def test_a_box_that_is_a_bit_off_counts_at_loose_thresholds_only() -> None:
    # IoU 0.8: right at 0.50 ... 0.80, seven of ten steps
    found = MeanAp([[truth(0, 0, 100)]], [boxes((0, 0, 100, 80, 0.9, 0))])
    assert found.map50 == pytest.approx(1)
    assert found.map50_95 == pytest.approx(0.7)


@needs_pycocotools
def test_half_of_the_objects_found_is_half_of_the_recall() -> None:
    there = [[truth(0, 0, 40), truth(100, 100, 40)]]
    found = MeanAp(there, [boxes((0, 0, 40, 40, 0.9, 0), (300, 300, 340, 340, 0.95, 0))])
    # precision 1/2 at the recalls 0 ... 0.5, which are 51 of 101 points
    assert found.map50 == pytest.approx(0.5 * 51 / 101)


def test_nothing_to_find_is_an_error() -> None:
    with pytest.raises(ValueError):
        MeanAp([[]], [boxes()])


@st.composite
def scenes(draw: st.DrawFn) -> tuple[list[list[Truth]], list[Boxes]]:
    rng = np.random.default_rng(draw(st.integers(0, 100_000)))
    there: list[list[Truth]] = []
    found: list[Boxes] = []
    for _ in range(draw(st.integers(1, 6))):
        objects = [
            truth(*rng.uniform(0, 60, 2), rng.uniform(5, 40), int(rng.integers(3)), crowd=rng.random() < 0.1)
            for _ in range(rng.integers(0, 4))
        ]
        rows = []
        for one in objects * 2:
            corners = np.asarray(one.box) + rng.normal(0, 3, 4)
            rows.append((*corners, rng.random(), int(rng.integers(3))))
        order = sorted(rows, key=lambda row: -row[4])
        there.append(objects)
        found.append(boxes(*order))
    if not any(t for objects in there for t in objects if not t.crowd):
        there[0] = [truth(0, 0, 10)]
    return there, found


@needs_pycocotools
@given(scenes())
@settings(max_examples=40, deadline=None)
def test_what_is_resampled_is_what_pycocotools_computes(scene: tuple[list[list[Truth]], list[Boxes]]) -> None:
    """Weights of one give the library's figures; whole weights those of a set with copies of pictures."""
    there, found = scene
    mean_ap = MeanAp(there, found)
    ones = np.ones(len(there))
    assert mean_ap.weighted(ones) == pytest.approx((mean_ap.map50, mean_ap.map50_95), abs=1e-9)
    copies = np.repeat(np.arange(len(there)), 2)
    twice = MeanAp([there[k] for k in copies], [found[k] for k in copies])
    assert mean_ap.weighted(ones * 2) == pytest.approx((twice.map50, twice.map50_95), abs=1e-9)
    interval = mean_ap.interval(1)
    assert interval.low <= mean_ap.map50_95 + 1e-9
    assert mean_ap.map50_95 <= interval.high + 1e-9
