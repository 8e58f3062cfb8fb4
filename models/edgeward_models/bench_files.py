"""Which of several files are one model, and what they are called beside one another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from edgeward_models.inspect import Inspection, inspect_model


def inspected(file: Path, scratch: Path, k: int) -> Inspection:
    """Read file `k`; what it needs to be whole goes into `scratch`. Raises Rejected, Unavailable."""
    home = scratch / str(k)
    home.mkdir(parents=True)
    return inspect_model(file, scratch=home)


def by_ports(found: Sequence[Inspection]) -> dict[str, list[Inspection]]:
    """Files of one model, by the name of its first one in FP32."""
    groups: list[list[Inspection]] = []
    for one in found:
        mine = next((group for group in groups if _alike(group[0], one)), None)
        if mine is None:
            groups.append([one])
        else:
            mine.append(one)
    named: dict[str, list[Inspection]] = {}
    for group in groups:
        first = min(group, key=lambda one: one.facts.precision != "fp32").facts.path
        name = first.stem if first.stem not in named else str(first)
        named[name] = group
    return named


def _alike(one: Inspection, other: Inspection) -> bool:
    """Whether two files can be the same model: ports of the same names, types and lengths."""
    mine, theirs = (one.facts.inputs + one.facts.outputs, other.facts.inputs + other.facts.outputs)
    return len(mine) == len(theirs) and all(
        (a.name, a.dtype, len(a.shape)) == (b.name, b.dtype, len(b.shape))
        and all(
            x == y or isinstance(x, str) or isinstance(y, str) for x, y in zip(a.shape, b.shape, strict=True)
        )
        for a, b in zip(mine, theirs, strict=True)
    )


def names_of(group: Sequence[Inspection]) -> list[str]:
    """File names without suffix, with their directory where two are the same."""
    stems = [one.facts.path.stem for one in group]
    return [
        one.facts.path.stem
        if stems.count(one.facts.path.stem) == 1
        else f"{one.facts.path.resolve().parent.name}/{one.facts.path.stem}"
        for one in group
    ]
