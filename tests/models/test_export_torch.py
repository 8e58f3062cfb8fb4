"""Real modules through PyTorch's two exporters: each file gives what the module gives, or there is no file.

Needs PyTorch and onnxscript: scripts/test-matrix torch.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="PyTorch is not installed here")
pytest.importorskip("onnxscript", reason="onnxscript is not installed here")

import torch
from torch import nn

from edgeward_models.export import archives
from edgeward_models.export.dispatch import export_source
from edgeward_models.export.inputs import parse_input
from edgeward_models.export.report import ExportOptions, ExportReport
from edgeward_models.export.torch_models import export_torch
from edgeward_models.export.verify import Tolerance
from edgeward_runtime.contract_guess import guess
from edgeward_runtime.sessions import open_exact
from edgeward_wire.errors import Rejected

pytestmark = pytest.mark.torch
EITHER = pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
X = torch.linspace(-1, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)


class Cnn(nn.Module):
    """Convolution, batch normalisation with statistics of its own, pooling, classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.norm.running_mean += torch.arange(8) * 0.1
        self.norm.running_var *= 3
        self.classes = nn.Linear(8, 5)

    def forward(self, image: Any) -> Any:
        return self.classes(self.drop(torch.relu(self.norm(self.conv(image))).mean((2, 3))))


class TwoInputs(nn.Module):
    """Words and numbers in; a mapping with a nested one out."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 8), nn.Linear(12, 3)

    def forward(self, ids: Any, extra: Any, scale: float = 1.0) -> Any:
        mixed = torch.cat([self.words(ids).mean(1), extra * scale], 1)
        return {"logits": self.head(mixed), "more": {"mixed": mixed}, "nothing": None}


class Memory(nn.Module):
    """An LSTM with its state as inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x: Any, h: Any, c: Any) -> Any:
        y, (h, c) = self.cells(x, (h, c))
        return y, h, c


class Branching(nn.Module):
    """Its way depends on what comes in."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # what TorchScript compiles must name its types
        if x.sum() > 0:
            return x * 2
        return x - 1


class Spectral(nn.Module):
    """No exporter knows eigenvalues."""

    def forward(self, x: Any) -> Any:
        return torch.linalg.eigvals(x).real


class Noisy(nn.Module):
    """Other outputs each time."""

    def forward(self, x: Any) -> Any:
        return nn.functional.dropout(x, 0.5, training=True)


class Infinite(nn.Module):
    """Divides by nothing."""

    def forward(self, x: Any) -> Any:
        return x, x / (x - x)


class Scaled(nn.Module):
    """Half precision beside a table of its own."""

    def forward(self, x: Any) -> Any:
        return (x * 0.5).argmax(1)


def exported(module: Any, examples: Any, tmp_path: Path, **how: Any) -> ExportReport:
    report = export_torch(module, examples, tmp_path / "model.onnx", ExportOptions(**how))
    assert report.passed, report.verification.failure
    assert report.out == tmp_path / "model.onnx"
    return report


def ports(report: ExportReport) -> dict[str, tuple[int | str, ...]]:
    return {port.name: port.shape for port in (*report.facts.inputs, *report.facts.outputs)}


def run(path: Path, **feeds: Any) -> list[Any]:
    session = open_exact(path)
    try:
        return session.run({name: np.asarray(value) for name, value in feeds.items()})
    finally:
        session.close()


# --- what works


@EITHER
def test_a_network_is_exported_in_eval_mode_with_an_open_batch(exporter: str, tmp_path: Path) -> None:
    module = Cnn().train()
    report = exported(module, X, tmp_path, exporter=exporter, dynamic_batch=True, labels=tuple("abcde"))
    assert report.exporter == exporter
    assert module.training
    assert module.norm.training
    assert "the module was in training mode: exported in eval mode." in report.notes
    assert ports(report) == {"image": ("batch", 3, 16, 16), "output": ("batch", 5)}
    assert report.verification.batches == (1, 3)
    assert report.verification.labels == (8, 8)
    assert "BatchNormalization" not in report.facts.operators or exporter == "torchscript"
    assert "Dropout" not in report.facts.operators
    module.eval()
    images = np.random.default_rng(0).random((2, 3, 16, 16), np.float32)
    np.testing.assert_allclose(
        run(tmp_path / "model.onnx", image=images)[0],
        module(torch.from_numpy(images)).detach().numpy(),
        atol=1e-5,
    )


def test_the_file_is_one_and_tells_nothing_of_this_machine(tmp_path: Path) -> None:
    report = exported(Cnn(), X, tmp_path, task="classification")
    raw = (tmp_path / "model.onnx").read_bytes()
    assert str(Path(__file__).parent).encode() not in raw
    assert b"site-packages" not in raw
    assert not report.facts.external
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert json.loads(report.facts.metadata["edgeward"]) == {"task": "classification"}
    assert json.loads(report.facts.metadata["edgeward.export"])["exporter"] == "dynamo"
    assert guess(tmp_path / "model.onnx").contract.task == "classification"


@EITHER
def test_a_transformer_layer_is_exported(exporter: str, tmp_path: Path) -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of nested tensors, which are not used
        module = nn.TransformerEncoder(layer, 1)
    fused = torch.backends.mha.get_fastpath_enabled()
    report = exported(module, torch.randn(1, 7, 16), tmp_path, exporter=exporter)
    assert report.facts.operators["MatMul"] + report.facts.operators.get("Gemm", 0) >= 4
    assert torch.backends.mha.get_fastpath_enabled() == fused


@EITHER
def test_two_inputs_and_a_mapping_come_out_by_their_names(exporter: str, tmp_path: Path) -> None:
    examples = {"extra": torch.randn(1, 4), "ids": torch.randint(0, 50, (1, 6))}
    report = exported(TwoInputs(), examples, tmp_path, exporter=exporter, dynamic_batch=True)
    assert ports(report) == {
        "ids": ("batch", 6),
        "extra": ("batch", 4),
        "logits": ("batch", 3),
        "more_mixed": ("batch", 12),
    }
    assert [port.dtype for port in report.facts.inputs] == ["int64", "float32"]


@EITHER
def test_a_state_is_carried_and_declared(exporter: str, tmp_path: Path) -> None:
    examples = (torch.randn(1, 5, 4), torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
    names = ("y", "h_out", "c_out")
    states = {"h": "h_out", "c": "c_out"}
    report = exported(Memory(), examples, tmp_path, exporter=exporter, states=states, output_names=names)
    assert report.verification.trials == 6
    contract = guess(tmp_path / "model.onnx", flags={"task": "tensor"}).contract
    assert {port.name: port.bind for port in contract.inputs} == {
        "x": "source",
        "h": "state:h",
        "c": "state:c",
    }
    assert contract.stateful


@EITHER
def test_the_batch_may_be_anywhere(exporter: str, tmp_path: Path) -> None:
    shapes = tuple(map(parse_input, ("x=Nx5x4", "h=1xNx8", "c=1xNx8")))
    report = exported(Memory(), None, tmp_path, exporter=exporter, inputs=shapes)
    assert ports(report)["h"] == (1, "batch", 8)
    assert report.verification.batches == (1, 3)


@pytest.mark.parametrize(("opset", "exporter"), [(13, "torchscript"), (17, "torchscript"), (23, "dynamo")])
def test_an_opset_that_is_asked_for_is_written(opset: int, exporter: str, tmp_path: Path) -> None:
    report = exported(nn.Sequential(Cnn(), nn.LayerNorm(5), nn.GELU()), X, tmp_path, opset=opset)
    assert (report.facts.opset, report.exporter) == (opset, exporter)


def test_whole_numbers_come_out_as_they_are(tmp_path: Path) -> None:
    report = exported(Scaled(), torch.randn(1, 9), tmp_path, exporter="torchscript")
    assert report.facts.outputs[0].dtype == "int64"


def test_samples_are_what_it_is_verified_with(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", image=np.random.default_rng(0).random((3, 3, 16, 16)))
    report = exported(Cnn(), X, tmp_path, samples=tmp_path / "rows.npz")
    assert (report.verification.evidence, report.verification.trials) == ("rows.npz", 3)


# --- falling back


def test_a_way_that_depends_on_data_falls_to_torchscript_and_says_why(tmp_path: Path) -> None:
    report = exported(Branching(), torch.ones(1, 4), tmp_path)
    assert report.exporter == "torchscript"
    assert report.attempts[0].outcome == "failed"
    assert "depends on the data (test_export_torch.py:" in report.attempts[0].reason
    assert any("compiled, not traced" in note for note in report.notes)
    for x in (np.full((1, 4), 2, np.float32), np.full((1, 4), -2, np.float32)):
        np.testing.assert_array_equal(run(tmp_path / "model.onnx", x=x)[0], Branching()(torch.from_numpy(x)))


def test_a_branch_that_a_trace_lost_is_found_by_verification(tmp_path: Path) -> None:
    """Compiled it would be right; a mapping as result cannot be compiled here, and the trace has one way."""

    class Wrapped(nn.Module):
        def forward(self, x: Any) -> Any:
            return {"y": x * 2 if x.sum() > 0 else x - 1}

    options = ExportOptions(exporter="torchscript")
    report = export_torch(Wrapped(), torch.ones(1, 4), tmp_path / "model.onnx", options)
    assert not report.passed
    assert report.verification.worst is not None
    assert any(
        "only the way that the examples took at test_export_torch.py:" in note for note in report.notes
    )
    assert not list(tmp_path.iterdir())


# --- refusals


def test_an_operator_that_nobody_has_is_named_by_both(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Rejected) as told:
        export_torch(Spectral(), torch.randn(4, 4), tmp_path / "model.onnx")
    assert "dynamo: The operator aten.linalg_eig has no counterpart" in told.value.what
    assert "torchscript: The operator aten.linalg_eigvals has no counterpart" in told.value.what
    sys.stdout.flush()
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


REFUSED: dict[str, tuple[Callable[[], Any], Any, dict[str, Any], str]] = {
    "random": (Noisy, torch.ones(4, 4), {}, "other outputs for the same inputs"),
    "infinite": (
        Infinite,
        torch.ones(1, 2),
        {},
        r"Output output_1 is not finite in the model itself: 2 of 2",
    ),
    "wrong shape": (
        Cnn,
        torch.ones(1, 4, 8, 8),
        {},
        r"does not run on image float32 \(1, 4, 8, 8\).*4 channels",
    ),
    "no inputs": (Cnn, None, {}, "Nothing says what goes into"),
    "double": (Cnn, torch.ones(1, 3, 8, 8).double(), {}, "float64, which no device can feed"),
    "bfloat": (Cnn, torch.ones(1, 3, 8, 8).bfloat16(), {}, "bfloat16"),
    "nested": (Cnn, [[X]], {}, "only tensors can be inputs"),
    "unknown": (Cnn, {"picture": X}, {}, "takes no input 'picture'"),
    "labels": (Cnn, X, {"labels": ("a", "b")}, "2 labels, but the model has 5"),
    "no classes": (Branching, X, {"task": "classification"}, "one row of scores"),
    "batch of a state": (
        Memory,
        (torch.randn(1, 5, 4), torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)),
        {"dynamic_batch": True},
        "does not run on x",
    ),
    "no such state": (Cnn, X, {"states": {"h": "c"}}, "names no input and output"),
    "old opset": (Cnn, X, {"opset": 9, "exporter": "dynamo"}, "writes opset 18 and cannot convert"),
    "not a module": (lambda: "text", None, {}, "is a str, not a torch.nn.Module"),
    "elsewhere": (lambda: nn.Linear(2, 2, device="meta"), torch.ones(1, 2), {}, "lies on meta"),
}


@pytest.mark.parametrize(("make", "examples", "how", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_exported_is_refused(
    make: Callable[[], Any], examples: Any, how: dict[str, Any], told: str, tmp_path: Path
) -> None:
    with pytest.raises(Rejected, match=told) as refused:
        export_torch(make(), examples, tmp_path / "model.onnx", ExportOptions(**how))
    assert "\n" not in refused.value.what
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_close_enough_is_not_left(tmp_path: Path) -> None:
    tight = ExportOptions(tolerance=Tolerance(rtol=0, atol=1e-15))
    report = export_torch(Cnn(), X, tmp_path / "model.onnx", tight)
    assert [(a.exporter, a.outcome) for a in report.attempts] == [
        ("dynamo", "differs"),
        ("torchscript", "differs"),
    ]
    assert report.verification.worst is not None
    assert report.verification.worst.output == "output"
    assert not list(tmp_path.iterdir())


# --- files


def scripted(module: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and what people have
        return torch.jit.trace(module.eval(), X)


def test_a_torchscript_archive_needs_its_shapes(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above
        scripted(Cnn()).save(str(path))
    assert archives.kind_of(path) is archives.TORCHSCRIPT
    with pytest.raises(Rejected, match="Nothing says what goes into") as told:
        export_source(str(path), tmp_path / "out" / "model.onnx")
    assert "--input image=" in told.value.next_step
    options = ExportOptions(inputs=(parse_input("image=Nx3x16x16"),))
    report = export_source(str(path), tmp_path / "out" / "model.onnx", options)
    assert report.exporter == "torchscript"
    assert ports(report)["output"] == ("batch", 5)


def test_a_program_brings_its_examples_and_must_be_trusted(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pytrees, PyTorch's own affair
        torch.export.save(torch.export.export(Cnn().eval(), (X,)), path)
    with pytest.raises(Rejected, match="runs whatever code"):
        export_source(str(path), tmp_path / "model.onnx")
    assert export_source(str(path), tmp_path / "model.onnx", trust=True).exporter == "dynamo"
    with pytest.raises(Rejected, match="does not run") as told:
        export_source(str(path), tmp_path / "x.onnx", ExportOptions(dynamic_batch=True), trust=True)
    assert "dynamic_shapes" in told.value.next_step


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_must_be_trusted_and_weights_are_none(tmp_path: Path, zipped: bool) -> None:
    whole, weights = tmp_path / "whole.pt", tmp_path / "weights.pth"
    torch.save(nn.Linear(4, 2), whole, _use_new_zipfile_serialization=zipped)
    torch.save(nn.Linear(4, 2).state_dict(), weights, _use_new_zipfile_serialization=zipped)
    with pytest.raises(Rejected, match="runs whatever code"):
        export_source(str(whole), tmp_path / "model.onnx")
    options = ExportOptions(inputs=(parse_input("x=1x4"),))
    assert export_source(str(whole), tmp_path / "model.onnx", options, trust=True).passed
    with pytest.raises(Rejected, match="weights only") as told:
        export_source(str(weights), tmp_path / "model.onnx")
    assert "package.module:function" in told.value.next_step


class Claims:
    """Pickles to a call that makes a file: what an attacker would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_an_untrusted_file_runs_nothing(tmp_path: Path) -> None:
    torch.save({"model": Claims(tmp_path / "proof")}, tmp_path / "model.pt")
    with pytest.raises(Rejected, match="runs whatever code"):
        export_source(str(tmp_path / "model.pt"), tmp_path / "model.onnx")
    assert not (tmp_path / "proof").exists()


def test_a_callable_builds_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_nets.py").write_text(
        "import torch\n"
        "print('loading')\n"
        "def build():\n    return torch.nn.Linear(4, 2), torch.ones(1, 4)\n"
        "def broken():\n    raise ValueError('no weights')\n"
        "ready = torch.nn.Linear(4, 2)\n"
        "class Net(torch.nn.Linear):\n    def __init__(self):\n        super().__init__(4, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "model.onnx"
    shapes = ExportOptions(inputs=(parse_input("input=1x4"),), exporter="torchscript")
    assert export_source("my_nets:build", out).source == "my_nets:build"
    assert export_source("my_nets:ready", out, shapes).passed
    assert export_source("my_nets:Net", out, shapes).passed
    with pytest.raises(Rejected, match=r"my_nets:broken failed: ValueError: no weights \(my_nets\.py:6\)"):
        export_source("my_nets:broken", out)
    assert str(tmp_path) not in sys.path
    sys.modules.pop("my_nets")
