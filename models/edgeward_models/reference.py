"""The reference models: built by the zoo, quantised by our search, measured beside published figures.

Invariants: what was published never hides the machine that ours come from; what the search does not offer
is a row without figures that says why; files are kept in the work directory, and a second run only measures.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgeward_models import zoo
from edgeward_models.bench import BenchReport, BenchRequest, Published, Row, bench_models
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
    return beside_published(made, request, progress)


@dataclass(frozen=True)
class Made:
    """A reference model's two files, or why there is only one."""

    fp32: Path
    int8: Path | None
    why_not: str = ""


def beside_published(
    made: Mapping[str, Made], request: ReferenceRequest, progress: Progress = silent
) -> BenchReport:
    """Measure the files, and put the published figures beside them. Raises as `bench` does."""
    files = {name: [file for file in (one.fp32, one.int8) if file is not None] for name, one in made.items()}
    wish = BenchRequest(
        tuple(file for some in files.values() for file in some),
        providers=request.providers,
        threads=request.threads,
        seconds=request.seconds,
        runs=request.runs,
    )
    report = bench_models(files, wish, progress)
    rows = [replace(row, name=row.precision.upper()) for row in report.rows]
    rows += [_missing(name, one, request) for name, one in made.items() if one.int8 is None]
    order = list(made)
    return replace(
        report,
        rows=tuple(sorted(rows, key=lambda row: order.index(row.model))),
        published={name: PUBLISHED.get(name, ()) for name in made},
        titles={name: TITLES.get(name, name) for name in made},
        notes=(*report.notes, _RANDOM),
    )


def _made(name: str, request: ReferenceRequest, progress: Progress) -> Made:
    """Its files. All of it is cheap when it is there: the search finds itself done."""
    home = request.work / name
    fp32 = zoo.build(name, home, progress=_named(f"build {name}", progress))
    wish = QuantiseRequest(fp32, budget_s=request.budget_s, threads=request.threads)
    report = quantise_model(wish, home / "int8", _named(f"quantise {name}", progress))
    if report.exit_code != 0:
        return Made(fp32, None, report.conclusion.splitlines()[0])
    return Made(fp32, home / "int8" / f"{report.name}.onnx")


def _named(step: str, progress: Progress) -> Progress:
    return lambda what, done, total: progress(f"{step}: {what}", done, total)


def _missing(name: str, made: Made, request: ReferenceRequest) -> Row:
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
