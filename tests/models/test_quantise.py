"""Quantising for real: what is offered, what is refused, and what a second run has to do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from edgeward_models import quantise_files
from edgeward_models.answers import Detections
from edgeward_models.bundle import BundleRequest, make_bundle
from edgeward_models.findings import Candidate
from edgeward_models.graph import read_facts
from edgeward_models.inspect import inspect_model
from edgeward_models.quantise import QuantiseRequest, aim_of, boxes_of, gate_of, quantise_model
from edgeward_models.quantise_files import check_place
from edgeward_models.quantise_report import QuantiseReport
from edgeward_models.schemes import TARGETS
from edgeward_models.search import Gate
from edgeward_models.workspace import Workspace
from edgeward_runtime import resources
from edgeward_runtime.tasks.detection import Settings
from edgeward_wire.contract import Contract, InputPort, OutputPort, Task
from edgeward_wire.errors import EdgewardError, Rejected
from models import search_models
from models.graphs import convolution_block, model_of, save
from runtime import builders

HERE = next(name for name, target in TARGETS.items() if target.arch == resources.machine())
ELSEWHERE = next(name for name, target in TARGETS.items() if target.arch not in ("", resources.machine()))
HALF_A_CORE = """
import sys
from dataclasses import replace
from pathlib import Path
from edgeward_models.quantise import QuantiseRequest, quantise_model
say = lambda what, done, total: print(what, flush=True)
quantise_model(QuantiseRequest(Path(sys.argv[1]), budget_s=3), Path(sys.argv[2]), say)
"""


class Run:
    """One finished search."""

    def __init__(self, model: Path, out: Path, **how: object) -> None:
        self.model, self.out, self.how = model, out, how
        self.report = quantise_model(self._request(), out)

    def again(self) -> QuantiseReport:
        return quantise_model(self._request(), self.out)

    def made(self) -> dict[str, int]:
        """What lies in the workspace, and when it was made."""
        return made_in(self.out)

    def _request(self) -> QuantiseRequest:
        return QuantiseRequest(self.model, **{"budget_s": 3.0, **self.how})  # type: ignore[arg-type]


def made_in(out: Path) -> dict[str, int]:
    """File of the workspace -> when it was made; but for the note of what lies outside of it."""
    steps = [path for path in (out / ".work").iterdir() if path.is_file() and path.name != "written.json"]
    return {path.name: path.stat().st_mtime_ns for path in steps}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A network for which INT8 pays, for this machine and for two others."""
    home = tmp_path_factory.mktemp("net")
    model = search_models.beside(search_models.heavy(home / "net.onnx"))
    return Run(model, home / "out", targets=(HERE, ELSEWHERE, "cuda"), keep_float=("conv0",))


def test_what_is_offered_is_faster_and_passed(run: Run) -> None:
    target = run.report.targets[0]
    assert (run.report.exit_code, target.here, target.target) == (0, True, HERE)
    assert target.offered is not None
    assert target.final is not None
    measured = target.offered.measured
    assert measured.pays
    assert measured.ratio is not None
    assert measured.ratio < 0.95
    assert "conv0" in measured.scheme.keep_float
    assert target.offered.parity is not None
    assert target.offered.parity >= 0.99
    assert target.final.samples >= 16
    assert target.final.agreement is not None
    assert target.final.agreement >= 0.9
    assert "x as fast as FP32" in run.report.conclusion


def test_every_candidate_is_chosen_measured_or_has_a_reason(run: Run) -> None:
    for target in run.report.targets:
        for one in target.candidates:
            assert one.measured.excluded or one.measured.sqnr_db is not None
            assert one.measured.excluded or not target.here or one.timing is not None


def test_the_files_can_be_deployed(run: Run, tmp_path: Path) -> None:
    facts = read_facts(run.out / "net.onnx")
    assert facts.precision == "int8"
    inspection = inspect_model(run.out / "net.onnx", scratch=tmp_path)
    known = inspection.guess.complete()
    assert known.accuracy["top1_agreement_fp32"] >= 0.9
    assert known.report == run.out / "report.json"
    assert {one.name for one in inspection.further} == {ELSEWHERE, "cuda"}
    bundle = make_bundle(BundleRequest(run.out / "net.onnx"), tmp_path / "bundle")
    assert {"int8", ELSEWHERE, "cuda"} == set(bundle.manifest.variants)
    assert bundle.manifest.variants["cuda"].precision == "fp16"
    assert bundle.manifest.variants["cuda"].targets == TARGETS["cuda"].hints
    assert bundle.manifest.variants["int8"].targets == TARGETS[HERE].hints


def test_the_sidecar_names_the_samples_from_where_it_lies(run: Run, tmp_path: Path) -> None:
    assert 'samples = "../pictures"' in (run.out / "net.toml").read_text()
    moved = tmp_path / "deep" / "out"
    shutil.copytree(run.out, moved, ignore=lambda *_: [".work"])
    assert [one.key for one in inspect_model(moved / "net.onnx", scratch=tmp_path).guess.missing] == [
        "samples"
    ]


def test_samples_that_are_given_need_not_be_in_the_sidecar(tmp_path: Path) -> None:
    model = search_models.beside(search_models.heavy(tmp_path / "net.onnx"))
    pictures = (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    assert "are not there" in rejected(model, tmp_path / "out").what
    Run(model, tmp_path / "out", budget_s=1.0, samples=pictures)
    text = (tmp_path / "out" / "net.toml").read_text()
    assert 'samples = "../elsewhere"' in text
    assert "MISSING" not in text


def test_what_this_machine_cannot_measure_says_so(run: Run) -> None:
    other = run.report.targets[1]
    assert not other.here
    assert any("device's probe decides" in note for note in other.notes)
    assert other.offered is not None
    assert other.offered.timing is None
    assert (run.out / f"net-{ELSEWHERE}.onnx").is_file()


def test_the_report_is_whole(run: Run) -> None:
    report = json.loads((run.out / "report.json").read_text())
    assert report["schema"] == "edgeward.quantise/1"
    assert report["targets"][0]["file"] == "net.onnx"
    assert report["machine"]["cores"] >= 1
    assert set(report["files"]) == {
        "net.onnx",
        "net.toml",
        "labels.txt",
        f"net-{ELSEWHERE}.onnx",
        "net-cuda.onnx",
    }
    text = (run.out / "report.md").read_text()
    assert "3 pictures in pictures" in text
    assert "Gate: top-1 agreement with FP32 of at least 0.900 (the default of classifications)" in text
    assert (run.out / "pareto.svg").read_text().startswith("<svg")


def test_a_second_run_redoes_nothing(run: Run) -> None:
    """How many candidates a batch has follows the clock, and so may which of them race one another."""
    before = run.made()
    again = run.again()
    after = run.made()
    assert {name: after[name] for name in before} == before
    found = {one.measured.scheme: judged(one) for one in again.targets[0].candidates}
    both = [one for one in run.report.targets[0].candidates if one.measured.scheme in found]
    assert both
    for one in both:
        assert found[one.measured.scheme] == judged(one)
    tried = [one for report in (run.report, again) for target in report.targets for one in target.candidates]
    files = {one.file for one in tried if one.file is not None}
    # Each was made once and judged once, whatever the runs were.
    assert len([name for name in after if name.endswith(".onnx")]) == len(files) + 1  # and what is prepared
    assert len([name for name in after if name.startswith("judged") and name.endswith("json")]) <= len(files)


def judged(one: Candidate) -> tuple[object, ...]:
    """What a candidate's trial said, without its race."""
    return one.file, one.parity, one.measured.sqnr_db, one.measured.agreement


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    model, out = search_models.beside(search_models.heavy(tmp_path / "net.onnx")), tmp_path / "out"
    command = [sys.executable, "-c", HALF_A_CORE, str(model), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            # The base is done, and the next one was begun, or there was no time for another.
            if line.startswith(("searching: u8 x pair, p", "searching: s8 x s8, p", "searching: done")):
                break
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = made_in(out)
    assert any(name.startswith("raced-") for name in before)
    assert not (out / "report.json").exists()
    finished = Run(model, out)
    after = made_in(out)
    assert {name: after[name] for name in before} == before
    assert len(after) > len(before)
    assert finished.report.exit_code == 0


def test_where_int8_does_not_pay_it_says_so_and_takes_back_what_was_offered(tmp_path: Path) -> None:
    model, out = search_models.beside(search_models.heavy(tmp_path / "net.onnx")), tmp_path / "out"
    assert Run(model, out, budget_s=1.0).report.exit_code == 0
    mine = out / "mine.txt"
    mine.write_text("somebody else's")
    save(model, convolution_block(size=32, channels=3))  # too little work
    (tmp_path / "net.toml").write_text((tmp_path / "net.toml").read_text().replace("logits", "scores"))
    report = Run(model, out, budget_s=1.0).report
    assert report.exit_code == 1
    assert "INT8 does not pay" in report.conclusion
    assert {path.name for path in out.iterdir()} == {
        ".work",
        "mine.txt",
        "report.json",
        "report.md",
        "pareto.svg",
    }


def test_what_is_offered_for_a_further_target_stands_where_the_first_has_nothing(tmp_path: Path) -> None:
    model = search_models.beside(search_models.heavy(tmp_path / "net.onnx"))
    report = Run(model, tmp_path / "out", budget_s=1.0, min_sqnr_db=150.0, targets=(HERE, "cuda")).report
    assert [report.file(one) for one in report.targets] == [None, "net.onnx"]
    assert report.exit_code == 1
    assert read_facts(tmp_path / "out" / "net.onnx").precision == "fp16"
    inspection = inspect_model(tmp_path / "out" / "net.onnx", scratch=tmp_path)
    assert inspection.guess.complete().targets == TARGETS["cuda"].hints


def test_a_gate_that_nothing_reaches_names_the_best_and_what_it_lacks(tmp_path: Path) -> None:
    model = search_models.beside(search_models.heavy(tmp_path / "net.onnx"))
    report = Run(model, tmp_path / "out", budget_s=1.0, min_sqnr_db=150.0).report
    assert report.exit_code == 1
    assert "nothing passes the gate" in report.conclusion
    assert "where 150.0 dB is needed" in report.conclusion
    assert not (tmp_path / "out" / "net.onnx").exists()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["targets"][0]["file"] is None


# --- what is refused


def rejected(model: Path, out: Path, **how: object) -> Rejected:
    with pytest.raises(Rejected) as caught:
        Run(model, out, **how)
    return caught.value


def test_an_int8_file_is_refused(tmp_path: Path) -> None:
    model = search_models.beside(builders.int8_classifier(tmp_path / "colours.onnx"))
    assert "INT8 already" in rejected(model, tmp_path / "out").what


def test_a_file_without_work_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Relu", ["x"], ["y"])
    model = save(tmp_path / "relu.onnx", model_of([node], {"x": [1, 4]}, {"y": [1, 4]}, {}))
    assert "nothing to quantise" in rejected(model, tmp_path / "out").what


def test_the_model_itself_is_never_written_over(tmp_path: Path) -> None:
    model = search_models.beside(search_models.heavy(tmp_path / "net.onnx"))
    before = model.read_bytes()
    assert "the model itself" in rejected(model, tmp_path).what
    assert model.read_bytes() == before


@pytest.mark.parametrize(
    "name", ["net.onnx", "net.toml", "labels.txt", "report.json", "report.md", "pareto.svg", "net-cuda.onnx"]
)
def test_what_somebody_else_wrote_is_neither_written_over_nor_deleted(name: str, tmp_path: Path) -> None:
    model = search_models.beside(search_models.heavy(tmp_path / "net.onnx"))
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    error = rejected(model, out, targets=(HERE, "cuda"))
    assert str(out / name) in error.what
    assert "would be written over" in error.what
    assert (out / name).read_text() == "mine"
    assert [path.name for path in out.iterdir() if path.name != ".work"] == [name]


def test_a_model_s_own_sidecar_and_labels_in_the_way_are_kept(tmp_path: Path) -> None:
    """`quantise ow/float.onnx --sidecar ow/net.toml --out ow`, as somebody did."""
    model = search_models.beside(search_models.heavy(tmp_path / "net.onnx"))
    floating = model.rename(tmp_path / "float.onnx")
    sidecar = tmp_path / "net.toml"
    sidecar.write_text(f'name = "net"\n{sidecar.read_text()}')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert "net.toml" in rejected(floating, tmp_path, sidecar=sidecar).what
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_what_an_earlier_run_wrote_is_its_own_until_somebody_changes_it(tmp_path: Path) -> None:
    place = tmp_path / "out"
    (place / ".work").mkdir(parents=True)
    quantise_files._write(place / "net.toml", "sidecar")  # and there it was killed
    check_place("net", ["x86-64"], place)
    quantise_files._write(place / "report.json", '{"schema": "edgeward.quantise/1", "files": {}}')
    check_place("net", ["x86-64"], place)
    (place / "net.toml").write_text("sidecar, with a note")
    with pytest.raises(Rejected, match=r"net\.toml is not what an earlier run left"):
        check_place("net", ["x86-64"], place)
    quantise_files._forget(place)
    assert (place / "net.toml").read_text() == "sidecar, with a note"


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = search_models.beside(search_models.heavy(tmp_path / "net.onnx", bad=True))
    assert "not finite" in rejected(model, tmp_path / "out").what


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ({"targets": ("x87",)}, "no target 'x87'"),
        ({"budget_s": 0.0}, "budget"),
        ({"max_drop": 1.5}, "drop"),
        ({"max_drop": 0.1, "min_agreement": 0.9}, "two ways"),
        ({"min_agreement": 2.0}, "share"),
        ({"min_sqnr_db": 1e9}, "gate"),
        ({"keep_float": ("conv9",)}, "conv9"),
        ({"samples": Path("nowhere")}, "nowhere"),
    ],
)
def test_requests_that_make_no_sense_are_refused(how: dict[str, object], word: str, tmp_path: Path) -> None:
    model = search_models.beside(search_models.heavy(tmp_path / "net.onnx"))
    error = rejected(model, tmp_path / "out", **how)
    assert word in error.what
    assert error.next_step


def test_samples_of_another_shape_are_refused_by_name(tmp_path: Path) -> None:
    model = search_models.heavy(tmp_path / "net.onnx")
    builders.sidecar_file(model.with_suffix(".toml"))
    builders.labels_file(tmp_path / "labels.txt")
    np.savez(tmp_path / "rows.npz", image=np.zeros((8, 3, 16, 16), np.float32))
    error = rejected(model, tmp_path / "out", samples=tmp_path / "rows.npz")
    assert "(8, 3, 16, 16)" in error.what


def test_two_runs_into_one_place_are_one_too_many(tmp_path: Path) -> None:
    model = search_models.beside(search_models.heavy(tmp_path / "net.onnx"))
    with Workspace(tmp_path / "out" / ".work").alone():
        assert "Another quantise is at work" in rejected(model, tmp_path / "out").what


def test_a_directory_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    model = search_models.beside(search_models.heavy(tmp_path / "net.onnx"))
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgewardError, match="cannot be made"):
        Run(model, tmp_path / "file" / "out")


# --- gates


def contract(task: Task) -> Contract:
    source = InputPort(name="x", dtype="float32", shape=(1, 4), bind="source")
    return Contract(
        task=task, inputs=(source,), outputs=(OutputPort(name="y", dtype="float32", shape=(1, 3)),)
    )


@pytest.mark.parametrize(
    ("task", "how", "metadata", "expected"),
    [
        ("classification", {}, {}, Gate(agreement=0.9)),
        ("tensor", {}, {}, Gate(sqnr_db=15.0)),
        ("classification", {}, {"about": "X, random weights (seed 0)"}, Gate(sqnr_db=15.0)),
        ("classification", {"max_drop": 0.25}, {}, Gate(agreement=0.75)),
        ("classification", {"min_agreement": 0.8, "min_sqnr_db": 9.0}, {}, Gate(0.8, 9.0)),
        ("tensor", {"min_sqnr_db": 9.0}, {}, Gate(sqnr_db=9.0)),
        ("vad", {}, {}, Gate(sqnr_db=15.0)),
        ("vad", {"min_agreement": 0.9}, {}, Gate(0.9)),
    ],
)
def test_gates(task: Task, how: dict[str, float], metadata: dict[str, str], expected: Gate) -> None:
    request = QuantiseRequest(Path("m.onnx"), **how)  # type: ignore[arg-type]
    gate, why = gate_of(request, contract(task), metadata)
    assert gate == expected
    assert why


def test_a_detector_s_boxes_may_be_a_gate() -> None:
    port = OutputPort(name="y", dtype="float32", shape=(1, 7, 50))
    known = contract("detection").model_copy(update={"outputs": (port,)})
    boxes = Detections(known, 3, None, Settings(0.25))
    gate, _ = gate_of(QuantiseRequest(Path("m.onnx"), max_drop=0.25), known, {}, boxes)
    assert gate == Gate(agreement=0.75, answers="boxes found by both")
    with pytest.raises(Rejected, match="no first answers"):
        gate_of(QuantiseRequest(Path("m.onnx"), max_drop=0.25), known, {})


@pytest.mark.parametrize(
    ("about", "labels", "known"),
    [("", 3, True), ("trained", None, True), ("X, random weights (seed 0)", 3, False), ("", 5, False)],
)
def test_boxes_are_read_where_that_means_something(
    about: str, labels: int | None, known: bool, tmp_path: Path
) -> None:
    """Random weights find nothing: there the output counts as a whole."""
    node = helper.make_node("Relu", ["x"], ["y"])
    made = model_of([node], {"x": [1, 7, 50]}, {"y": [1, 7, 50]}, {})
    helper.set_model_props(made, {"about": about})
    path = save(tmp_path / "d.onnx", made)
    found = inspect_model(path, None, {"task": "detection", "name": "d"}, scratch=tmp_path)
    if labels is not None:
        (tmp_path / "labels.txt").write_text("\n".join(f"c{k}" for k in range(labels)))
        found = replace(found, guess=replace(found.guess, labels=tmp_path / "labels.txt"))
    assert (boxes_of(found) is not None) == known


def test_agreement_means_nothing_without_classes() -> None:
    with pytest.raises(Rejected, match="no first answers"):
        gate_of(QuantiseRequest(Path("m.onnx"), max_drop=0.1), contract("tensor"), {})


def test_the_search_aims_higher_the_fewer_samples_there_are() -> None:
    must = Gate(0.9, 15.0)
    few, many = aim_of(must, 25), aim_of(must, 900)
    assert few.agreement == pytest.approx(0.96)
    assert many.agreement == pytest.approx(0.91)
    assert few.sqnr_db == many.sqnr_db == pytest.approx(15.3)
    assert aim_of(Gate(agreement=1.0), 10).agreement == 1.0


def test_the_model_is_onnx_s_own(run: Run) -> None:
    onnx.checker.check_model(onnx.load(str(run.out / "net.onnx")), full_check=True)
