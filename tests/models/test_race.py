"""Races: fair turns, paired ratios, and contenders that fall out."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from edgeward_models.race import (
    GROUP,
    LATE,
    Contender,
    Timing,
    _blur,
    _Rounds,
    _Run,
    _Runner,
    race,
    race_steadily,
)
from edgeward_models.statistics import Interval
from edgeward_wire.verdict import Plan
from runtime import builders

CPU = "CPUExecutionProvider"
PLAN = Plan(provider=CPU, variant="x")


def feeds(size: int = 32, count: int = 3) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [{"image": generator.random((1, 3, size, size), np.float32)} for _ in range(count)]


def run(*contenders: Contender, rounds: int = 12, size: int = 32) -> list[Timing]:
    return race(contenders, feeds(size), goal_s=0.0, least=rounds, most=rounds)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return builders.classifier(tmp_path / "colours.onnx")


def test_the_reference_is_first_and_its_ratio_is_one(model: Path) -> None:
    reference, same = run(Contender("fp32", model, PLAN), Contender("again", model, PLAN))
    assert (reference.name, reference.ratio, reference.interval) == ("fp32", 1.0, (1.0, 1.0))
    assert reference.runs == same.runs == 12
    assert same.ratio is not None
    assert same.interval is not None
    assert same.interval.low <= same.ratio <= same.interval.high
    assert same.p50_ms is not None
    assert same.p90_ms is not None
    assert same.p99_ms is not None
    assert 0 < same.p50_ms <= same.p90_ms <= same.p99_ms


def test_what_does_more_work_has_a_larger_ratio(tmp_path: Path) -> None:
    small, large = (_convolutions(tmp_path / f"{n}.onnx", n) for n in (1, 8))
    timings = run(Contender("small", small, PLAN), Contender("large", large, PLAN), size=64)
    assert timings[1].ratio is not None
    assert timings[1].ratio > 1.5


def test_what_does_not_load_is_a_timing_with_the_reason(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    elsewhere = Plan(provider="TensorrtExecutionProvider", variant="x")
    timings = run(
        Contender("fp32", model, PLAN),
        Contender("broken", broken, PLAN),
        Contender("gone", tmp_path / "gone.onnx", PLAN),
        Contender("no provider", model, elsewhere),
        Contender("good", model, PLAN),
    )
    assert [t.loaded for t in timings] == [True, False, False, False, True]
    assert all(t.runs == 0 and t.ratio is None and "does not load" in t.reason for t in timings[1:4])
    assert timings[4].ratio is not None


def test_what_loads_and_does_not_run_is_told_apart(model: Path, tmp_path: Path) -> None:
    other = builders.classifier(tmp_path / "other.onnx", size=16)
    timings = run(Contender("fp32", model, PLAN), Contender("other", other, PLAN))
    assert timings[1].loaded
    assert "does not run" in timings[1].reason
    assert timings[0].runs == 12


def test_without_a_reference_there_are_latencies_and_no_ratios(model: Path, tmp_path: Path) -> None:
    timings = run(Contender("fp32", tmp_path / "gone.onnx", PLAN), Contender("good", model, PLAN))
    assert not timings[0].loaded
    assert timings[1].p50_ms is not None
    assert timings[1].ratio is None
    assert "reference" in timings[1].reason


def test_many_contenders_race_in_groups_against_the_same_reference(model: Path) -> None:
    names = [f"c{k}" for k in range(2 * GROUP)]
    seen: list[tuple[str, int, int]] = []
    timings = race(
        [Contender(name, model, PLAN) for name in names],
        feeds(),
        goal_s=0.0,
        least=4,
        most=4,
        progress=lambda *step: seen.append(step),
    )
    assert [t.name for t in timings] == names
    assert 4 <= timings[0].runs <= 12  # three groups, less what others disturbed
    assert all(t.runs == 4 and t.ratio is not None for t in timings[1:])
    assert seen[-1] == ("timing", 300, 300)


def test_a_disturbed_round_does_not_count_where_there_are_others() -> None:
    clean, disturbed = _Run(1.0, 2.0, True), _Run(9.0, 2.0, False)
    runner = _Runner(Contender("x", Path("x.onnx"), PLAN), runs=[disturbed, clean, clean, disturbed, clean])
    timing = runner.timing(_Runner(Contender("fp32", Path("f.onnx"), PLAN)), 3)
    assert (timing.runs, timing.ratio, timing.p99_ms) == (3, 0.5, 1000.0)
    few = runner.timing(_Runner(Contender("fp32", Path("f.onnx"), PLAN)), 4)
    assert (few.runs, few.p99_ms) == (5, 9000.0)


def test_past_its_time_a_race_waits_for_nobody() -> None:
    waits, late = _Rounds(1.0, 20, 400, math.inf), _Rounds(1.0, 20, 400, 0.0)
    assert waits.done(20, 20, 1.0)
    assert not waits.done(20, 19, 1.0)  # for undisturbed rounds, three times as long
    assert waits.done(20, 0, 3.0)
    assert not waits.done(19, 19, 9.0)
    assert late.done(LATE, 0, 1.0)
    assert not late.done(LATE - 1, 0, 9.0)
    assert not late.done(LATE, LATE, 0.5)


def test_what_was_blurred_races_again_unless_it_is_late(model: Path) -> None:
    contenders = [Contender(name, model, PLAN) for name in ("fp32", "again")]
    (_, kept) = race_steadily(contenders, feeds(), goal_s=0.01, least=2, late=0.0)
    assert kept.runs >= 2
    (_, best) = race_steadily(contenders, feeds(), goal_s=0.01, least=2)
    assert best.interval is not None
    assert _blur(Timing("x", 9, 1, 1, 1, 0.5, Interval(0.4, 0.6))) == pytest.approx(0.4)
    assert _blur(Timing("x", 0, reason="It does not load.")) == 0.0


def test_time_bounds_the_rounds(model: Path) -> None:
    contender = [Contender("fp32", model, PLAN)]
    assert race(contender, feeds(), goal_s=0.0, least=2, most=50)[0].runs == 2
    # As many as must: with fewer undisturbed ones the disturbed would not count.
    assert race(contender, feeds(), goal_s=30.0, least=5, most=5)[0].runs == 5
    assert race([], feeds()) == []


@pytest.mark.parametrize(("count", "least", "most"), [(0, 1, 1), (1, 0, 1), (1, 3, 2), (1, 1, 1_000_000)])
def test_bounds_are_checked(model: Path, count: int, least: int, most: int) -> None:
    with pytest.raises(ValueError):
        race([Contender("fp32", model, PLAN)], feeds(count=count), least=least, most=most)


def _convolutions(path: Path, count: int) -> Path:
    """`count` convolutions in a row, (1, 3, 64, 64) -> the same."""
    nodes = [
        helper.make_node("Conv", ["image" if k == 0 else f"x{k}", "w"], [f"x{k + 1}"], pads=[2] * 4)
        for k in range(count)
    ]
    shape = [1, 3, 64, 64]
    weights = helper.make_tensor("w", TensorProto.FLOAT, [3, 3, 5, 5], np.full(225, 0.01, np.float32))
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x{count}", TensorProto.FLOAT, shape)],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString())
    return path
