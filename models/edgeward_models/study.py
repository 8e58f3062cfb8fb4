"""What the candidates of all targets share, and the steps that are kept: files made, files tried.

Invariant: a step's key holds all that its result depends on, the processor's features too where it was
measured, so that what is found in the workspace is what would come out again.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeward_models.answers import Detections
from edgeward_models.calibration import Ranges
from edgeward_models.progress import Progress
from edgeward_models.quantiser import quantise
from edgeward_models.race import FullFeeds
from edgeward_models.samples import Feeds, Samples
from edgeward_models.schemes import Calibration, Scheme
from edgeward_models.search import Gate
from edgeward_models.trials import Bench, Effort, Judged, drive, finite, side_by_side
from edgeward_models.workspace import Workspace, file_digest
from edgeward_runtime import resources
from edgeward_runtime.sessions import RunFailed, open_session
from edgeward_wire.contract import Contract
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Precision
from edgeward_wire.verdict import Plan

TEST_SEED = 3


@dataclass(frozen=True)
class Study:
    """All that the candidates of every target share."""

    whole: Path
    """The float model, its weights inside."""
    prepared: Path
    operators: Mapping[str, int]
    names: tuple[str, ...]
    """The nodes that can be quantised, in the graph's order."""
    contract: Contract
    samples: Samples
    effort: Effort
    bench: Callable[[], Bench]
    """FP32 on the `fit` samples: run when it is first needed."""
    boxes: Detections | None
    """How a detector's output is read, for parts and agreement; None: outputs count as a whole."""
    feeds: Sequence[FullFeeds]
    """To race with."""
    full_feeds: Callable[[int], Sequence[Feeds]]
    """All inputs of the graph for the first so many `fit` samples."""
    ranges: Callable[[Calibration], Ranges]
    keep_float: tuple[str, ...]
    aim: Gate
    """What the search tries to reach."""
    must: Gate
    """What must be reached."""
    why: str
    """Why that."""
    float_plan: Plan
    """How FP32 runs here."""
    work: Workspace
    key: Mapping[str, Any]
    """Whatever every result depends on."""
    budget_s: float
    deadline: float
    """time.monotonic()"""
    progress: Progress


def make_file(study: Study, scheme: Scheme) -> Path:
    """The scheme's file. Raises Rejected where the model has nothing for it."""
    ranges = study.ranges(scheme.calibration) if scheme.method == "static" else None
    key = {**study.key, "scheme": scheme.key(), "ranges": ranges.plain() if ranges is not None else None}

    def make(out: Path) -> None:
        quantise(study.prepared, out, scheme, ranges)

    return study.work.file(f"{scheme.method}.onnx", key, make)


def float_s(study: Study) -> float:
    """Seconds that FP32 takes for a sample here."""
    key = {**study.key, **here(), "plan": study.float_plan.model_dump(), "samples": study.effort.fit}

    def measure() -> float:
        bench = study.bench()
        return bench.reference_s / max(1, len(bench.samples))

    seconds: float = study.work.json("float-s", key, measure)
    return seconds


def check_tests(study: Study) -> None:
    """Run FP32 over as many test samples as the search takes: little of the budget, spent before the rest.

    Raises Rejected where an output is not finite: the search would be for nothing.
    """
    count = min(study.effort.test, study.effort.fit)
    key = {**study.key, "plan": study.float_plan.model_dump(), "test": count}

    def run() -> int:
        session = open_session(study.whole, study.float_plan)  # it has loaded before
        try:
            runs = drive(session, study.contract, study.samples.stream("test", count, TEST_SEED))
            return sum(1 for _ in finite(study.whole, study.contract, runs, "test sample"))
        except RunFailed as error:
            raise Rejected(f"{study.whole.name} does not run on the samples. {error.what}") from error
        finally:
            session.close()

    study.work.json("float-tested", key, run)


def held_out(study: Study, file: Path, plan: Plan, count: int) -> Judged:
    """The file beside FP32 on test samples, which nothing else has seen.

    Raises Rejected where an output of FP32 is not finite.
    """
    key = {
        **study.key,
        **_read_as(study),
        "file": file_digest(file),
        "plan": plan.model_dump(),
        "test": count,
    }

    def make() -> dict[str, Any]:
        samples = study.samples.stream("test", count, TEST_SEED)
        float_file = study.whole, study.float_plan
        return side_by_side(study.contract, float_file, (file, plan), samples, study.boxes).plain()

    return Judged.of(study.work.json("tested", key, make))


def judge(study: Study, file: Path, plan: Plan | None, scheme: Scheme, samples: int) -> Judged:
    """The file's trial on the first so many samples."""
    key = {
        **study.key,
        **here(),
        **_read_as(study),
        "file": file_digest(file),
        "plan": None if plan is None else plan.model_dump(),
        "samples": samples,
        "exact": study.effort.exact,
    }

    def make() -> dict[str, Any]:
        return study.bench().first(samples).judge(file, plan, precision_of(scheme)).plain()

    return Judged.of(study.work.json("judged", key, make))


def precision_of(scheme: Scheme) -> Precision:
    """What a scheme makes."""
    return "fp16" if scheme.method == "fp16" else "int8"


def in_its_name(study: Study, error: Rejected) -> str:
    """What is wrong, said of the model rather than of the copy that was prepared."""
    return error.what.replace(study.prepared.name, study.whole.name)


def _read_as(study: Study) -> dict[str, Any]:
    """What figures depend on besides the contract."""
    return {} if study.boxes is None else {"boxes": study.boxes.key}


def here() -> dict[str, Any]:
    """What a measurement depends on besides the files."""
    return {"isa": sorted(resources.isa()), "arch": platform.machine()}
