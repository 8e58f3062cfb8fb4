"""`agent-ctl model quantise`: the INT8 file that pays on a target, found by measuring."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeward_ctl.model.libraries import needing

if TYPE_CHECKING:
    from edgeward_ctl.screen import Progressing
    from edgeward_models.quantise_report import QuantiseReport

Json = Annotated[bool, typer.Option("--json", help="The whole report as one JSON document on stdout.")]


def command(
    *,
    model: Annotated[Path, typer.Argument(help="The float ONNX file.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory for the files and the report.", show_default=False)],
    samples: Annotated[
        Path | None,
        typer.Option(
            help="Directory of pictures or WAV files, or an .npz.", show_default="the sidecar's, else noise"
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(help="x86-64, arm64, tensorrt or cuda; repeat it.", show_default="this machine's"),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(help="How long to search, e.g. 5m; the base and the final figures are always taken."),
    ] = "10m",
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Gate: how much agreement with FP32 may be lost (first answers, a detector's boxes).",
            show_default="0.10",
        ),
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(help="Gate: the agreement with FP32.", show_default="0.90")
    ] = None,
    min_sqnr: Annotated[
        float | None, typer.Option(help="Gate: SQNR in dB.", show_default="15 where nothing is classified")
    ] = None,
    keep_float: Annotated[
        list[str] | None, typer.Option(metavar="NODE", help="A node that stays in float; repeat it.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="classification, detection, ...")] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads to measure with.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples.")] = 0,
    sidecar: Annotated[
        Path | None, typer.Option(help="TOML that says what the file cannot.", show_default="MODEL.toml")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A sidecar's setting, e.g. inputs.image.width=320.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Search for the fastest INT8 file that is still right. Stop it and run it again: it goes on.

    Exit code 1: nothing is offered, because nothing passed the gate or INT8 does not pay here.
    """
    from edgeward_ctl import checked, screen

    with needing("models"):
        from edgeward_models.quantise import QuantiseRequest, quantise_model

    request = QuantiseRequest(
        model=model,
        sidecar=sidecar,
        flags={**checked.settings(settings or []), **({} if task is None else {"task": task})},
        samples=samples,
        targets=tuple(target or ()),
        budget_s=checked.seconds(budget),
        max_drop=max_drop,
        min_agreement=min_agreement,
        min_sqnr_db=min_sqnr,
        threads=threads,
        seed=seed,
        keep_float=tuple(keep_float or ()),
    )
    with screen.board(began=time.monotonic()) as board:
        report = quantise_model(request, out, lambda what, done, total: _show(board, what, done, total))
    if as_json:
        screen.print_json(report.plain())
    else:
        _print(report, out)
    raise typer.Exit(report.exit_code)


def _show(board: Progressing, what: str, done: int, total: int) -> None:
    """`searching: u8 x pair` is the step `searching` with that detail."""
    step, _, detail = what.partition(": ")
    board.step(step, done, total, detail)


def _print(report: QuantiseReport, out: Path) -> None:
    """The candidates, what it comes to and where the files are on stdout; the next step on stderr."""
    from edgeward_ctl import screen
    from edgeward_models.quantise_report import COLUMNS, WEAK, advice, brief, conclude, in_float

    console = screen.out()
    for one in report.targets:
        shown, more = brief(one)
        numbers = ("SQNR", "agreement", "latency / FP32", "p50 ms", "parity")
        console.print(screen.table(COLUMNS, shown, right=numbers))
        if more:
            console.print(f"and {more} more in the report", markup=False)
        console.print(conclude(one), markup=False, soft_wrap=True)
        if line := in_float(one):
            console.print(line, markup=False, soft_wrap=True)
    for one in report.targets:
        if name := report.file(one):
            console.print(f"offered  {out / name}", markup=False, soft_wrap=True)
    console.print(f"report   {out / 'report.md'}", markup=False, soft_wrap=True)
    threads = f"{report.threads} thread{'s' if report.threads > 1 else ''}"
    screen.say(f"Measured on {report.machine.cpu}, {threads}. {report.machine.capability}.")
    if report.evidence == "weak":
        screen.say(WEAK)
    step = advice(report) or f"agent-ctl deploy {out / f'{report.name}.onnx'} --fleet NAME"
    screen.say(f"next: {step}")
