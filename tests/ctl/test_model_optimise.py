"""`agent-ctl model optimise` as a process: what people see, exit codes, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from models.graphs import convolution_block, save

AGENT_CTL = Path(sys.executable).parent / "agent-ctl"


def ctl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [AGENT_CTL, "model", "optimise", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save(tmp_path / "conv.onnx", convolution_block())


def test_a_table_for_people_and_a_page(model: Path, tmp_path: Path) -> None:
    done = ctl(model, "--out", tmp_path / "o.onnx", "--seconds", "0.05", "--html", tmp_path / "r.html")
    assert (done.returncode, done.stderr.count("error:")) == (0, 0), done.stderr
    assert "Conv + BatchNormalization" in done.stdout
    assert "p99 ms" in done.stdout
    assert "level basic" in done.stderr
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert (tmp_path / "o.onnx").stat().st_size > 0


def test_one_json_document(model: Path, tmp_path: Path) -> None:
    done = ctl(model, "--out", tmp_path / "o.onnx", "--seconds", "0", "--level", "extended", "--json")
    told = json.loads(done.stdout)
    assert (told["level"], told["same"], told["timings"]) == ("extended", True, [])


def test_bad_input_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"PK\x03\x04 weights")
    done = ctl(tmp_path / "m.onnx", "--out", tmp_path / "o.onnx")
    assert done.returncode == 2
    assert done.stderr.startswith("error: m.onnx is not ONNX")
    assert "next: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o.onnx").exists()


def test_a_page_that_cannot_be_written_is_said_before_the_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for html, code in ((tmp_path / "file" / "r.html", 69), (tmp_path, 69), (model, 2)):
        done = ctl(model, "--out", tmp_path / "o.onnx", "--html", html)
        assert done.returncode == code, done.stderr
        assert not (tmp_path / "o.onnx").exists()
    assert model.stat().st_size > 0


def test_what_cannot_be_written_is_unavailable(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = ctl(model, "--out", tmp_path / "file" / "o.onnx", "--seconds", "0")
    assert done.returncode == 69
    assert "cannot be written" in done.stderr
