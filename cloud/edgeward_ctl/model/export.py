"""`agent-ctl model export`: a framework's model as a verified ONNX file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgeward_ctl.model.libraries import needing

if TYPE_CHECKING:
    from edgeward_models.export.report import ExportReport


class Exporter(str, Enum):
    """Of PyTorch."""

    auto = "auto"
    dynamo = "dynamo"
    torchscript = "torchscript"


Source = Annotated[
    str,
    typer.Argument(
        help="package.module:callable that returns the model, or a file: .pt, .pth, .pt2, .joblib, .pkl.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--out", help="Where the ONNX file goes.", show_default=False)]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="NAME=1x3x224x224:float32, once for each; N where the batch stays open.",
        show_default="the examples'",
    ),
]
Outputs = Annotated[
    list[str] | None, typer.Option("--output", help="A name for each output, in their order.")
]
States = Annotated[
    list[str] | None, typer.Option("--state", help="INPUT=OUTPUT: carried from run to run, from zero.")
]
DynamicBatch = Annotated[
    bool, typer.Option("--dynamic-batch", help="Leave the first dimension of all inputs open.")
]
Which = Annotated[Exporter, typer.Option(help="Of PyTorch. auto: dynamo, and torchscript where that fails.")]
Opset = Annotated[int | None, typer.Option(help="ONNX's operator set.", show_default="18")]
Purpose = Annotated[
    str | None, typer.Option(help="What it is for: classification, detection ...", show_default=False)
]
Labels = Annotated[
    Path | None, typer.Option(help="The classes' names, one a line.", show_default="the estimator's own")
]
Samples = Annotated[
    Path | None, typer.Option(help="An .npz of inputs to verify with.", show_default="seeded noise")
]
Rtol = Annotated[float | None, typer.Option(help="Allowed beside |expected|.", show_default="0.001")]
Atol = Annotated[float | None, typer.Option(help="Allowed besides.", show_default="0.0001")]
Seed = Annotated[int, typer.Option(min=0, help="Of the noise.")]
Trust = Annotated[bool, typer.Option("--trust", help="Read a pickle: that runs whatever code is in it.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def command(
    source: Source,
    *,
    out: Out,
    inputs: Inputs = None,
    outputs: Outputs = None,
    states: States = None,
    dynamic_batch: DynamicBatch = False,
    exporter: Which = Exporter.auto,
    opset: Opset = None,
    task: Purpose = None,
    labels: Labels = None,
    samples: Samples = None,
    rtol: Rtol = None,
    atol: Atol = None,
    seed: Seed = 0,
    trust: Trust = False,
    as_json: Json = False,
) -> None:
    """Export a model, and prove that the file gives its outputs. Exit code 1: it does not; no file."""
    from edgeward_ctl import screen

    with needing("models"):
        from edgeward_models.export import dispatch, verify
        from edgeward_models.export import inputs as shapes
        from edgeward_models.export import report as reports

    options = reports.ExportOptions(
        exporter=exporter.value,
        opset=opset,
        dynamic_batch=dynamic_batch,
        inputs=tuple(shapes.parse_input(text) for text in inputs or ()),
        output_names=tuple(outputs or ()),
        states=reports.parse_states(states or ()),
        task=reports.parse_task(task),
        labels=labels,
        samples=samples,
        tolerance=verify.Tolerance(
            verify.RTOL if rtol is None else rtol, verify.ATOL if atol is None else atol
        ),
        seed=seed,
    )
    with screen.board(began=time.monotonic()) as board:
        report = dispatch.export_source(
            source,
            out,
            options,
            trust=trust,
            progress=lambda what, done, total: board.step("export", done, total, what),
        )
    if as_json:
        screen.print_json(report.plain())
    else:
        _print(report)
    raise typer.Exit(0 if report.passed else 1)


def _print(report: ExportReport) -> None:
    from edgeward_ctl import screen

    made = screen.table(("", ""), _lines(report))
    made.show_header = False
    screen.out().print(made)
    if not report.passed:
        screen.say(f"failed: {report.verification.failure}")
        screen.say(f"next: {report.advice}")


def _lines(report: ExportReport) -> Iterator[tuple[str, str]]:
    from edgeward_ctl import screen

    facts, checked = report.facts, report.verification
    size = screen.size(facts.bytes)
    yield "file", f"{report.out} ({size})" if report.out else "none: the outputs differ"
    if report.labels:
        yield "labels", str(report.labels)
    yield "exporter", f"{report.exporter}, opset {facts.opset}, IR {facts.ir_version}"
    for attempt in report.attempts:
        if attempt.reason:
            yield f"  {attempt.exporter}", f"{attempt.outcome}: {attempt.reason}"
    for what, ports in (("input", facts.inputs), ("output", facts.outputs)):
        for port in ports:
            yield f"{what} {port.name}", f"{port.dtype} {' × '.join(map(str, port.shape)) or 'scalar'}"
    batches = " and ".join(map(str, checked.batches))
    tried = f"{checked.trials} trials of {checked.evidence}, batch {batches}"
    allowed = f"rtol {checked.tolerance.rtol:g}, atol {checked.tolerance.atol:g}"
    yield "verified", f"{'yes' if checked.passed else 'NO'}: {tried}, {allowed}"
    if checked.worst:
        yield "worst element", f"{checked.worst} ({checked.worst.trial})"
    if checked.labels:
        hits, rows = checked.labels
        yield "same label", f"{hits} of {rows} rows"
    for note in report.notes:
        yield "note", note
