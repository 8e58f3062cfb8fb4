"""A model's labels: UTF-8 text, one a line, in the order of the classes."""

from __future__ import annotations

from pathlib import Path

from edgeward_wire.errors import Rejected, Unavailable

MAX_LABELS_BYTES = 4 << 20
MAX_LABEL = 200


def read_labels(path: Path, classes: int | None = None) -> tuple[str, ...]:
    """The labels, each cut at MAX_LABEL characters. Raises Rejected when they are not `classes` many."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_LABELS_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read: {error.strerror or error}.", "Check the path.") from error
    if len(raw) > MAX_LABELS_BYTES:
        raise Rejected(f"{path.name} is longer than {MAX_LABELS_BYTES} bytes.")
    try:
        lines = raw.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise Rejected(f"{path.name} is not UTF-8 text.", "Save the labels as UTF-8, one a line.") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise Rejected(f"{path.name} holds no labels.", "Write one label a line.")
    if classes is not None and len(lines) != classes:
        raise Rejected(
            f"{path.name} has {len(lines)} labels, but the model has {classes} classes.",
            "Write one label a line.",
        )
    return tuple(line.strip()[:MAX_LABEL] for line in lines)
