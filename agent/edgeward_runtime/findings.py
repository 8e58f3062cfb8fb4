"""What comes to light while a model file is looked at, for the person whose file it is.

Invariant: a guess that could be wrong is a note; what nobody can infer is missing, with what to do about it.
Neither stops the looking: one look finds all there is to say.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Missing:
    """Something that the file does not tell: what, and what to do."""

    key: str
    """Where it would be declared: labels, task, inputs.<name>."""
    what: str
    next_step: str


@dataclass
class Findings:
    """Of one file, in the order in which they were found."""

    sidecar: str
    """The name of the file in which people would declare more."""
    notes: list[str] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Something was taken for granted."""
        self.notes.append(text)

    def lack(self, key: str, what: str, next_step: str) -> None:
        """Something is to be declared under `key`."""
        self.missing.append(Missing(key, what, next_step))
