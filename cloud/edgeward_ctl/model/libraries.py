"""Libraries that a command needs and an installation may lack."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgeward_wire.errors import Rejected


@contextmanager
def needing(extra: str) -> Iterator[None]:
    """Around imports: what is not installed is named, with the extra that brings it. Raises Rejected."""
    try:
        yield
    except ImportError as error:
        raise Rejected(
            f"This needs a library that is not installed: {error.name}.",
            f"pip install 'edgeward[ctl,{extra}]'",
        ) from error
