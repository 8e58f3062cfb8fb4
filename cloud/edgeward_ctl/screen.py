"""The terminal: tables on stdout, progress on stderr; plain lines where it is no terminal.

Invariant: what a program may read (tables, JSON) is alone on stdout; everything else goes to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from types import TracebackType
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from edgeward_ctl import views
from edgeward_ctl.follow import Board
from edgeward_wire.api import TargetProgress
from edgeward_wire.verdict import Verdict

_WIDE = 400
"""Of what is no terminal: a program reads lines, and must not find them folded."""

_GAP = 2
_LONGEST = {"state": 24, "sees": 20, "device": 40}
"""What a column asks for at most; a longer state is folded, anything else is cut."""
_DISPENSABLE = ("variant", "provider", "p99 ms", "p50 ms", "source", "online", "sees", "pipeline", "model")
"""Columns that a narrow terminal goes without, in this order."""
_KEPT = ("device", "fps", "state")


def out() -> Console:
    """Stdout."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False)


def err() -> Console:
    """Stderr."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else _WIDE, highlight=False)


def print_json(value: Any) -> None:
    """One JSON document on one line."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """One line on stderr."""
    err().print(text, markup=False, soft_wrap=True)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str | Text]],
    *,
    right: Sequence[str] = (),
    least: Mapping[str, int] | None = None,
) -> Table:
    """A table without lines to get in the way. `right` columns hold numbers, `least` the narrowest widths."""
    made = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column in columns:
        made.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=column not in ("reason", "state", "why"),
            min_width=(least or {}).get(column),
        )
    for row in rows:
        # What devices and files say is text, never markup.
        made.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return made


def ago(moment: float | None, now: float) -> str:
    """`12 s ago`, for people."""
    return f"{duration(max(0.0, now - moment))} ago" if moment else "never"


def duration(seconds: float) -> str:
    """`4 min`, for people."""
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def short_clock(moment: float, now: float) -> str:
    """`17:05` in local time, with the date when that is not today's."""
    day, today = time.localtime(moment), time.localtime(now)
    return time.strftime("%H:%M" if day[:3] == today[:3] else "%Y-%m-%d %H:%M", day)


def clock(moment: float) -> str:
    """A moment in the reader's own time zone."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))


def number(value: float | None, digits: int = 1) -> str:
    """Or nothing."""
    return "" if value is None else f"{value:.{digits}f}"


def size(count: float) -> str:
    """Bytes, for people."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


# --- tables


def overview_table(rows: Sequence[views.Row], room: int = _WIDE) -> Table:
    """What runs where, now, in at most `room` characters: a narrow terminal shows what matters most."""
    cells = _overview_cells(rows)
    wide = {name: max([len(name), *(len(cell) for cell in column)]) for name, column in cells.items()}
    wide = {name: min(width, _LONGEST.get(name, width)) for name, width in wide.items()}
    several = any(a.device == b.device and a.source != b.source for a, b in pairwise(rows))
    shown = fitting(wide, room, keep=("source",) if several else ())
    lines = zip(*(cells[name] for name in shown), strict=True)
    least = {name: wide[name] for name in _KEPT}
    return table(shown, lines, right=("fps", "p50 ms", "p99 ms"), least=least)


def fitting(wide: Mapping[str, int], room: int, keep: Sequence[str] = ()) -> list[str]:
    """The columns for which there is room; those of `keep` go last."""
    shown = dict(wide)
    for name in (*(c for c in _DISPENSABLE if c not in keep), *keep):
        if sum(width + _GAP for width in shown.values()) <= room:
            break
        shown.pop(name, None)
    return list(shown)


def _overview_cells(rows: Sequence[views.Row]) -> dict[str, list[str | Text]]:
    """The columns in their order, with all of their cells."""
    several = len({row.pipeline for row in rows if row.pipeline}) > 1
    return {
        "device": [row.device for row in rows],
        "online": [_online(row.online) for row in rows],
        **({"pipeline": [row.pipeline for row in rows]} if several else {}),
        "source": [row.source for row in rows],
        "model": [row.model for row in rows],
        "provider": [row.provider for row in rows],
        "variant": [row.variant for row in rows],
        "fps": [number(row.fps) for row in rows],
        "p50 ms": [number(row.p50) for row in rows],
        "p99 ms": [number(row.p99) for row in rows],
        "sees": [row.sees for row in rows],
        "state": [_state(row.state) for row in rows],
    }


def _online(online: bool) -> Text:
    return Text("yes", "green") if online else Text("no", "dim")


def _state(state: str) -> Text:
    bad = any(word in state for word in ("failed", "down", "below", "rejected"))
    return Text(state, "red" if bad else "yellow" if state.startswith("probation") else "")


def endings_table(rows: Sequence[views.Ending]) -> Table:
    """How a deployment ended."""
    return table(
        ("device", "result", "variant", "provider", "p50 ms", "p99 ms", "serving after", "reason"),
        (
            (
                row.device,
                Text(row.result, {True: "green", False: "red", None: "yellow"}[row.succeeded]),
                row.variant,
                row.provider,
                number(row.p50),
                number(row.p99),
                f"{row.serving_after_s:.1f} s" if row.serving_after_s is not None else "",
                row.reason,
            )
            for row in rows
        ),
        right=("p50 ms", "p99 ms", "serving after"),
    )


def chapters_table(rows: Sequence[views.Chapter]) -> Table:
    """A device's deployments and faults."""
    return table(
        ("when", "what", "result", "took", "p50 / p99 ms", "reason"),
        (
            (
                clock(row.at),
                row.what,
                row.result,
                duration(row.took_s) if row.took_s is not None else "",
                " / ".join(filter(None, (number(views.p50(row.numbers)), number(views.p99(row.numbers))))),
                row.reason,
            )
            for row in rows
        ),
    )


def verdict_table(verdict: Verdict) -> Table:
    """Every plan that was tried, with the numbers of those that lost."""
    return table(
        ("plan", "outcome", "p50 ms", "p99 ms", "ratio", "parity", "memory MB", "why"),
        (
            (
                outcome.plan.title,
                Text(
                    outcome.outcome, {"chosen": "bold green", "passed": "green"}.get(outcome.outcome, "red")
                ),
                number(outcome.p50_ms, 2),
                number(outcome.p99_ms, 2),
                number(outcome.ratio, 2),
                number(outcome.parity, 4),
                number(outcome.memory_mb, 0),
                outcome.reason,
            )
            for outcome in verdict.plans
        ),
        right=("p50 ms", "p99 ms", "ratio", "parity", "memory MB"),
    )


# --- progress


class Progressing(Board, Protocol):
    """A board that also shows the steps on this machine."""

    def __enter__(self) -> Progressing: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]: ...

    def step(self, name: str, done: float, total: float, detail: str = "") -> None:
        """A step of ours: bundle, upload, sign."""


def board(*, began: float) -> Progressing:
    """Bars on a terminal, lines elsewhere."""
    return Bars() if err().is_terminal else Lines(began)


class Bars:
    """One bar a step, then one a device."""

    def __init__(self) -> None:
        self._console = err()
        self._stack = ExitStack()
        self._rows: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
            console=self._console,
        )

    def __enter__(self) -> Bars:
        self._stack.enter_context(self._progress)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        self._stack.close()
        return False

    def step(self, name: str, done: float, total: float, detail: str = "") -> None:
        """A step of ours."""
        self._set(name, done / total if total else 1.0, "done" if done >= total else "", detail)

    def device(self, target: TargetProgress) -> None:
        """A device moved."""
        if target.result == "succeeded":
            state = "[green]succeeded[/]"
        elif target.result is not None:
            state = f"[red]{views.RESULT_WORDS[target.result]}[/]"
        else:
            state = target.state if target.online else f"[dim]{target.state}, offline[/]"
        self._set(target.device, views.way(target), state, target.detail or target.reason)

    def say(self, text: str) -> None:
        """One line above the bars."""
        self._progress.console.print(text, markup=False)

    def _set(self, name: str, share: float, state: str, detail: str) -> None:
        if name not in self._rows:
            self._rows[name] = self._progress.add_task(name, total=1.0, state="", detail="")
        room = max(10, self._console.width - 70)
        self._progress.update(self._rows[name], completed=share, state=state, detail=escape(detail[:room]))


class Lines:
    """A line for each change: for logs, and for programs that watch."""

    def __init__(self, began: float) -> None:
        self._began = began
        self._last: dict[str, str] = {}

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        return False

    def step(self, name: str, done: float, total: float, detail: str = "") -> None:
        """A step of ours, at its end."""
        if done >= total:
            self._line(name, f"{name}: {detail or 'done'}")

    def device(self, target: TargetProgress) -> None:
        """A device moved to another state."""
        words = views.RESULT_WORDS[target.result] if target.result else target.state
        away = "" if target.online or target.result else " (offline)"
        why = f": {target.reason}" if target.reason else ""
        self._line(target.device, f"{target.device}: {words}{away}{why}")

    def say(self, text: str) -> None:
        """One line."""
        self._line(text, text)

    def _line(self, key: str, text: str) -> None:
        if self._last.get(key) != text:
            self._last[key] = text
            say(f"{time.monotonic() - self._began:7.1f} s  {text}")
