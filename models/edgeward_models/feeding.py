"""Everything that one run of a model takes: samples for its sources, its constants, its states at zero.

Invariant: the same files and seed give the same arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgeward_models.inspect import Inspection
from edgeward_models.samples import Feeds, open_samples
from edgeward_runtime.ports import constants, shape_of
from edgeward_wire.contract import Contract

MAX_FEEDS = 1024


@dataclass(frozen=True)
class Fed:
    """Whole inputs, and where they come from."""

    feeds: tuple[Feeds, ...]
    """All inputs of the graph by name, constants and states included."""
    origin: str
    """For people: "9 pictures in pictures", "noise from seed 0"."""
    sizes: dict[str, int]
    """The length that each named dimension has in them."""


def feed(inspection: Inspection, samples: Path | None = None, *, count: int = 8, seed: int = 0) -> Fed:
    """At most `count` whole inputs (at least one) of an inspected model.

    `samples` None: those that its sidecar names, else seeded noise.

    Raises:
        Rejected: the samples do not suit the model. Unavailable: they cannot be read.
    """
    contract = inspection.guess.contract
    source = open_samples(contract, samples or inspection.guess.samples, seed=seed)
    least = source.limit("test")
    wanted = max(1, min(count, MAX_FEEDS, count if least is None else least))
    fixed = {**constants(contract), **states(contract)}
    feeds = tuple({**fixed, **one} for one in source.take("test", wanted, seed))
    sizes = {name: span.default for name, span in contract.dimensions.items()}
    return Fed(feeds, source.origin, sizes)


def states(contract: Contract) -> Feeds:
    """The states at the start: zeros."""
    return {
        port.name: np.zeros(shape_of(contract, port), np.dtype(port.dtype))
        for port in contract.inputs
        if port.bind.startswith("state:")
    }
