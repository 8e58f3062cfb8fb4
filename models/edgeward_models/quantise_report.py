"""What came of a quantisation, for people and programs: conclusions, tables, Markdown, JSON, a picture.

Invariants: no figure stands without its interval; whoever is not offered has a reason. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeward_models.findings import Candidate, Final, TargetReport
from edgeward_models.graph import Facts
from edgeward_models.machine import Machine, lines
from edgeward_models.pareto_plot import Dot, Kind, draw
from edgeward_models.search import PAYS, nearest
from edgeward_models.statistics import Interval
from edgeward_models.trials import Effort
from edgeward_wire import __version__

SCHEMA = "edgeward.quantise/1"
DONE, NOT_OFFERED = 0, 1
_FEW = 4
WEAK = "Weak evidence: calibrated and judged on noise, nothing is known of real inputs. Give --samples."


@dataclass(frozen=True)
class QuantiseReport:
    """The whole run."""

    name: str
    model: Facts
    sha256: str
    """Of the float model."""
    origin: str
    """Of the samples, for people."""
    evidence: str
    effort: Effort
    machine: Machine
    threads: int
    targets: tuple[TargetReport, ...]
    took_s: float

    @property
    def exit_code(self) -> int:
        """0 where every target has something on offer."""
        return DONE if all(one.offered is not None for one in self.targets) else NOT_OFFERED

    @property
    def main(self) -> TargetReport | None:
        """The first target that something is offered for."""
        return next((one for one in self.targets if one.offered is not None), None)

    def file(self, target: TargetReport) -> str | None:
        """The name of what is offered for a target."""
        if target.offered is None:
            return None
        return f"{self.name}.onnx" if target is self.main else f"{self.name}-{target.target}.onnx"

    @property
    def conclusion(self) -> str:
        """A sentence for each target."""
        return "\n".join(conclude(one) for one in self.targets)

    def plain(self) -> dict[str, Any]:
        """For JSON: the whole report; what is infinite is null."""
        made: dict[str, Any] = _json(
            {
                "schema": SCHEMA,
                "edgeward": __version__,
                "name": self.name,
                "model": {
                    "file": self.model.path.name,
                    "sha256": self.sha256,
                    "macs": self.model.macs,
                    "bytes": self.model.bytes,
                },
                "samples": {"origin": self.origin, "evidence": self.evidence, **asdict(self.effort)},
                "machine": self.machine.plain(),
                "threads": self.threads,
                "targets": [{"file": self.file(one), **_target(one)} for one in self.targets],
                "exit": self.exit_code,
                "took_s": round(self.took_s, 1),
            }
        )
        return made


def conclude(target: TargetReport) -> str:
    """What came of one target, and what to do where nothing is offered."""
    one, final = target.offered, target.final
    if one is not None and final is not None:
        speed = "has"
        if one.timing is not None and one.timing.ratio is not None:
            interval = one.timing.interval or Interval(one.timing.ratio, one.timing.ratio)
            range_ = f"[{1 / interval.high:.2f}, {1 / interval.low:.2f}]"
            speed = f"is {1 / one.timing.ratio:.2f} x as fast as FP32 {range_} at"
        notes = "" if target.here else " " + " ".join(target.notes)
        return f"{target.target}: {one.title} {speed} {_accuracy(target, final)}.{notes}"
    measured = [c.measured for c in target.candidates]
    best = nearest(measured, target.gate)
    if best is not None and target.gate.passes(measured[best]):
        title = target.candidates[best].title
        return (
            f"{target.target}: nothing is offered. {title} passes, but was not held against the test samples."
        )
    if best is not None:
        return (
            f"{target.target}: nothing passes the gate. The best of those that pay,"
            f" {target.candidates[best].title}, is {1 / (measured[best].ratio or 1.0):.2f} x as fast and has"
            f" {target.gate.lacks(measured[best])}."
        )
    timed = [c for c in target.candidates if c.measured.ratio is not None]
    if timed:
        fastest = min(timed, key=lambda c: c.measured.ratio or math.inf)
        return (
            f"{target.target}: INT8 does not pay. The fastest candidate, {fastest.title}, takes"
            f" {fastest.measured.ratio:.2f} of FP32's time"
            f" {_between(fastest.timing.interval if fastest.timing else None, 2)}; at most {PAYS} would pay"
            + (f" ({fastest.measured.excluded})." if fastest.measured.excluded else ".")
        )
    reason = next((m.excluded for m in measured if m.excluded), "") or " ".join(target.notes)
    return f"{target.target}: no candidate can be offered. {reason}".strip()


def _accuracy(target: TargetReport, final: Final) -> str:
    text = f"SQNR {decibels(final.sqnr_db)} {_between(final.sqnr_interval, 1)}"
    if final.agreement is not None:
        text += (
            f" and {target.gate.answers} {_share(final.agreement)} {_between(final.agreement_interval, 3)}"
        )
    return f"{text} on {final.samples} test samples"


def in_float(target: TargetReport) -> str:
    """The operators that do not run on integers on this target; empty where none was meant to."""
    meant = any(one.measured.scheme.method != "fp16" for one in target.candidates)
    if not meant or not target.unsupported:
        return ""
    return f"In float on this target: {', '.join(target.unsupported)}."


def advice(report: QuantiseReport) -> str:
    """The next step where something is not offered."""
    failed = [one for one in report.targets if one.offered is None]
    if not failed:
        return ""
    near = any(
        not one.here or nearest([c.measured for c in one.candidates], one.gate) is not None for one in failed
    )
    if near and report.evidence == "weak":
        return "Give --samples: on noise, calibration and accuracy mean little."
    if near:
        return (
            "Give more or better --samples, a larger --budget, or a lower gate (--min-agreement, --min-sqnr)."
        )
    return 'Deploy the float model, with float = "reason" in its sidecar, or quantise for another --target.'


# --- the table of candidates


COLUMNS = ("candidate", "SQNR", "agreement", "latency / FP32", "p50 ms", "parity", "is", "why")


def rows(target: TargetReport) -> list[tuple[str, ...]]:
    """One row of text a candidate, the offered one first, then the front, then what is slower or excluded."""
    return [_row(target, k) for k in sorted(range(len(target.candidates)), key=lambda k: _rank(target, k))]


def brief(target: TargetReport) -> tuple[list[tuple[str, ...]], int]:
    """The rows that a person wants to see first, and how many more there are.

    What is offered, the front, the schemes without float layers, and one example of each kind of exclusion.
    """
    kept, kinds = [], set()
    order = sorted(range(len(target.candidates)), key=lambda k: _rank(target, k))
    for k in order:
        one = target.candidates[k].measured
        kind = one.excluded.split(" ")[:4] if one.excluded else []
        if len(order) <= _FEW or k == target.chosen or k in target.front or not one.scheme.keep_float:
            kept.append(k)
        elif kind and " ".join(kind) not in kinds:
            kinds.add(" ".join(kind))
            kept.append(k)
    return [_row(target, k) for k in kept], len(order) - len(kept)


def _rank(target: TargetReport, k: int) -> tuple[bool, bool, bool, float]:
    one = target.candidates[k].measured
    return k != target.chosen, bool(one.excluded), k not in target.front, one.ratio or math.inf


def _row(target: TargetReport, k: int) -> tuple[str, ...]:
    one = target.candidates[k]
    m, timing = one.measured, one.timing
    return (
        one.title,
        "" if m.sqnr_db is None else decibels(m.sqnr_db),
        "" if m.agreement is None else f"{_share(m.agreement)} {_between(one.agreement_interval, 2)}",
        ""
        if timing is None or timing.ratio is None
        else f"{timing.ratio:.3f} {_between(timing.interval, 3)}",
        "" if timing is None or timing.p50_ms is None else f"{timing.p50_ms:.2f}",
        "" if one.parity is None else f"{one.parity:.4f}",
        "chosen" if k == target.chosen else "front" if k in target.front else "",
        _why(target, k),
    )


def _why(target: TargetReport, k: int) -> str:
    one = target.candidates[k].measured
    if one.excluded:
        return one.excluded
    if k == target.chosen:
        return ""
    if one.ratio is not None and not one.pays:
        return "not faster than FP32" if one.ratio >= 1 else f"takes more than {PAYS} of FP32's time"
    if not target.gate.passes(one):
        return target.gate.lacks(one)
    return ""


# --- for people


def markdown(report: QuantiseReport) -> str:
    """The report as Markdown."""
    text = [f"# {report.name}: float to INT8", "", *(f"- {line}" for line in report.conclusion.splitlines())]
    if next_step := advice(report):
        text.append(f"- {next_step}")
    weak = " (weak evidence: nothing is known of real inputs)" if report.evidence == "weak" else ""
    counts = report.effort
    text += [
        "",
        "## Measured",
        "",
        f"Samples: {report.origin}{weak}. {counts.calibrate} calibrated, {counts.fit} searched, {counts.test}"
        " tested; testing saw none of what the others did. Samples that are crops of the same few pictures"
        " depend on one another: the intervals are rather too narrow then.",
        "",
        f"Latencies are paired with FP32's in one process, in turn, on {_threads(report.threads)}."
        " Intervals are at 95 %.",
        "",
        *(f"- {what}: {value}" for what, value in lines(report.machine)),
    ]
    for target in report.targets:
        text += ["", f"## {target.target}", "", f"Gate: {target.gate.says()} ({target.why})."]
        text += target.notes
        if line := in_float(target):
            text.append(line)
        text += ["", *_markdown_table(COLUMNS, rows(target))]
        offered = target.offered
        if offered is not None and offered.measured.scheme.keep_float:
            text += ["", f"In float in what is offered: {', '.join(offered.measured.scheme.keep_float)}."]
        if target.layers:
            most = [(str(x["name"]), f"{x['macs_share']:.1%}", decibels(x["sqnr_db"])) for x in target.layers]
            text += ["", "The most sensitive layers, each quantised alone:", ""]
            text += _markdown_table(("layer", "share of the work", "SQNR"), most[:16])
    if any(target.here for target in report.targets):
        text += ["", "![accuracy against latency](pareto.svg)"]
    return "\n".join(text) + "\n"


def _markdown_table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(columns), "|" + " --- |" * len(columns), *map(line, body)]


def plot(report: QuantiseReport) -> str:
    """Accuracy against latency of the first target that was measured here, as SVG."""
    target = next((one for one in report.targets if one.here), None)
    dots = [] if target is None else [d for k in range(len(target.candidates)) if (d := _dot(target, k))]
    where = report.name if target is None else f"{report.name} on {target.target}"
    return draw(dots, f"{where}: {report.machine.cpu}, {_threads(report.threads)}")


def _dot(target: TargetReport, k: int) -> Dot | None:
    m = target.candidates[k].measured
    if m.ratio is None or m.sqnr_db is None or not math.isfinite(m.sqnr_db):
        return None
    kind: Kind = "excluded" if m.excluded else "other"
    if k == target.chosen:
        kind = "chosen"
    elif k in target.front:
        kind = "front"
    return Dot(m.ratio, m.sqnr_db, kind, target.candidates[k].title)


def decibels(value: float | None) -> str:
    """`22.5 dB`."""
    if value is None or value == math.inf:
        return "equal"
    return "nothing left" if value == -math.inf else f"{value:.1f} dB"


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _between(interval: Interval | None, digits: int) -> str:
    return "" if interval is None else f"[{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def _target(target: TargetReport) -> Mapping[str, Any]:
    return {
        "target": target.target,
        "measured_here": target.here,
        "gate": {**asdict(target.gate), "why": target.why},
        "conclusion": conclude(target),
        "chosen": target.chosen,
        "front": list(target.front),
        "final": None if target.final is None else asdict(target.final),
        "fp32": None if target.fp32 is None else asdict(target.fp32),
        "candidates": [_candidate(one) for one in target.candidates],
        "layers": [dict(layer) for layer in target.layers],
        "unsupported": list(target.unsupported),
        "notes": list(target.notes),
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    m = one.measured
    return {
        "title": one.title,
        "scheme": m.scheme.key(),
        "bytes": one.bytes,
        "sqnr_db": m.sqnr_db,
        "sqnr_interval": one.sqnr_interval,
        "agreement": m.agreement,
        "agreement_interval": one.agreement_interval,
        "parity": one.parity,
        "ratio": m.ratio,
        "ratio_interval": one.timing.interval if one.timing else None,
        "p50_ms": one.timing.p50_ms if one.timing else None,
        "p99_ms": one.timing.p99_ms if one.timing else None,
        "excluded": m.excluded,
    }


def _json(value: Any) -> Any:
    """Values as JSON knows them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_json(v) for v in value]
    return value
