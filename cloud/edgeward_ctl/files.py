"""`model inspect`: a file on its own, without any cloud."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from edgeward_ctl import screen
from edgeward_wire.errors import Rejected


def inspect(model: Path, sidecar: Path | None, as_json: bool) -> None:
    """Facts on stderr, the sidecar on stdout: `agent-ctl model inspect m.onnx > m.toml`."""
    try:
        from edgeward_models import inspect as models
    except ImportError as error:
        raise Rejected(
            f"Reading models needs a library that is not installed: {error.name}.",
            "pip install 'edgeward[ctl,models]'",
        ) from error
    with tempfile.TemporaryDirectory(prefix="agent-ctl-") as scratch:
        inspection = models.inspect_model(model, sidecar, scratch=Path(scratch))
    if as_json:
        screen.print_json(models.plain(inspection))
        return
    for what, value in models.facts_table(inspection):
        screen.say(f"{what:<14}{value}")
    screen.say("")
    sys.stdout.write(models.sidecar_text(inspection))
