"""A target's layers ranked by sensitivity, as far as the time allows, and further in the next run.

Invariants: a layer is measured once for a scheme and its samples, in whichever run; what is returned was
measured, and no two figures come from other samples.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace

from edgeward_models.schemes import Scheme
from edgeward_models.sensitivity import Layer, rank_layers
from edgeward_models.study import Study

UNTOUCHED_DB = 300.0
"""Of a layer that changes nothing: JSON has no infinity."""


def rank(study: Study, scheme: Scheme, deadline: float) -> list[Layer]:
    """The layers that were measured up to `deadline` (time.monotonic()), the most sensitive first.

    Raises Rejected, Unavailable.
    """
    key = {**study.key, "scheme": scheme.key(), "count": study.effort.rank}
    known = [Layer(**one) for one in study.work.so_far("ranking", key) or []]
    if {one.name for one in known} >= set(study.names) - set(scheme.keep_float):
        return known
    layers = rank_layers(
        study.prepared,
        scheme,
        study.ranges(scheme.calibration),
        study.full_feeds(study.effort.rank),
        known={one.name: one.sqnr_db for one in known},
        deadline=deadline,
        progress=study.progress,
    )
    found = [replace(one, sqnr_db=_plain(one.sqnr_db)) for one in layers]
    if found != known:
        study.work.keep("ranking", key, [asdict(one) for one in found])
    return found


def _plain(sqnr_db: float) -> float:
    return sqnr_db if math.isfinite(sqnr_db) else math.copysign(UNTOUCHED_DB, sqnr_db)
