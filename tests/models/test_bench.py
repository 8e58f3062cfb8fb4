"""Measuring tiny files: rows, groups, parity, and what is said of the machine. Nothing asserts a time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgeward_models import bench_tables, machine
from edgeward_models.bench import BenchReport, BenchRequest, Published, Row, bench, gate, plain
from edgeward_models.footprint import measure
from edgeward_models.statistics import Interval
from edgeward_runtime.sessions import CPU
from edgeward_wire.errors import Rejected
from edgeward_wire.verdict import Plan
from models.graphs import attention_block, save
from runtime import builders


def run(*files: Path, **how: object) -> BenchReport:
    return bench(BenchRequest(files, **{"runs": 3, **how}))  # type: ignore[arg-type]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The same classifier in FP32 and INT8."""
    return builders.classifier(tmp_path / "fp32.onnx"), builders.int8_classifier(tmp_path / "int8.onnx")


def test_a_pair_is_compared_with_its_float_file_whatever_the_order(pair: tuple[Path, Path]) -> None:
    fp32, int8 = pair
    report = run(int8, fp32)
    first, second = report.rows
    assert (first.name, first.precision, first.reference, first.ratio) == ("fp32", "fp32", True, 1.0)
    assert (second.name, second.precision, second.reference) == ("int8", "int8", False)
    assert second.model == first.model == "fp32"
    for row in report.rows:
        assert row.runs == 3
        assert row.p50_ms is not None
        assert row.p99_ms is not None
        assert 0 < row.p50_ms <= row.p99_ms
        assert row.parity == pytest.approx(1.0, abs=1e-3)
        assert row.memory_mb is not None
        assert row.load_ms is not None
    assert second.ratio == pytest.approx(1 / (second.speed_up or 0))
    assert 10 < (second.sqnr_db or 0) < 100
    assert report.right


def test_models_of_other_ports_are_measured_apart(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = save(tmp_path / "attention.onnx", attention_block())
    report = run(*pair, other)
    assert report.models == ["fp32", "attention"]
    assert [row.reference for row in report.rows] == [True, False, True]
    assert set(report.inputs) == {"fp32", "attention"}


def test_files_with_other_lengths_are_other_models(tmp_path: Path) -> None:
    three, four = (builders.classifier(tmp_path / f"{n}.onnx", classes=n) for n in (3, 4))
    assert run(three, four).models == ["3", "4"]


def test_the_samples_of_any_of_them_serve_all(tmp_path: Path) -> None:
    builders.classifier(tmp_path / "fp32.onnx")
    builders.int8_classifier(tmp_path / "int8.onnx")
    builders.labels_file(tmp_path / "labels.txt")
    builders.picture_directory(tmp_path / "pictures")
    builders.sidecar_file(tmp_path / "int8.toml", samples="pictures")
    report = run(tmp_path / "fp32.onnx", tmp_path / "int8.onnx")
    assert report.inputs == {"fp32": "3 pictures in pictures"}


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    files = [builders.classifier(tmp_path / place / "m.onnx", salt=k) for k, place in enumerate("ab")]
    assert [row.name for row in run(*files).rows] == ["a/m", "b/m"]


def test_a_provider_that_is_not_there_is_a_row_with_a_reason(pair: tuple[Path, Path]) -> None:
    report = run(pair[0], providers=("CPU", "Qnn"))
    here, there = report.rows
    assert here.reason == ""
    assert (there.provider, there.p50_ms, there.runs) == ("Qnn", None, 0)
    assert "Qnn is not in this build" in there.reason
    assert not report.right


def test_what_it_is_compared_with_may_be_what_does_not_run(pair: tuple[Path, Path]) -> None:
    lost, found = run(pair[0], providers=("Qnn", "CPU")).rows
    assert lost.reference
    assert (found.ratio, found.interval) == (None, None)
    assert found.p50_ms is not None
    assert found.reason == "What it is compared with has no figures."


def not_finite(path: Path, fault: str) -> Path:
    """The classifier, with a fault in the last weights."""
    model = onnx.load(str(builders.classifier(path)))
    weights = max((t for t in model.graph.initializer if len(t.dims) == 2), key=lambda t: t.name)
    values = numpy_helper.to_array(weights).copy()
    values[0] = float(fault)
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("fault", ["nan", "inf"])
def test_outputs_that_are_not_finite_are_a_row_with_a_reason(
    pair: tuple[Path, Path], tmp_path: Path, fault: str
) -> None:
    broken = not_finite(tmp_path / "broken.onnx", fault)
    (row,) = run(broken).rows
    assert "Output logits is not finite" in row.reason
    report = run(broken, pair[1])
    first, second = report.rows
    assert "Output logits is not finite" in first.reason
    assert second.p50_ms is not None
    assert (second.sqnr_db, second.reason) == (None, "What it is compared with has no figures.")
    assert not report.right


def test_the_race_itself_tells_how_far_it_is(pair: tuple[Path, Path]) -> None:
    told: list[tuple[str, int, int]] = []
    request = BenchRequest(pair, runs=8)
    bench(request, lambda what, done, total: told.append((what, done, total)))
    racing = [(done, total) for what, done, total in told if what == "measure: fp32, timing"]
    assert len({done for done, _ in racing}) >= 8
    assert racing == sorted(racing)
    assert all(done < total for done, total in racing)
    assert told[-1] == ("measure: done", 1, 1)


def test_everything_is_json(pair: tuple[Path, Path]) -> None:
    told = json.loads(json.dumps(plain(run(*pair)), allow_nan=False))
    assert told["schema"] == "edgeward.bench/1"
    assert told["machine"]["capability"]
    assert [row["precision"] for row in told["rows"]] == ["fp32", "int8"]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (BenchRequest(()), "nothing to measure"),
        (BenchRequest((Path("m.onnx"),) * 33), "too many"),
        (BenchRequest((Path("m.onnx"),), runs=0), "1 to"),
        (BenchRequest((Path("nowhere.onnx"),)), "There is no file"),
    ],
)
def test_bad_wishes_are_rejected(request_: BenchRequest, says: str) -> None:
    with pytest.raises(Rejected, match=says):
        bench(request_)


# --- in a process of its own


def plan(**how: object) -> Plan:
    return Plan.model_validate({"provider": CPU, "variant": "fp32", **how})


def test_a_footprint_is_taken_elsewhere(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx")
    found = measure(path, plan(), {"image": np.zeros((1, 3, 32, 32), np.float32)})
    assert found.reason == ""
    assert found.memory_mb is not None
    assert 0 <= found.memory_mb < 200
    assert (found.load_ms or 0) > 0


def test_a_footprint_says_what_went_wrong(tmp_path: Path) -> None:
    path = builders.classifier(tmp_path / "m.onnx")
    wrong = measure(path, plan(), {"image": np.zeros((1, 3, 5, 32), np.float32)})
    assert wrong.memory_mb is None
    assert "32" in wrong.reason
    late = measure(path, plan(), {"image": np.zeros((1, 3, 32, 32), np.float32)}, timeout_s=0.001)
    assert "longer than 0.001 s" in late.reason


def test_a_process_that_dies_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that crashes as soon as it is loaded stands for a driver that does."""
    path = builders.classifier(tmp_path / "m.onnx")
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = measure(path, plan(), {"image": np.zeros((1, 3, 32, 32), np.float32)})
    assert found.reason == "It crashes when it is loaded or run (SIGSEGV)."


# --- tables


def report(*rows: Row, **how: object) -> BenchReport:
    here = machine.Machine("Some CPU", "x86_64", 4, ("avx2",), False, "", 40.0, 3.0, "1.23.2", "3.10")
    made = BenchReport(rows, {}, here, 55.0, 2, 1.0, {}, {})
    return replace(made, **how)  # type: ignore[arg-type]


FP32 = Row(
    model="resnet50", name="FP32", file=Path("a"), precision="fp32", provider="CPU", threads=1, bytes=1,
    runs=9, p50_ms=28.04, p90_ms=30.0, p99_ms=31.0, ratio=1.0, interval=Interval(1, 1), parity=1.0,
    sqnr_db=float("inf"), memory_mb=100.4, reference=True,
)  # fmt: skip
INT8 = replace(
    FP32, name="INT8", precision="int8", p50_ms=14.0, ratio=0.5, interval=Interval(0.49, 0.51), parity=0.98,
    sqnr_db=20.0, reference=False,
)  # fmt: skip
PUBLISHED = {"resnet50": (Published("CPU", 28, 11),)}


def test_published_figures_stand_beside_ours_and_the_machine_is_named() -> None:
    rows = bench_tables.beside(report(FP32, INT8, published=PUBLISHED, titles={"resnet50": "ResNet-50"}))
    assert rows == [
        ("ResNet-50", "here: Some CPU, no VNNI, 1 thread", "28.0", "14.0", "2.00 ×"),
        ("ResNet-50", "published: CPU", "28", "11", "2.55 ×"),
    ]


def test_what_is_not_offered_is_said() -> None:
    gone = replace(INT8, p50_ms=None, ratio=None, interval=None, reason="nothing passes")
    rows = bench_tables.beside(report(FP32, gone, published=PUBLISHED))
    assert rows[0][3:] == ("", "not offered")
    assert not report(FP32, gone).right


def test_wrong_outputs_are_marked_and_no_success() -> None:
    cells = dict(zip(bench_tables.HEADS, bench_tables.cells(INT8), strict=True))
    assert cells["parity"] == "0.9800 WRONG"
    assert cells["95 %"] == "0.490 to 0.510"
    assert gate(replace(INT8, precision="fp16")) == 0.98
    assert gate(replace(INT8, provider="Tensorrt")) == 0.98
    assert not report(FP32, INT8).right
    assert dict(zip(bench_tables.HEADS, bench_tables.cells(FP32), strict=True))["SQNR dB"] == "exact"


def test_markdown_tells_the_machine_its_heat_and_how_to_read_it() -> None:
    text = bench_tables.markdown(
        report(FP32, INT8, published=PUBLISHED, inputs={"resnet50": "9 pictures"}, notes=("A | note.",))
    )
    assert "no VNNI" in text
    assert "40 °C before, 55 °C after, slowed down 2 times" in text
    assert "Inputs: 9 pictures." in text
    assert "## Beside published figures" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {len(bench_tables.HEADS) + 1, 6}


def test_a_published_speed_up_is_its_own_ratio() -> None:
    assert Published("T4", 4.2, 2.1).speed_up == pytest.approx(2.0)
