"""What a bench yields."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One figure. `baseline` and `ratio` where two sides were measured; `holds` is None without a goal."""

    bench: str
    metric: str
    value: float
    unit: str
    baseline: float | None = None
    ratio: float | None = None
    goal: str = ""
    holds: bool | None = None
    note: str = ""


def at_most(
    bench: str,
    metric: str,
    value: float,
    unit: str,
    *,
    goal: float,
    baseline: float | None = None,
    note: str = "",
) -> Row:
    ratio = round(value / baseline, 3) if baseline else None
    return Row(bench, metric, round(value, 3), unit, baseline, ratio, f"<= {goal:g}", value <= goal, note)


def at_least(bench: str, metric: str, value: float, unit: str, *, goal: float, note: str = "") -> Row:
    return Row(bench, metric, round(value, 3), unit, None, None, f">= {goal:g}", value >= goal, note)


def told(bench: str, metric: str, value: float, unit: str, note: str = "") -> Row:
    """A figure without a goal."""
    return Row(bench, metric, round(value, 3), unit, note=note)
