"""JSON Schemas, generated from the types: `python -m edgeward_wire.schemas DIR`.

`docs/schemas/` holds the generated files; a test fails when they and the types differ.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgeward_wire.ack import Ack, Refresh
from edgeward_wire.assignment import Assignment
from edgeward_wire.document import Document
from edgeward_wire.event import Event
from edgeward_wire.manifest import Manifest
from edgeward_wire.reported import Reported
from edgeward_wire.result import ResultMessage
from edgeward_wire.status import Birth, Status
from edgeward_wire.telemetry import Window
from edgeward_wire.verdict import Verdict

DOCUMENTS: dict[str, type[Document]] = {
    "manifest": Manifest,
    "assignment": Assignment,
    "reported": Reported,
    "telemetry": Window,
    "event": Event,
    "result": ResultMessage,
    "status": Status,
    "birth": Birth,
    "ack": Ack,
    "refresh": Refresh,
    "verdict": Verdict,
}


def schema_texts() -> dict[str, str]:
    """File name -> JSON Schema text, for each document that crosses the wire."""
    return {
        f"{name}-1.schema.json": json.dumps(kind.model_json_schema(by_alias=True), indent=2, sort_keys=True)
        + "\n"
        for name, kind in DOCUMENTS.items()
    }


def main() -> None:
    """Write them into the directory named on the command line."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in schema_texts().items():
        (directory / name).write_text(text)


if __name__ == "__main__":
    main()
