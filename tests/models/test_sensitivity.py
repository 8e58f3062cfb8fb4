"""Layers are ranked by what quantising each alone does; what was not reached is not made up."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeward_models.calibration import Ranges, calibrate
from edgeward_models.prepare import prepare
from edgeward_models.quantiser import quantisable, quantise
from edgeward_models.schemes import Scheme
from edgeward_models.sensitivity import rank_layers
from edgeward_models.similarity import sqnr_db
from edgeward_runtime.sessions import open_exact
from edgeward_wire.errors import Rejected
from models import quant_models
from models.quant_models import Net

SCHEME = Scheme("static")


def ready(model: Path, home: Path) -> tuple[Path, Ranges, list[dict[str, np.ndarray]]]:
    prepared = prepare(model, home / "p.onnx")
    feeds = quant_models.noise(prepared, 4)
    return prepared, calibrate(prepared, feeds), feeds


def test_every_layer_is_ranked_the_worst_first(tmp_path: Path) -> None:
    prepared, ranges, feeds = ready(quant_models.resnet(tmp_path / "m.onnx"), tmp_path)
    said: list[tuple[str, int, int]] = []
    layers = rank_layers(prepared, SCHEME, ranges, feeds, progress=lambda *step: said.append(step))
    assert sorted(layer.name for layer in layers) == sorted(quantisable(prepared))
    assert [layer.sqnr_db for layer in layers] == sorted(layer.sqnr_db for layer in layers)
    assert sum(layer.macs_share for layer in layers) == pytest.approx(1.0)
    assert {layer.op for layer in layers} == {"Conv", "Gemm"}
    assert said == [("layer by layer", k, 7) for k in range(8)]


def test_a_layer_that_is_hard_to_quantise_comes_first(tmp_path: Path) -> None:
    """One weight of a channel dwarfs the others: they all become zero."""
    path = quant_models.resnet(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    name = next(node.input[1] for node in model.graph.node if node.name == "b2")
    tensor = next(t for t in model.graph.initializer if t.name == name)
    weights = numpy_helper.to_array(tensor).copy()
    weights[:, 0, 0, 0] = 300.0
    tensor.CopyFrom(numpy_helper.from_array(weights, name))
    path.write_bytes(model.SerializeToString())
    prepared, ranges, feeds = ready(path, tmp_path)
    noisy = rank_layers(prepared, SCHEME, ranges, feeds, deadline=time.monotonic() + 60)
    assert noisy[0].name in ("b2", "b1", "fc")  # what feeds or follows the loud layer suffers with it


def test_a_figure_is_that_of_a_file_with_this_layer_alone(tmp_path: Path) -> None:
    """The last layer: its own codes are all that changes, but for the codes of the output."""
    prepared, ranges, feeds = ready(quant_models.resnet(tmp_path / "m.onnx"), tmp_path)
    figure = {layer.name: layer.sqnr_db for layer in rank_layers(prepared, SCHEME, ranges, feeds)}["fc"]
    others = [name for name in quantisable(prepared) if name != "fc"]
    wide = ranges.knowing({"logits": (-1e-6, 1e-6)})
    scheme = Scheme("static", outputs=False, symmetric_activations=False).keeping(*others)
    file = quantise(prepared, tmp_path / "q.onnx", scheme, wide)
    found = [(open_exact(prepared).run(feed)[0], open_exact(file).run(feed)[0]) for feed in feeds]
    whole = sqnr_db(np.stack([a for a, _ in found]), np.stack([b for _, b in found]))
    assert figure == pytest.approx(whole, abs=0.5)


def test_more_bits_hurt_less(tmp_path: Path) -> None:
    prepared, ranges, feeds = ready(quant_models.resnet(tmp_path / "m.onnx"), tmp_path)
    mean = {}
    for weights in ("s8", "s7"):
        layers = rank_layers(prepared, Scheme("static", weights=weights), ranges, feeds)  # type: ignore[arg-type]
        mean[weights] = sum(layer.sqnr_db for layer in layers)
    assert mean["s8"] > mean["s7"]


def test_a_deadline_leaves_out_what_was_not_reached(tmp_path: Path) -> None:
    prepared, ranges, feeds = ready(quant_models.resnet(tmp_path / "m.onnx"), tmp_path)
    assert rank_layers(prepared, SCHEME, ranges, feeds, deadline=time.monotonic() - 1) == []


def test_what_is_known_is_not_measured_again_and_stays_where_time_is_up(tmp_path: Path) -> None:
    prepared, ranges, feeds = ready(quant_models.resnet(tmp_path / "m.onnx"), tmp_path)
    known = {"stem": 1.5, "not a layer": 1.0}
    late = rank_layers(prepared, SCHEME, ranges, feeds, known=known, deadline=time.monotonic() - 1)
    assert [(layer.name, layer.op, layer.sqnr_db) for layer in late] == [("stem", "Conv", 1.5)]
    assert late[0].macs_share > 0
    steps: list[int] = []
    rank_layers(prepared, SCHEME, ranges, feeds, known=known, progress=lambda _, done, __: steps.append(done))
    assert steps == list(range(1, 8))


def test_layers_that_are_not_asked_for_are_not_ranked(tmp_path: Path) -> None:
    prepared, ranges, feeds = ready(quant_models.resnet(tmp_path / "m.onnx"), tmp_path)
    kept = rank_layers(prepared, SCHEME.keeping("stem", "fc"), ranges, feeds)
    assert {"stem", "fc"}.isdisjoint(layer.name for layer in kept)
    only = rank_layers(prepared, Scheme("static", operators=("Gemm",)), ranges, feeds)
    assert [layer.name for layer in only] == ["fc"]


def test_constants_are_fed_beside_the_samples(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Mul", net.conv("x", (4, 3, 3, 3), name="conv"), "gain")
    model = net.save(tmp_path / "m.onnx", {"x": (1, 3, 8, 8), "gain": (1,)}, {"y": x})
    prepared = prepare(model, tmp_path / "p.onnx")
    full = quant_models.noise(prepared, 2)
    gain = {"gain": np.ones(1, np.float32)}
    ranges = calibrate(prepared, [{**feed, **gain} for feed in full])
    pictures = [{"x": feed["x"]} for feed in full]
    (layer,) = rank_layers(prepared, SCHEME, ranges, pictures, constants=gain)
    assert layer.name == "conv"
    assert 10 < layer.sqnr_db < math.inf
    with pytest.raises(Rejected, match="lack gain"):
        rank_layers(prepared, SCHEME, ranges, pictures)


def test_without_samples_there_is_nothing_to_rank_on(tmp_path: Path) -> None:
    prepared, ranges, _ = ready(quant_models.resnet(tmp_path / "m.onnx"), tmp_path)
    with pytest.raises(ValueError, match="feeds"):
        rank_layers(prepared, SCHEME, ranges, [])
