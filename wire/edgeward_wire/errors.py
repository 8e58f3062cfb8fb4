"""Errors by blame. Whatever is neither of these two is a bug, and crashes into a supervisor.

Each says what is wrong, why, and what to do: `what` is the sentence, `next_step` the remedy.
"""

from __future__ import annotations


class EdgewardError(Exception):
    """An error that a person can act on."""

    def __init__(self, what: str, next_step: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.what} {self.next_step}".strip() if self.next_step else self.what


class Rejected(EdgewardError):
    """The artefact's or the request's own fault: trying again changes nothing."""


class Unavailable(EdgewardError):
    """The world's fault (network, disk, camera, a server that is away): trying again may help."""
