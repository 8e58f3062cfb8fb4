"""No pair of a `pair` file can saturate vpmaddubsw: scales against brute force, proofs on written files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from edgeward_models.calibration import calibrate
from edgeward_models.codes import activation_code, rounded_weights, weight_scales
from edgeward_models.pairsafe import LIMIT, kernel_rows, pair_sums, scales, worst_pairs
from edgeward_models.prepare import prepare
from edgeward_models.quantiser import quantise
from edgeward_models.regions import Weighted
from edgeward_models.saturation import layers_at_risk
from edgeward_models.schemes import Scheme
from edgeward_runtime.parity import cosine
from edgeward_runtime.sessions import open_exact
from models import quant_models

ROWS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


def worst_by_brute_force(row: np.ndarray) -> int:
    """The largest amount of a0 w0 + a1 w1 over all pairs (2i, 2i + 1) and activations 0 and 255."""
    padded = [int(w) for w in row] + [0] * (len(row) % 2)
    sums = [
        abs(x * a + y * b)
        for a, b in zip(padded[::2], padded[1::2], strict=True)
        for x in (0, 255)
        for y in (0, 255)
    ]
    return max(sums)


@given(ROWS)
def test_no_rounded_pair_exceeds_sixteen_bits(rows: np.ndarray) -> None:
    codes = np.round(rows.astype(np.float64) / scales(rows, pairs=True)[:, None]).astype(int)
    assert np.abs(codes).max(initial=0) <= 127
    assert all(worst_by_brute_force(row) <= LIMIT for row in codes)


@given(ROWS)
def test_float32_scales_and_weights_round_to_no_more(rows: np.ndarray) -> None:
    """What the quantiser does: scales stored in float32."""
    stored = scales(rows, pairs=True).astype(np.float32)
    codes = np.round(rows / stored[:, None]).astype(int)
    assert all(worst_by_brute_force(row) <= LIMIT for row in codes)


@given(arrays.arrays(np.int8, st.tuples(st.integers(1, 4), st.integers(1, 9))))
def test_the_bound_is_the_worst_case_itself(codes: np.ndarray) -> None:
    bounds = 255 * pair_sums(codes.astype(np.int32))
    assert list(bounds) == [worst_by_brute_force(row) for row in codes]


@given(ROWS)
def test_pairs_cost_no_more_than_seven_bits_and_no_less_than_eight(rows: np.ndarray) -> None:
    eight, pair, seven = (
        scales(rows, pairs=False),
        scales(rows, pairs=True),
        scales(rows, pairs=False, codes=63),
    )
    assert (eight <= pair).all()
    assert (pair <= seven * (1 + 1e-9)).all()


def test_an_odd_number_of_channels_pairs_across_positions() -> None:
    """(1 output, 3 channels, 2 positions): the kernel reads position 0 whole before position 1."""
    weights = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    assert kernel_rows("Conv", weights, 0).tolist() == [[0, 2, 4, 1, 3, 5]]
    assert pair_sums(kernel_rows("Conv", weights, 0)).tolist() == [8]  # 3 + 5; not 4 + 5


def test_a_products_pairs_lie_along_k() -> None:
    matrix = np.array([[1, 10], [2, 20], [3, 30]], np.float32)  # K = 3, N = 2
    assert pair_sums(kernel_rows("MatMul", matrix, 1)).tolist() == [3, 30]
    assert pair_sums(kernel_rows("Gemm", matrix.T.copy(), 0)).tolist() == [3, 30]


SHAPES = {
    "pointwise": ("Conv", (6, 5, 1, 1), 1),
    "dense 3x3": ("Conv", (4, 3, 3, 3), 1),
    "grouped": ("Conv", (6, 3, 3, 3), 2),
    "depthwise": ("Conv", (6, 1, 3, 3), 6),
    "multiplied": ("Conv", (6, 1, 3, 3), 3),
    "one-dimensional": ("Conv", (4, 3, 5), 1),
    "three-dimensional": ("Conv", (2, 3, 3, 3, 3), 1),
}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("weights", ["s8", "s7", "pair"])
def test_a_written_convolution_is_proven(kind: str, weights: str, tmp_path: Path) -> None:
    _, shape, groups = SHAPES[kind]
    net = quant_models.Net(4)
    net.conv("x", shape, name="conv", group=groups)
    constant = net.constants[0]
    loud = np.sign(numpy_helper.to_array(constant)) * np.float32(0.5)  # every pair of one sign is the worst
    constant.CopyFrom(numpy_helper.from_array(np.abs(loud).astype(np.float32), constant.name))
    sides = (8,) * (len(shape) - 2)
    model = net.save(tmp_path / "m.onnx", {"x": (1, shape[1] * groups, *sides)}, {"y": "conv.out"})
    prepared = prepare(model, tmp_path / "p.onnx")
    ranges = calibrate(prepared, quant_models.noise(prepared))
    scheme = Scheme("static", weights=weights)  # type: ignore[arg-type]
    (bound,) = worst_pairs(quantise(prepared, tmp_path / "q.onnx", scheme, ranges))
    assert bound.node == "conv"
    if kind == "depthwise":
        assert bound.worst == 0
    elif weights == "s8":
        assert not bound.safe
    else:
        assert 30_000 < bound.worst <= LIMIT


@pytest.mark.parametrize("build", [quant_models.resnet, quant_models.yolo, quant_models.transformer])
def test_all_of_a_pair_file_is_safe(build: object, tmp_path: Path) -> None:
    prepared = prepare(build(tmp_path / "m.onnx"), tmp_path / "p.onnx")  # type: ignore[operator]
    ranges = calibrate(prepared, quant_models.noise(prepared))
    bounds = worst_pairs(quantise(prepared, tmp_path / "q.onnx", Scheme("static"), ranges))
    assert len(bounds) >= 6
    assert all(bound.safe and bound.worst for bound in bounds)


def _qoperator(path: Path, weights: np.ndarray, zero: np.ndarray) -> Path:
    """A file in the other format: MatMulInteger with constant weights (K, N)."""
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "w", "za"], ["y"], name="mm")],
        "g",
        [
            helper.make_tensor_value_info(
                "a", TensorProto.UINT8 if zero.dtype == np.uint8 else TensorProto.INT8, None
            )
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT32, None)],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(zero, "za")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def test_integer_operators_are_read_too(tmp_path: Path) -> None:
    weights = np.array([[100], [100], [-100], [100]], np.int8)
    (bound,) = worst_pairs(_qoperator(tmp_path / "m.onnx", weights, np.array(3, np.uint8)))
    assert (bound.op, bound.worst, bound.safe) == ("MatMulInteger", 51_000, False)
    weights[1] = -100
    (bound,) = worst_pairs(_qoperator(tmp_path / "m.onnx", weights, np.array(3, np.uint8)))
    assert (bound.worst, bound.safe) == (25_500, True)


def test_both_ways_of_writing_a_file_are_read_alike(tmp_path: Path) -> None:
    """What is at risk by its weights has golden inputs chosen for it, however it is written."""
    prepared = prepare(quant_models.resnet(tmp_path / "m.onnx"), tmp_path / "p.onnx")
    feeds = quant_models.noise(prepared)
    scheme = Scheme("static", weights="s8", per_channel=True)
    qdq = quantise(prepared, tmp_path / "qdq.onnx", scheme, calibrate(prepared, feeds))
    folded = tmp_path / "folded.onnx"
    integers = quant_models.folded(qdq, folded)
    assert integers >= 4
    unsafe = {bound.node for bound in worst_pairs(qdq) if not bound.safe}
    assert {bound.node for bound in worst_pairs(folded) if not bound.safe} == unsafe
    assert len(unsafe) >= 4
    model = onnx.load(str(folded))
    layers = layers_at_risk(model)
    assert len(layers) == len(layers_at_risk(onnx.load(str(qdq)))) >= 4
    onnx.save(model, str(tmp_path / "unfolded.onnx"))
    ran = [open_exact(path).run(feeds[0])[0] for path in (folded, tmp_path / "unfolded.onnx")]
    assert cosine(*ran) > 0.9999


def test_a_float_file_has_nothing_to_prove(tmp_path: Path) -> None:
    assert worst_pairs(quant_models.resnet(tmp_path / "m.onnx")) == []


def test_signed_activations_are_not_paired(tmp_path: Path) -> None:
    prepared = prepare(quant_models.resnet(tmp_path / "m.onnx"), tmp_path / "p.onnx")
    ranges = calibrate(prepared, quant_models.noise(prepared))
    scheme = Scheme("static", activations="s8", weights="s8")
    assert {b.worst for b in worst_pairs(quantise(prepared, tmp_path / "q.onnx", scheme, ranges))} == {0}


# --- codes


@given(st.floats(-1e6, 0), st.floats(0, 1e6), st.sampled_from(["u8", "s8"]), st.booleans())
def test_zero_has_a_code_and_the_ends_are_within(low: float, high: float, kind: str, symmetric: bool) -> None:
    scheme = Scheme("static", activations=kind, symmetric_activations=symmetric)  # type: ignore[arg-type]
    scale, zero = activation_code((low, high), scheme)
    first, last = (0, 255) if kind == "u8" else (-128, 127)
    assert first <= zero <= last
    if symmetric:
        assert zero == (128 if kind == "u8" else 0) or scale == 1.0
    room = scale * 1.01 + 1e-30
    assert (first - zero) * scale <= low + room
    assert (last - zero) * scale >= high - room


@settings(max_examples=30)
@given(
    arrays.arrays(np.float32, (4, 6), elements=st.floats(-100, 100, width=32)),
    st.sampled_from(["s8", "s7", "pair"]),
    st.booleans(),
)
def test_rounded_weights_are_half_a_code_away_at_most(
    rows: np.ndarray, weights: str, per_channel: bool
) -> None:
    one = Weighted("n", "MatMul", "x", "w", (6, 4), axis=1)
    scheme = Scheme("static", weights=weights, per_channel=per_channel)  # type: ignore[arg-type]
    matrix = np.ascontiguousarray(rows.T)
    scale = weight_scales(matrix, one, scheme)
    found = rounded_weights(matrix, one, scheme)
    assert found.dtype == np.float32
    assert (np.abs(found - matrix) <= scale[None] * 0.5001 + 1e-6).all()
    assert per_channel or len(set(scale)) == 1


def test_a_graph_with_only_weights_below_the_smallest_scale_is_zeros(tmp_path: Path) -> None:
    assert scales(np.zeros((2, 3), np.float32), pairs=True).tolist() == [1e-8, 1e-8]
    assert onnx.__version__
