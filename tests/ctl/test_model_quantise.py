"""`agent-ctl model quantise` as a process: exit codes, what stands where, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgeward_models.schemes import TARGETS
from edgeward_runtime import resources
from models import search_models
from models.graphs import convolution_block, save
from runtime import builders

HERE = next(name for name, target in TARGETS.items() if target.arch == resources.machine())
AGENT_CTL = Path(sys.executable).parent / "agent-ctl"


def ctl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [AGENT_CTL, "model", "quantise", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return search_models.beside(search_models.heavy(tmp_path / "net.onnx"))


def test_a_table_and_the_files_on_stdout_and_the_next_step_on_stderr(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = ctl(model, "--out", out, "--budget", "1s")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split()[:3] == ["candidate", "SQNR", "agreement"]
    assert "chosen" in done.stdout
    assert "x as fast as FP32" in done.stdout
    assert f"offered  {out / 'net.onnx'}" in done.stdout
    assert f"report   {out / 'report.md'}" in done.stdout
    assert "searching: done" in done.stderr
    assert f"next: agent-ctl deploy {out / 'net.onnx'}" in done.stderr


def test_noise_is_weak_evidence_and_what_stays_in_float_is_named(tmp_path: Path) -> None:
    model = search_models.heavy(tmp_path / "net.onnx", last="Erf")
    done = ctl(
        model,
        "--out",
        tmp_path / "out",
        "--budget",
        "1s",
        "--task",
        "tensor",
        "--target",
        HERE,
        "--target",
        "cuda",
    )
    assert "Weak evidence" in done.stderr, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("In float on this target")] == [
        "In float on this target: Erf."
    ]  # of FP16 everything is
    assert f"offered  {tmp_path / 'out' / 'net-cuda.onnx'}" in done.stdout
    assert 'task = "tensor"' in (tmp_path / "out" / "net.toml").read_text()


def test_one_json_document(model: Path, tmp_path: Path) -> None:
    done = ctl(model, "--out", tmp_path / "out", "--budget", "1s", "--json", "--keep-float", "conv1")
    told = json.loads(done.stdout)
    assert (told["exit"], told["targets"][0]["file"]) == (0, "net.onnx")
    assert all("conv1" in one["scheme"]["keep_float"] for one in told["targets"][0]["candidates"])


def test_a_gate_that_fails_is_exit_code_one(model: Path, tmp_path: Path) -> None:
    done = ctl(model, "--out", tmp_path / "out", "--budget", "1s", "--min-sqnr", "150")
    assert done.returncode == 1
    assert "nothing passes the gate" in done.stdout
    assert "offered" not in done.stdout
    assert "next: Give more" in done.stderr


def test_int8_that_does_not_pay_is_exit_code_one(tmp_path: Path) -> None:
    model = save(tmp_path / "net.onnx", convolution_block(size=8, channels=3))
    builders.sidecar_file(tmp_path / "net.toml", size=8)
    sidecar = (tmp_path / "net.toml").read_text().replace("logits", "scores")
    (tmp_path / "net.toml").write_text(sidecar)
    builders.labels_file(tmp_path / "labels.txt")
    done = ctl(model, "--out", tmp_path / "out", "--budget", "1s")
    assert done.returncode == 1, done.stderr
    assert not (tmp_path / "out" / "net.onnx").exists()
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--budget", "soon"), "no length of time"),
        (("--target", "x87"), "no target"),
        (("--samples", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_an_error_with_a_next_step(
    arguments: tuple[str, str], word: str, model: Path, tmp_path: Path
) -> None:
    done = ctl(model, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert word in errors[0]
    assert "next: " in done.stderr
    assert "Traceback" not in done.stderr


def test_an_int8_file_is_refused(tmp_path: Path) -> None:
    model = search_models.beside(builders.int8_classifier(tmp_path / "colours.onnx"))
    done = ctl(model, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "INT8 already" in done.stderr


def test_what_cannot_be_written_is_unavailable(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = ctl(model, "--out", tmp_path / "file" / "out")
    assert done.returncode == 69
    assert "cannot be made" in done.stderr
