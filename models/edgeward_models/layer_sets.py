"""Which layers to keep in float together. Pure.

Layers are ranked twice: by the noise that each one adds when it alone is quantised, and by that noise over
the work that goes back to float. Each set is taken as it is and with its gaps closed: a float region without
gaps needs fewer conversions between float and integers.

Invariant: names come out in the order of the layers that went in, which is the graph's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

_GAP = 2


class Ranked(Protocol):
    """A layer, as `sensitivity` found it."""

    @property
    def name(self) -> str: ...
    @property
    def macs_share(self) -> float: ...
    @property
    def sqnr_db(self) -> float: ...


def sets(layers: Sequence[Ranked], count: int) -> list[list[str]]:
    """The `count` most sensitive in both orders, each closed and as it is; equal ones once.

    The first is the unbroken one of the plain order: where the first layers are the sensitive ones, as
    they often are, it is the front of the network.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for order in (noise, density):
        most = [layer.name for layer in sorted(layers, key=order, reverse=True)[:count]]
        for names in (closed(layers, most), in_order(layers, most)):
            found.setdefault(tuple(names), names)
    return list(found.values())


def closed(layers: Sequence[Ranked], names: Sequence[str]) -> list[str]:
    """The set with gaps of up to `_GAP` layers closed, the gap before the first layer of the graph too."""
    held = sorted(k for k, layer in enumerate(layers) if layer.name in set(names))
    filled: set[int] = set(held)
    for a, b in zip([-1, *held], held, strict=False):
        if b - a - 1 <= _GAP:
            filled.update(range(a + 1, b))
    return [layers[k].name for k in sorted(filled)]


def runs(layers: Sequence[Ranked], names: Sequence[str]) -> list[list[Ranked]]:
    """The set cut into its unbroken regions."""
    found: list[list[Ranked]] = []
    last = -2
    for k, layer in enumerate(layers):
        if layer.name in set(names):
            if k != last + 1:
                found.append([])
            found[-1].append(layer)
            last = k
    return found


def in_order(layers: Sequence[Ranked], names: Sequence[str]) -> list[str]:
    wanted = set(names)
    return [layer.name for layer in layers if layer.name in wanted]


def noise(layer: Ranked) -> float:
    return math.pow(10.0, -max(-300.0, min(300.0, layer.sqnr_db)) / 10)


def density(layer: Ranked) -> float:
    """Noise taken away for the work that goes back to float; a conversion costs something by itself."""
    return noise(layer) / (0.005 + max(0.0, layer.macs_share))
