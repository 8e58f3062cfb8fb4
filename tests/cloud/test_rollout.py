"""Rollouts as a table of decisions: no clock, no database."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeward_cloud import rollout
from edgeward_cloud.rollout import Rollout, Target
from edgeward_wire.errors import Rejected
from edgeward_wire.manifest import ModelRef
from edgeward_wire.reported import Update
from edgeward_wire.verdict import Plan, Verdict

NOW = 1000.0


def model(letter: str) -> ModelRef:
    return ModelRef(path=f"models/net/{letter}.json", sha256=letter * 64)


def made(name: str, letter: str = "a", *devices: str, results: Any = None, **more: Any) -> Rollout:
    """A rollout of model `letter`; `results` are its targets' results in order."""
    given_results = results or [None] * len(devices)
    targets = tuple(Target(d, result=r) for d, r in zip(devices, given_results, strict=True))
    values = {"fleet": "edge", "pipeline": "main", **more}
    return Rollout(
        name, model=model(letter), attempt=1, created_at=1.0, created_by="", targets=targets, **values
    )


def report(name: str, result: Any = None, **more: Any) -> Update:
    values = {"state": "idle" if result else "downloading", **more}
    return Update(rollout=name, model=model("a"), attempt=1, result=result, **values)


def results(one: Rollout) -> list[str | None]:
    return [t.result for t in one.targets]


# --- membership


def test_all_accepted_devices_of_a_fleet_are_members() -> None:
    assert rollout.members("edge", None, ["b", "a"]) == ("a", "b")
    assert rollout.members("edge", "b", ["b", "a"]) == ("b",)


def test_an_empty_rollout_is_refused() -> None:
    with pytest.raises(Rejected, match="no accepted device"):
        rollout.members("edge", None, [])
    with pytest.raises(Rejected, match="c is not accepted"):
        rollout.members("edge", "c", ["a"])


# --- progress


def test_a_rollout_advances_by_its_own_reports_only() -> None:
    before = made("r1", "a", "d1", "d2")
    chosen = Plan(provider="CPUExecutionProvider", variant="int8")
    verdict = Verdict(model_sha256="a" * 64, key="b" * 64, chosen=chosen)
    heard = {
        "d1": report("r1", state="preparing", progress=0.5, detail="3 of 6", verdict=verdict),
        "d2": report("r0", "succeeded"),
        "d9": report("r1", "succeeded"),
    }
    after = rollout.advance(before, heard, NOW)
    assert after.targets[0] == Target(
        "d1",
        "preparing",
        progress=0.5,
        detail="3 of 6",
        variant="int8",
        provider="CPUExecutionProvider",
    )
    assert after.targets[1] == before.targets[1]
    assert after.state == "running"


def test_it_is_finished_when_every_target_has_a_result() -> None:
    one = rollout.advance(made("r1", "a", "d1", "d2"), {"d1": report("r1", "succeeded")}, NOW)
    assert (one.state, one.finished_at) == ("running", None)
    two = rollout.advance(one, {"d2": report("r1", "failed_rolled_back", reason="too slow")}, NOW + 1)
    assert (two.state, two.finished_at) == ("finished", NOW + 1)
    assert two.targets[1].reason == "too slow"


@pytest.mark.parametrize(
    ("first", "then", "stays"),
    [
        ("succeeded", "failed_rolled_back", "succeeded"),
        ("failed_no_change", "succeeded", "failed_no_change"),
        ("succeeded", None, "succeeded"),
        ("superseded", "succeeded", "succeeded"),  # the device knows better than the cloud
        ("superseded", None, "superseded"),
        ("canceled", "failed_no_change", "failed_no_change"),
        (None, "rejected", "rejected"),
    ],
)
def test_a_result_is_final(first: Any, then: Any, stays: str) -> None:
    before = made("r1", "a", "d1", results=[first])
    assert results(rollout.advance(before, {"d1": report("r1", then)}, NOW)) == [stays]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([None, "succeeded", "rejected"])), max_size=20)
)
def test_it_finishes_exactly_when_all_have_spoken_in_any_order(heard: list[tuple[str, Any]]) -> None:
    one = made("r1", "a", "a", "b", "c")
    for device, result in heard:
        one = rollout.advance(one, {device: report("r1", result)}, NOW)
    spoken = {device for device, result in heard if result}
    assert (one.state == "finished") == (spoken == {"a", "b", "c"})
    for target in one.targets:
        first = next((r for d, r in heard if d == target.device and r), None)
        assert target.result == first


def test_who_is_no_longer_admitted_is_not_waited_for() -> None:
    left = rollout.leave(made("r1", "a", "d1", "d2", results=["succeeded", None]), "d2", NOW)
    assert (left.state, results(left)) == ("finished", ["succeeded", "canceled"])


# --- superseding


def test_a_fleets_newer_rollout_ends_all_older_ones_of_its_pipeline() -> None:
    newer = made("r9", "b", "d1", "d2")
    running = [
        made("r1", "a", "d1", "d2", results=["succeeded", None]),
        made("r2", "a", "d1", device="d1"),
        made("r3", "a", "d1", pipeline="side"),
        made("r4", "a", "x1", fleet="other"),
        newer,
    ]
    changed = {r.id: r for r in rollout.supersede(newer, running, NOW)}
    assert set(changed) == {"r1", "r2"}
    assert (changed["r1"].state, results(changed["r1"])) == ("superseded", ["succeeded", "superseded"])
    assert changed["r2"].state == "superseded"


def test_one_devices_rollout_takes_only_that_device_out_of_its_fleets() -> None:
    newer = made("r9", "b", "d1", device="d1")
    running = [
        made("r1", "a", "d1", "d2"),
        made("r2", "a", "d1", "d2", results=[None, "succeeded"]),
        made("r3", "a", "d1", device="d1"),
        made("r4", "a", "d2", device="d2"),
    ]
    changed = {r.id: r for r in rollout.supersede(newer, running, NOW)}
    assert (changed["r1"].state, results(changed["r1"])) == ("running", ["superseded", None])
    assert (changed["r2"].state, results(changed["r2"])) == ("finished", ["superseded", "succeeded"])
    assert changed["r3"].state == "superseded"
    assert "r4" not in changed


# --- what a device should run


def test_a_device_runs_the_newest_rollout_that_lists_it() -> None:
    history = [
        made("r1", "a", "d1", "d2"),
        made("r2", "b", "d1", device="d1"),
        made("r3", "c", "d1", "d2", state="canceled"),
        made("r4", "c", "d1", pipeline="side"),
    ]
    rows = rollout.desired("d1", history)
    assert {name: row.rollout for name, row in rows.items()} == {"main": "r2", "side": "r4"}
    assert rollout.desired("d2", history)["main"].model == model("a")
    assert rollout.desired("d9", history) == {}


def test_a_newcomer_joins_what_may_succeed() -> None:
    history = [
        made("r1", "a", "d1", results=["succeeded"], state="finished"),
        made("r2", "b", "d1", results=["failed_rolled_back"], state="finished"),
        made("r3", "c", "d1", device="d1"),
        made("r4", "a", "d1", pipeline="side"),
    ]
    assert [r.id for r in rollout.for_newcomer(history)] == ["r1", "r4"]
    assert rollout.for_newcomer([]) == []


def test_the_attempt_counts_rollouts_of_the_same_model_and_pipeline() -> None:
    history = [made("r1", "a", "d1"), made("r2", "b", "d1"), made("r3", "a", "d1", pipeline="side")]
    assert rollout.attempt_number(history, "main", model("a")) == 2
    assert rollout.attempt_number(history, "main", model("c")) == 1


# --- the way back


def good(name: str, letter: str, **more: Any) -> Rollout:
    return made(name, letter, "d1", results=["succeeded"], state="finished", **more)


def back(history: list[Rollout], device: str | None = None) -> str:
    return rollout.way_back(history, "edge", "main", device).id


def test_a_rollback_goes_to_the_model_before() -> None:
    assert back([good("r1", "a"), good("r2", "b")]) == "r1"


def test_it_skips_the_same_model_and_what_never_succeeded() -> None:
    failed = made("r3", "c", "d1", results=["failed_rolled_back"], state="finished")
    assert back([good("r1", "a"), good("r2", "b"), failed, good("r4", "b")]) == "r1"
    assert back([good("r1", "a"), good("r2", "b"), failed]) == "r2"


def test_a_superseded_rollout_that_some_committed_counts() -> None:
    partly = made("r1", "a", "d1", "d2", results=["succeeded", "superseded"], state="superseded")
    assert back([partly, good("r2", "b")]) == "r1"


def test_going_back_twice_goes_back_two_models_and_then_no_further() -> None:
    history = [good("r1", "a"), good("r2", "b"), good("r3", "c")]
    history.append(good("r4", "b", restores=back(history)))
    assert history[-1].restores == "r2"
    history.append(good("r5", "a", restores=back(history)))
    assert history[-1].restores == "r1"
    with pytest.raises(Rejected, match="nothing to roll fleet edge back to"):
        back(history)
    history.append(good("r6", "d"))
    assert back(history) == "r1"


def test_nothing_to_go_back_from_or_to_is_refused_with_the_reason() -> None:
    with pytest.raises(Rejected, match="Nothing was ever deployed"):
        back([])
    with pytest.raises(Rejected, match="no model before net a"):
        back([good("r1", "a")])
    with pytest.raises(Rejected, match="Nothing was ever deployed"):
        back([replace(good("r1", "a"), pipeline="side")])


def test_a_device_goes_back_by_its_own_history() -> None:
    history = [
        good("r1", "a"),
        made("r2", "b", "d1", "d2", results=["failed_rolled_back", "succeeded"], state="finished"),
        good("r3", "c", device="d1"),
    ]
    assert back(history, "d1") == "r1"
    with pytest.raises(Rejected, match="nothing to roll device d2 back to"):
        back(history, "d2")
    # The fleet's own history has no place for what a single device was given.
    assert back(history) == "r1"
