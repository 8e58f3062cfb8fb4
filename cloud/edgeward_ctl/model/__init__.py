"""`agent-ctl model`: from a trained model to a bundle. One file a command; one row below makes it known.

Invariant: importing these files loads nothing heavy; libraries are imported when a command runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from edgeward_ctl.model import bench, bundle, evaluate, export, inspect, optimise, quantise, zoo

COMMANDS: dict[str, Callable[..., Any]] = {
    "bench": bench.command,
    "bundle": bundle.command,
    "evaluate": evaluate.command,
    "export": export.command,
    "inspect": inspect.command,
    "optimise": optimise.command,
    "quantise": quantise.command,
}

app = typer.Typer(
    help="From a trained model to a bundle: look, export, optimise, quantise, prove.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(zoo.app, name="zoo")
