"""Sessions: what loads, what does not, and the one line that says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from conftest import missing
from edgeward_runtime.sessions import (
    CPU,
    NotLoaded,
    Placement,
    RunFailed,
    WrongProvider,
    available_providers,
    open_exact,
    open_session,
    profiled_placement,
    reason_of,
    save_optimised,
    tensorrt_major,
)
from edgeward_wire.verdict import Plan
from runtime.builders import classifier, int8_classifier

IMAGE = {"image": np.zeros((1, 3, 32, 32), np.float32)}


def plan(provider: str = CPU, **more: object) -> Plan:
    return Plan.model_validate({"provider": provider, "variant": "int8", **more})


def test_a_session_knows_its_ports_and_runs(tmp_path: Path) -> None:
    session = open_session(int8_classifier(tmp_path / "m.onnx", metadata={"a": "b"}), plan(), placement=True)
    assert [(p.name, p.dtype, p.shape) for p in session.inputs] == [
        ("image", "float32", ("batch", 3, 32, 32))
    ]
    assert session.metadata == {"a": "b"}
    (logits,) = session.run(IMAGE)
    assert logits.shape == (1, 3)
    with pytest.raises(RunFailed, match=r"A run failed: .*32"):
        session.run({"image": np.zeros((1, 3, 9, 9), np.float32)})


def test_all_nodes_are_on_the_cpu(tmp_path: Path) -> None:
    path = int8_classifier(tmp_path / "m.onnx")
    profiled = profiled_placement(path, plan(), IMAGE)
    assert profiled is not None
    assert profiled.on_provider == profiled.total > 0
    recorded = open_session(path, plan(), placement=True).placement()
    if recorded is not None:  # ONNX Runtime 1.24 and newer
        assert recorded == Placement(recorded.total, recorded.total)
    assert open_session(path, plan()).placement() is None


@pytest.mark.parametrize("session", [{}, {"session.x64quantprecision": "1"}])
def test_exact_and_optimised_agree(tmp_path: Path, session: dict[str, str]) -> None:
    path = int8_classifier(tmp_path / "m.onnx")
    noise = {"image": np.random.default_rng(0).random((1, 3, 32, 32), np.float32)}
    exact, fast = open_exact(path).run(noise)[0], open_session(path, plan(session=session)).run(noise)[0]
    np.testing.assert_allclose(fast, exact, atol=0.13)


@pytest.mark.parametrize(("level", "own"), [("none", False), ("basic", False), ("extended", True)])
def test_the_optimised_graph_can_be_saved(tmp_path: Path, level: str, own: bool) -> None:
    path = classifier(tmp_path / "m.onnx")
    save_optimised(path, plan(optimisation=level), tmp_path / "out.onnx")
    nodes = onnx.load(str(tmp_path / "out.onnx")).graph.node
    assert any(node.domain == "com.microsoft" for node in nodes) is own
    ones = {"image": np.ones((1, 3, 32, 32), np.float32)}
    np.testing.assert_allclose(
        open_session(tmp_path / "out.onnx", plan()).run(ones)[0], open_exact(path).run(ones)[0], rtol=1e-5
    )


def test_what_does_not_load_is_not_saved(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"hello")
    with pytest.raises(NotLoaded):
        save_optimised(tmp_path / "m.onnx", plan(), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_a_provider_that_is_not_built_in_does_not_load(tmp_path: Path) -> None:
    with pytest.raises(NotLoaded, match="Qnn is not in this build"):
        open_session(classifier(tmp_path / "m.onnx"), plan("QnnExecutionProvider"))


def test_a_provider_that_falls_back_in_silence_is_caught(tmp_path: Path) -> None:
    """The GPU build on a machine without a GPU: CUDA is listed, and a CPU session comes back."""
    if "CUDAExecutionProvider" not in available_providers():
        pytest.skip("this is not the GPU build of ONNX Runtime")  # .ci/run has an environment for it
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU: CUDA works")
    with pytest.raises(WrongProvider):
        open_session(classifier(tmp_path / "m.onnx"), plan("CUDAExecutionProvider"))


@pytest.mark.parametrize("raw", [b"", b"hello", b"\x08" * 40])
def test_what_is_not_onnx_does_not_load(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(raw)
    with pytest.raises(NotLoaded) as caught:
        open_session(path, plan())
    assert "\n" not in caught.value.what
    assert str(tmp_path) not in caught.value.what


def test_a_future_operator_set_is_named(tmp_path: Path) -> None:
    path = classifier(tmp_path / "m.onnx")
    model = onnx.load(path)
    model.opset_import[0].version = 99
    onnx.save(model, path)
    with pytest.raises(NotLoaded, match=r"operator set 99; ONNX Runtime .* reads up to \d+\."):
        open_session(path, plan())


def test_reasons_are_short() -> None:
    noisy = RuntimeError(
        "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for QGemm(1) node with"
        " name 'x'\n\n" + "y" * 1000
    )
    reason = reason_of(noisy)
    assert reason.startswith("Could not find an implementation for QGemm(1)")
    assert len(reason) <= 300


def test_the_shipped_model_loads() -> None:
    path = Path(__file__).parents[2] / "models/zoo/efficientnet-lite0.onnx"
    if not path.is_file():
        missing("the shipped model")
    assert open_session(path, plan()).outputs[0].shape[-1] == 1000


def test_bound_inputs_give_the_same_and_share_nothing(tmp_path: Path) -> None:
    """CUDA's way of running, on the CPU: shapes change, arrays are used again, outputs are kept."""
    path = classifier(tmp_path / "m.onnx", batch="batch")
    plain, bound = open_session(path, plan()), open_session(path, plan(), bound=True)
    random = np.random.default_rng(0)
    image = random.random((1, 3, 32, 32), np.float32)
    (first,) = bound.run({"image": image})
    kept = first.copy()
    for batch in (1, 1, 2, 1):
        image = random.random((batch, 32, 32, 3), np.float32).transpose(0, 3, 1, 2)  # not contiguous
        (theirs,), (ours,) = plain.run({"image": image}), bound.run({"image": image})
        assert np.array_equal(theirs, ours)
    assert np.array_equal(first, kept), "a later run wrote into an earlier one's outputs"
    with pytest.raises(RunFailed):
        bound.run({"image": np.zeros((1, 3, 9, 9), np.float32)})
    assert np.array_equal(bound.run({"image": image})[0], ours), "it works again after a wrong input"


def test_the_version_of_tensorrt_is_that_of_the_build() -> None:
    linked = "TensorrtExecutionProvider" in available_providers()
    assert tensorrt_major() is None or linked
