"""`agent-ctl model zoo`: models to try the pipeline with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from edgeward_ctl.model.libraries import needing

app = typer.Typer(help="Models to try the pipeline with: list them, build one.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


@app.command("list")
def show(as_json: Json = False) -> None:
    """What can be built, whose weights it has, and under which licence. Needs no profile."""
    from dataclasses import asdict

    from edgeward_ctl import screen

    with needing("models"):
        from edgeward_models.zoo import RECIPES

    if as_json:
        screen.print_json([asdict(entry) for entry in RECIPES.values()])
        return
    rows = [
        (entry.name, entry.title, entry.task, entry.weights, entry.licence, entry.takes or "nothing")
        for entry in RECIPES.values()
    ]
    screen.out().print(screen.table(("name", "model", "task", "weights", "licence", "--weights takes"), rows))


@app.command("build")
def build(
    name: Annotated[str, typer.Argument(help="As `list` says it.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Directory for the files.", show_default=False)],
    weights: Annotated[
        Path | None,
        typer.Option(help="Trained weights instead of those that `list` says.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build a model: the ONNX file, its sidecar and what that names. Needs no profile; stdout is the file."""
    from edgeward_ctl import screen

    with needing("models"):
        from edgeward_models import zoo

    with screen.board(began=time.monotonic()) as board:

        def progress(what: str, done: int, total: int) -> None:
            board.step("build", min(done, total - 1), total, what)

        built = zoo.build_files(name, out, weights=weights, progress=progress)
        board.step("build", 1, 1, f"{built.model.name}, {screen.size(built.model.stat().st_size)}")
        for note in built.notes:
            board.say(f"note: {note}")
    if as_json:
        screen.print_json(
            {
                "model": str(built.model),
                "sidecar": str(built.sidecar),
                "files": [str(file) for file in built.files],
                "notes": list(built.notes),
            }
        )
    else:
        screen.out().print(str(built.model), markup=False, soft_wrap=True)
