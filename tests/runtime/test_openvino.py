"""OpenVINO as a real second provider: its plans load, run on it, are judged by parity, and may win.

These need the OpenVINO build of ONNX Runtime, which excludes the plain one: scripts/test-matrix makes the
environment and runs `-m openvino`.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from conftest import missing
from edgeward_agent.messages import Qualify, QualifyMessage, QualifyProgress
from edgeward_agent.qualify import qualify, subject_of
from edgeward_runtime import golden, parity, resources
from edgeward_runtime.plans import CPU, OPENVINO, Machine, VariantFacts, candidates
from edgeward_runtime.probe import probe
from edgeward_runtime.sessions import (
    NotLoaded,
    WrongProvider,
    available_providers,
    open_exact,
    open_session,
    profiled_placement,
)
from edgeward_wire.verdict import Plan
from runtime.builders import classifier, int8_classifier, picture_directory
from runtime.bundles import Bundle, colour_bundle

pytestmark = pytest.mark.openvino

ZOO = Path(__file__).parents[2] / "models/zoo"
SHIPPED = ZOO / "efficientnet-lite0.onnx"
PLAN = Plan(provider=OPENVINO, variant="int8", options={"device_type": "CPU", "num_of_threads": "1"})


@pytest.fixture(scope="module", autouse=True)
def build() -> None:
    if OPENVINO not in available_providers():
        missing("the OpenVINO build of ONNX Runtime")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return colour_bundle(tmp_path_factory.mktemp("openvino"), float_too=True)


def order(bundle: Bundle, *, threads: int = 1, providers: tuple[str, ...] = ()) -> Qualify:
    return Qualify(
        model=bundle.ref,
        manifest=bundle.manifest,
        blobs=str(bundle.blobs),
        threads=threads,
        providers=providers,
        key="0" * 64,
        lock="",
        scratch="",
    )


def agent(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeward_agent.cli", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# --- sessions


@pytest.mark.parametrize("make", [int8_classifier, classifier])
def test_all_nodes_run_on_it_and_give_the_exact_answer(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "m.onnx")
    session = open_session(path, PLAN, placement=True)
    noise = {"image": np.random.default_rng(0).random((1, 3, 32, 32), np.float32)}
    assert parity.cosine(session.run(noise)[0], open_exact(path).run(noise)[0]) >= 0.99
    recorded, profiled = session.placement(), profiled_placement(path, PLAN, noise)
    for placement in (recorded, profiled):
        assert placement is not None
        assert placement.on_provider == placement.total > 0


@pytest.mark.parametrize("device", ["NPU", "NONE"])
def test_a_device_that_is_not_there_is_no_session_on_it(device: str, bundle: Bundle) -> None:
    """An absent device falls back to a CPU session; an unknown one keeps the name, and runs no node."""
    subject = subject_of(order(bundle))
    plan = PLAN.model_copy(update={"options": {"device_type": device}})
    found = probe(subject, [plan, Plan(provider=CPU, variant="int8")])
    assert found.outcomes[0].outcome == "wrong_provider"
    assert "CPU" in found.outcomes[0].reason
    assert {o.outcome for o in found.outcomes[1:]} <= {"passed", "chosen"}
    assert found.chosen is not None
    assert found.chosen.provider == CPU


def test_an_unknown_option_does_not_load(tmp_path: Path) -> None:
    plan = PLAN.model_copy(update={"options": {"bogus": "1"}})
    with pytest.raises(NotLoaded, match="bogus") as caught:
        open_session(int8_classifier(tmp_path / "m.onnx"), plan)
    assert not isinstance(caught.value, WrongProvider)


def test_what_it_compiles_is_kept_apart_by_weights(tmp_path: Path) -> None:
    """Two models of one architecture in one cache: each gives its own answer, also from the cache."""
    cache = tmp_path / "cache"
    plan = PLAN.model_copy(update={"options": {**PLAN.options, "cache_dir": str(cache)}})
    one, other = classifier(tmp_path / "one.onnx"), tmp_path / "other.onnx"
    turned = onnx.load(one)
    dense = next(tensor for tensor in turned.graph.initializer if tensor.name == "dense")
    dense.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(dense), "dense"))
    onnx.save(turned, other)
    noise = {"image": np.random.default_rng(0).random((1, 3, 32, 32), np.float32)}
    for path in (one, other, one, other):
        exact = open_exact(path).run(noise)[0]
        assert np.allclose(open_session(path, plan).run(noise)[0], exact, atol=1e-3)
    assert any(cache.iterdir())


# --- verdicts


def test_it_is_tried_before_the_cpu_with_every_variant() -> None:
    machine = Machine(resources.machine(), resources.isa(), available_providers())
    facts = {p: VariantFacts(p, p) for p in ("int8", "fp32")}  # type: ignore[arg-type]
    found = candidates(facts, machine, threads=2)
    assert [p.title for p in found[:2]] == ["OpenVINO int8 x2", "OpenVINO fp32 x2"]
    assert {p.provider for p in found[2:]} == {CPU}


def test_a_verdict_counts_its_plans_with_their_numbers(bundle: Bundle) -> None:
    said: list[QualifyMessage] = []
    verdict = qualify(order(bundle, threads=2), said.append)
    assert verdict.chosen is not None
    mine = [o for o in verdict.plans if o.plan.provider == OPENVINO]
    assert {o.plan.variant for o in mine} == {"int8", "fp32"}
    for outcome in mine:
        assert outcome.outcome in {"passed", "chosen"}, outcome.reason
        assert outcome.nodes_on_provider == outcome.nodes_total
        assert outcome.nodes_total
        assert outcome.parity is not None
        assert outcome.parity >= 0.99
        assert outcome.p50_ms is not None
        assert not outcome.unverified
    assert any(isinstance(m, QualifyProgress) and m.note.startswith("OpenVINO") for m in said)


def test_it_is_chosen_where_it_alone_is_allowed(bundle: Bundle) -> None:
    verdict = qualify(order(bundle, providers=("openvino",)), lambda _: None)
    assert {o.plan.provider for o in verdict.plans} == {OPENVINO}
    assert verdict.chosen is not None
    assert verdict.chosen.provider == OPENVINO


def test_wrong_outputs_lose_on_it_too(bundle: Bundle) -> None:
    subject = subject_of(order(bundle))
    arrays = golden.read_npz(subject.variants["int8"].golden)
    arrays = {k: (v[:, ::-1].copy() if k.startswith("out.") else v) for k, v in arrays.items()}
    wrong = dataclasses.replace(subject.variants["int8"], golden=golden.write_npz(arrays))
    changed = dataclasses.replace(subject, variants={**subject.variants, "int8": wrong})
    found = probe(changed, [PLAN, PLAN.model_copy(update={"variant": "fp32"})])
    assert [o.outcome for o in found.outcomes] == ["wrong_output", "chosen"]
    assert "below 0.99" in found.outcomes[0].reason


# --- the shipped model, as people meet it


def test_probe_prints_it_for_the_shipped_model() -> None:
    said = agent("probe", SHIPPED)
    assert (said.returncode, said.stderr) == (0, "")
    lines = [line for line in said.stdout.splitlines() if line.startswith("OpenVINO int8 x")]
    assert len(lines) == 1
    assert " passed " in lines[0] or " chosen " in lines[0]
    assert "Best: " in said.stdout


def test_the_shipped_model_is_right_on_it() -> None:
    said = agent("probe", SHIPPED, "--provider", "openvino", "--json")
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    (outcome,) = found["plans"]
    assert found["chosen"]["provider"] == OPENVINO
    assert outcome["outcome"] == "chosen"
    assert outcome["nodes_on_provider"] == outcome["nodes_total"] > 100
    assert outcome["parity"] >= 0.99


def test_run_serves_on_it(bundle: Bundle, tmp_path: Path) -> None:
    files = bundle.blobs.parent / "files-1"
    pictures = picture_directory(tmp_path / "pictures")
    said = agent(
        "run", "--model", files / "int8.onnx", "--source", pictures, "--provider", "openvino", "--json"
    )
    assert said.returncode == 0, said.stderr
    *frames, summary = (json.loads(line) for line in said.stdout.splitlines())
    assert [frame["top"][0]["label"] for frame in frames] == ["red", "green", "blue"]
    assert summary["plan"].startswith("OpenVINO int8")
