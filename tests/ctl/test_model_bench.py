"""`agent-ctl model bench` as a process: tables, files, exit codes, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from conftest import need
from edgeward_ctl.cli import main
from runtime import builders

PLOTS = find_spec("matplotlib") is not None
AGENT_CTL = Path(sys.executable).parent / "agent-ctl"


def ctl(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [AGENT_CTL, "model", "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return builders.classifier(tmp_path / "fp32.onnx"), builders.int8_classifier(tmp_path / "int8.onnx")


def test_a_table_a_page_and_a_plot(pair: tuple[Path, Path], tmp_path: Path) -> None:
    need("matplotlib")
    done = ctl(*pair, "--runs", 3, "--markdown", tmp_path / "b.md", "--plot", tmp_path / "b.svg")
    assert done.returncode == 0, done.stderr
    assert "speed-up" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[2:4]] == ["fp32", "int8"]
    assert "instructions" in done.stderr
    assert (tmp_path / "b.md").read_text().startswith("# Benchmark")
    assert b"<svg" in (tmp_path / "b.svg").read_bytes()


def test_one_json_document(pair: tuple[Path, Path]) -> None:
    told = json.loads(ctl(*pair, "--runs", 3, "--json").stdout)
    assert [row["runs"] for row in told["rows"]] == [3, 3]


def test_what_does_not_run_is_a_row_and_exit_code_1(pair: tuple[Path, Path]) -> None:
    done = ctl(pair[0], "--runs", 2, "--provider", "CPU", "--provider", "Qnn")
    assert done.returncode == 1
    assert "Qnn is not in this build" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Name files, or give --reference"),
        (["m.onnx", "--reference"], "Name files, or give --reference"),
        (["m.onnx", "--only", "resnet50"], "Name files, or give --reference"),
        (["--reference", "--only", "alexnet", "--work", "nowhere"], "The zoo has no model 'alexnet'"),
        (["--reference", "--budget", "soon"], "no length of time"),
        (["nowhere.onnx"], "There is no file nowhere.onnx"),
        (["m.onnx", "--plot", "p.pdf"], "neither SVG nor PNG" if PLOTS else "not installed: matplotlib"),
        (["m.onnx", "--on", "cam-1", "--plot", "p.svg"], "--plot does not go with --on"),
        (["a.onnx", "b.onnx", "--on", "cam-1"], "one model at a time"),
        (["m.onnx", "--allow-float", "to compare"], "--allow-float belongs to --on"),
        (["m.onnx", "--set", "task=vad"], "--set belongs to --on"),
    ],
)
def test_bad_wishes_are_errors_with_a_next_step(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["agent-ctl", "model", "bench", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert says in told
    assert "next: " in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("option", ["--markdown", "--plot"])
def test_a_place_that_cannot_be_written_is_said_before_anything_is_measured(
    pair: tuple[Path, Path], tmp_path: Path, option: str
) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib", reason="the extra `plots` is not installed")
    (tmp_path / "file").write_text("")
    done = ctl(*pair, "--runs", 3, option, tmp_path / "file" / "b.svg")
    assert done.returncode == 69
    assert "cannot be written" in done.stderr
    assert "measure" not in done.stderr


def test_a_device_needs_a_profile(tmp_path: Path) -> None:
    done = subprocess.run(
        [AGENT_CTL, "--profile", tmp_path / "none", "model", "bench", "m.onnx", "--on", "cam-1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
