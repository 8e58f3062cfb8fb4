"""The only importer of matplotlib: a benchmark as a picture, SVG or PNG by the file's name.

Invariant: the same report gives the same bytes with the same matplotlib: no date, no random names.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from edgeward_models.bench_tables import title
from edgeward_models.whole_file import write_whole
from edgeward_wire.errors import Rejected

if TYPE_CHECKING:
    from edgeward_models.bench import BenchReport, Row

SUFFIXES = (".svg", ".png")
_COLOURS = {"fp32": "#8a97a8", "fp16": "#4f9d8b", "int8": "#2563a8"}
_OURS, _OTHERS = "#2563a8", "#c7ced8"
_CLEAR = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "edgeward",
    "font.family": "DejaVu Sans",  # it comes with matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
}


def check_suffix(out: Path) -> None:
    """Raises Rejected for what is neither SVG nor PNG: before the work, not after it."""
    if out.suffix.lower() not in SUFFIXES:
        raise Rejected(f"{out.name} is neither SVG nor PNG.", "End the plot's name in .svg or .png.")


def bench_plot(report: BenchReport, out: Path) -> None:
    """Latencies of all rows; beside them, where there are published figures, the speed-ups of both.

    Raises:
        Rejected: the suffix. Unavailable: it cannot be written.
    """
    check_suffix(out)
    rows = [row for row in report.rows if row.p50_ms is not None]
    compared = [model for model in report.models if report.published.get(model)]
    with matplotlib.rc_context(_STYLE):
        height = max(2.8, 1.5 + 0.36 * len(rows) + 0.3 * len(report.models), 1.2 + 0.9 * len(compared))
        figure = Figure(figsize=(11.0 if compared else 7.5, height), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, 2 if compared else 1, squeeze=False)[0]
        _latencies(axes[0], report, rows)
        if compared:
            _speed_ups(axes[1], report, compared)
        _heading(figure, report)
        write_whole(out, _rendered(figure, out.suffix.lower()))


def _rendered(figure: Figure, suffix: str) -> bytes:
    made = io.BytesIO()
    if suffix == ".svg":
        figure.savefig(made, format="svg", metadata={"Date": None})
    else:
        figure.savefig(made, format="png", dpi=150, metadata={"Software": None})
    return made.getvalue()


def _heading(figure: Figure, report: BenchReport) -> None:
    machine = report.machine
    figure.suptitle(
        f"{machine.cpu} ({machine.arch}), {machine.capability}\nONNX Runtime {machine.ort}",
        x=0.01,
        ha="left",
        fontsize=9,
    )


def _latencies(axes: Axes, report: BenchReport, rows: Sequence[Row]) -> None:
    """A bar to p50, a whisker to p99; models under one another."""
    places, labels, at, last = [], [], 0.0, ""
    longest = max((row.p99_ms or 0.0 for row in rows), default=1.0)
    for row in rows:
        if row.model != last:
            at += 0.9 if last else 0.0
            _head(axes, at, title(report, row.model))
            last = row.model
        assert row.p50_ms is not None
        p99 = row.p99_ms or row.p50_ms
        axes.barh(at, row.p50_ms, height=0.62, color=_COLOURS[row.precision])
        axes.plot([row.p50_ms, p99], [at, at], color="#1c2430", linewidth=1)
        gain = f"  ({row.speed_up:.2f} ×)" if row.speed_up and not row.reference else ""
        told = f"{row.p50_ms:.3g} ms{gain}"
        axes.text(p99 + 0.01 * longest, at, told, va="center", fontsize=8)
        places.append(at)
        labels.append(f"{row.name}, {row.provider}")
        at += 1.0
    axes.set_yticks(places, labels)
    axes.set_ylim(at - 0.3, -1.1)
    axes.set_xlim(0, longest * 1.3)
    threads = sorted({row.threads for row in rows})
    told = ", ".join(map(str, threads))
    axes.set_xlabel(
        f"latency of one run in ms ({told} thread{'' if threads == [1] else 's'}): p50, line to p99"
    )
    axes.set_title("Latency")


def _head(axes: Axes, at: float, text: str) -> None:
    """A model's name above its bars, clear of the axis."""
    axes.annotate(
        text,
        (0, at - 0.62),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold",
        bbox=_CLEAR,
    )


def _speed_ups(axes: Axes, report: BenchReport, models: Sequence[str]) -> None:
    """FP32 over INT8: ours and what was published."""
    at, places, labels = 0.0, [], []
    most = 1.0
    for model in models:
        ours = next((r.speed_up for r in report.rows if r.model == model and r.precision == "int8"), None)
        bars = [("here", ours, _OURS)] + [
            (f"published, {one.platform}", one.speed_up, _OTHERS) for one in report.published[model]
        ]
        _head(axes, at, title(report, model))
        for label, value, colour in bars:
            axes.barh(at, value or 0.0, height=0.62, color=colour)
            told = f"{value:.2f} ×" if value else "INT8 not offered"
            axes.text((value or 0.0) + 0.04, at, told, va="center", fontsize=8, bbox=_CLEAR)
            places.append(at)
            labels.append(label)
            most = max(most, value or 0.0)
            at += 1.0
        at += 0.9
    axes.axvline(1.0, color="#5b6675", linewidth=0.8, linestyle=":")
    axes.set_yticks(places, labels)
    axes.set_ylim(at - 1.2, -1.1)
    axes.set_xlim(0, most * 1.25)
    axes.set_xlabel("times as fast as FP32 on the same machine")
    axes.set_title("INT8 against FP32, here and as published")
