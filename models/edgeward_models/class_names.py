"""The classes of a model, by the ways in which people write them. Pure.

Invariant: a name stands for one class or is refused; nothing is guessed from what is merely near.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from edgeward_wire.errors import Rejected

MOST_NAMED = 3
"""Of many faults of one kind, so many are named."""


class Names:
    """The classes of a model, by the ways in which people write them."""

    def __init__(self, labels: Sequence[str], classes: int | None) -> None:
        """`classes`: how many the model has, where that is known."""
        self.labels = tuple(labels)
        self.classes = len(labels) if labels else classes
        self._exact: dict[str, list[int]] = {}
        self._folded: dict[str, list[int]] = {}
        for k, label in enumerate(labels):
            self._exact.setdefault(label, []).append(k)
            self._folded.setdefault(_fold(label), []).append(k)

    def find(self, name: str, where: str) -> int | None:
        """The class of this name (exactly, or but for case and `_`), or of this index; None: there is none.

        Raises:
            Rejected: the name stands for several classes, or the index is out of range.
        """
        found = self._exact.get(name) or self._folded.get(_fold(name)) or []
        if len(found) > 1:
            raise Rejected(
                f"{where}: the model has the label {name!r} {len(found)} times, as classes"
                f" {' and '.join(map(str, found))}.",
                "Write the index of the class instead.",
            )
        if found:
            return found[0]
        return self.index(name, where)

    def index(self, text: str, where: str) -> int | None:
        """The class of this index; None when it is no whole number. Raises Rejected: out of range."""
        digits = text.strip()
        if not (digits.isascii() and digits.removeprefix("-").isdigit()) or len(digits) > 9:
            return None
        if int(digits) < 0 or (self.classes is not None and int(digits) >= self.classes):
            last = "" if self.classes is None else f" the model has 0 to {self.classes - 1}."
            raise Rejected(f"{where}: class {digits} is out of range:{last or ' classes begin at 0.'}")
        return int(digits)

    def find_all(self, names: Iterable[str], where: str) -> dict[str, int]:
        """All of them. Raises Rejected with those that the model does not have, and what comes near."""
        found = {name: self.find(name, where) for name in names}
        unknown = [name for name, index in found.items() if index is None]
        if unknown:
            raise self._unknown(unknown, where)
        return {name: index for name, index in found.items() if index is not None}

    def _unknown(self, unknown: Sequence[str], where: str) -> Rejected:
        if not self.labels:
            return Rejected(
                f"{where} names the class {unknown[0]!r}, but the model's labels are not known.",
                "Give them (labels = ... in the sidecar, or --labels FILE), or write class indices.",
            )
        folded = {_fold(label): label for label in self.labels}
        near = difflib.get_close_matches(_fold(unknown[0]), folded, n=3, cutoff=0.6)
        hint = f" (near: {', '.join(repr(folded[name]) for name in near)})" if near else ""
        shown = ", ".join(repr(name) for name in unknown[1:MOST_NAMED])
        others = f", nor {shown}{and_more(unknown)}" if shown else ""
        return Rejected(
            f"{where}: the model has no label {unknown[0]!r}{hint}{others}.",
            f"Use its {len(self.labels)} labels as they are written, or indices 0 to {len(self.labels) - 1}.",
        )


def and_more(many: Sequence[str]) -> str:
    """What follows the first `MOST_NAMED` of them."""
    return f" and {len(many) - MOST_NAMED} more" if len(many) > MOST_NAMED else ""


def _fold(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())
