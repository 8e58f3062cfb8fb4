"""An answer of the runtime as it crosses the wire; `edgeward_wire.result.headline` has it as one line."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgeward_runtime.pipeline import Saw
from edgeward_runtime.tasks.answer import Answer, Classified, Detected, Found, Raw, Scored, Segmented, Spoken
from edgeward_wire.result import (
    MAX_AREAS,
    MAX_BOXES,
    MAX_VALUES,
    Area,
    Box,
    ResultMessage,
    Seen,
    Speech,
    Values,
)

_MAX_TOP = 5
_MAX_LABEL = 200


def message(saw: Saw, pipeline: str) -> ResultMessage:
    """One result as a device tells it."""
    return ResultMessage(
        pipeline=pipeline,
        source=saw.source,
        time=saw.time,
        model=saw.recipe.model.name,
        version=saw.recipe.model.version,
        latency_ms=saw.stages["end_to_end"],
        task=saw.recipe.contract.task,
        why=saw.why or "every",
        **_part(saw.look.answer, saw.time),
    )


def _part(answer: Answer, now: float) -> dict[str, Any]:
    """The field of the message that this kind of answer fills."""
    if isinstance(answer, Classified):
        return {"top": tuple(_seen(one) for one in answer.top[:_MAX_TOP])}
    if isinstance(answer, Detected):
        return {"boxes": tuple(_box(box, answer.size) for box in answer.boxes[:MAX_BOXES])}
    if isinstance(answer, Segmented):
        areas = (
            Area(label=area.label[:_MAX_LABEL], index=area.class_index, share=min(1.0, area.share))
            for area in answer.areas[:MAX_AREAS]
        )
        return {"areas": tuple(areas)}
    if isinstance(answer, Spoken):
        since = max(0.0, now - answer.for_s)
        return {"speech": Speech(active=answer.active, score=answer.score, since=since)}
    return {"values": _values(answer)}


def _seen(one: Scored) -> Seen:
    return Seen(label=one.label[:_MAX_LABEL], index=one.class_index, score=min(1.0, one.score))


def _box(found: Found, size: tuple[int, int]) -> Box:
    x1, y1, x2, y2 = found.corners
    width, height = max(1, size[0]), max(1, size[1])
    return Box(
        label=found.label[:_MAX_LABEL],
        index=found.class_index,
        score=min(1.0, max(0.0, found.score)),
        x1=_share(x1, width),
        y1=_share(y1, height),
        x2=_share(x2, width),
        y2=_share(y2, height),
        zones=found.zones[:16],
    )


def _share(pixels: float, side: int) -> float:
    return round(min(1.0, max(0.0, pixels / side)), 5)


def _values(answer: Raw) -> tuple[Values, ...]:
    return tuple(
        Values(
            name=name,
            shape=tuple(array.shape)[:8],
            first=tuple(float(v) for v in np.nan_to_num(array.reshape(-1)[:MAX_VALUES].astype(np.float64))),
        )
        for name, array in answer.outputs[:32]
    )
