"""The networks that are built node by node: published sizes, sane activations, the same bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from edgeward_models import zoo
from edgeward_models.graph import Facts, read_facts
from edgeward_runtime.contract_guess import Guess, guess
from edgeward_runtime.sessions import open_exact
from edgeward_wire.errors import Rejected

graphs: ModuleType = zoo.recipe("graphs")
states: ModuleType = zoo.recipe("states")
forward: ModuleType = zoo.recipe("forward")
NAMES = ("resnet50", "yolov8s", "distilhubert")


@dataclass(frozen=True)
class Made:
    """One network, built by the zoo, and built again beside it with its tensors kept."""

    recipe: ModuleType
    file: Path
    facts: Facts
    guess: Guess
    tensors: dict[str, np.ndarray[Any, Any]]
    results: dict[str, np.ndarray[Any, Any] | None]
    notes: tuple[str, ...]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    known: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in known:
            recipe = zoo.recipe(name)
            kept: list[Any] = []

            class Kept(graphs.Graph):  # type: ignore[misc, name-defined]
                def __init__(self, *arguments: Any) -> None:
                    super().__init__(*arguments)
                    kept.append(self)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(recipe, "Graph", Kept)
                built = zoo.build_files(name, tmp_path_factory.mktemp(name))
            facts = read_facts(built.model)
            tensors, results = kept[0].parameters.tensors, kept[0].results
            known[name] = Made(recipe, built.model, facts, guess(built.model), tensors, results, built.notes)
        return known[name]

    return make


def learned(tensors: dict[str, np.ndarray[Any, Any]]) -> int:
    """Parameters as they are published: running statistics are not learned."""
    return sum(t.size for name, t in tensors.items() if ".running_" not in name)


# --- the published sizes


@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("resnet50", 25_557_032, 4_089_184_256),  # torchvision's table: 25,557,032; 4.09 GFLOPS (MACs)
        ("yolov8s", 11_166_560, 14_301_312_000),  # the model's summary: 11,166,560; 28.6 GFLOPs
        ("distilhubert", 23_491_200, 3_406_329_856),  # 23.49 M (the article's table)
    ],
)
def test_sizes_are_the_published_ones(
    made: Callable[[str], Made], name: str, parameters: int, macs: int
) -> None:
    network = made(name)
    assert learned(network.tensors) == parameters
    assert network.facts.macs == pytest.approx(macs, rel=1e-6)
    assert network.facts.parameters == pytest.approx(parameters, rel=0.004)  # and shapes, grids, statistics
    assert network.facts.opset == 17


def test_resnet_leaves_its_norms_to_the_optimiser(made: Callable[[str], Made]) -> None:
    operators = made("resnet50").facts.operators
    assert operators["Conv"] == operators["BatchNormalization"] == 53
    assert operators["Relu"] == 49


def test_yolo_has_the_operators_of_its_exporter(made: Callable[[str], Made]) -> None:
    operators = made("yolov8s").facts.operators
    assert (operators["Sigmoid"], operators["Mul"]) == (58, 58)  # 57 activations, the scores, the strides
    assert (operators["MaxPool"], operators["Resize"], operators["Softmax"]) == (3, 2, 1)
    assert "BatchNormalization" not in operators


def test_distilhubert_has_attention_and_gelu_in_pieces(made: Callable[[str], Made]) -> None:
    operators = made("distilhubert").facts.operators
    assert (operators["Erf"], operators["LayerNormalization"], operators["Softmax"]) == (10, 5, 2)
    assert operators["InstanceNormalization"] == 1


# --- what they answer


def photographs(size: int) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = graphs.photographs(size)
    return found


@pytest.mark.parametrize(
    ("name", "output", "shape"),
    [
        ("resnet50", "logits", (1, 1000)),
        ("yolov8s", "output0", (1, 84, 8400)),
        ("distilhubert", "features", (1, 49, 768)),
    ],
)
def test_they_run_and_their_activations_stay_sane(
    made: Callable[[str], Made], name: str, output: str, shape: tuple[int, ...]
) -> None:
    network = made(name)
    contract = network.guess.complete().contract
    session = open_exact(network.file)
    source = contract.source
    if source.image is None:
        feed = np.random.default_rng(3).standard_normal((1, 16_000)).astype(np.float32)
    else:
        scale, bias = (np.array(v)[:, None, None] for v in (source.image.scale, source.image.bias))
        tiles = np.tile(photographs(224)[:1] * 255 * scale + bias, (1, 1, 3, 3))
        feed = tiles[:, :, : source.image.height, : source.image.width].astype(np.float32)
    [found] = session.run({source.name: feed})
    session.close()
    assert [port.name for port in contract.outputs] == [output]
    assert found.shape == shape
    assert np.isfinite(found).all()
    if name == "yolov8s":
        assert found[:, 4:].min() >= 0
        assert found[:, 4:].mean() < 0.1, "a detector finds little in most places"
        assert np.abs(found[:, :4]).max() < 2000
    else:
        assert 0.3 < found.std() < 10


def test_the_runtime_computes_what_numpy_computed(made: Callable[[str], Made], tmp_path: Path) -> None:
    """The probe's results come from operators that share nothing with the runtime's."""
    hubert = made("distilhubert")
    session = open_exact(hubert.file)
    [found] = session.run({"audio": hubert.recipe.chirps().astype(np.float32)})
    session.close()
    np.testing.assert_allclose(found, hubert.results["features"], atol=2e-4)

    resnet = made("resnet50")
    model = onnx.load(str(resnet.file))
    for dimension in model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dimension.dim_param = "side"
    onnx.save(model, str(tmp_path / "any-size.onnx"))
    sidecars = zoo.recipe("sidecars")
    mean, spread = (np.array(v)[:, None, None] for v in (sidecars.IMAGENET_MEAN, sidecars.IMAGENET_SPREAD))
    probe = ((photographs(resnet.recipe.PROBE_SIZE) - mean) / spread).astype(np.float32)
    session = open_exact(tmp_path / "any-size.onnx")
    [found] = session.run({"image": probe[:3]})
    session.close()
    expected = resnet.results["logits"]
    assert expected is not None
    np.testing.assert_allclose(found, expected[:3], atol=2e-3)


# --- the same bytes


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("resnet50", "f25e5680047e0c4503b0e1755793e59a30248c059ab4d4678002474856dd22a9"),
        ("yolov8s", "b8d1411d1a1f7c1fc631dd76c5b8634ef724cd464898a46d117fb7d0c37968ea"),
        ("distilhubert", "b7aeb81f07a82b084418c73084464d72420b6f93dc2188e287804a361c8e4454"),
    ],
)
def test_every_machine_builds_the_same_bytes(made: Callable[[str], Made], name: str, digest: str) -> None:
    """Seen the same with AVX-512, AVX2 and AVX, one thread and two, NumPy 2.2 and 2.4."""
    assert hashlib.sha256(made(name).file.read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", NAMES)
def test_what_is_random_says_so_everywhere(made: Callable[[str], Made], name: str) -> None:
    network = made(name)
    assert network.guess.name == network.file.stem == f"{name}-random"
    assert "random weights" in network.facts.metadata["about"]
    assert "means nothing" in network.notes[0]
    assert "means nothing" in network.file.with_suffix(".toml").read_text(encoding="utf-8")
    assert network.guess.annotations == {"licence": "Apache-2.0"}


# --- own weights


@pytest.mark.parametrize("name", NAMES)
def test_a_state_dict_of_the_usual_names_makes_the_trained_network(
    made: Callable[[str], Made], tmp_path: Path, name: str
) -> None:
    """The random network's own tensors, saved and loaded: the same nodes and weights, without any probe."""
    network = made(name)
    np.savez(tmp_path / "state.npz", **network.tensors)
    built = zoo.build_files(name, tmp_path, weights=tmp_path / "state.npz")
    assert (built.model.name, built.notes) == (f"{name}.onnx", ())
    ours, theirs = onnx.load(str(built.model)).graph, onnx.load(str(network.file)).graph
    assert ours.node == theirs.node
    assert ours.initializer == theirs.initializer


def test_prefixes_and_older_names_are_understood(made: Callable[[str], Made], tmp_path: Path) -> None:
    tensors = dict(made("distilhubert").tensors)
    at = "encoder.pos_conv_embed.conv."
    tensors[f"{at}parametrizations.weight.original0"] = tensors.pop(f"{at}weight_g")
    tensors[f"{at}parametrizations.weight.original1"] = tensors.pop(f"{at}weight_v")
    tensors["masked_spec_embed"] = np.zeros(768, np.float32)
    np.savez(tmp_path / "state.npz", **{f"hubert.{name}": tensor for name, tensor in tensors.items()})
    assert zoo.build("distilhubert", tmp_path, weights=tmp_path / "state.npz").name == "distilhubert.onnx"


def test_a_state_dict_that_does_not_fit_is_rejected_by_name(
    made: Callable[[str], Made], tmp_path: Path
) -> None:
    tensors = dict(made("resnet50").tensors)
    del tensors["layer3.5.bn2.bias"]
    tensors["fc.weight"] = tensors["fc.weight"][:10]
    tensors["extra.weight"] = np.zeros(3, np.float32)
    np.savez(tmp_path / "state.npz", **tensors)
    with pytest.raises(Rejected) as caught:
        zoo.build("resnet50", tmp_path / "out", weights=tmp_path / "state.npz")
    for part in ("layer3.5.bn2.bias", "fc.weight is (10, 2048), not (1000, 2048)", "extra.weight"):
        assert part in caught.value.what
    assert not list((tmp_path / "out").glob("*.onnx"))


# --- the operators in NumPy


def test_erf_and_rounding() -> None:
    import math

    x = np.linspace(-5, 5, 201)
    np.testing.assert_allclose(forward.erf(x), [math.erf(v) for v in x], atol=2e-7)
    assert forward.rounded(np.array([0.0, 1.0, -3.0])).tolist() == [0.0, 1.0, -3.0]
    np.testing.assert_allclose(forward.rounded(x), x, rtol=2**-12, atol=0)


def test_drawn_tensors_do_not_depend_on_one_another() -> None:
    one, other = graphs.Seeded(), graphs.Seeded()
    other.get("first", (3,), graphs.normal((3,), 1.0))
    draw = graphs.normal((4,), 1.0)
    np.testing.assert_array_equal(one.get("second", (4,), draw), other.get("second", (4,), draw))
    assert not np.array_equal(graphs.Seeded(1).get("second", (4,), draw), one.tensors["second"])
