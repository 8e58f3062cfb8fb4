"""A benchmark for people: rows for the terminal, and Markdown. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from edgeward_models import machine
from edgeward_models.bench import BenchReport, Row, gate

HEADS = (
    *("file", "precision", "provider", "threads", "p50 ms", "p90 ms", "p99 ms", "ratio", "95 %"),
    *("speed-up", "parity", "SQNR dB", "memory MB", "runs", "why"),
)
BESIDE_HEADS = ("model", "where", "FP32 ms", "INT8 ms", "speed-up")
RIGHT = tuple(head for head in HEADS if head not in ("file", "precision", "provider", "why"))


def title(report: BenchReport, model: str) -> str:
    """What a model is called."""
    return report.titles.get(model, model)


def cells(row: Row) -> tuple[str, ...]:
    """One row, as `HEADS` says."""
    interval = f"{row.interval.low:.3f} to {row.interval.high:.3f}" if row.interval else ""
    return (
        row.name,
        row.precision.upper(),
        row.provider,
        str(row.threads),
        *(_number(value, 2) for value in (row.p50_ms, row.p90_ms, row.p99_ms)),
        _number(row.ratio, 3),
        "" if row.reference else interval,
        "" if row.speed_up is None else f"{row.speed_up:.2f} ×",
        _parity(row),
        "exact" if row.sqnr_db == math.inf else _number(row.sqnr_db, 1),
        _number(row.memory_mb, 0),
        str(row.runs) if row.runs else "",
        row.reason,
    )


def beside(report: BenchReport) -> list[tuple[str, str, str, str, str]]:
    """(model, where, FP32 ms, INT8 ms, speed-up): ours, then what was published."""
    found = []
    for model in report.models:
        mine = {row.precision: row for row in reversed(report.rows) if row.model == model}
        fp32, int8 = mine.get("fp32"), mine.get("int8")
        if model not in report.published or fp32 is None:
            continue
        ours = f"here: {report.machine.cpu}, {'VNNI' if report.machine.vnni else 'no VNNI'}"
        ours = ours if report.machine.arch == "x86_64" else f"here: {report.machine.cpu}"
        name = title(report, model)
        found.append(
            (
                name,
                f"{ours}, {_threads(fp32.threads)}",
                _number(fp32.p50_ms, 1),
                _number(int8.p50_ms, 1) if int8 else "",
                f"{int8.speed_up:.2f} ×" if int8 and int8.speed_up else "not offered",
            )
        )
        found += [
            (name, f"published: {p.platform}", f"{p.fp32_ms:g}", f"{p.int8_ms:g}", f"{p.speed_up:.2f} ×")
            for p in report.published[model]
        ]
    return found


def facts(report: BenchReport) -> list[tuple[str, str]]:
    """The machine, and what became of it meanwhile."""
    found = [pair for pair in machine.lines(report.machine) if pair[0] != "temperature"]
    before, after = report.machine.temperature_c, report.temperature_after_c
    heat = "not known" if before is None or after is None else f"{before:.0f} °C before, {after:.0f} °C after"
    slowed = f", slowed down {report.throttled} times" if report.throttled else ""
    return [*found, ("temperature", heat + slowed)]


def markdown(report: BenchReport) -> str:
    """The whole report."""
    text = ["# Benchmark", ""]
    text += [f"- {what}: {value}" for what, value in facts(report)]
    text += [f"- **{note}**" for note in report.notes]
    for model in report.models:
        rows = [row for row in report.rows if row.model == model]
        inputs = report.inputs.get(model)
        text += ["", f"## {title(report, model)}", ""]
        text += [f"Inputs: {inputs}.", ""] if inputs else []
        text += _table(HEADS, map(cells, rows))
    if report.published:
        text += ["", "## Beside published figures", ""]
        text += _table(BESIDE_HEADS, beside(report))
        text += ["", PUBLISHED_NOTE]
    text += ["", READING]
    return "\n".join(text) + "\n"


PUBLISHED_NOTE = (
    "Published figures name neither processor nor versions; another machine's milliseconds do not compare,"
    " ratios do, and only where the instructions are alike: 2.5 times on a CPU takes VNNI or its like."
)
READING = (
    "Ratio: median of paired latencies to the first FP32 file, with its 95 % interval; below 1 is faster."
    " Parity: smallest cosine of any output with the same file's own exact outputs; below 0.99 a device"
    " refuses it. SQNR: against the first file's exact outputs. Memory: what loading and the first run"
    " took of a fresh process's own. Files of one model ran in turn in one process, warmed up, not spinning."
)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _parity(row: Row) -> str:
    if row.parity is None:
        return ""
    return f"{row.parity:.4f}" + ("" if row.parity >= gate(row) else " WRONG")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    marks = [
        "---:" if head in RIGHT or head.endswith(" ms") or head == "speed-up" else "---" for head in heads
    ]
    return [line(heads), line(marks), *map(line, rows)]
