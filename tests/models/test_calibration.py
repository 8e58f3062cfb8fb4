"""Ranges: what was seen, cut as asked, the same every time, in memory that does not grow with the samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgeward_models.calibration import SAMPLES, Ranges, calibrate, source_ranges
from edgeward_models.histogram import BINS, Histogram, divergence
from edgeward_models.prepare import prepare
from edgeward_runtime.sessions import open_exact
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from models import quant_models
from models.quant_models import Net


@pytest.fixture
def resnet(tmp_path: Path) -> Path:
    return prepare(quant_models.resnet(tmp_path / "m.onnx"), tmp_path / "p.onnx")


def all_tensors(model: Path, feed: dict[str, np.ndarray], scratch: Path) -> dict[str, np.ndarray]:
    """Every activation of a run, the plain way: as outputs of the graph."""
    proto = onnx.load(str(model))
    names = [name for node in proto.graph.node for name in node.output]
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    scratch.write_bytes(proto.SerializeToString())
    return {**feed, **dict(zip(names, open_exact(scratch).run(feed), strict=True))}


def test_minmax_is_what_was_seen_rounded_to_three_digits(resnet: Path, tmp_path: Path) -> None:
    feeds = quant_models.noise(resnet, 3)
    ranges = calibrate(resnet, feeds)
    seen = [all_tensors(resnet, feed, tmp_path / "all.onnx") for feed in feeds]
    for name in ("image", "stem.relu.out", "b2.out", "logits"):
        low = min(0.0, *(float(tensors[name].min()) for tensors in seen))
        high = max(0.0, *(float(tensors[name].max()) for tensors in seen))
        assert ranges[name] == (float(f"{low:.3g}"), float(f"{high:.3g}"))
    assert ranges["stem.out"] == ranges["stem.relu.out"]  # what the ReLU cuts off needs no codes
    assert ranges["stem.relu.out"][0] == 0


@pytest.mark.parametrize("method", ["minmax", "percentile", "entropy"])
def test_ranges_are_the_same_each_time_and_survive_json(resnet: Path, method: str) -> None:
    feeds = quant_models.noise(resnet)
    first = calibrate(resnet, feeds, method)  # type: ignore[arg-type]
    second = calibrate(resnet, iter(feeds), method, total=4)  # type: ignore[arg-type]
    assert first.plain() == second.plain()
    assert Ranges(json.loads(json.dumps(first.plain()))) == first
    widest = calibrate(resnet, feeds)
    assert all(widest[n][0] <= low and high <= widest[n][1] for n, (low, high) in first.items())


def test_a_percentile_cuts_what_is_rare(resnet: Path) -> None:
    feeds = quant_models.noise(resnet, 8)
    feeds[0]["image"][0, 0, 0, 0] = 1000.0
    assert calibrate(resnet, feeds)["image"][1] == 1000.0
    assert calibrate(resnet, feeds, "percentile", percentile=99.9)["image"][1] < 10
    assert calibrate(resnet, feeds, "entropy")["image"][1] < 1000


def test_known_ranges_win_over_seen_ones(resnet: Path) -> None:
    ranges = calibrate(
        resnet, quant_models.noise(resnet), known={"image": (-0.9921875, 1.0), "other": (0, 1)}
    )
    assert ranges["image"] == (-0.9921875, 1.0)
    assert "other" not in ranges


def test_large_tensors_are_sampled_evenly(tmp_path: Path) -> None:
    net = Net()
    model = net.save(tmp_path / "m.onnx", {"x": (1, 3, 400, 400)}, {"y": net.conv("x", (1, 3, 1, 1))})
    feed = {"x": np.linspace(-1, 1, 3 * 400 * 400, dtype=np.float32).reshape(1, 3, 400, 400)}
    assert feed["x"].size > SAMPLES
    low, high = calibrate(model, [feed], "percentile", percentile=90.0)["x"]
    assert low == pytest.approx(-0.9, abs=0.01)
    assert high == pytest.approx(0.9, abs=0.01)


def test_a_pictures_range_comes_from_its_preprocessing() -> None:
    image = {"width": 4, "height": 4, "scale": [1 / 128] * 3, "bias": [-127 / 128] * 3}
    port = {"name": "image", "dtype": "float32", "shape": [1, 3, 4, 4], "bind": "source", "image": image}
    out = {"name": "y", "dtype": "float32", "shape": [1, 3]}
    contract = Contract.model_validate({"task": "tensor", "inputs": [port], "outputs": [out]})
    assert source_ranges(contract) == {"image": (-127 / 128, 1.0)}


def test_progress_counts_to_the_end(resnet: Path) -> None:
    said: list[tuple[str, int, int]] = []
    calibrate(resnet, quant_models.noise(resnet, 3), progress=lambda *step: said.append(step))
    assert said == [("calibrating", k, 3) for k in range(4)]


# --- bad input


def test_no_samples_are_refused(resnet: Path) -> None:
    with pytest.raises(Rejected, match="no samples"):
        calibrate(resnet, [])


@pytest.mark.parametrize(
    ("feed", "said"),
    [
        (
            {"image": np.zeros((1, 3, 8, 16), np.float32)},
            r"float32 of shape \(1, 3, 16, 16\).*\(1, 3, 8, 16\)",
        ),
        ({"image": np.zeros((1, 3, 16, 16), np.float64)}, "takes float32.*have float64"),
        ({"picture": np.zeros((1, 3, 16, 16), np.float32)}, "lack image and have picture"),
        ({}, "lack image"),
    ],
)
def test_samples_that_do_not_fit_are_told_apart(resnet: Path, feed: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(Rejected, match=said):
        calibrate(resnet, [feed])


def test_an_output_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    net = Net()
    root = net.op("Sqrt", net.conv("x", (2, 3, 1, 1), name="conv"))
    model = net.save(tmp_path / "m.onnx", {"x": (1, 3, 4, 4)}, {"y": root})
    with pytest.raises(Rejected, match="Output y is not finite"):
        calibrate(model, quant_models.noise(model))


def test_an_infinite_mask_inside_has_no_range(tmp_path: Path) -> None:
    net = Net()
    masked = net.op(
        "Add", net.conv("x", (2, 3, 1, 1)), net.constant(np.array([-np.inf], np.float32)), name="mask"
    )
    model = net.save(
        tmp_path / "m.onnx",
        {"x": (1, 3, 4, 4)},
        {
            "y": net.op(
                "Softmax", net.op("Clip", masked, net.constant(np.array(-9.0, np.float32)), name="clip")
            )
        },
    )
    ranges = calibrate(model, quant_models.noise(model))
    assert "mask.out" not in ranges or np.isfinite(ranges["mask.out"]).all()
    assert "y" in ranges


def test_a_range_holds_zero_and_is_finite() -> None:
    for limits in ((1.0, 2.0), (0.0, np.inf), (np.nan, 1.0), (-2.0, -1.0)):
        with pytest.raises(ValueError, match="no range"):
            Ranges({"x": limits})


# --- histograms

VALUES = arrays.arrays(np.float64, st.integers(0, 40), elements=st.floats(-1e30, 1e30, allow_subnormal=False))


@given(st.lists(VALUES, max_size=4))
def test_no_count_is_lost_and_every_value_has_its_bin(batches: list[np.ndarray]) -> None:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    values = np.concatenate([np.zeros(0), *batches])
    assert histogram.zeros + histogram.counts.sum() == values.size
    places = np.flatnonzero(histogram.counts)
    rest = values[np.abs(values) > 1e-30]
    if rest.size:
        assert (places.min() - BINS) * histogram.width <= rest.min()
        assert rest.max() < (places.max() + 1 - BINS) * histogram.width
        assert np.abs(rest).max() >= histogram.width * BINS / 2 * (1 - 1e-12)


@settings(max_examples=50)
@given(arrays.arrays(np.float64, st.integers(1, 300), elements=st.floats(-100, 100)), st.floats(50, 100))
def test_a_percentile_leaves_out_no_more_than_it_says(values: np.ndarray, percent: float) -> None:
    histogram = Histogram()
    histogram.add(values)
    low, high = histogram.percentile(percent)
    assert low <= 0 <= high
    out = values.size * (100 - percent) / 200 + 1e-9
    assert (values < low - 1e-12).sum() <= out
    assert (values > high + 1e-12).sum() <= out


def test_order_of_growth_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(1000) * np.exp(rng.standard_normal(1000) * 3)
    one, other = Histogram(), Histogram()
    one.add(values)
    for value in sorted(values, key=abs):
        other.add(np.array([value]))
    assert one.width == other.width
    assert (one.counts == other.counts).all()


def test_entropy_cuts_a_long_tail_and_keeps_a_flat_one() -> None:
    rng = np.random.default_rng(1)
    flat, tailed, rectified = Histogram(), Histogram(), Histogram()
    flat.add(rng.uniform(-1, 1, 200_000))
    tailed.add(np.append(rng.standard_normal(200_000), [60.0]))
    rectified.add(np.maximum(rng.uniform(-9, 1, 200_000), 0))  # nine zeros in ten say nothing of where to cut
    assert flat.entropy()[1] > 0.95
    assert 2 < tailed.entropy()[1] < 20
    assert rectified.entropy()[1] > 0.9


def test_codes_that_fit_the_bins_lose_nothing() -> None:
    amounts = np.arange(1, 129, dtype=np.int64)
    assert divergence(amounts, 128, 128) == pytest.approx(0.0, abs=1e-9)
    assert divergence(amounts, 64, 64) > 0
    assert Histogram().entropy() == (0.0, 0.0)
