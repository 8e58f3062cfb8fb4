"""`agent-ctl model inspect`: a file on its own, without any cloud."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from edgeward_ctl.model.libraries import needing

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]


def command(
    model: Annotated[Path, typer.Argument(help="The ONNX file.", show_default=False)],
    sidecar: Annotated[
        Path | None, typer.Option(help="TOML that says what the file cannot.", show_default="MODEL.toml")
    ] = None,
    as_json: Json = False,
) -> None:
    """What can be read of a file; stdout is the sidecar TOML of it. Needs no profile."""
    from edgeward_ctl import screen

    with needing("models"):
        from edgeward_models import inspect as models

    with tempfile.TemporaryDirectory(prefix="agent-ctl-") as scratch:
        inspection = models.inspect_model(model, sidecar, scratch=Path(scratch))
    if as_json:
        screen.print_json(models.plain(inspection))
        return
    facts = models.facts_table(inspection)
    width = max(14, *(len(what) + 2 for what, _ in facts))
    for what, value in facts:
        screen.say(f"{what:<{width}}{value}")
    screen.say("")
    sys.stdout.write(models.sidecar_text(inspection))
