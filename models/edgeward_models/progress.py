"""How long work tells what it is doing."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""(what is being done now, steps done, steps in all)."""


def silent(what: str, done: int, total: int) -> None:
    """Nobody looks."""
