"""The search decides within its bounds, whatever the measurements say."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeward_models.pareto import dominates
from edgeward_models.schemes import TARGETS, Scheme
from edgeward_models.search import (
    BATCH,
    MAX_CANDIDATES,
    PAYS,
    TIE,
    Gate,
    Measured,
    Space,
    choose,
    front_of,
    identity,
    nearest,
    needs_proof,
    next_candidates,
    root,
)
from edgeward_wire.manifest import TargetHints


@dataclass(frozen=True)
class Layer:
    name: str
    macs_share: float
    sqnr_db: float


figures = st.none() | st.floats(-20, 60)
outcomes = st.builds(
    Measured,
    scheme=st.builds(
        Scheme, st.just("static"), keep_float=st.lists(st.sampled_from("abcdef"), unique=True).map(tuple)
    ),
    sqnr_db=figures,
    agreement=st.none() | st.floats(0, 1),
    ratio=st.none() | st.floats(0.01, 3),
    ratio_high=st.none() | st.floats(0.01, 3),
    excluded=st.sampled_from(["", "", "", "It does not load."]),
)
gates = st.builds(Gate, st.none() | st.floats(0, 1), st.none() | st.floats(0, 40))
layer_lists = st.lists(st.tuples(st.floats(0, 1), st.floats(-10, 90)), max_size=20).map(
    lambda rows: tuple(Layer(f"n{k}", *row) for k, row in enumerate(rows))
)
GATE = Gate(sqnr_db=20.0)


def search(
    space: Space, measure: Callable[[Scheme], Measured], budget: int, layers: tuple[Layer, ...]
) -> list[Measured]:
    """The whole loop, as the orchestration runs it."""
    measured: list[Measured] = []
    while len(measured) < budget:
        batch = next_candidates(space, measured, budget - len(measured))
        assert len(batch) <= min(BATCH, budget - len(measured))
        if not batch and not space.layers and layers and root(space, measured) is not None:
            space = replace(space, layers=layers)
            continue
        if not batch:
            break
        measured += [measure(scheme) for scheme in batch]
    return measured


# --- invariants


@settings(max_examples=60)
@given(st.integers(0, 400), st.randoms(use_true_random=False), layer_lists, gates)
def test_the_search_ends_within_its_budget_and_tries_nothing_twice(
    budget: int, dice: random.Random, layers: tuple[Layer, ...], gate: Gate
) -> None:
    def measure(scheme: Scheme) -> Measured:
        if dice.random() < 0.1:
            return Measured(scheme, excluded="It does not load.")
        return Measured(scheme, dice.uniform(0, 50), dice.random(), dice.uniform(0.3, 1.3))

    keep = ("kept",) if dice.random() < 0.5 else ()
    measured = search(Space(TARGETS["x86-64"].schemes, gate, keep_float=keep), measure, budget, layers)
    assert len(measured) <= min(budget, MAX_CANDIDATES)
    assert len({identity(one.scheme) for one in measured}) == len(measured)
    assert all(set(keep) <= set(one.scheme.keep_float) for one in measured)


@given(st.lists(outcomes, max_size=20), gates)
def test_what_is_chosen_is_faster_than_fp32_and_passes(measured: list[Measured], gate: Gate) -> None:
    k = choose(measured, gate)
    fit = [one for one in measured if one.pays and gate.passes(one)]
    assert (k is None) == (not fit)
    if k is not None:
        chosen = measured[k]
        assert not chosen.excluded
        assert chosen.ratio is not None
        assert chosen.ratio <= PAYS
        assert gate.passes(chosen)
        assert chosen.ratio <= min(one.ratio or math.inf for one in fit) * TIE


@given(st.lists(outcomes, max_size=20))
def test_the_front_has_no_dominated_member_and_loses_no_other(measured: list[Measured]) -> None:
    members = set(front_of(measured))
    points = {k: point for k, one in enumerate(measured) if (point := one.point) is not None}
    for k, point in points.items():
        assert (k in members) == (not any(dominates(other, point) for other in points.values()))
    assert members <= set(points)


@given(st.lists(outcomes, max_size=20), gates)
def test_the_nearest_is_faster_than_fp32_too(measured: list[Measured], gate: Gate) -> None:
    k = nearest(measured, gate)
    assert (k is None) == (not any(one.pays for one in measured))
    if k is not None:
        assert measured[k].pays


# --- where it goes


def additive(layers: tuple[Layer, ...], *, base_ratio: float = 0.5) -> Callable[[Scheme], Measured]:
    """A network whose layers add their noise, and whose float layers and conversions cost time."""
    names = [layer.name for layer in layers]

    def measure(scheme: Scheme) -> Measured:
        kept = set(scheme.keep_float)
        noise = sum(10 ** (-layer.sqnr_db / 10) for layer in layers if layer.name not in kept)
        borders = sum((a in kept) != (b in kept) for a, b in zip(["", *names], [*names, ""], strict=True))
        work = sum(layer.macs_share for layer in layers if layer.name in kept)
        worse = {"minmax": 1.0, "percentile": 1.3, "entropy": 2.0}[scheme.calibration]
        ratio = base_ratio + (1 - base_ratio) * work + 0.004 * borders
        ratio = 3.0 if scheme.method == "dynamic" else ratio
        return Measured(scheme, -10 * math.log10(noise * worse + 1e-4), ratio=ratio, ratio_high=ratio)

    return measure


NETWORK = tuple(
    Layer(f"n{k}", 0.05, db)
    for k, db in enumerate([24, 12, 18, 35, 20, 22, 50, 51, 52, 50, 30, 53, 54, 55, 50, 52, 51, 58, 60, 40])
)


def test_it_finds_the_sensitive_front_of_a_network() -> None:
    space = Space(TARGETS["x86-64"].schemes[:1], Gate(sqnr_db=21.0))
    measured = search(space, additive(NETWORK), 40, NETWORK)
    k = choose(measured, space.gate)
    assert k is not None
    chosen = measured[k]
    best = min(  # of all sets of up to five layers
        one.ratio or math.inf
        for names in _subsets([layer.name for layer in NETWORK[:11]], 5)
        if space.gate.passes(one := additive(NETWORK)(Scheme("static", keep_float=names)))
    )
    assert chosen.ratio is not None
    assert chosen.ratio <= best * TIE
    assert chosen.scheme.calibration == "minmax"


def test_the_base_comes_first_then_calibrations_then_layers() -> None:
    space = Space((Scheme("static"),), GATE)
    first = next_candidates(space, [], 10)
    assert first == (Scheme("static"),)
    measured = [additive(NETWORK)(first[0])]
    second = next_candidates(replace(space, schemes=TARGETS["x86-64"].schemes), measured, 10)
    assert {scheme.calibration for scheme in second} == {"percentile", "entropy"}
    measured += [additive(NETWORK)(scheme) for scheme in second]
    assert next_candidates(space, measured, 10) == ()
    assert root(space, measured) == Scheme("static")
    third = next_candidates(replace(space, layers=NETWORK), measured, 10)
    assert third[0].keep_float == ("n0", "n1")  # the most sensitive, and the gap before it


def test_the_front_of_a_network_is_among_the_first_sets_tried() -> None:
    space = Space((Scheme("static"),), GATE, NETWORK)
    measured = [
        additive(NETWORK)(Scheme("static", calibration=method))
        for method in ("minmax", "percentile", "entropy")
    ]
    first = next_candidates(space, measured, 10)
    assert [len(scheme.keep_float) for scheme in first] == sorted(len(scheme.keep_float) for scheme in first)
    assert tuple(f"n{k}" for k in range(6)) in [scheme.keep_float for scheme in first]


def test_a_blurred_latency_does_not_hide_the_better_calibration() -> None:
    space = Space((Scheme("static"), Scheme("static", weights="s7")), GATE)
    measured = [
        Measured(Scheme("static"), 14.0, ratio=0.5),
        Measured(Scheme("static", calibration="percentile"), 14.5, ratio=0.7),  # the same kernels
        Measured(Scheme("static", weights="s7"), 10.0, ratio=0.48),
    ]
    assert root(space, measured) == Scheme("static", calibration="percentile")


def test_nothing_is_ranked_where_int8_is_slower_anyway() -> None:
    space = Space((Scheme("static"),), GATE, NETWORK)
    measured = search(space, additive(NETWORK, base_ratio=1.2), 50, NETWORK)
    assert root(space, measured) is None
    assert choose(measured, GATE) is None
    assert nearest(measured, GATE) is None
    assert len(measured) <= 3


def test_nothing_loads_and_the_search_ends() -> None:
    measured = search(
        Space(TARGETS["x86-64"].schemes, GATE),
        lambda s: Measured(s, excluded="It does not load."),
        50,
        NETWORK,
    )
    assert len(measured) == len(TARGETS["x86-64"].schemes)


def test_a_tie_goes_to_the_more_accurate() -> None:
    a, b, c = (
        Measured(Scheme("static", keep_float=(name,)), db, ratio=ratio, ratio_high=ratio)
        for name, db, ratio in (("a", 25.0, 0.500), ("b", 30.0, 0.505), ("c", 40.0, 0.6))
    )
    assert choose([a, b, c], GATE) == 1


def test_faster_must_be_worth_it_and_beyond_doubt() -> None:
    assert not Measured(Scheme("static"), 50.0, ratio=0.96, ratio_high=0.97).pays
    assert Measured(Scheme("static"), 50.0, ratio=0.95, ratio_high=1.0).pays
    unsure = Measured(Scheme("static"), 50.0, ratio=0.94, ratio_high=1.01)
    assert not unsure.pays
    assert choose([unsure], GATE) is None


@pytest.mark.parametrize(
    ("hints", "needed"),
    [
        (TargetHints(), True),
        (TargetHints(arch=("x86_64",)), True),
        (TargetHints(arch=("x86_64",), isa=("avx512_vnni",)), False),
        (TargetHints(arch=("x86_64",), isa=("avx512_vnni", "avx_vnni")), False),
        (TargetHints(isa=("avx512_vnni", "avx2")), True),
        (TargetHints(arch=("aarch64",)), False),
        (TargetHints(providers=("Tensorrt",)), False),
        (TargetHints(providers=("CPU", "OpenVINO")), True),
    ],
)
def test_what_may_saturate_somewhere_in_the_fleet_needs_a_proof(hints: TargetHints, needed: bool) -> None:
    assert needs_proof(hints) is needed


def test_a_gate_says_what_is_lacking() -> None:
    gate = Gate(0.9, 15.0)
    one = Measured(Scheme("static"), 16.0, 0.85, 0.5)
    assert not gate.passes(one)
    assert gate.lacks(one) == "top-1 agreement with FP32 0.850, where 0.900 is needed"
    assert gate.says() == "top-1 agreement with FP32 of at least 0.900 and SQNR of at least 15.0 dB"
    assert gate.passes(replace(one, agreement=0.9))
    assert gate.lacks(replace(one, agreement=0.9)) == ""
    assert "unknown" in GATE.lacks(Measured(Scheme("static")))
    assert not Gate().passes(replace(one, excluded="It does not load."))


@given(outcomes, gates)
def test_a_gate_lacks_something_where_it_does_not_pass(one: Measured, gate: Gate) -> None:
    assert gate.passes(one) == (not one.excluded and not gate.lacks(one))


def _subsets(names: list[str], most: int) -> list[tuple[str, ...]]:
    from itertools import combinations

    return [chosen for count in range(most + 1) for chosen in combinations(names, count)]
