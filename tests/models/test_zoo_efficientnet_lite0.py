"""The shipped EfficientNet-Lite0: INT8, right on its pictures, safe from saturation, made by its recipe.

Only the tests marked `torch` need PyTorch; those of the graph need onnx; the rest onnxruntime, cv2 and numpy.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("cv2")
pytest.importorskip("onnxruntime")

import numpy as np

from edgeward_models import zoo
from edgeward_runtime import golden, images
from edgeward_runtime.contract_guess import guess
from edgeward_runtime.preprocess import Preprocess

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

recipe: ModuleType = zoo.recipe("efficientnet_lite0")

ZOO = zoo.directory()
SHIPPED = ZOO / "efficientnet-lite0.onnx"
SIDECAR: dict[str, Any] = tomllib.loads((ZOO / "efficientnet-lite0.toml").read_text(encoding="utf-8"))
EXPECTED: dict[str, Any] = tomllib.loads((ZOO / "pictures" / "expected.toml").read_text(encoding="utf-8"))
LABELS = (ZOO / "imagenet-labels.txt").read_text(encoding="utf-8").splitlines()
CONTRACT = guess(SHIPPED).complete().contract


def feed(picture: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A picture as the device prepares it."""
    return {"image": Preprocess(CONTRACT.source)(images.decode(picture.read_bytes())).copy()}


def feeds() -> list[dict[str, np.ndarray[Any, Any]]]:
    return [feed(path) for path in golden.find_pictures(ZOO / "pictures")]


def quantised_weights(model: Any) -> dict[str, np.ndarray[Any, Any]]:
    """{convolution: its int8 weights}, for the convolutions that read dequantised constants."""
    numpy_helper = pytest.importorskip("onnx").numpy_helper
    constants = {item.name: item for item in model.graph.initializer}
    dequantised = {node.output[0]: node for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found = {}
    for node in model.graph.node:
        if node.op_type == "Conv" and node.input[1] in dequantised:
            found[node.name] = numpy_helper.to_array(constants[dequantised[node.input[1]].input[0]])
    return found


def convolution_macs(model: Any) -> dict[str, int]:
    """{convolution: multiply-accumulates for one picture}."""
    onnx = pytest.importorskip("onnx")
    shaped = onnx.shape_inference.infer_shapes(model)
    sizes = {item.name: item.type.tensor_type.shape.dim for item in shaped.graph.value_info}
    constants = {item.name: item.dims for item in model.graph.initializer}
    dequantised = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    macs = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            weights = constants[dequantised.get(node.input[1], node.input[1])]
            height, width = (dim.dim_value for dim in sizes[node.output[0]][2:])
            macs[node.name] = int(np.prod(list(weights))) * height * width
    return macs


# --- the shipped file ---------------------------------------------------------------------------------------


def test_the_file_has_the_contract_of_its_sidecar() -> None:
    declared = SIDECAR["inputs"]["image"]
    [image], [logits] = CONTRACT.inputs, CONTRACT.outputs
    assert (image.name, image.dtype) == ("image", "float32")
    assert image.shape == ("batch", 3, declared["height"], declared["width"])
    assert (logits.name, logits.shape) == ("logits", ("batch", len(LABELS)))
    assert list(SIDECAR["outputs"]) == ["logits"]
    assert len(set(LABELS)) == 1000


@pytest.mark.parametrize("optimise", [True, False], ids=["optimised", "exact"])
@pytest.mark.parametrize("picture", sorted(EXPECTED))
def test_pictures_get_their_labels(picture: str, optimise: bool) -> None:
    answer = int(recipe.logits(SHIPPED, [feed(ZOO / "pictures" / picture)], optimise=optimise)[0].argmax())
    assert answer in EXPECTED[picture]["classes"], LABELS[answer]
    assert LABELS[EXPECTED[picture]["classes"][0]] == EXPECTED[picture]["label"]


def test_a_batch_gives_what_single_pictures_give() -> None:
    single = feeds()
    together = recipe.logits(SHIPPED, [{"image": np.concatenate([one["image"] for one in single])}])
    np.testing.assert_allclose(together, recipe.logits(SHIPPED, single), atol=1e-4)


def test_this_machine_computes_what_the_file_says() -> None:
    """The parity gate of a device, cosine >= 0.99: a saturating kernel gives 0.95 here."""
    single = feeds()
    fast, exact = recipe.logits(SHIPPED, single), recipe.logits(SHIPPED, single, optimise=False)
    lengths = np.linalg.norm(fast, axis=1) * np.linalg.norm(exact, axis=1)
    assert ((fast * exact).sum(axis=1) / lengths).min() >= 0.99


def test_most_of_the_work_is_int8() -> None:
    model = pytest.importorskip("onnx").load(str(SHIPPED))
    macs, quantised = convolution_macs(model), quantised_weights(model)
    share = sum(macs[name] for name in quantised) / sum(macs.values())
    assert share >= 0.85
    assert set(macs) - set(quantised) == set(recipe.FLOAT_CONVOLUTIONS)


def test_no_dense_convolution_can_saturate_sixteen_bits() -> None:
    """255 * (a + b) < 2**15 for each pair of weights of one sign that vpmaddubsw adds."""
    checked = 0
    for weights in quantised_weights(pytest.importorskip("onnx").load(str(SHIPPED))).values():
        if weights.shape[1] > 1:  # depthwise ones have a single input channel and sum in 32 bits
            rows = weights.astype(int).transpose(0, 2, 3, 1).reshape(len(weights), -1, 2)
            worst = max(np.maximum(rows, 0).sum(axis=2).max(), np.maximum(-rows, 0).sum(axis=2).max())
            assert 255 * worst < 2**15
            checked += 1
    assert checked >= 25


def test_the_file_tells_nothing_of_the_machine_that_made_it() -> None:
    content = SHIPPED.read_bytes()
    assert not re.search(rb"/(tmp|home|root|usr|work)/|site-packages|https?:", content)
    assert not pytest.importorskip("onnx").load_from_string(content).metadata_props
    assert len(content) < 6_000_000


# --- the recipe ---------------------------------------------------------------------------------------------


def test_without_pytorch_the_shipped_file_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PACKAGES", ("no_such_package",))
    built = zoo.build_files("efficientnet-lite0", tmp_path)
    assert built.model.read_bytes() == SHIPPED.read_bytes()
    assert "shipped" in built.notes[0]
    assert guess(built.model).complete().precision == "int8"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(FP32, INT8), by the recipe."""
    for package in recipe.PACKAGES:
        pytest.importorskip(package)
    made = zoo.build_files("efficientnet-lite0", tmp_path_factory.mktemp("zoo"))
    assert made.original is not None
    return made.original, made.model


@pytest.mark.torch
def test_the_recipe_makes_the_shipped_file(built: tuple[Path, Path]) -> None:
    """The same bytes; on another CPU a range may round the other way: then the same graph and answers."""
    if built[1].read_bytes() == SHIPPED.read_bytes():
        return
    onnx = pytest.importorskip("onnx")
    ours, theirs = onnx.load(str(built[1])).graph, onnx.load(str(SHIPPED)).graph
    assert [n.SerializeToString() for n in ours.node] == [n.SerializeToString() for n in theirs.node]
    for one, other in zip(ours.initializer, theirs.initializer, strict=True):
        assert one.name == other.name
        a, b = onnx.numpy_helper.to_array(one), onnx.numpy_helper.to_array(other)
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=0.01, atol=1)
    crops = recipe.evaluation_crops(90)
    results = [recipe.logits(path, crops, optimise=False) for path in (built[1], SHIPPED)]
    assert recipe.sqnr_db(*results) > 30


@pytest.mark.torch
def test_accuracy_is_as_recorded(built: tuple[Path, Path]) -> None:
    found = recipe.measure(built[0], SHIPPED, recipe.evaluation_crops(360))
    recorded = SIDECAR["accuracy"]
    assert found.agreement >= recipe.wilson(round(recorded["top1_agreement_fp32"] * 360), 360)[0]
    assert found.sqnr_db >= recorded["sqnr_db"] - 1
    assert found.agreement >= 0.9


@pytest.mark.torch
def test_the_float_model_is_right_on_the_expected_pictures(built: tuple[Path, Path]) -> None:
    for name, entry in EXPECTED.items():
        answer = int(recipe.logits(built[0], [feed(ZOO / "pictures" / name)])[0].argmax())
        assert answer == entry["classes"][0], name
