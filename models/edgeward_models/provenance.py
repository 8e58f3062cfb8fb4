"""Where a bundle comes from: digests of what went into it, and the versions of what made it.

Invariant: nothing here changes what a device runs, so none of it is part of a bundle's content.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx

from edgeward_models.inspect import Inspection
from edgeward_models.samples import Samples
from edgeward_models.workspace import file_digest
from edgeward_runtime import sessions
from edgeward_wire import __version__

_FACTS_OF_EXPORT = "edgeward.export"


def provenance(inspection: Inspection, sidecar: Path | None, samples: Samples) -> dict[str, str]:
    """Where it comes from: digests of what went in, and the versions of what made it."""
    facts, known = inspection.facts, inspection.guess
    found = {
        "file": facts.path.name,
        "file_sha256": file_digest(facts.path),
        "samples": samples.origin,
        "samples_sha256": samples.digest,
        "made_by": f"edgeward {__version__}",
        "onnxruntime": sessions.version(),
        "onnx": onnx.__version__,
        "numpy": np.__version__,
        "producer": facts.producer,
    }
    beside = sidecar or facts.path.with_suffix(".toml")
    for name, path in (("sidecar", beside), ("labels", known.labels), ("report", known.report)):
        if path is not None and path.is_file():
            found[f"{name}_sha256"] = file_digest(path)
    found.update(_export_facts(facts.metadata.get(_FACTS_OF_EXPORT, "")))
    return {key[:64]: value[:200] for key, value in found.items() if value}


def _export_facts(said: str) -> dict[str, str]:
    """What our exporter wrote into the file; nothing of what others put there."""
    try:
        table = json.loads(said or "{}")
    except (json.JSONDecodeError, RecursionError):
        return {}
    if not isinstance(table, dict):
        return {}
    return {f"export_{key}": value for key, value in list(table.items())[:32] if isinstance(value, str)}
