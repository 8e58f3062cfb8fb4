"""`agent-ctl model optimise`: a file's graph optimised and saved, what that changed, and whether it paid."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeward_ctl.model.libraries import needing

if TYPE_CHECKING:
    from edgeward_models.optimise import OptimiseReport


class Level(str, Enum):
    """How far to go."""

    basic = "basic"
    extended = "extended"
    all = "all"


class Kind(str, Enum):
    """Whose fusions to try."""

    auto = "auto"
    transformer = "transformer"
    cnn = "cnn"


def command(
    model: Annotated[Path, typer.Argument(help="The ONNX file.", show_default=False)],
    *,
    out: Annotated[Path, typer.Option("--out", help="Where the optimised file goes.", show_default=False)],
    level: Annotated[
        Level,
        typer.Option(
            help="basic: ONNX's own operators, to deploy. extended, all: ONNX Runtime's own, to look at."
        ),
    ] = Level.basic,
    kind: Annotated[Kind, typer.Option(help="Which fusions to try above basic.")] = Kind.auto,
    html: Annotated[
        Path | None, typer.Option(help="Also write the report as one HTML page.", show_default=False)
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            help="Pictures, sounds or an .npz to compare on.", show_default="the sidecar's, or noise"
        ),
    ] = None,
    sidecar: Annotated[
        Path | None, typer.Option(help="TOML that says what the file cannot.", show_default="MODEL.toml")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Of the race.")] = 1,
    seconds: Annotated[float, typer.Option(min=0, max=600, help="How long both race; 0: not at all.")] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Optimise a file's graph and say what that changed. Exit code 1: the result is not to be used."""
    from edgeward_ctl import screen

    with needing("models"):
        from edgeward_models import optimise as models
        from edgeward_models import report_page
        from edgeward_models.whole_file import check_place, write_whole

    if html is not None:
        check_place(html, model)
    request = models.OptimiseRequest(
        model, out, level.value, kind.value, sidecar, samples, seconds=seconds, threads=threads
    )
    with screen.board(began=time.monotonic()) as board:
        report = models.optimise(request, lambda what, done, total: board.step("optimise", done, total, what))
    if html is not None:
        write_whole(html, report_page.page(report))
    if as_json:
        screen.print_json(models.plain(report))
    else:
        _print(report)
    raise typer.Exit(0 if report.right else 1)


def _print(report: OptimiseReport) -> None:
    from edgeward_ctl import screen
    from edgeward_models import report_page

    out = screen.out()
    out.print(screen.table(("", "now", ""), ((t.what, t.value, t.was) for t in report_page.tiles(report))))
    fused = report_page.fusion_rows(report)
    if fused:
        out.print()
        heads = ("fused", "times", "now", "where")
        out.print(screen.table(heads, fused, right=("times",)))
    out.print()
    out.print(_operators(report))
    if report.timings:
        out.print()
        out.print(_timings(report))
        screen.say(report_page.at_load_line(report))
    if report.fault:
        screen.say(f"The optimised file does not load as a device loads it: {report.fault} Do not use it.")
    for note in report.notes:
        screen.say(f"note: {note}")
    screen.say(f"{report.out}: level {report.level}, compared on {report.inputs}.")


def _operators(report: OptimiseReport) -> object:
    from edgeward_ctl import screen

    before, after = report.before.operators, report.after.operators
    names = sorted(before.keys() | after.keys(), key=lambda n: (-max(before.get(n, 0), after.get(n, 0)), n))
    rows = ((name, str(before.get(name, 0)), str(after.get(name, 0))) for name in names)
    return screen.table(("operator", "before", "after"), rows, right=("before", "after"))


def _timings(report: OptimiseReport) -> object:
    from edgeward_ctl import screen

    rows = (
        (
            timing.name,
            screen.number(timing.p50_ms, 2),
            screen.number(timing.p90_ms, 2),
            screen.number(timing.p99_ms, 2),
            screen.number(timing.ratio, 3),
            "" if timing.interval is None else f"{timing.interval.low:.3f} to {timing.interval.high:.3f}",
            str(timing.runs),
            timing.reason,
        )
        for timing in report.timings
    )
    heads = ("latency", "p50 ms", "p90 ms", "p99 ms", "ratio", "95 %", "runs", "why")
    return screen.table(heads, rows, right=heads[1:-1])
