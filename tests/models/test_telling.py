"""Saturation is computed as a processor without VNNI commits it, and the inputs that show it are chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgeward_models.pairsafe import LIMIT
from edgeward_models.saturation import correction, layers_at_risk
from edgeward_models.telling import candidate_count, choose_inputs, cut_outputs, loudest_run, pick, scores
from edgeward_runtime import golden
from edgeward_runtime.contract_guess import guess
from edgeward_runtime.golden import SEQUENCE_STEPS
from edgeward_runtime.parity import cosine
from edgeward_runtime.sessions import open_exact
from edgeward_wire.contract import Contract
from runtime import builders

STEP, WEIGHT_STEP = np.float32(1 / 64), np.float32(1 / 128)


def quantised(
    path: Path, op: str, weights: np.ndarray, shape: list[int], zero: int = 0, **attributes: object
) -> Path:
    """One Conv or Gemm as a quantiser writes it: u8 activations, s8 weights with one scale."""
    constants: dict[str, np.ndarray] = {
        "s": STEP, "z": np.uint8(zero), "w": weights.astype(np.int8), "ws": WEIGHT_STEP, "wz": np.int8(0),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        helper.make_node(op, ["xd", "wd"], ["y"], **attributes),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def cut_off(codes: np.ndarray, weights: np.ndarray, *, saturate: bool = True) -> np.ndarray:
    """(positions, K) u8 times (K, N) s8 as vpmaddubsw adds them: pair by pair, cut off at 16 bits."""
    if len(weights) % 2:
        codes, weights = np.pad(codes, ((0, 0), (0, 1))), np.pad(weights, ((0, 1), (0, 0)))
    products = codes.astype(np.int64)[:, :, None] * weights.astype(np.int64)[None]
    pairs = products.reshape(len(codes), -1, 2, weights.shape[1]).sum(axis=2)
    return np.asarray((np.clip(pairs, -LIMIT - 1, LIMIT) if saturate else pairs).sum(axis=1))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 5), st.booleans(), st.integers(0, 999))
def test_a_product_is_cut_off_as_its_pairs_are(
    tmp_path_factory: pytest.TempPathFactory, positions: int, k: int, n: int, transposed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(-127, 128, (k, n))
    path = tmp_path_factory.mktemp("m") / "m.onnx"
    stored = weights.T if transposed else weights
    layers = layers_at_risk(
        onnx.load(quantised(path, "Gemm", stored, [positions, k], transB=int(transposed)))
    )
    codes = rng.integers(0, 256, (positions, k)).astype(np.uint8)
    expected = (cut_off(codes, weights) - cut_off(codes, weights, saturate=False)) * STEP * WEIGHT_STEP
    got = correction(layers[0], codes) if layers else np.zeros_like(expected)
    np.testing.assert_allclose(got, expected, atol=1e-2)
    assert layers or not expected.any()


@pytest.mark.parametrize(
    ("channels", "groups", "strides", "pads", "dilations"),
    [
        (4, 1, [1, 1], [0, 0, 0, 0], [1, 1]),
        (3, 1, [2, 2], [1, 1, 1, 1], [1, 1]),  # an odd number of channels: pairs span positions
        (4, 2, [1, 2], [1, 0, 2, 1], [2, 1]),
    ],
)
def test_a_convolution_is_cut_off_as_its_pairs_are(
    tmp_path: Path, channels: int, groups: int, strides: list[int], pads: list[int], dilations: list[int]
) -> None:
    rng = np.random.default_rng(channels)
    weights = rng.integers(-127, 128, (6, channels // groups, 3, 3))
    path = quantised(
        tmp_path / "m.onnx", "Conv", weights, [1, channels, 9, 8], 7,
        group=groups, strides=strides, pads=pads, dilations=dilations,
    )  # fmt: skip
    (layer,) = layers_at_risk(onnx.load(path))
    codes = rng.integers(0, 256, (1, channels, 9, 8)).astype(np.uint8)
    exact = open_exact(path).run({"x": (codes.astype(np.float32) - 7) * STEP})[0]
    got = correction(layer, codes)
    assert got.shape == exact.shape
    padded = np.pad(codes[0], ((0, 0), (pads[0], pads[2]), (pads[1], pads[3])), constant_values=7)
    for out, row, column in [(0, 0, 0), (5, 1, 2), (3, got.shape[2] - 1, got.shape[3] - 1)]:
        group = out // (6 // groups)
        mine = padded[group * (channels // groups) : (group + 1) * (channels // groups)]
        top, left = row * strides[0], column * strides[1]
        patch = mine[
            :,
            top : top + 2 * dilations[0] + 1 : dilations[0],
            left : left + 2 * dilations[1] + 1 : dilations[1],
        ]
        codes_row = patch.transpose(1, 2, 0).reshape(1, -1)
        weights_row = weights[out].transpose(1, 2, 0).reshape(-1, 1)
        whole = cut_off(codes_row, weights_row, saturate=False)
        unpadded = (whole - 7 * weights_row.sum()) * STEP * WEIGHT_STEP
        np.testing.assert_allclose(exact[0, out, row, column], unpadded[0, 0], rtol=1e-3, atol=1e-3)
        expected = (cut_off(codes_row, weights_row) - whole) * STEP * WEIGHT_STEP
        np.testing.assert_allclose(got[0, out, row, column], expected[0, 0], atol=1e-3)


def test_depthwise_kernels_and_small_weights_are_safe(tmp_path: Path) -> None:
    wide = np.full((4, 1, 3, 3), 127)
    assert not layers_at_risk(onnx.load(quantised(tmp_path / "a.onnx", "Conv", wide, [1, 4, 8, 8], group=4)))
    small = np.full((8, 4), 64)
    assert not layers_at_risk(onnx.load(quantised(tmp_path / "b.onnx", "Gemm", small, [1, 8])))
    assert not layers_at_risk(onnx.load(builders.classifier(tmp_path / "c.onnx")))


# --- the choice


def plain(tmp_path: Path) -> tuple[Path, Contract, np.ndarray]:
    """A plain u8 x s8 product, its contract and its weights (32, 6)."""
    rng = np.random.default_rng(5)
    weights = rng.integers(60, 128, (32, 6)) * np.repeat(rng.choice([-1, 1], (16, 6)), 2, axis=0)
    path = quantised(tmp_path / "plain.onnx", "Gemm", weights, [1, 32])
    return path, guess(path, flags={"task": "tensor"}).contract, weights


def dim_and_bright(count: int, bright: set[int]) -> list[dict[str, np.ndarray]]:
    """Inputs in 0..2 that no pair of weights can saturate with, and some in 0..4 that do."""
    rng = np.random.default_rng(9)
    return [
        {"x": rng.uniform(0, 4 if k in bright else 1.9, (1, 32)).astype(np.float32)} for k in range(count)
    ]


def saturated_cosine(raw: bytes, weights: np.ndarray) -> float:
    """Parity of the golden vectors on a processor that saturates: its outputs are computed here."""
    worst = 1.0
    for inputs, outputs in golden.vectors(golden.read_npz(raw)):
        codes = np.clip(np.rint(inputs["x"] / STEP), 0, 255).astype(np.uint8)
        mine = cut_off(codes, weights) * STEP * WEIGHT_STEP
        worst = min(worst, cosine(mine, outputs["y"]))
    return worst


def test_chosen_inputs_catch_a_saturating_kernel_where_others_pass_it(tmp_path: Path) -> None:
    path, contract, weights = plain(tmp_path)
    candidates = dim_and_bright(40, {11, 23, 37})
    first = golden.make_golden(path, contract, feeds=candidates[:8])
    assert saturated_cosine(first, weights) >= 0.99  # the gate lets it pass
    chosen = choose_inputs(path, contract, candidates, 8)
    assert len(chosen) == 8
    assert {11, 23, 37} <= {k for k, one in enumerate(candidates) if any(one is c for c in chosen)}
    assert saturated_cosine(golden.make_golden(path, contract, feeds=chosen), weights) < 0.99


def test_the_score_is_what_the_processor_would_do(tmp_path: Path) -> None:
    path, contract, weights = plain(tmp_path)
    candidates = dim_and_bright(12, {3, 7})
    for feeds, (turn, _) in zip(candidates, scores(path, contract, candidates), strict=True):
        raw = golden.make_golden(path, contract, feeds=[feeds])
        assert 1 - turn == pytest.approx(saturated_cosine(raw, weights), abs=1e-4)


def test_the_saturated_outputs_are_what_the_processor_would_give(tmp_path: Path) -> None:
    path, contract, weights = plain(tmp_path)
    feeds = dim_and_bright(6, {1, 4})
    cuts = cut_outputs(path, contract, feeds)
    raw = golden.make_golden(path, contract, feeds=feeds, cuts=cuts)
    arrays = golden.read_npz(raw)
    for k, ((inputs, outputs), cut) in enumerate(
        zip(golden.vectors(arrays), golden.cuts(arrays), strict=True)
    ):
        codes = np.clip(np.rint(inputs["x"] / STEP), 0, 255).astype(np.uint8)
        expected = cut_off(codes, weights) * STEP * WEIGHT_STEP
        np.testing.assert_allclose(cut["y"], expected, rtol=1e-4, atol=1e-3)
        assert (np.abs(cut["y"] - outputs["y"]).max() > 0.1) == (k in (1, 4))
    assert not cut_outputs(path, contract, dim_and_bright(3, set()))  # none of these is cut off
    safe = builders.classifier(tmp_path / "safe.onnx")
    assert not cut_outputs(safe, guess(safe).contract, [{"image": np.ones((1, 3, 32, 32), np.float32)}])


def with_state(path: Path, weights: np.ndarray) -> Path:
    """A plain product of x + h; h becomes a hundredth of what it gives."""
    model = onnx.load(quantised(path, "Gemm", weights, [1, 32]))
    model.graph.node[0].input[0] = "sum"
    model.graph.node.insert(0, helper.make_node("Add", ["x", "h"], ["sum"]))
    model.graph.node.append(helper.make_node("Mul", ["y", "hundredth"], ["hn"]))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.01), "hundredth"))
    model.graph.input.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, 32]))
    model.graph.output.append(helper.make_tensor_value_info("hn", TensorProto.FLOAT, [1, 32]))
    path.write_bytes(model.SerializeToString(deterministic=True))
    return path


def test_a_saturating_kernel_goes_on_from_the_states_that_it_left(tmp_path: Path) -> None:
    weights = np.random.default_rng(5).integers(90, 128, (32, 32))
    path = with_state(tmp_path / "m.onnx", weights)
    contract = guess(path, flags={"task": "tensor"}).contract
    assert contract.stateful
    feeds = dim_and_bright(8, set(range(8)))
    state = np.zeros((1, 32), np.float32)
    for inputs, cut in zip(feeds, cut_outputs(path, contract, feeds), strict=True):
        codes = np.clip(np.rint((inputs["x"] + state) / STEP), 0, 255).astype(np.uint8)
        expected = (cut_off(codes, weights) * STEP * WEIGHT_STEP).astype(np.float32)
        np.testing.assert_allclose(cut["y"], expected, rtol=1e-3, atol=0.5)
        state = expected * np.float32(0.01)
    exact = [
        outputs["y"]
        for _, outputs in golden.vectors(golden.read_npz(golden.make_golden(path, contract, feeds=feeds)))
    ]
    assert np.abs(exact[-1] - cut["y"]).max() > 10


def test_without_anything_to_saturate_the_largest_activations_lead(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx")
    contract = guess(path).contract
    candidates = [{"image": np.full((1, 3, 32, 32), v, np.float32)} for v in np.linspace(0, 1, 20)]
    scored = scores(path, contract, candidates)
    assert [turn for turn, _ in scored] == [0.0] * 20
    assert max(range(20), key=lambda k: scored[k]) == 19
    assert len(choose_inputs(path, contract, candidates[:5], 8)) == 5


def test_half_lead_and_half_are_spread() -> None:
    scored = [(float(k in (4, 9, 17)), 0.0) for k in range(20)]
    assert pick(scored, 6) == [0, 4, 6, 9, 13, 17]
    assert pick([(0.0, 0.0)] * 20, 8) == pick([(0.0, 0.0)] * 20, 8)
    assert len(pick([(0.0, 0.0)] * 9, 8)) == 8


def test_steps_of_a_sequence_follow_one_another() -> None:
    quiet_then_loud = [{"x": np.full((1, 4), float(k >= 30), np.float32)} for k in range(64)]
    run = loudest_run(quiet_then_loud, SEQUENCE_STEPS)
    start = next(k for k, one in enumerate(quiet_then_loud) if one is run[0])
    assert start >= 30
    assert all(a is b for a, b in zip(run, quiet_then_loud[start:], strict=False))


def test_fewer_candidates_are_run_of_a_large_model() -> None:
    assert [candidate_count(macs) for macs in (0, 385_000_000, 4_100_000_000, 14_000_000_000)] == [
        64,
        64,
        48,
        16,
    ]
