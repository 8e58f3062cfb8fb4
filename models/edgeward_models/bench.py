"""How fast files run here, side by side: latencies, ratio to FP32, parity, memory, and the machine's state.

    report = bench(BenchRequest((Path("fp32.onnx"), Path("int8.onnx"))))

Invariants: files of one model (the same ports) run in turn in one process, on the same inputs, warmed up,
never spinning; a speed is a paired ratio with its interval; what does not load is a row with the reason. The
machine's instructions, power mode, temperature and load are part of the result: a ratio of INT8 to FP32
means little without them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgeward_models import machine
from edgeward_models.bench_files import by_ports, inspected, names_of
from edgeward_models.feeding import Fed, feed
from edgeward_models.footprint import measure
from edgeward_models.inspect import Inspection
from edgeward_models.machine import Machine
from edgeward_models.progress import Progress, silent
from edgeward_models.race import MAX_RUNS, Contender, Timing, race
from edgeward_models.similarity import cosine, energies, ratio_db
from edgeward_models.statistics import Interval
from edgeward_runtime import parity, plans, resources
from edgeward_runtime.plans import VariantFacts
from edgeward_runtime.sessions import NotLoaded, RunFailed, Session, open_exact, open_session
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import Precision
from edgeward_wire.verdict import Plan

MAX_FILES = 32
LEAST_RUNS = 10
_BUSY = 0.5  # processes that wanted a core, for each core, before we began
_INPUTS = 8

Outputs = list[list[Any]]
"""One list of arrays a run."""


@dataclass(frozen=True)
class BenchRequest:
    """What to measure. The first file in FP32 of each model is what its others are compared with."""

    files: tuple[Path, ...]
    providers: tuple[str, ...] = ("CPU",)
    threads: int = 1
    seconds: float = 5.0
    """For each model."""
    runs: int | None = None
    """Exactly so many, however long they take."""
    samples: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One file on one provider. Figures are None where it did not get so far."""

    model: str
    """Its model: the reference's name."""
    name: str
    file: Path
    precision: Precision
    provider: str
    threads: int
    bytes: int
    runs: int = 0
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None
    ratio: float | None = None
    """Latency over the reference's; below 1 is faster."""
    interval: Interval | None = None
    parity: float | None = None
    """The smallest cosine of any output with this file's own exact ones: below 0.99, a device refuses it."""
    sqnr_db: float | None = None
    """Against the reference's exact outputs; infinite where they are equal."""
    memory_mb: float | None = None
    """What loading and the first run took of a fresh process's own memory."""
    load_ms: float | None = None
    reference: bool = False
    reason: str = ""
    """Why figures are missing."""

    @property
    def speed_up(self) -> float | None:
        """How many times as fast as the reference."""
        return 1 / self.ratio if self.ratio else None


@dataclass(frozen=True)
class Published:
    """Latencies that others published, in ms. Other machines, perhaps other versions: ratios compare."""

    platform: str
    fp32_ms: float
    int8_ms: float

    @property
    def speed_up(self) -> float:
        """FP32 over INT8."""
        return self.fp32_ms / self.int8_ms


@dataclass(frozen=True)
class BenchReport:
    """All rows, and what they were measured on."""

    rows: tuple[Row, ...]
    inputs: dict[str, str]
    """By model: where its inputs came from."""
    machine: Machine
    """Before the first run."""
    temperature_after_c: float | None
    throttled: int
    """How often a core was slowed down for heat meanwhile."""
    took_s: float
    published: dict[str, tuple[Published, ...]]
    """By model; empty but for the reference models."""
    titles: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def models(self) -> list[str]:
        """In order."""
        return list(dict.fromkeys(row.model for row in self.rows))

    @property
    def right(self) -> bool:
        """Whether every row has its figures, and none of them is of wrong outputs."""
        return all(not row.reason and (row.parity or 0.0) >= gate(row) for row in self.rows)


def bench(request: BenchRequest, progress: Progress = silent) -> BenchReport:
    """Measure all files; those with the same ports are one model.

    Raises:
        Rejected: a file, the samples or the wish is no good. Unavailable: a file cannot be read.
    """
    _check(request)
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as scratch:
        found = [inspected(file, Path(scratch), k) for k, file in enumerate(dict.fromkeys(request.files))]
        return _measured(by_ports(found), request, progress)


def bench_models(
    models: Mapping[str, Sequence[Path]], request: BenchRequest, progress: Progress = silent
) -> BenchReport:
    """Measure files of which it is known what models they are; `request.files` names them all.

    Raises: as `bench`.
    """
    _check(request)
    with tempfile.TemporaryDirectory(prefix="edgeward-bench-") as scratch:
        place = Path(scratch)
        groups = {
            name: [inspected(file, place / name, k) for k, file in enumerate(files)]
            for name, files in models.items()
        }
        return _measured(groups, request, progress)


def _measured(
    models: Mapping[str, Sequence[Inspection]], request: BenchRequest, progress: Progress
) -> BenchReport:
    began, before, throttled = time.monotonic(), machine.facts(), resources.throttle_count()
    rows: list[Row] = []
    inputs: dict[str, str] = {}
    for k, (name, files) in enumerate(models.items()):
        progress(f"measure: {name}", k, len(models))
        group = sorted(files, key=lambda one: one.facts.precision != "fp32")
        told = next((one for one in group if one.guess.samples is not None), group[0])
        fed = feed(told, request.samples, count=_INPUTS, seed=request.seed)
        inputs[name] = fed.origin
        rows += _Group(name, group, fed, request, _within(progress, name, k, len(models))).rows()
    progress("measure: done", len(models), len(models))
    return BenchReport(
        rows=tuple(rows),
        inputs=inputs,
        machine=before,
        temperature_after_c=machine.temperature_c(),
        throttled=resources.throttle_count() - throttled,
        took_s=time.monotonic() - began,
        published={},
        titles={},
        notes=tuple(_notes(before, rows)),
    )


def _within(progress: Progress, name: str, k: int, models: int) -> Progress:
    """The progress of model k of so many: its last part is done when all is."""

    def told(what: str, done: int, total: int) -> None:
        progress(f"measure: {name}, {what}", k * total + min(done, total - 1), models * total)

    return told


def plain(report: BenchReport) -> dict[str, Any]:
    """Everything, for `--json`: what is infinite is null."""
    return {
        "schema": "edgeward.bench/1",
        "machine": report.machine.plain(),
        "temperature_after_c": report.temperature_after_c,
        "throttled": report.throttled,
        "took_s": round(report.took_s, 1),
        "inputs": report.inputs,
        "notes": list(report.notes),
        "rows": [
            {
                **asdict(row),
                "file": str(row.file),
                "interval": list(row.interval) if row.interval else None,
                "sqnr_db": row.sqnr_db if row.sqnr_db is not None and abs(row.sqnr_db) < 1e9 else None,
                "speed_up": row.speed_up,
            }
            for row in report.rows
        ],
        "published": {
            model: [asdict(one) | {"speed_up": round(one.speed_up, 2)} for one in found]
            for model, found in report.published.items()
        },
    }


def _check(request: BenchRequest) -> None:
    if not request.files:
        raise Rejected("There is nothing to measure.", "Name ONNX files, or give --reference.")
    if len(request.files) * len(request.providers) > MAX_FILES:
        raise Rejected(
            f"{len(request.files)} files on {len(request.providers)} providers are too many;"
            f" at most {MAX_FILES} rows are measured."
        )
    if request.runs is not None and not 1 <= request.runs <= MAX_RUNS:
        raise Rejected(f"{request.runs} runs were asked for; 1 to {MAX_RUNS} are measured.")


def _notes(before: Machine, rows: Sequence[Row]) -> list[str]:
    notes = []
    if before.load is not None and before.load > _BUSY * before.cores:
        notes.append(
            f"Other work wanted the cores (load {before.load:.1f} on {before.cores}):"
            " latencies are too long, ratios hold better."
        )
    wrong = [
        f"{row.name} ({row.provider})" for row in rows if row.parity is not None and row.parity < gate(row)
    ]
    if wrong:
        notes.append(
            f"Not to be deployed here: {', '.join(wrong)}. Under this plan the outputs differ from the file's"
            " own exact ones, so its speed counts for nothing."
        )
    return notes


def gate(row: Row) -> float:
    """The cosine below which a device refuses a plan."""
    return parity.gate(parity.GATE, row.precision, row.provider)


# --- one model


@dataclass(frozen=True)
class _Group:
    model: str
    group: Sequence[Inspection]
    fed: Fed
    request: BenchRequest
    progress: Progress

    def rows(self) -> list[Row]:
        """All of its files on all providers; the reference first."""
        found: list[tuple[Row, Contender]] = []
        truth = _exact(self.group[0].whole, self.fed)
        for provider in self.request.providers:
            for name, inspection in zip(names_of(self.group), self.group, strict=True):
                found.append(self._look(name, inspection, provider, truth))
        running = [contender for row, contender in found if not row.reason]
        timings = race(
            running,
            self.fed.feeds,
            goal_s=self.request.seconds,
            least=self.request.runs or LEAST_RUNS,
            most=self.request.runs or MAX_RUNS,
            progress=self.progress,
        )
        by_file = {id(one): timing for one, timing in zip(running, timings, strict=True)}
        lost = bool(found[0][0].reason)  # then the race had another reference than its figures would say
        return [
            _timed(replace(row, reference=k == 0), by_file.get(id(contender)), lost)
            for k, (row, contender) in enumerate(found)
        ]

    def _look(
        self, name: str, inspection: Inspection, provider: str, truth: Outputs | str
    ) -> tuple[Row, Contender]:
        """Everything but the latency: memory, load, parity."""
        facts = inspection.facts
        plan = self._plan(inspection, provider)
        row = Row(
            model=self.model,
            name=name,
            file=facts.path,
            precision=facts.precision,
            provider=plan.provider.removesuffix("ExecutionProvider"),
            threads=plan.threads,
            bytes=facts.bytes,
        )
        return _prove(row, inspection.whole, plan, self.fed, truth), Contender(name, inspection.whole, plan)

    def _plan(self, inspection: Inspection, provider: str) -> Plan:
        """What a device would try first on this provider."""
        precision, threads = inspection.facts.precision, self.request.threads
        full = plans.provider_name(provider)
        here = plans.Machine(resources.machine(), resources.isa(), (full,))
        variants: dict[str, VariantFacts] = {precision: VariantFacts(precision, "0" * 64)}
        tried = plans.candidates(variants, here, threads=threads, only=(full,))
        plain_ones = [plan for plan in tried if plan.threads == threads] or tried
        return plain_ones[0] if plain_ones else Plan(provider=full, variant=precision, threads=threads)


def _prove(row: Row, file: Path, plan: Plan, fed: Fed, truth: Outputs | str) -> Row:
    """Load it and run it, and hold it against its own exact outputs and the reference's."""
    footprint = measure(file, plan, fed.feeds[0])
    row = replace(row, memory_mb=footprint.memory_mb, load_ms=footprint.load_ms, reason=footprint.reason)
    if row.reason:
        return row
    exact = _exact(file, fed)
    try:
        session = open_session(file, plan)
        try:
            mine = [session.run(feeds) for feeds in fed.feeds]
        finally:
            session.close()
            resources.give_back()
    except (NotLoaded, RunFailed) as error:
        return replace(row, reason=error.what)
    if isinstance(exact, str):
        return replace(row, reason=f"Without optimisation: {exact}")
    row = replace(row, parity=_worst(mine, exact))
    return row if isinstance(truth, str) else replace(row, sqnr_db=_sqnr(truth, mine))


def _exact(file: Path, fed: Fed) -> Outputs | str:
    """The file's exact outputs, or why there are none to compare with."""
    try:
        session: Session = open_exact(file)
        try:
            runs = [session.run(feeds) for feeds in fed.feeds]
        finally:
            session.close()
    except (NotLoaded, RunFailed) as error:
        return error.what
    for k, port in enumerate(session.outputs):
        if not all(np.isfinite(run[k]).all() for run in runs if run[k].dtype.kind == "f"):
            return f"Output {port.name} is not finite (NaN or infinity)."
    return runs


def _worst(mine: Outputs, exact: Outputs) -> float:
    pairs = (pair for one, other in zip(mine, exact, strict=True) for pair in zip(one, other, strict=True))
    return min((cosine(a, b) for a, b in pairs if a.dtype.kind in "fiub"), default=1.0)


def _sqnr(truth: Outputs, mine: Outputs) -> float | None:
    """Over all float outputs of all runs."""
    signal = noise = 0.0
    for one, other in zip(truth, mine, strict=True):
        for a, b in zip(one, other, strict=True):
            if a.dtype.kind == "f":
                if a.shape != b.shape:
                    return None
                s, n = energies(a, b)
                signal, noise = signal + s, noise + n
    return ratio_db(signal, noise) if signal else None


def _timed(row: Row, timing: Timing | None, lost: bool) -> Row:
    if timing is None:
        return row
    return replace(
        row,
        runs=timing.runs,
        p50_ms=timing.p50_ms,
        p90_ms=timing.p90_ms,
        p99_ms=timing.p99_ms,
        ratio=None if lost else timing.ratio,
        interval=None if lost else timing.interval,
        reason=row.reason or timing.reason or ("What it is compared with has no figures." if lost else ""),
    )
