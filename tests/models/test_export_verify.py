"""How a file is held against its model: the worst element, what is not finite, what does not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgeward_models.export.document import (
    PROVENANCE_KEY,
    clean,
    finish,
    join_columns,
    keep_outputs,
    settle_outputs,
)
from edgeward_models.export.publish import Candidate, Subject, publish
from edgeward_models.export.report import ExportOptions, NotExported
from edgeward_models.export.verify import Step, Tolerance, Trial, fault_of, verify, worst_element
from edgeward_models.graph import MAX_IR_VERSION
from edgeward_runtime.sessions import open_exact
from edgeward_wire.errors import Rejected
from runtime import builders

Array = npt.NDArray[Any]
FLOATS = hnp.arrays(
    np.float32, hnp.array_shapes(max_dims=3, max_side=4), elements=st.floats(-1e6, 1e6, width=32)
)
EXACT = Tolerance()


def answers(path: Path, batch: int, seed: int = 0) -> Step:
    """A step that the file of `builders.classifier` gets right: its own outputs."""
    image = np.random.default_rng(seed).random((batch, 3, 32, 32), np.float32)
    session = open_exact(path)
    try:
        logits = session.run({"image": image})[0]
    finally:
        session.close()
    return Step({"image": image}, {"logits": logits})


# --- elements


@given(FLOATS, FLOATS)
def test_an_array_is_within_tolerance_exactly_when_numpy_says_so(a: Array, b: Array) -> None:
    b = np.resize(b, a.shape)
    worst = worst_element("y", a, b, EXACT)
    assert worst is not None
    difference, allowed = np.abs(a.astype(float) - b), EXACT.atol + EXACT.rtol * np.abs(a.astype(float))
    assert (worst.excess <= 1) == bool((difference <= allowed).all())
    assert worst.absolute == difference[worst.index]
    assert worst.excess == pytest.approx((difference / allowed).max())


def test_the_worst_element_is_named_with_both_values() -> None:
    expected, actual = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)
    expected[1, 2], actual[1, 2], actual[0, 0] = 2.0, 2.5, 1e-5
    worst = worst_element("y", expected, actual, EXACT)
    assert worst is not None
    assert (worst.index, worst.expected, worst.actual) == ((1, 2), 2.0, 2.5)
    assert (worst.absolute, worst.relative) == (0.5, 0.25)
    assert str(worst) == "y[1, 2] is 2 in the model and 2.5 in the file: 0.5 apart, 0.25 of it"


def test_whole_numbers_and_truth_values_are_compared_too() -> None:
    for dtype in (np.int64, np.uint8, np.bool_):
        same, other = np.array([0, 1], dtype), np.array([1, 1], dtype)
        near, far = worst_element("y", same, same, EXACT), worst_element("y", same, other, EXACT)
        assert near is not None
        assert near.excess == 0
        assert far is not None
        assert far.excess > 1


def test_values_that_are_not_finite_are_named_with_whose_they_are() -> None:
    good, bad = np.zeros((2, 2), np.float32), np.array([[0, 0], [np.nan, np.inf]], np.float32)
    assert fault_of("y", good, good) == ""
    assert "not finite in the model itself: 2 of 4 values, the first is nan at (1, 0)" in fault_of(
        "y", bad, bad
    )
    assert "not finite in the file only" in fault_of("y", good, bad)
    assert fault_of("y", good, good[:1]) == "Output y is 2 x 2 in the model, but 1 x 2 in the file."


@pytest.mark.parametrize(("rtol", "atol"), [(0, 0), (-1, 1), (1, 1), (float("nan"), 1), (0, float("inf"))])
def test_what_is_no_tolerance_is_refused(rtol: float, atol: float) -> None:
    with pytest.raises(Rejected, match="no tolerance"):
        Tolerance(rtol, atol)


# --- files


def test_a_right_file_passes_with_every_batch(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx")
    trials = [Trial("one", 1, (answers(path, 1),)), Trial("three", 3, (answers(path, 3),))]
    checked = verify(path, trials, EXACT, classifier=True)
    assert checked.passed
    assert (checked.batches, checked.labels) == ((1, 3), (4, 4))
    assert checked.worst is not None
    assert checked.worst.excess == 0


def test_a_wrong_file_fails_with_the_worst_element(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx")
    step = answers(path, 1)
    step.expected["logits"][0, 1] += 3.0  # type: ignore[index]
    checked = verify(path, [Trial("shifted", 1, (step,))], EXACT, classifier=True)
    assert not checked.passed
    assert checked.worst is not None
    assert (checked.worst.output, checked.worst.index, checked.worst.trial) == ("logits", (0, 1), "shifted")
    assert checked.worst.absolute == pytest.approx(3, rel=1e-5)
    assert checked.failure.startswith("Outputs differ: logits[0, 1] is ")


def test_a_fixed_batch_that_should_be_open_is_a_fault(tmp_path: Path) -> None:
    open_one, fixed = (
        builders.classifier(tmp_path / "o.onnx"),
        builders.classifier(tmp_path / "f.onnx", batch=1),
    )
    checked = verify(fixed, [Trial("three", 3, (answers(open_one, 3),))], EXACT)
    assert not checked.passed
    assert checked.failure.startswith("With a batch of 3 the file does not run: ")


def test_a_missing_output_and_a_file_that_does_not_load_are_faults(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx")
    step = answers(path, 1)
    other = Step(step.feeds, {"boxes": step.expected["logits"]})
    assert verify(path, [Trial("x", 1, (other,))], EXACT).faults == ("The file has no output boxes.",)
    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    broken = verify(tmp_path / "bad.onnx", [Trial("x", 1, (step,))], EXACT)
    assert not broken.passed
    assert broken.failure.startswith("ONNX Runtime does not load the file")


def accumulator(path: Path, gain: float) -> Path:
    """sum' = sum + gain * x, out is sum'."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Mul", ["x", "gain"], ["scaled"]),
            onnx.helper.make_node("Add", ["sum", "scaled"], ["sum_out"]),
        ],
        "g",
        [value("x", 1, [1, 2]), value("sum", 1, [1, 2])],
        [value("sum_out", 1, [1, 2])],
        [onnx.numpy_helper.from_array(np.float32(gain), "gain")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_state_is_carried_by_the_file_itself(tmp_path: Path) -> None:
    """A drift that one step hides in the tolerance shows after many: the file's own state goes on."""
    x, zero = np.ones((1, 2), np.float32), np.zeros((1, 2), np.float32)
    steps = tuple(
        Step({"x": x, "sum": zero if k == 0 else zero + k}, {"sum_out": zero + k + 1}) for k in range(8)
    )
    strict = Tolerance(rtol=0, atol=5e-3)
    drifting = accumulator(tmp_path / "d.onnx", 1.001)
    assert verify(drifting, [Trial("apart", 1, steps)], strict).passed
    carried = verify(drifting, [Trial("in sequence", 1, steps, {"sum": "sum_out"})], strict)
    assert not carried.passed
    assert carried.worst is not None
    assert carried.worst.absolute == pytest.approx(8e-3, rel=1e-2)
    right = accumulator(tmp_path / "r.onnx", 1.0)
    assert verify(right, [Trial("in sequence", 1, steps, {"sum": "sum_out"})], strict).passed


# --- documents


def test_what_belongs_to_the_exporting_machine_is_removed(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx", metadata={"note": "/home/somebody"})
    model = onnx.load(str(path))
    model.ir_version = MAX_IR_VERSION + 2
    model.opset_import.append(onnx.helper.make_opsetid("ai.onnx", 17))
    model.opset_import.append(onnx.helper.make_opsetid("com.unused", 1))
    model.graph.node[0].doc_string = "File /home/somebody/train.py, line 3"
    entry = model.graph.node[0].metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.stack_trace", "File /home/somebody/train.py, line 3"
    onnx.save(model, str(tmp_path / "raw.onnx"))
    facts = finish(tmp_path / "raw.onnx", tmp_path / "out.onnx", {"task": "classification"}, {"torch": "2"})
    assert b"/home/somebody" not in (tmp_path / "out.onnx").read_bytes()
    assert facts.ir_version == MAX_IR_VERSION
    assert json.loads(facts.metadata["edgeward"]) == {"task": "classification"}
    assert json.loads(facts.metadata[PROVENANCE_KEY]) == {"torch": "2"}
    written = onnx.load(str(tmp_path / "out.onnx"))
    assert [(o.domain, o.version) for o in written.opset_import] == [("", 17)]
    assert not verify(tmp_path / "out.onnx", [Trial("x", 1, (answers(path, 1),))], EXACT).failure


def test_weights_that_lie_beside_the_raw_file_are_brought_in(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx")
    (tmp_path / "raw").mkdir()
    raw = tmp_path / "raw" / "raw.onnx"
    onnx.save(onnx.load(str(path)), str(raw), save_as_external_data=True, location="w", size_threshold=0)
    facts = finish(raw, tmp_path / "raw" / "out.onnx", {}, {})
    assert not facts.external
    assert verify(tmp_path / "raw" / "out.onnx", [Trial("x", 1, (answers(path, 1),))], EXACT).passed


def test_operators_of_nobody_are_refused_without_the_scratch_file_s_name(tmp_path: Path) -> None:
    model = onnx.load(str(builders.classifier(tmp_path / "m.onnx")))
    model.graph.node[0].domain = "org.pytorch.aten"
    model.opset_import.append(onnx.helper.make_opsetid("org.pytorch.aten", 1))
    onnx.save(model, str(tmp_path / "raw.onnx"))
    with pytest.raises(
        NotExported, match=r"^What the exporter wrote needs operators.*org\.pytorch\.aten::Conv"
    ):
        finish(tmp_path / "raw.onnx", tmp_path / "out.onnx", {}, {})


def test_only_the_outputs_that_are_kept_keep_their_nodes(tmp_path: Path) -> None:
    model = onnx.load(str(builders.classifier(tmp_path / "m.onnx")))
    graph = model.graph
    graph.node.append(onnx.helper.make_node("ArgMax", ["logits"], ["label"], axis=1))
    graph.output.append(onnx.helper.make_tensor_value_info("label", onnx.TensorProto.INT64, ["batch", 1]))
    keep_outputs(model, ["logits"])
    assert "ArgMax" not in {node.op_type for node in graph.node}
    assert [value.name for value in graph.output] == ["logits"]
    onnx.checker.check_model(model)
    keep_outputs(model, ["logits"])
    assert len(graph.node) == 5


def test_inputs_for_columns_become_one(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Sub", ["sepal length", "b"], ["y"])],
        "g",
        [value("sepal length", 1, [None, 1]), value("b", 1, [None, 1])],
        [value("y", 1, [None, 1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    join_columns(model, "features", ["sepal length", "b"])
    onnx.checker.check_model(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    session = open_exact(tmp_path / "m.onnx")
    rows = np.array([[5, 2], [1, 4]], np.float32)
    np.testing.assert_array_equal(session.run({"features": rows})[0], [[3], [-3]])
    session.close()


@pytest.mark.parametrize(
    ("runs", "shape"),
    [
        ([(1, (1, 3)), (3, (3, 3))], ["batch", 3]),
        ([(1, (1, 3))], [1, 3]),
        ([(1, (1, 3)), (1, (2, 3))], ["lost_0", 3]),
        ([(1, (1, 3, 1))], ["lost_0", "lost_1"]),
        ([], ["lost_0", "lost_1"]),
    ],
)
def test_lengths_that_were_lost_are_those_of_all_runs(tmp_path: Path, runs: list, shape: list) -> None:
    model = onnx.load(str(builders.classifier(tmp_path / "m.onnx")))
    output = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["lost_0", "lost_1"])
    model.graph.output[0].CopyFrom(output)
    settle_outputs(model, [(batch, {"logits": seen}) for batch, seen in runs])
    dims = model.graph.output[0].type.tensor_type.shape.dim
    assert [d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims] == shape


def test_lengths_that_follow_from_values_stay_open(tmp_path: Path) -> None:
    model = onnx.load(str(builders.classifier(tmp_path / "m.onnx")))
    model.graph.node.append(onnx.helper.make_node("NonZero", ["logits"], ["where"]))
    model.graph.output.append(
        onnx.helper.make_tensor_value_info("where", onnx.TensorProto.INT64, [2, "found"])
    )
    settle_outputs(model, [(1, {"where": (2, 5)}), (1, {"where": (2, 5)})])
    assert model.graph.output[1].type.tensor_type.shape.dim[1].dim_param == "found"
    clean(model)


# --- publishing


def subject(path: Path, *candidates: Candidate, batch: int = 1, shift: float = 0.0) -> Subject:
    step = answers(path, batch)
    step.expected["logits"][:] += shift  # type: ignore[index]
    return Subject(
        "a test", candidates, [Trial("x", batch, (step,))], "noise", labels=("red", " green  apple\n", "blue")
    )


def copying(path: Path, name: str = "copy") -> Candidate:
    def make(raw: Path) -> list[str]:
        raw.write_bytes(path.read_bytes())
        return [f"{name} was asked"]

    return Candidate(name, make)


def failing(name: str = "broken") -> Candidate:
    def make(raw: Path) -> list[str]:
        raw.write_bytes(b"half of a file")
        raise NotExported(f"{name} has no Conv.", "Take another.")

    return Candidate(name, make)


def test_the_first_candidate_that_is_right_is_taken_and_the_others_told(tmp_path: Path) -> None:
    path, out = builders.classifier(tmp_path / "m.onnx"), tmp_path / "new" / "out.onnx"
    wrong = builders.classifier(tmp_path / "w.onnx", salt=500)
    candidates = (failing(), copying(wrong, "wrong"), copying(path), copying(path, "never asked"))
    report = publish(subject(path, *candidates), out, ExportOptions())
    assert report.passed
    assert report.exporter == "copy"
    assert [(a.exporter, a.outcome) for a in report.attempts] == [
        ("broken", "failed"),
        ("wrong", "differs"),
        ("copy", "verified"),
    ]
    assert report.notes == ("copy was asked",)
    assert sorted(p.name for p in out.parent.iterdir()) == ["out-labels.txt", "out.onnx"]
    assert (out.parent / "out-labels.txt").read_text() == "red\ngreen apple\nblue\n"
    assert json.loads(json.dumps(report.plain(), allow_nan=False))["verification"]["passed"] is True


def test_a_file_that_is_wrong_is_not_left_and_the_old_one_is(tmp_path: Path) -> None:
    path, out = builders.classifier(tmp_path / "m.onnx"), tmp_path / "out" / "out.onnx"
    out.parent.mkdir()
    out.write_bytes(b"what was there")
    report = publish(subject(path, copying(path), shift=0.5), out, ExportOptions())
    assert not report.passed
    assert report.out is None
    assert report.verification.worst is not None
    assert report.verification.worst.absolute == pytest.approx(0.5, rel=1e-4)
    assert "--opset" in report.advice
    assert [p.name for p in out.parent.iterdir()] == ["out.onnx"]
    assert out.read_bytes() == b"what was there"


def test_a_difference_that_is_small_beside_the_output_says_which_tolerance_takes_it(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx")
    options = ExportOptions(tolerance=Tolerance(rtol=0, atol=1e-9))
    report = publish(subject(path, copying(path), shift=1e-5), tmp_path / "out.onnx", options)
    assert not report.passed
    atol = float(report.advice.split("--atol ")[1].rstrip("."))
    assert report.verification.worst is not None
    assert report.verification.worst.absolute < atol < 4e-5
    again = ExportOptions(tolerance=Tolerance(rtol=0, atol=atol))
    assert publish(subject(path, copying(path), shift=1e-5), tmp_path / "out.onnx", again).passed


def test_when_nobody_can_every_reason_is_told(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx")
    with pytest.raises(
        Rejected, match=r"No exporter can do it\. one: one has no Conv\. two: two has no Conv"
    ) as told:
        publish(subject(path, failing("one"), failing("two")), tmp_path / "x" / "out.onnx", ExportOptions())
    assert told.value.next_step == "Take another."
    assert not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize("name", ["out.pt", "out", "."])
def test_the_file_must_be_named_onnx(tmp_path: Path, name: str) -> None:
    path = builders.classifier(tmp_path / "m.onnx")
    with pytest.raises(Rejected, match="cannot be the name"):
        publish(subject(path, copying(path)), tmp_path / name, ExportOptions())


@pytest.mark.parametrize("opset", [0, 6, 24])
def test_an_opset_that_no_device_loads_is_refused(opset: int) -> None:
    with pytest.raises(Rejected, match="opsets 7 to 23" if opset else "not supported"):
        ExportOptions(opset=opset)
