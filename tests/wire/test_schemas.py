"""docs/schemas is generated: `python -m edgeward_wire.schemas docs/schemas` after a change of a type."""

from __future__ import annotations

from pathlib import Path

from edgeward_wire.schemas import schema_texts

DIRECTORY = Path(__file__).resolve().parents[2] / "docs/schemas"


def test_the_generated_schemas_have_not_drifted() -> None:
    written = {path.name: path.read_text() for path in DIRECTORY.iterdir()}
    assert written == schema_texts()
