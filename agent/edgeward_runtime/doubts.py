"""What a source's settings ask for and the model in service cannot give: it would do nothing. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from edgeward_runtime.sources.options import ANY, Rules
from edgeward_runtime.tasks.segmentation import BACKGROUND
from edgeward_runtime.tasks.vad import SPEECH

_NUMBERED = re.compile(r"class \d+")
_MOST_NAMED = 3


class _Heeds(NamedTuple):
    """Which settings a task looks at."""

    thresholds: bool = True
    classes: bool = True
    zones: bool = False
    below: bool = True


_TASKS = {
    "detection": _Heeds(zones=True),
    "classification": _Heeds(),
    "audio-classification": _Heeds(),
    "segmentation": _Heeds(below=False),
    "vad": _Heeds(classes=False),
    "tensor": _Heeds(thresholds=False, classes=False, below=False),
}


def doubt(task: str, labels: Sequence[str], rules: Rules, below: float | None = None) -> str:
    """One line on what does nothing with a model of this task and these labels; empty: all of it does.

    `below` is that of the pipeline's samples.
    """
    heeds = _TASKS[task]
    used = {
        "thresholds": (bool(rules.thresholds), heeds.thresholds),
        "classes": (bool(rules.classes), heeds.classes),
        "zones": (bool(rules.zones), heeds.zones),
        "samples below": (below is not None, heeds.below),
    }
    idle = [name for name, (said, heeded) in used.items() if said and not heeded]
    found = [f"{', '.join(idle)}: of no use to a model for {task}."] if idle else []
    if heeds.thresholds:
        found += _unknown("thresholds", rules.thresholds.keys() - {ANY}, task, labels)
    if heeds.classes:
        found += _unknown("classes", rules.classes, task, labels)
    return " ".join(found)


def _unknown(setting: str, named: Iterable[str], task: str, labels: Sequence[str]) -> Iterator[str]:
    known = _known(task, labels)
    unknown = sorted(
        name for name in named if name not in known and (labels or not _NUMBERED.fullmatch(name))
    )
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        more = ", ..." if len(unknown) > _MOST_NAMED else ""
        shown = ", ".join(name[:40] for name in unknown[:_MOST_NAMED]) + more
        yield f"{setting}: no label of the model is {shown}{f' (near: {near[0][:40]})' if near else ''}."


def _known(task: str, labels: Sequence[str]) -> tuple[str, ...]:
    if task == "vad":
        return (SPEECH,)
    if task == "segmentation" and len(labels) == 1:
        return (BACKGROUND, *labels)
    return tuple(labels)
