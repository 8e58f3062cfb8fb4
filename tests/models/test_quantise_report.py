"""Reports: every outcome has its sentence, every candidate its reason, every figure its interval."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from edgeward_models import machine
from edgeward_models.findings import Candidate, Final, TargetReport
from edgeward_models.graph import read_facts
from edgeward_models.quantise_report import (
    QuantiseReport,
    advice,
    brief,
    conclude,
    decibels,
    in_float,
    markdown,
    plot,
    rows,
)
from edgeward_models.race import Timing
from edgeward_models.schemes import Scheme
from edgeward_models.search import Gate, Measured
from edgeward_models.statistics import Interval
from edgeward_models.trials import Effort
from runtime import builders

GATE = Gate(agreement=0.9)


def candidate(
    ratio: float | None, agreement: float | None = 0.95, excluded: str = "", *keep: str
) -> Candidate:
    scheme = Scheme("static", keep_float=keep)
    timing = (
        None if ratio is None else Timing("x", 20, 5.0, 6.0, 7.0, ratio, Interval(ratio - 0.01, ratio + 0.01))
    )
    measured = Measured(scheme, 20.0, agreement, ratio, None if ratio is None else ratio + 0.01, excluded)
    return Candidate(
        measured,
        None,
        1000,
        0.999,
        Interval(19, 21),
        None if agreement is None else Interval(0.9, 0.97),
        timing,
    )


FINAL = Final(300, 22.0, Interval(21.5, 22.5), 0.94, Interval(0.91, 0.96))
CHOSEN = candidate(0.5)


def target(*candidates: Candidate, chosen: int | None = None, final: Final | None = None) -> TargetReport:
    return TargetReport("x86-64", GATE, "as asked for", True, candidates, chosen, final, front=(0,))


@pytest.fixture
def report(tmp_path: Path) -> QuantiseReport:
    facts = read_facts(builders.classifier(tmp_path / "colours.onnx"))
    counts = Effort(fit=64, test=300, calibrate=32, exact=8, rank=8)
    found = (target(CHOSEN, candidate(None, None, "It does not load: no."), chosen=0, final=FINAL),)
    here = machine.facts()
    return QuantiseReport("colours", facts, "0" * 64, "3 pictures", "strong", counts, here, 1, found, 12.0)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            target(CHOSEN, chosen=0, final=FINAL),
            [
                "2.00 x as fast as FP32 [1.96, 2.04]",
                "22.0 dB [21.5, 22.5]",
                "0.940 [0.910, 0.960]",
                "300 test",
            ],
        ),
        (
            target(candidate(0.5, 0.8), candidate(0.4, 0.6)),
            ["nothing passes", "2.00 x as fast", "0.800, where 0.900 is needed"],
        ),
        (
            target(candidate(1.2)),
            ["INT8 does not pay", "at most 0.95 would pay", "takes 1.20 of FP32's time [1.19, 1.21]"],
        ),
        (target(candidate(None, None, "It does not load: no.")), ["no candidate", "It does not load: no."]),
        (target(), ["no candidate can be offered"]),
    ],
)
def test_every_outcome_has_its_sentence(found: TargetReport, words: list[str]) -> None:
    text = conclude(found)
    assert text.startswith("x86-64: ")
    for word in words:
        assert word in text


def test_the_main_file_is_that_of_the_first_target_with_something_on_offer(report: QuantiseReport) -> None:
    nothing, found, more = (
        replace(one, target=name)
        for name, one in (
            ("arm64", target(candidate(1.2))),
            ("x86-64", target(CHOSEN, chosen=0, final=FINAL)),
            ("cuda", target(CHOSEN, chosen=0, final=FINAL)),
        )
    )
    told = replace(report, targets=(nothing, found, more))
    assert told.main is found
    assert [told.file(one) for one in told.targets] == [None, "colours.onnx", "colours-cuda.onnx"]
    assert told.exit_code == 1
    assert replace(report, targets=(nothing,)).main is None


def test_what_there_was_no_time_to_test_is_no_failure_of_the_gate() -> None:
    assert "u8 x pair, minmax passes, but was not held against the test samples" in conclude(
        target(candidate(0.5))
    )


def test_a_detector_agrees_on_boxes() -> None:
    boxes = Gate(agreement=0.9, answers="boxes found by both")
    found = replace(target(CHOSEN, chosen=0, final=FINAL), gate=boxes)
    assert "boxes found by both 0.940" in conclude(found)
    low = replace(target(candidate(0.5, 0.8)), gate=boxes)
    assert "boxes found by both 0.800, where 0.900 is needed" in conclude(low)


def test_what_can_be_done_depends_on_what_is_lacking(report: QuantiseReport) -> None:
    assert advice(report) == ""
    assert report.exit_code == 0
    near = replace(report, targets=(target(candidate(0.5, 0.8)),))
    assert near.exit_code == 1
    assert "--min-agreement" in advice(near)
    assert "--samples" in advice(replace(near, evidence="weak"))
    slow = replace(report, targets=(target(candidate(1.2)),))
    assert "float model" in advice(slow)


def test_a_row_says_why_it_is_not_the_one() -> None:
    found = target(
        candidate(0.7, 0.7),
        CHOSEN,
        candidate(1.3),
        candidate(0.97),
        candidate(None, None, "It does not load: no."),
        chosen=1,
        final=FINAL,
    )
    table = rows(found)
    assert [row[6] for row in table] == ["chosen", "front", "", "", ""]
    assert [row[7] for row in table] == [
        "",
        "top-1 agreement with FP32 0.700, where 0.900 is needed",
        "takes more than 0.95 of FP32's time",
        "not faster than FP32",
        "It does not load: no.",
    ]


def test_a_brief_table_keeps_the_chosen_the_front_and_one_of_each_fault() -> None:
    faults = [candidate(None, None, "It does not load: a.", name) for name in "abc"]
    others = [candidate(0.8, 0.95, "", name) for name in "def"]
    found = target(CHOSEN, *faults, *others, chosen=0, final=FINAL)
    shown, more = brief(found)
    assert [row[0] for row in shown] == ["u8 x pair, minmax", "u8 x pair, minmax, 1 layer float"]
    assert more == 5


def test_json_has_no_infinities(report: QuantiseReport) -> None:
    equal = replace(CHOSEN, measured=replace(CHOSEN.measured, sqnr_db=math.inf))
    text = json.dumps(
        replace(report, targets=(target(equal, chosen=0, final=FINAL),)).plain(), allow_nan=False
    )
    told = json.loads(text)
    assert told["targets"][0]["candidates"][0]["sqnr_db"] is None
    assert told["targets"][0]["file"] == "colours.onnx"
    assert told["exit"] == 0


def test_markdown_tells_samples_machine_gate_and_candidates(report: QuantiseReport) -> None:
    text = markdown(replace(report, evidence="weak"))
    for word in (
        "weak evidence",
        "32 calibrated, 64 searched, 300 tested",
        "1 thread",
        report.machine.capability,
    ):
        assert word in text
    assert "| u8 x pair, minmax |" in text
    assert "(as asked for)" in text
    assert plot(report).count("<title>") == 1


def test_operators_in_float_are_named_where_integers_were_meant() -> None:
    found = replace(target(CHOSEN), unsupported=("Erf", "Softmax"))
    assert in_float(found) == "In float on this target: Erf, Softmax."
    assert in_float(target(CHOSEN)) == ""
    half = replace(CHOSEN, measured=replace(CHOSEN.measured, scheme=Scheme("fp16")))
    assert in_float(replace(target(half), unsupported=("Conv", "Gemm"))) == ""


def test_decibels_for_people() -> None:
    assert (decibels(22.46), decibels(math.inf), decibels(-math.inf)) == ("22.5 dB", "equal", "nothing left")


def test_an_infinite_figure_is_left_out_of_a_sidecar() -> None:
    final = replace(FINAL, sqnr_db=math.inf)
    assert set(final.accuracy()) == {
        "top1_agreement_fp32",
        "top1_agreement_fp32_low",
        "top1_agreement_fp32_high",
        "samples",
    }
