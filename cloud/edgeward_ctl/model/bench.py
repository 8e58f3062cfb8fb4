"""`agent-ctl model bench`: how fast files run, here or on a device of the fleet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward_ctl.model.libraries import needing
from edgeward_wire.errors import Rejected

if TYPE_CHECKING:
    from edgeward_models.bench import BenchReport
    from edgeward_models.progress import Progress

Files = Annotated[
    list[str] | None,
    typer.Argument(
        help="ONNX files; with --on one, or NAME or NAME@VERSION of a release.", show_default=False
    ),
]
Reference = Annotated[
    bool, typer.Option("--reference", help="ResNet-50, YOLOv8-s and DistilHuBERT, FP32 and INT8.")
]
Only = Annotated[list[str] | None, typer.Option(help="Of the reference models, this one; repeat it.")]
Work = Annotated[
    Path | None, typer.Option(help="Where the reference models are kept.", show_default="the user's cache")
]
Budget = Annotated[str, typer.Option(help="How long to search for each INT8 reference model.")]
On = Annotated[
    str | None, typer.Option("--on", metavar="DEVICE", help="Measure on this device of the fleet.")
]
Detach = Annotated[bool, typer.Option("--detach", help="With --on: do not wait for the result.")]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, show_default="1; with --on what the device decides")
]
Seconds = Annotated[
    float | None,
    typer.Option(min=0.1, max=3600, help="For each model.", show_default="5; --reference 10; --on 900"),
]
Runs = Annotated[
    int | None, typer.Option(min=1, max=10_000, help="Exactly so many of each file.", show_default=False)
]
Providers = Annotated[
    list[str] | None, typer.Option(help="Execution provider; repeat it.", show_default="CPU")
]
Samples = Annotated[
    Path | None,
    typer.Option(help="Pictures, sounds or an .npz to run on.", show_default="the sidecar's, or noise"),
]
Markdown = Annotated[Path | None, typer.Option(help="Also write Markdown.", show_default=False)]
Plot = Annotated[Path | None, typer.Option(help="Also write a plot, .svg or .png.", show_default=False)]
Sidecar = Annotated[
    Path | None,
    typer.Option(help="With --on: TOML that says what the file cannot.", show_default="MODEL.toml"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="With --on: a sidecar's setting, e.g. inputs.image.width=320."),
]
AllowFloat = Annotated[
    str | None,
    typer.Option("--allow-float", metavar="REASON", help="With --on: measure a file that is not INT8."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@dataclass(frozen=True)
class _Wish:
    """What was asked for, as typed."""

    files: list[str]
    reference: bool
    only: list[str]
    work: Path | None
    budget: str
    threads: int | None
    seconds: float | None
    runs: int | None
    providers: tuple[str, ...]
    samples: Path | None
    how: _How


@dataclass(frozen=True)
class _How:
    """How a file is bundled for a device."""

    sidecar: Path | None
    settings: list[str]
    allow_float: str | None

    @property
    def given(self) -> list[str]:
        """The options that were typed."""
        said = {"--sidecar": self.sidecar, "--set": self.settings, "--allow-float": self.allow_float}
        return [option for option, value in said.items() if value]


def command(
    context: typer.Context,
    files: Files = None,
    *,
    reference: Reference = False,
    only: Only = None,
    work: Work = None,
    budget: Budget = "2m",
    on: On = None,
    detach: Detach = False,
    threads: Threads = None,
    seconds: Seconds = None,
    runs: Runs = None,
    provider: Providers = None,
    samples: Samples = None,
    markdown: Markdown = None,
    plot: Plot = None,
    sidecar: Sidecar = None,
    settings: Settings = None,
    allow_float: AllowFloat = None,
    as_json: Json = False,
) -> None:
    """Latencies, ratio to FP32, parity and memory, side by side.

    Exit code 1: a file gives wrong outputs under the plan that was measured, does not load, or is not there.
    """
    wish = _Wish(
        files or [],
        reference,
        only or [],
        work,
        budget,
        threads,
        seconds,
        runs,
        tuple(provider or ()),
        samples,
        _How(sidecar, settings or [], allow_float),
    )
    if on is not None:
        _check_remote(wish, markdown, plot)
        raise typer.Exit(_remote(context, wish, on, detach, as_json))
    if bool(wish.files) == reference or (detach or (only and not reference)):
        raise Rejected(
            "Name files, or give --reference (with --only for some of them); --detach belongs to --on.",
            "agent-ctl model bench FP32.onnx INT8.onnx",
        )
    if wish.how.given:
        raise Rejected(
            f"{wish.how.given[0]} belongs to --on: here files are measured as they are.",
            "Leave it out, or name a device with --on.",
        )
    write, draw = _writer(markdown), _drawer(plot)
    report = _measure(wish)
    write(report)
    draw(report)
    _print(report, as_json)
    raise typer.Exit(0 if report.right else 1)


# --- here


def _measure(wish: _Wish) -> BenchReport:
    with needing("models"):
        from edgeward_models import bench
    how: dict[str, Any] = {
        "threads": wish.threads or 1,
        "runs": wish.runs,
        "providers": wish.providers or ("CPU",),
    }
    if not wish.reference:
        paths = tuple(map(Path, wish.files))
        request = bench.BenchRequest(paths, samples=wish.samples, seconds=wish.seconds or 5.0, **how)
        return _shown(lambda progress: bench.bench(request, progress))
    from edgeward_ctl import checked
    from edgeward_models import reference

    models = reference.ReferenceRequest(
        (wish.work or reference.default_work()).expanduser(),
        names=tuple(wish.only) or tuple(reference.TITLES),
        budget_s=checked.seconds(wish.budget),
        seconds=wish.seconds or 10.0,
        **how,
    )
    return _shown(lambda progress: reference.bench_reference(models, progress))


def _shown(work: Callable[[Progress], BenchReport]) -> BenchReport:
    """Do the work with its progress on stderr."""
    from edgeward_ctl import screen

    with screen.board(began=time.monotonic()) as board:

        def progress(what: str, done: int, total: int) -> None:
            step, _, detail = what.partition(": ")
            board.step(step, done, total, detail)

        return work(progress)


def _writer(markdown: Path | None) -> Callable[[BenchReport], None]:
    """What writes the page, if it can: that it cannot is said before the work."""
    if markdown is None:
        return lambda report: None
    with needing("models"):
        from edgeward_models import bench_tables
        from edgeward_models.whole_file import check_place, write_whole
    check_place(markdown)
    return lambda report: write_whole(markdown, bench_tables.markdown(report))


def _drawer(plot: Path | None) -> Callable[[BenchReport], None]:
    """What draws, if it can: that it cannot is said before the work."""
    if plot is None:
        return lambda report: None
    with needing("models,plots"):
        from edgeward_models import plots
        from edgeward_models.whole_file import check_place
    plots.check_suffix(plot)
    check_place(plot)
    return lambda report: plots.bench_plot(report, plot)


def _print(report: BenchReport, as_json: bool) -> None:
    from edgeward_ctl import screen
    from edgeward_models import bench, bench_tables

    if as_json:
        screen.print_json(bench.plain(report))
        return
    out = screen.out()
    for model in report.models:
        rows = [bench_tables.cells(row) for row in report.rows if row.model == model]
        out.print(f"{bench_tables.title(report, model)}", style="bold", markup=False)
        out.print(screen.table(bench_tables.HEADS, rows, right=bench_tables.RIGHT))
        out.print()
    if report.published:
        out.print(screen.table(bench_tables.BESIDE_HEADS, bench_tables.beside(report), right=("speed-up",)))
        out.print()
    for what, value in bench_tables.facts(report):
        screen.say(f"{what:<14}{value}")
    for note in report.notes:
        screen.say(f"note: {note}")


# --- on a device


def _check_remote(wish: _Wish, markdown: Path | None, plot: Path | None) -> None:
    """Raises Rejected for what only works here."""
    here = {
        "--reference": wish.reference,
        "--only": wish.only,
        "--work": wish.work,
        "--runs": wish.runs,
        "--provider": wish.providers,
        "--samples": wish.samples,
        "--markdown": markdown,
        "--plot": plot,
    }
    given = [option for option, value in here.items() if value]
    if given:
        raise Rejected(
            f"{given[0]} does not go with --on: the device tries every plan on the golden inputs.",
            "Leave it out, or leave out --on.",
        )
    if len(wish.files) != 1:
        raise Rejected(
            f"A device measures one model at a time, not {len(wish.files)}.",
            "agent-ctl model bench MODEL.onnx --on DEVICE",
        )


def _remote(context: typer.Context, wish: _Wish, device: str, detach: bool, as_json: bool) -> int:
    from edgeward_ctl import checked, deploying
    from edgeward_ctl.model import remote_bench
    from edgeward_ctl.profile import find_directory, load_profile

    how = wish.how
    options = remote_bench.Options(
        threads=wish.threads,
        sidecar=how.sidecar,
        flags=checked.settings(how.settings),
        allow_float=how.allow_float,
    )
    if wish.seconds is not None:
        options = replace(options, seconds=wish.seconds)
    waiting = deploying.Waiting(detach=detach, as_json=as_json)
    profile = load_profile(find_directory(context.obj, os.environ))
    return remote_bench.run(profile, wish.files[0], device, waiting, options)
