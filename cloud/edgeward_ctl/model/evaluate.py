"""`agent-ctl model evaluate`: how good a file is, against labels and against its float original."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgeward_ctl.model.libraries import needing

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from edgeward_models.evaluation import Evaluation, Gate, Row
    from edgeward_models.metrics import Figure

_WORST_LAYERS = 12
_FEW = 5
_MINUS = "−"


class Boxes(str, Enum):
    """What a detector's output means."""

    yolov8 = "yolov8"
    yolov5 = "yolov5"
    end_to_end = "end-to-end"


Data = Annotated[
    Path | None,
    typer.Option(
        help="Labelled: one folder a class, a CSV `file,label`, COCO JSON, or an .npz with `labels`.",
        show_default=False,
    ),
]
Gated = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Gate: how far top-1 or mAP50-95 (unlabelled: agreement) may fall below FP32's, e.g. 0.01.",
        show_default=False,
    ),
]
PerLayer = Annotated[
    bool | None,
    typer.Option(
        "--per-layer/--no-per-layer", help="Where it departs from FP32.", show_default="if it is there"
    ),
]


def command(
    *,
    model: Annotated[Path, typer.Argument(help="ONNX file, its directory, or bundle.", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option(metavar="FP32.onnx", help="Its float original.", show_default="the sidecar's variant"),
    ] = None,
    data: Data = None,
    pictures: Annotated[
        Path | None, typer.Option(help="The pictures of a COCO file.", show_default="beside it")
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(help="Unlabelled, to compare with FP32.", show_default="the data, or the sidecar's"),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="At most so many.", show_default="all labelled, 300 others"),
    ] = None,
    max_drop: Gated = None,
    per_layer: PerLayer = None,
    boxes: Annotated[
        Boxes | None, typer.Option(help="What a detector's output is.", show_default="from its shape")
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="All optimisation off: the files' own answers, slowly.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="To run with.", show_default="the cores, at most 4")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    variant: Annotated[
        str | None, typer.Option(help="Of a bundle or sidecar.", show_default="INT8, for this machine")
    ] = None,
    task: Annotated[str | None, typer.Option(help="classification, detection, ...")] = None,
    labels: Annotated[Path | None, typer.Option(help="Text file, one label a line.")] = None,
    sidecar: Annotated[
        Path | None, typer.Option(help="TOML that says what the file cannot.", show_default="MODEL.toml")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A sidecar's setting, e.g. inputs.image.width=320.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure a file's accuracy, with intervals (95 %). Exit code 1: the gate of --max-drop failed."""
    from edgeward_ctl import checked, screen

    with needing("models"):
        from edgeward_models import evaluation
        from edgeward_models.evaluate import EvaluateRequest, evaluate

    flags: dict[str, Any] = checked.settings(settings or [])
    flags.update({key: str(v) for key, v in (("task", task), ("labels", labels)) if v is not None})
    request = EvaluateRequest(
        model=model,
        against=against,
        sidecar=sidecar,
        flags=flags,
        variant=variant,
        data=data,
        pictures=pictures,
        samples=samples,
        count=count,
        max_drop=max_drop,
        per_layer=per_layer,
        boxes=boxes.value if boxes is not None else None,
        exact=exact,
        threads=threads,
        seed=seed,
    )
    with screen.board(began=time.monotonic()) as board:
        found = evaluate(request, lambda what, done, total: board.step(what, done, total, f"{done}/{total}"))
    if as_json:
        screen.print_json(evaluation.plain(found))
    else:
        _print(found)
    raise typer.Exit(0 if found.passed else 1)


def _print(found: Evaluation) -> None:
    from edgeward_ctl import screen

    out = screen.out()
    for what, text in _facts(found):
        out.print(f"{what:<10}{text}", markup=False, soft_wrap=True)
    out.print()
    for part in _parts(found):
        out.print(part)
        out.print()
    for note in found.notes:
        out.print(f"note: {note}", markup=False, soft_wrap=True)
    if found.gate is not None:
        for line in _gate(found.gate):
            out.print(line, soft_wrap=True)


def _parts(found: Evaluation) -> Iterator[Table]:
    """The tables, in the order in which people ask."""
    from edgeward_ctl import screen

    yield _figures(found)
    if len(found.classes) > 1:
        yield _classes(found)
    if found.class_ap:
        worst_ap = sorted(found.class_ap.items(), key=lambda entry: entry[1])[:_FEW]
        first = _of("class", len(worst_ap), len(found.class_ap))
        cells = [(found.label(k), _share(ap)) for k, ap in worst_ap]
        yield screen.table((first, "AP50-95"), cells, right=("AP50-95",))
    if found.confused:
        pairs = found.confused[:_FEW]
        rows = [(found.label(c.label), found.label(c.predicted), str(c.count)) for c in pairs]
        yield screen.table(("most often confused", "taken for", "times"), rows, right=("times",))
    if found.layers is not None:
        yield _layers(found)


def _classes(found: Evaluation) -> Table:
    from edgeward_ctl import screen

    there = [c for c in found.classes if c.support]
    worst = sorted(there, key=lambda c: (c.f1, -c.support))[:_FEW]
    heads = (_of("class", len(worst), len(there)), "F1", "precision", "recall", "samples")
    cells = [
        (found.label(c.index), _share(c.f1), _share(c.precision), _share(c.recall), str(c.support))
        for c in worst
    ]
    return screen.table(heads, cells, right=heads[1:])


def _facts(found: Evaluation) -> list[tuple[str, str]]:
    from edgeward_ctl import screen

    subjects = [("model", found.model), ("against", found.against)]
    how = found.plan
    if found.parity is not None:
        how += f"; cosine {found.parity:.4f} with the model's own exact outputs"
    return [
        *((what, f"{s.title}, {s.precision}, {screen.size(s.bytes)}") for what, s in subjects if s),
        *((what, text) for what, text in (("labelled", found.data), ("samples", found.samples)) if text),
        ("run on", how),
    ]


def _figures(found: Evaluation) -> Table:
    """One row a figure; FP32's columns only where there is something in them."""
    from edgeward_ctl import screen

    paired = any(row.fp32 is not None for row in found.rows)
    heads = ["", found.model.precision, "(95 %)", *(["FP32", "(95 %)", "drop", "(95 %)"] if paired else [])]
    heads.append("samples")
    rows = [
        [row.title, *_cells(row, row.model)]
        + ([*_cells(row, row.fp32), *_cells(row, row.drop, signed=True)] if paired else [])
        + [str(row.model.count)]
        for row in found.rows
    ]
    return screen.table(heads, rows, right=heads[1:])


def _cells(row: Row, figure: Figure | None, *, signed: bool = False) -> tuple[str, str]:
    """A figure and its interval, in the row's unit."""
    if figure is None:
        return "", ""
    low, high = figure.interval
    if row.unit == "dB":
        if low == high:
            return _decibels(figure.value), ""
        return _decibels(figure.value), f"{_decibels(low, '')} to {_decibels(high, '')}"
    if signed:
        return _points(figure.value), f"{_points(low)} to {_points(high)}"
    return _share(figure.value), f"{_share(low, '')} to {_share(high, '')}"


def _layers(found: Evaluation) -> Table:
    from edgeward_ctl import screen

    rows = found.layers.rows if found.layers is not None else ()
    worst = rows[:_WORST_LAYERS]
    heads = (_of("layer", len(worst), len(rows)), "operator", "SQNR dB", "its own dB")
    cells = [
        (
            row.node,
            row.op,
            _decibels(row.sqnr_db, ""),
            "" if row.own_db is None else _decibels(row.own_db, ""),
        )
        for row in worst
    ]
    return screen.table(heads, cells, right=heads[2:])


def _gate(gate: Gate) -> Sequence[Text]:
    """The verdict, and whether the samples were enough for one."""
    from rich.text import Text

    low, high = gate.drop.interval
    colour = "green" if gate.passed else "red"
    verdict = Text("gate ").append("passed" if gate.passed else "FAILED", f"bold {colour}")
    verdict.append(
        f": {gate.what}, drop {_points(gate.drop.value)} points ({_points(low)} to {_points(high)}),"
        f" {_points(gate.allowed)} allowed."
    )
    if gate.decided:
        return [verdict]
    enough = f" About {gate.needed:,} samples would decide it." if gate.needed is not None else ""
    doubt = Text("not decided: the interval spans the gate", "yellow")
    return [verdict, doubt.append(f"; {gate.drop.count} samples are too few.{enough}".replace(",", " "))]


def _of(what: str, shown: int, there: int) -> str:
    return f"{what}, {shown} worst of {there}" if shown < there else f"{what}, worst first"


def _share(value: float, unit: str = " %") -> str:
    return f"{value * 100:.1f}{unit}"


def _points(value: float) -> str:
    """Percentage points."""
    return f"{value * 100:.1f}".replace("-", _MINUS).replace(f"{_MINUS}0.0", "0.0")


def _decibels(value: float, unit: str = " dB") -> str:
    if math.isinf(value):
        return "equal" if value > 0 else "no signal"
    return f"{value:.1f}{unit}".replace("-", _MINUS)
