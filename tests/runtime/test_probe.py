"""Probing real plans of a real model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from conftest import missing
from edgeward_agent.messages import Qualify
from edgeward_agent.qualify import subject_of
from edgeward_runtime import golden, plans
from edgeward_runtime.contract_guess import guess
from edgeward_runtime.plans import ARENA, CPU, SPINNING, Machine, VariantFacts, candidates
from edgeward_runtime.probe import Findings, probe
from edgeward_runtime.trials import Candidate, Subject
from edgeward_wire.manifest import Limits
from edgeward_wire.verdict import Plan
from runtime.bundles import Bundle, colour_bundle

MACHINE = Machine("x86_64", frozenset(), (CPU,))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return colour_bundle(tmp_path_factory.mktemp("probe"), float_too=True)


@pytest.fixture
def subject(bundle: Bundle) -> Subject:
    return subject_of(
        Qualify(
            model=bundle.ref,
            manifest=bundle.manifest,
            blobs=str(bundle.blobs),
            threads=1,
            key="0" * 64,
            lock="",
            scratch="",
        )
    )


def plans_of(subject: Subject, threads: int = 1, only: tuple[str, ...] = ()) -> list[Plan]:
    variants = {name: c.facts for name, c in subject.variants.items()}
    return candidates(variants, MACHINE, threads=threads, only=only)


def results(found: Findings) -> dict[str, set[str]]:
    """What came of each variant's plans."""
    by_variant: dict[str, set[str]] = {}
    for o in found.outcomes:
        right = o.outcome in ("passed", "chosen")
        by_variant.setdefault(o.plan.variant, set()).add("right" if right else o.outcome)
    return by_variant


def test_every_plan_gets_its_numbers_and_one_is_chosen(subject: Subject) -> None:
    steps: list[tuple[str, int, int]] = []
    tried = plans_of(subject, threads=2)
    found = probe(subject, tried, progress=lambda phase, done, total, _: steps.append((phase, done, total)))
    assert [o.plan for o in found.outcomes][: len(tried)] == tried
    assert [o.outcome for o in found.outcomes].count("chosen") == 1
    assert {o.outcome for o in found.outcomes} == {"chosen", "passed"}
    assert found.chosen is not None
    assert sum(o.ratio is not None for o in found.outcomes) == 3
    for o in found.outcomes:
        assert o.parity is not None
        assert o.parity > 0.999
        assert o.p50_ms is not None
        assert o.p99_ms is not None
        assert 0 < o.p50_ms <= o.p99_ms
        assert o.load_ms is not None
        assert o.memory_mb is not None
    assert steps[0] == ("preparing", 0, len(tried))
    assert [done for phase, done, _ in steps if phase == "preparing"] == list(range(len(found.outcomes)))
    assert steps[-1] == ("validating", 1, 1)


def test_the_best_are_refined_and_every_option_tried_is_told(subject: Subject) -> None:
    plans_of_two = [Plan(provider=CPU, variant=name, threads=2) for name in subject.variants]
    found = probe(subject, plans_of_two)
    refined = [o.plan for o in found.outcomes[len(plans_of_two) :]]
    assert len(set(map(Plan.model_dump_json, refined))) == len(refined)
    assert SPINNING in refined[0].session
    assert any(ARENA in plan.session for plan in refined)
    assert any(plan.optimisation == "extended" for plan in refined)
    assert all(o.p50_ms is not None for o in found.outcomes)


def test_an_incumbent_that_was_refined_before_is_not_tried_twice(subject: Subject) -> None:
    plan = Plan(provider=CPU, variant="int8", threads=1, session={ARENA: "0"})
    found = probe(subject, [plan.model_copy(update={"session": {}})], incumbent=plan)
    assert [o.plan for o in found.outcomes].count(plan) == 1
    held = next(o for o in found.outcomes if o.plan == plan)
    assert held.ratio is not None  # it was in the finals


def test_an_incumbent_that_a_refinement_beats_still_meets_it_in_the_finals(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "GAIN_TO_REFINE", 1e9)  # every option that is right wins
    plan = Plan(provider=CPU, variant="int8", threads=1)
    found = probe(subject, [], incumbent=plan)
    in_the_finals = [o.plan for o in found.outcomes if o.ratio is not None]
    assert plan in in_the_finals
    assert Plan(provider=CPU, variant="int8", threads=1, session={ARENA: "0"}, optimisation="basic") in (
        in_the_finals
    )


def test_a_plan_that_no_option_makes_faster_is_chosen_as_it_is(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "GAIN_TO_REFINE", 0.0)
    plan = Plan(provider=CPU, variant="int8", threads=1)
    found = probe(subject, [plan])
    assert found.chosen == plan
    assert [o.outcome for o in found.outcomes] == ["chosen", "passed", "passed"]


def test_what_does_not_load_is_an_outcome(subject: Subject) -> None:
    found = probe(subject, plans_of(subject, only=("Qnn", "CPU")))
    absent = [o for o in found.outcomes if o.plan.provider.startswith("Qnn")]
    assert {(o.outcome, o.unverified) for o in absent} == {("not_loaded", True)}
    assert found.chosen is not None
    none = probe(subject, plans_of(subject, only=("Qnn",)))
    assert none.chosen is None
    assert none.reason == "No plan passed. Qnn is not in this build of ONNX Runtime."


def test_wrong_outputs_lose_however_fast(subject: Subject, tmp_path: Path) -> None:
    """The INT8 file's golden vectors are of other weights, as if a kernel computed something else."""
    wrong = dict(subject.variants)
    arrays = golden.read_npz(wrong["int8"].golden)
    arrays = {k: (v[:, ::-1].copy() if k.startswith("out.") else v) for k, v in arrays.items()}
    wrong["int8"] = dataclasses.replace(wrong["int8"], golden=golden.write_npz(arrays))
    found = probe(dataclasses.replace(subject, variants=wrong), plans_of(subject))
    assert results(found) == {"int8": {"wrong_output"}, "fp32": {"right"}}
    reasons = [o.reason for o in found.outcomes if o.outcome == "wrong_output"]
    assert all("below 0.99" in reason for reason in reasons)


def with_cut(raw: Path | bytes, *, saturating: bool) -> bytes:
    """Golden vectors whose exact outputs are not quite what this machine gives: its own are those of a kernel
    that saturates, or as far from these as from the exact ones."""
    arrays = golden.read_npz(raw)
    for k, (_, outputs) in enumerate(golden.vectors(dict(arrays))):
        mine = outputs["logits"].astype(np.float64)
        across = np.roll(mine, 1, axis=1)
        across -= mine * float((across * mine).sum() / (mine * mine).sum())
        exact = (mine + 0.05 * across).astype(np.float32)
        arrays[f"out.{k}.logits"] = exact
        arrays[f"cut.{k}.logits"] = outputs["logits"] if saturating else exact + exact - outputs["logits"]
    return golden.write_npz(arrays)


@pytest.mark.parametrize("saturating", [True, False])
def test_outputs_that_saturation_explains_lose_although_their_cosine_passes(
    subject: Subject, saturating: bool
) -> None:
    made = dict(subject.variants)
    made["int8"] = dataclasses.replace(
        made["int8"], golden=with_cut(made["int8"].golden, saturating=saturating)
    )
    found = probe(dataclasses.replace(subject, variants=made), plans_of(subject))
    int8 = [o for o in found.outcomes if o.plan.variant == "int8"]
    assert all(o.parity is not None and o.parity > 0.99 for o in int8)
    if saturating:
        assert {o.outcome for o in int8} == {"wrong_output"}
        assert all("lean towards what saturating sums give" in o.reason for o in int8)
        assert found.chosen is not None
        assert found.chosen.variant == "fp32"
    else:
        assert {o.outcome for o in int8} <= {"passed", "chosen"}


def test_a_broken_file_loses(subject: Subject) -> None:
    broken = dict(subject.variants)
    broken["int8"] = dataclasses.replace(broken["int8"], file=Path(__file__))
    found = probe(dataclasses.replace(subject, variants=broken), plans_of(subject))
    assert results(found) == {"int8": {"not_loaded"}, "fp32": {"right"}}


def test_another_preprocessing_stops_it_before_anything_is_loaded(subject: Subject) -> None:
    assert subject.preprocess is not None
    arrays = {
        k: v + 0.1 if k.startswith("tensor") else v for k, v in golden.read_npz(subject.preprocess).items()
    }
    found = probe(dataclasses.replace(subject, preprocess=golden.write_npz(arrays)), plans_of(subject))
    assert {o.outcome for o in found.outcomes} == {"skipped"}
    assert "prepares golden picture 0 differently" in found.reason


@pytest.mark.parametrize("limits", [Limits(p99_ms=1e-6), Limits(memory_mb=1e-9)])
def test_limits_of_the_manifest(subject: Subject, limits: Limits) -> None:
    found = probe(dataclasses.replace(subject, limits=limits), plans_of(subject)[:1])
    if limits.memory_mb is not None and not all(o.memory_mb for o in found.outcomes):
        pytest.skip("the small model took no memory that could be seen")
    assert [o.outcome for o in found.outcomes if o.ratio is not None or limits.memory_mb] == ["over_limit"]
    assert found.chosen is None
    assert "the manifest allows" in found.reason


def test_a_limit_that_a_refined_plan_breaks_is_the_reason(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "GAIN_TO_REFINE", 1e9)  # the first plan passes, and never meets the finals
    strict = dataclasses.replace(subject, limits=Limits(p99_ms=1e-6))
    found = probe(strict, [Plan(provider=CPU, variant="int8", threads=1)])
    assert found.outcomes[0].outcome == "passed"
    assert found.chosen is None
    assert "the manifest allows" in found.reason


def test_an_incumbent_stays_unless_another_is_clearly_faster(subject: Subject) -> None:
    """The same plan under another name cannot be 10 % faster than itself."""
    plan = Plan(provider=CPU, variant="int8")
    twin = plan.model_copy(update={"session": {"session.set_denormal_as_zero": "0"}})
    found = probe(subject, [twin], incumbent=plan)
    ratio = {o.plan.title: o.ratio for o in found.outcomes}
    assert found.chosen is not None
    assert found.chosen == plan or (ratio[found.chosen.title] or 1) <= 0.9 * (ratio[plan.title] or 1)


def test_time_runs_out(subject: Subject) -> None:
    found = probe(subject, plans_of(subject), budget_s=0)
    assert {o.outcome for o in found.outcomes} == {"skipped"}
    assert found.chosen is None


def test_no_plan_at_all(subject: Subject) -> None:
    assert probe(subject, []).reason.startswith("No plan fits this machine")


def test_the_shipped_model_is_probed_quickly() -> None:
    zoo = Path(__file__).parents[2] / "models/zoo"
    path = zoo / "efficientnet-lite0.onnx"
    if not (path.is_file() and (zoo / "efficientnet-lite0.toml").is_file()):
        missing("the shipped model")
    known = guess(path)
    assert known.samples is not None
    made = golden.make_golden(path, known.contract, golden.find_pictures(known.samples))
    facts = VariantFacts("int8", "")
    subject = Subject(known.contract, {"int8": Candidate(facts, path, made, 0.99)})
    found = probe(subject, candidates({"int8": facts}, MACHINE, threads=2))
    assert found.chosen is not None
    assert min(o.parity or 0 for o in found.outcomes) >= 0.99
