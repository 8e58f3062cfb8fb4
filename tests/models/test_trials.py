"""Trials: saturation, parity, states, shapes and what is not finite, each with its reason."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper

from edgeward_models.answers import Detections
from edgeward_models.calibration import calibrate
from edgeward_models.prepare import prepare
from edgeward_models.quantiser import quantise
from edgeward_models.schemes import Scheme
from edgeward_models.trials import Bench, Judged, apart, drive, effort, saturation, set_bench, side_by_side
from edgeward_runtime.sessions import CPU, open_exact
from edgeward_runtime.tasks.detection import Settings
from edgeward_wire.contract import Contract, InputPort, OutputPort
from edgeward_wire.errors import Rejected
from edgeward_wire.verdict import Plan
from models import search_models
from models.graphs import model_of, save

PLAN = Plan(provider=CPU, variant="x")
CLASSIFYING = Contract(
    task="classification",
    inputs=(InputPort(name="image", dtype="float32", shape=(1, 3, 32, 32), bind="source"),),
    outputs=(OutputPort(name="logits", dtype="float32", shape=(1, 3)),),
)
STATEFUL = Contract(
    task="tensor",
    inputs=(
        InputPort(name="x", dtype="float32", shape=(1, 2), bind="source"),
        InputPort(name="before", dtype="float32", shape=(1, 2), bind="state:sum"),
        InputPort(name="gain", dtype="float32", shape=(1,), bind="const", const=(2.0,)),
    ),
    outputs=(
        OutputPort(name="y", dtype="float32", shape=(1, 2)),
        OutputPort(name="after", dtype="float32", shape=(1, 2), bind="state:sum"),
    ),
)


def samples(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"image": rng.random((1, 3, 32, 32)).astype(np.float32)} for _ in range(count)]


class Net:
    """A network, its INT8 files, and the bench that they stand on."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.file = search_models.heavy(home / "net.onnx")
        self.prepared = prepare(self.file, home / "prepared.onnx")
        self.ranges = calibrate(self.prepared, samples())
        self.bench = set_bench(self.file, CLASSIFYING, PLAN, samples(), 3)

    def int8(self, **scheme: object) -> Path:
        out = self.home / "int8.onnx"
        return quantise(self.prepared, out, Scheme("static", **scheme), self.ranges)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Net:
    return Net(tmp_path_factory.mktemp("net"))


def test_a_good_file_is_judged_on_every_sample(net: Net) -> None:
    judged = net.bench.judge(net.int8(), PLAN, "int8")
    assert judged.excluded == ""
    assert judged.parity is not None
    assert judged.parity > 0.99
    assert len(judged.energies) == len(judged.agreed) == 6
    sqnr = judged.sqnr()
    assert sqnr is not None
    assert sqnr[0] > 15
    assert Judged.of(judged.plain()) == judged


def test_without_a_plan_only_the_exact_outputs_count(net: Net) -> None:
    judged = net.bench.first(4).judge(net.int8(), None, "int8")
    assert (judged.excluded, judged.parity, len(judged.energies)) == ("", None, 4)


def test_a_file_is_its_own_equal(net: Net) -> None:
    judged = net.bench.judge(net.file, PLAN, "fp32")
    sqnr = judged.sqnr()
    assert sqnr is not None
    assert sqnr[0] > 80
    assert all(judged.agreed)


def test_what_does_not_load_or_run_is_a_reason(net: Net, tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"nothing")
    assert net.bench.judge(broken, PLAN, "int8").excluded.startswith("It does not load: ")
    other = search_models.heavy(tmp_path / "other.onnx", size=16)
    assert net.bench.judge(other, PLAN, "int8").excluded.startswith("It loads, but does not run. ")
    gone = Plan(provider="TensorrtExecutionProvider", variant="x")
    assert "does not load" in net.bench.judge(net.file, gone, "int8").excluded


def test_outputs_that_are_not_finite_exclude_a_candidate_and_refuse_a_float_model(
    net: Net, tmp_path: Path
) -> None:
    bad = search_models.heavy(tmp_path / "bad.onnx", bad=True)
    assert "not finite on sample" in net.bench.judge(bad, None, "int8").excluded
    with pytest.raises(Rejected, match="not finite on sample 0, in float"):
        set_bench(bad, CLASSIFYING, PLAN, samples(), 3)


def test_outputs_unlike_their_own_exact_ones_are_excluded_with_both_numbers(tmp_path: Path) -> None:
    """A float layer between integers without a shield: the runtime quantises it, and is off."""
    spread = np.array([1.0, 1e-3], np.float32)
    nodes = [
        helper.make_node("QuantizeLinear", ["image", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "s_out", "z16"], ["q_out"]),
        helper.make_node("DequantizeLinear", ["q_out", "s_out", "z16"], ["d_out"]),
        helper.make_node("Mul", ["d_out", "undo"], ["big"]),
        helper.make_node("GlobalAveragePool", ["big"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["logits"]),
    ]
    weights = {
        "s": np.float32(1 / 255),
        "z": np.uint8(0),
        "w": (np.array([[0.1, -0.1, 0.2], [0.9, -0.8, -0.05]], np.float32) * spread[:, None])[
            ..., None, None
        ],
        "s_out": np.float32(2e-5),
        "z16": np.uint16(32768),
        "undo": (1 / spread)[None, :, None, None],
    }
    ports = {"image": [1, 3, 32, 32]}, {"logits": [1, 2]}
    file = save(tmp_path / "island.onnx", model_of(nodes, *ports, weights, opset=21))
    session = open_exact(file)
    rows = [{"logits": session.run(feeds)[0]} for feeds in samples()]
    bench = Bench(CLASSIFYING, samples(), rows, 1.0, 3)
    judged = bench.judge(file, PLAN, "int8")
    assert judged.parity is not None
    assert judged.parity < 0.99
    assert f"cosine {judged.parity:.4f} with its own exact ones, below 0.99" in judged.excluded


def detections(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Boxes of some hundred pixels and the scores of three classes."""
    boxes = np.random.default_rng(1).uniform(10, 600, (1, 4, 50))
    return {"y": np.concatenate([boxes, scores], axis=1).astype(np.float32)}


def test_a_detectors_scores_are_not_hidden_by_its_boxes() -> None:
    port = OutputPort(name="y", dtype="float32", shape=(1, 7, 50))
    contract = CLASSIFYING.model_copy(update={"task": "detection", "outputs": (port,)})
    boxes = Detections(contract, 3, None, Settings(0.25))
    scores = np.zeros((1, 3, 50))
    scores[0, 1, :5] = 0.9
    pairs = [(detections(scores), detections(np.zeros_like(scores)))]  # it sees nothing any more
    whole, split = apart(contract, pairs), apart(contract, pairs, boxes)
    assert whole.sqnr() is not None
    assert whole.sqnr()[0] > 40  # type: ignore[index]
    assert split.sqnr()[0] == pytest.approx(0.0)  # type: ignore[index]
    assert split.agreement()[0] == 0.0  # type: ignore[index]
    same = apart(contract, [(detections(scores), detections(scores))], boxes)
    assert same.agreement()[0] == 1.0  # type: ignore[index]
    nobody = detections(np.zeros_like(scores))
    assert apart(contract, [(nobody, nobody)], boxes).agreement() is None


@pytest.mark.parametrize(
    ("activation", "reference", "mine", "agreed"),
    [("none", 0.6, 0.4, 0.0), ("none", 0.6, 0.9, 1.0), ("sigmoid", 0.1, -0.1, 0.0)],
)
def test_one_number_is_the_second_of_two_classes(
    activation: str, reference: float, mine: float, agreed: float
) -> None:
    port = CLASSIFYING.outputs[0].model_copy(update={"shape": (1, 1), "activation": activation})
    contract = CLASSIFYING.model_copy(update={"task": "vad", "outputs": (port,)})
    pair = tuple({"logits": np.array([[value]], np.float32)} for value in (reference, mine))
    assert apart(contract, [pair]).agreed == (agreed,)  # type: ignore[list-item]


def test_weights_tell_what_may_saturate_without_vnni(net: Net) -> None:
    assert saturation(net.int8(weights="pair")) == ""
    assert saturation(net.int8(weights="s7")) == ""
    reason = saturation(net.int8(weights="s8"))
    assert "without VNNI" in reason
    assert "conv" in reason
    assert saturation(net.file) == ""


def test_states_are_carried_and_constants_fed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "before"], ["after"]),
        helper.make_node("Mul", ["after", "gain"], ["y"]),
    ]
    shapes = {"x": [1, 2], "before": [1, 2], "gain": [1]}, {"y": [1, 2], "after": [1, 2]}
    file = save(tmp_path / "sum.onnx", model_of(nodes, *shapes, {}))
    rows = [{"x": np.full((1, 2), float(k), np.float32)} for k in range(4)]
    runs = list(drive(open_exact(file), STATEFUL, rows))
    assert [float(outputs["y"][0, 0]) for _, outputs in runs] == [0, 2, 6, 12]
    assert [float(feeds["before"][0, 0]) for feeds, _ in runs] == [0, 0, 1, 3]
    bench = set_bench(file, STATEFUL, PLAN, rows, 4)
    assert [set(outputs) for outputs in bench.reference] == [{"y"}] * 4  # the state is no result
    judged = side_by_side(STATEFUL, (file, PLAN), (file, PLAN), iter(rows))
    assert judged.agreed == ()
    assert judged.energies[0] == ((0.0, 0.0),)


@given(
    st.floats(0, 100),
    st.floats(0.1, 1e5),
    st.none() | st.integers(1, 2000),
    st.none() | st.integers(1, 2000),
    st.integers(0, 1 << 32),
)
def test_no_more_samples_than_there_are_and_never_none(
    run_s: float, budget_s: float, fit: int | None, test: int | None, size: int
) -> None:
    counts = effort(run_s, budget_s, fit, test, size)
    for count, has in (
        (counts.fit, fit),
        (counts.calibrate, fit),
        (counts.exact, fit),
        (counts.rank, fit),
        (counts.test, test),
    ):
        assert 1 <= count <= (math.inf if has is None else has)
    assert counts.fit <= 512
    assert counts.test <= 900


def test_a_larger_budget_takes_no_fewer_samples() -> None:
    small, large = (effort(0.02, budget, None, None, 1000) for budget in (60.0, 600.0))
    assert small.fit < large.fit
    assert small.test < large.test
