"""`agent-ctl model evaluate` as a process: what people see, exit codes, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from runtime import builders

AGENT_CTL = Path(sys.executable).parent / "agent-ctl"


def ctl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [AGENT_CTL, "model", "evaluate", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluate")
    builders.int8_classifier(root / "int8.onnx")
    builders.classifier(root / "fp32.onnx")
    builders.labels_file(root / "labels.txt")
    builders.sidecar_file(root / "int8.toml")
    for colour in builders.COLOURS:
        builders.picture_file(root / "data" / colour / "0.png", colour)
    # Red pictures that are called blue: wrong by construction.
    builders.picture_file(root / "data/blue/1.png", "red")
    return root


def test_a_table_a_gate_and_how_sure_it_is(home: Path) -> None:
    done = ctl(
        home / "int8.onnx",
        "--against",
        home / "fp32.onnx",
        "--data",
        home / "data",
        "--max-drop",
        "0.1",
        "--per-layer",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("model     int8.onnx, int8, ")
    assert "labelled  4 pictures of 3 classes in data" in lines
    top1 = next(line.split() for line in lines if line.startswith("top-1 "))
    assert top1[:6] == ["top-1", "75.0", "%", "30.1", "to", "95.4"]
    assert any(line.split() == ["blue", "red", "1"] for line in lines)
    assert any(line.startswith("layer, worst first") for line in lines)
    assert any(line.startswith("gate passed: top-1, drop 0.0 points (") for line in lines)
    assert any("not decided: the interval spans the gate" in line for line in lines)
    assert "evaluating" in done.stderr


def test_a_gate_that_fails_ends_with_1(home: Path) -> None:
    worse = builders.classifier(home / "other.onnx", salt=1)
    done = ctl(
        worse, "--against", home / "fp32.onnx", "--sidecar", home / "int8.toml", "--max-drop", "0", "--json"
    )
    told = json.loads(done.stdout)
    assert (done.returncode, told["gate"]["passed"], told["gate"]["decided"]) == (0, True, False)
    # Rows that say something else: the same file with its classes in another order.
    model = onnx.load(str(worse))
    for tensor in model.graph.initializer:
        if tensor.name == "dense":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), "dense"))
    worse.write_bytes(model.SerializeToString())
    arguments = ["--against", home / "fp32.onnx", "--sidecar", home / "int8.toml", "--data", home / "data"]
    done = ctl(worse, *arguments, "--max-drop", "0.1")
    assert done.returncode == 1
    assert "gate FAILED: top-1, drop 25.0 points" in done.stdout


def test_bad_input_is_an_error_with_a_next_step(home: Path) -> None:
    for arguments, why in (
        ([home / "int8.onnx"], "error: There is nothing to hold int8.onnx against."),
        ([home / "labels.txt", "--data", home / "data"], "error: labels.txt is not an ONNX file"),
        ([home / "int8.onnx", "--data", home / "nowhere"], "error: There is no labelled data at"),
    ):
        done = ctl(*arguments)
        assert done.returncode == 2
        assert done.stderr.startswith(why), done.stderr
        assert "next: " in done.stderr
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
