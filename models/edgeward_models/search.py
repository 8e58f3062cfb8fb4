"""What to try next, and what to take in the end: the search over quantisation schemes. Pure.

    the target's base → its other calibrations → the target's other schemes → the most sensitive layers in
      float: 1, 2, 4, ... → small steps around the fastest that passes, and around the best that nearly does

Invariants: never more candidates than are left, never one twice; what is chosen was measured 5 % faster
than FP32 and passed the gate; a candidate that may saturate on a processor of the target is never offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from edgeward_models.layer_sets import Ranked, closed, density, in_order, noise, runs, sets
from edgeward_models.pareto import Point, front
from edgeward_models.schemes import CALIBRATIONS, Scheme
from edgeward_wire.manifest import TargetHints

TOP1 = "top-1 agreement with FP32"
PAYS = 0.95
"""What a candidate may take of FP32's time at most: less of a gain is not worth another file."""
TIE = 1.02
"""Within 2 % of the fastest, the more accurate one is taken: less than a measurement tells apart."""
PATIENCE = 16
"""So many candidates in a row that do not change what would be taken end the search."""
BATCH = 4
MAX_CANDIDATES = 200
_ROOTS = 2
_ROOTS_APART = 1.1
_VNNI = frozenset({"avx512_vnni", "avx_vnni"})


@dataclass(frozen=True)
class Measured:
    """One candidate that was tried. Figures are None where it did not get so far."""

    scheme: Scheme
    sqnr_db: float | None = None
    agreement: float | None = None
    """The share of samples with FP32's first answer, of a classification; of the boxes, of a detector."""
    ratio: float | None = None
    """Paired latency over FP32's; below 1 is faster."""
    ratio_high: float | None = None
    """The upper end of its interval."""
    excluded: str = ""
    """Why it is out of the question."""

    @property
    def point(self) -> Point | None:
        """Its place in the plane of accuracy and latency; None without both."""
        if self.excluded or self.sqnr_db is None or self.ratio is None:
            return None
        return Point(self.sqnr_db, self.ratio)

    @property
    def pays(self) -> bool:
        """Whether it is faster than FP32 by what another file is worth, and beyond doubt."""
        if self.excluded or self.ratio is None:
            return False
        return self.ratio <= PAYS and (self.ratio_high is None or self.ratio_high <= 1.0)


@dataclass(frozen=True)
class Gate:
    """What a candidate's accuracy must reach: one figure, or both."""

    agreement: float | None = None
    sqnr_db: float | None = None
    answers: str = TOP1
    """What the agreement is of."""

    def passes(self, one: Measured) -> bool:
        """Excluded candidates and unknown figures never pass."""
        figures = ((self.agreement, one.agreement), (self.sqnr_db, one.sqnr_db))
        return not one.excluded and all(
            least is None or (value is not None and value >= least) for least, value in figures
        )

    def shortfall(self, one: Measured) -> float:
        """How far the worse figure is from the gate, in bits (6 dB, or ten percent of all answers)."""
        missing = [(self.agreement, one.agreement, 0.1), (self.sqnr_db, one.sqnr_db, 6.0)]
        short = [
            math.inf if value is None else (least - value) / unit
            for least, value, unit in missing
            if least is not None
        ]
        return max(short, default=0.0)

    def says(self) -> str:
        """The gate for people."""
        parts = []
        if self.agreement is not None:
            parts.append(f"{self.answers} of at least {self.agreement:.3f}")
        if self.sqnr_db is not None:
            parts.append(f"SQNR of at least {self.sqnr_db:.1f} dB")
        return " and ".join(parts) or "none"

    def lacks(self, one: Measured) -> str:
        """What a candidate has, where it is short of the gate."""
        parts = []
        if self.agreement is not None and (one.agreement is None or one.agreement < self.agreement):
            has = "unknown" if one.agreement is None else f"{one.agreement:.3f}"
            parts.append(f"{self.answers} {has}, where {self.agreement:.3f} is needed")
        if self.sqnr_db is not None and (one.sqnr_db is None or one.sqnr_db < self.sqnr_db):
            has = "unknown" if one.sqnr_db is None else f"{one.sqnr_db:.1f} dB"
            parts.append(f"SQNR {has}, where {self.sqnr_db:.1f} dB is needed")
        return "; ".join(parts)


@dataclass(frozen=True)
class Space:
    """What the search may try."""

    schemes: tuple[Scheme, ...]
    """The base first."""
    gate: Gate
    layers: tuple[Ranked, ...] = ()
    """In the graph's order; empty until they were ranked."""
    keep_float: tuple[str, ...] = ()
    """These stay in float in every candidate."""


def needs_proof(hints: TargetHints) -> bool:
    """Whether a file for these hints must be proved free of saturation from its weights (`pairsafe`).

    x86-64 without VNNI adds two 8-bit products in 16 bits, so that a file may be right on the machine that
    measured it and wrong on its neighbour. `pair` and `s7` weights cannot overflow; plain 8-bit weights
    may, and are offered only where they were proved not to, or where the hints demand VNNI.
    """
    x86 = not hints.arch or "x86_64" in hints.arch
    cpu = not hints.providers or "CPU" in hints.providers
    vnni = bool(hints.isa) and set(hints.isa) <= _VNNI
    return x86 and cpu and not vnni


def next_candidates(space: Space, measured: Sequence[Measured], left: int) -> tuple[Scheme, ...]:
    """At most `left` schemes that are worth a try now, none of them measured before; empty: stop.

    With `space.layers` empty the search ends where it needs the ranking: rank `root(...)` and go on.
    """
    room = min(left, BATCH, MAX_CANDIDATES - len(measured))
    if room <= 0:
        return ()
    tried = {identity(one.scheme) for one in measured}
    for stage in _STAGES:
        fresh: dict[Scheme, Scheme] = {}
        for scheme in stage(space, measured):
            key = identity(scheme)
            if key not in tried:
                fresh.setdefault(key, scheme)
            if len(fresh) == room:
                break
        if fresh:
            return tuple(fresh.values())
    return ()


def identity(scheme: Scheme) -> Scheme:
    """Schemes that differ only in the order of names are the same."""
    return replace(
        scheme, keep_float=tuple(sorted(scheme.keep_float)), operators=tuple(sorted(scheme.operators))
    )


def choose(measured: Sequence[Measured], gate: Gate) -> int | None:
    """The index of what to take: the fastest that passes, of a tie the most accurate; or None."""
    fit = [k for k, one in enumerate(measured) if one.pays and gate.passes(one)]
    if not fit:
        return None
    limit = min(_ratio(measured[k]) for k in fit) * TIE
    return max(
        (k for k in fit if _ratio(measured[k]) <= limit),
        key=lambda k: (_db(measured[k]), -_ratio(measured[k])),
    )


def nearest(measured: Sequence[Measured], gate: Gate) -> int | None:
    """Where nothing passes: the index of the most accurate candidate that pays."""
    fit = [k for k, one in enumerate(measured) if one.pays]
    return max(fit, key=lambda k: (-gate.shortfall(measured[k]), _db(measured[k])), default=None)


def front_of(measured: Sequence[Measured]) -> list[int]:
    """The indices on the Pareto front of SQNR against latency, the fastest first."""
    points = [(k, point) for k, one in enumerate(measured) if (point := one.point) is not None]
    return [points[k][0] for k in front([point for _, point in points])]


def root(space: Space, measured: Sequence[Measured]) -> Scheme | None:
    """The scheme whose layers are worth ranking: None when none of them pays."""
    roots = [one for one in _roots(space, measured) if one.scheme.method == "static"]
    return roots[0].scheme if roots else None


# --- the stages, each of them everything that it would try, the most promising first


def _base(space: Space, measured: Sequence[Measured]) -> Iterator[Scheme]:
    yield from islice(_schemes(space, measured), 1)


def _schemes(space: Space, measured: Sequence[Measured]) -> Iterator[Scheme]:
    for scheme in space.schemes:
        yield replace(scheme, keep_float=space.keep_float)


def _calibrations(space: Space, measured: Sequence[Measured]) -> Iterator[Scheme]:
    bare = [one for one in measured if _is_root(space, one) and one.scheme.method == "static"]
    for one in _by_promise(space.gate, bare)[:1]:
        for method in CALIBRATIONS:
            yield replace(one.scheme, calibration=method)


def _fronts(space: Space, measured: Sequence[Measured]) -> Iterator[Scheme]:
    """1, 2, 4, ... of the most sensitive layers in float, until that costs more than it gives.

    First the unbroken sets alone, all sizes: these are most often the best; then the others of each size.
    """
    by_scheme = {identity(one.scheme): one for one in measured}
    for most in (1, None):
        for start in _roots(space, measured):
            passed = space.gate.passes(start)
            if passed and start.scheme.method != "static":
                continue  # right as it is, and float layers would only slow it down
            count = 1
            while count <= len(space.layers) // 2:
                level = [_keeping(space, start.scheme, names) for names in sets(space.layers, count)[:most]]
                yield from level
                known = [by_scheme[key] for scheme in level if (key := identity(scheme)) in by_scheme]
                if len(known) == len(level) and _enough(space.gate, known, passed):
                    break
                passed = passed or any(space.gate.passes(one) for one in known)
                count *= 2


def _enough(gate: Gate, level: Sequence[Measured], passed: bool) -> bool:
    """Whether more float layers lead nowhere: none pays any more, or a smaller set passed as well."""
    return not any(one.pays for one in level) or (passed and any(gate.passes(one) for one in level))


def _steps(space: Space, measured: Sequence[Measured]) -> Iterator[Scheme]:
    """Small steps: away from float where it passes, towards float where it nearly does."""
    if not space.layers or _idle(space.gate, measured) > PATIENCE:
        return
    chosen = choose(measured, space.gate)
    if chosen is not None:
        if measured[chosen].scheme.method == "static":
            yield from (replace(measured[chosen].scheme, calibration=method) for method in CALIBRATIONS)
        yield from _leaner(space, measured[chosen].scheme)
    for one in _nearly(space, measured, None if chosen is None else measured[chosen]):
        yield from islice(_richer(space, one.scheme), 2 * BATCH)
    if chosen is not None:
        yield from islice(_richer(space, measured[chosen].scheme), BATCH)


_STAGES: tuple[Callable[[Space, Sequence[Measured]], Iterator[Scheme]], ...] = (
    _base,
    _calibrations,
    _schemes,
    _fronts,
    _steps,
)


def _leaner(space: Space, scheme: Scheme) -> Iterator[Scheme]:
    """One float layer less, the one that costs most for what it saves first."""
    kept = _own(space, scheme)
    for layer in sorted(kept, key=density):
        yield _keeping(space, scheme, [one.name for one in kept if one is not layer])
    for run in runs(space.layers, [one.name for one in kept]):
        if len(run) > 1:
            names = {layer.name for layer in run}
            yield _keeping(space, scheme, [one.name for one in kept if one.name not in names])


def _richer(space: Space, scheme: Scheme) -> Iterator[Scheme]:
    """One float layer more: what lies beside a float region, and what is most sensitive, in turn."""
    kept = [layer.name for layer in _own(space, scheme)]
    names = [layer.name for layer in space.layers]
    held = {names.index(name) for name in kept}
    beside = {k for h in held for k in (h - 1, h + 1) if 0 <= k < len(names) and k not in held}
    rest = [layer for layer in space.layers if layer.name not in kept]
    for layers in zip(
        sorted(rest, key=density, reverse=True),
        sorted(rest, key=noise, reverse=True),
        sorted((space.layers[k] for k in beside), key=noise, reverse=True) or rest,
        strict=False,
    ):
        for layer in layers:
            yield _keeping(space, scheme, [*kept, layer.name])
            yield _keeping(space, scheme, closed(space.layers, [*kept, layer.name]))


def _nearly(space: Space, measured: Sequence[Measured], chosen: Measured | None) -> list[Measured]:
    """Of the front, the most accurate that do not pass and are faster than what was chosen."""
    limit = 1.0 if chosen is None else _ratio(chosen)
    members = [measured[k] for k in front_of(measured)]
    open_ones = [one for one in members if one.pays and not space.gate.passes(one) and _ratio(one) < limit]
    return sorted(open_ones, key=space.gate.shortfall)[:2]


def _idle(gate: Gate, measured: Sequence[Measured]) -> int:
    """How many candidates ago the choice or the best one without a choice changed last."""
    best = choose(measured, gate)
    best = nearest(measured, gate) if best is None else best
    return len(measured) if best is None else len(measured) - 1 - best


def _roots(space: Space, measured: Sequence[Measured]) -> list[Measured]:
    """What float layers are added to: without any, paying, and worth it beside the others; few."""
    kinds: dict[Scheme, list[Measured]] = {}
    for one in measured:
        if _is_root(space, one) and one.pays:
            kinds.setdefault(_kernels(one.scheme), []).append(one)
    # Those that run the same kernels are equally fast, whatever a busy machine made of it.
    best = [replace(max(alike, key=_db), ratio=min(map(_ratio, alike))) for alike in kinds.values()]
    # A little faster and less accurate is no other root: float layers make up for more than that.
    members = [
        one
        for one in best
        if not any(_db(o) > _db(one) and _ratio(o) <= _ratio(one) * _ROOTS_APART for o in best)
    ]
    return _by_promise(space.gate, members)[:_ROOTS]


def _kernels(scheme: Scheme) -> Scheme:
    """The same for schemes that differ in numbers only."""
    return replace(scheme, calibration="minmax", weights="pair")


def _is_root(space: Space, one: Measured) -> bool:
    return not one.excluded and set(one.scheme.keep_float) == set(space.keep_float)


def _by_promise(gate: Gate, candidates: Sequence[Measured]) -> list[Measured]:
    """The fastest that passes, then those whose accuracy is best for their speed.

    6 dB are one bit: what a candidate is behind in accuracy may be made up with float layers, which cost
    about as much as they save; so one bit stands against a tenth of FP32's time.
    """

    def cost(one: Measured) -> tuple[bool, float]:
        passes = gate.passes(one)
        return not passes, _ratio(one) - (0.0 if passes else _db(one) / 60)

    return sorted((one for one in candidates if one.ratio is not None), key=cost)


# --- schemes with other float layers


def _own(space: Space, scheme: Scheme) -> list[Ranked]:
    """The float layers that the search chose itself."""
    kept = set(scheme.keep_float) - set(space.keep_float)
    return [layer for layer in space.layers if layer.name in kept]


def _keeping(space: Space, scheme: Scheme, names: Sequence[str]) -> Scheme:
    more = [name for name in in_order(space.layers, names) if name not in space.keep_float]
    return replace(scheme, keep_float=(*space.keep_float, *more))


# --- figures


def _db(one: Measured) -> float:
    return -math.inf if one.sqnr_db is None else one.sqnr_db


def _ratio(one: Measured) -> float:
    return math.inf if one.ratio is None else one.ratio
