"""The reference models: built by the zoo, quantised by our search, measured beside published figures.

Invariants: what was published never hides the machine that ours come from; what the search does not offer
is a row without figures that says why; files are kept in the work directory, and a second run only measures.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from edgeward_models import zoo
from edgeward_models.bench import BenchReport, BenchRequest, Published, Row, bench
from edgeward_models.progress import Progress, silent
from edgeward_models.quantise import QuantiseRequest, quantise_model

TITLES = {
    "resnet50": "ResNet-50, 224 × 224",
    "yolov8s": "YOLOv8-s, 640 × 640",
    "distilhubert": "DistilHuBERT, 1 s",
}
PUBLISHED: dict[str, tuple[Published, ...]] = {
    "resnet50": (Published("CPU", 28, 11), Published("T4", 4.2, 2.1), Published("Jetson Orin", 8.5, 3.8)),
    "yolov8s": (Published("CPU", 95, 38), Published("T4", 12, 5.8), Published("Jetson Orin", 22, 9.5)),
    "distilhubert": (Published("CPU", 85, 32), Published("Jetson Orin", 45, 18)),
}
"""Batch 1, milliseconds, FP32 and INT8: figures of the kind that users compare with, as the project's field
notes gathered them. They name no processor and no version; 2.5 times on a CPU takes VNNI or its like."""
BUDGET_S = 120.0
_RANDOM = "Weights are random: speed and parity mean what they say, answers mean nothing."


@dataclass(frozen=True)
class ReferenceRequest:
    """How to measure the reference models; `work` keeps their files."""

    work: Path
    names: tuple[str, ...] = tuple(TITLES)
    budget_s: float = BUDGET_S
    """Of each search."""
    threads: int = 1
    seconds: float = 10.0
    runs: int | None = None
    providers: tuple[str, ...] = ("CPU",)


def default_work() -> Path:
    """The user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(home) / "edgeward" / "reference"


def bench_reference(request: ReferenceRequest, progress: Progress = silent) -> BenchReport:
    """Build and quantise what is not there yet, and measure it.

    Raises:
        Rejected, Unavailable: as the zoo, the quantiser and `bench` do.
    """
    made = {name: _made(name, request, progress) for name in request.names}
    files = tuple(file for one in made.values() for file in (one.fp32, one.int8) if file is not None)
    report = bench(
        BenchRequest(
            files,
            providers=request.providers,
            threads=request.threads,
            seconds=request.seconds,
            runs=request.runs,
        ),
        progress,
    )
    names = {one.fp32: name for name, one in made.items()}
    renamed = {row.model: names[row.file] for row in report.rows if row.reference}
    rows = [replace(row, model=renamed[row.model], name=_plain_name(row)) for row in report.rows]
    rows += [_missing(name, one, request) for name, one in made.items() if one.int8 is None]
    return replace(
        report,
        rows=tuple(sorted(rows, key=lambda row: list(made).index(row.model))),
        inputs={renamed[model]: origin for model, origin in report.inputs.items()},
        published={name: PUBLISHED.get(name, ()) for name in made},
        titles={name: TITLES.get(name, name) for name in made},
        notes=(*report.notes, _RANDOM),
    )


@dataclass(frozen=True)
class _Made:
    fp32: Path
    int8: Path | None
    why_not: str = ""


def _made(name: str, request: ReferenceRequest, progress: Progress) -> _Made:
    """The model's two files. Both are cheap when they are there: the search resumes and finds itself done."""
    home = request.work / name
    fp32 = zoo.build(name, home, progress=progress)
    wish = QuantiseRequest(fp32, budget_s=request.budget_s, threads=request.threads)
    report = quantise_model(wish, home / "int8", progress)
    if report.exit_code != 0:
        return _Made(fp32, None, report.conclusion.splitlines()[0])
    return _Made(fp32, home / "int8" / f"{report.name}.onnx")


def _plain_name(row: Row) -> str:
    return "FP32" if row.precision == "fp32" else row.precision.upper()


def _missing(name: str, made: _Made, request: ReferenceRequest) -> Row:
    return Row(
        model=name,
        name="INT8",
        file=made.fp32,
        precision="int8",
        provider="CPU",
        threads=request.threads,
        bytes=0,
        reason=made.why_not,
    )
